"""What breaks when things go wrong: kills, rival writers, flipped bytes, full disks, hostile texts.

    python -m faults [--short] [--seed N]   one row per fault; exit status 1 where anything was lost
    python -m faults --speed                what a fresh process pays to open a store and read it

tried: faults injected.
survived: faults after which every row could be read or computed again, and was right; texts that
stayed text; files that became a valid table or a DataError.
lost: rows reported as kept and not found afterwards.
wrong: rows that came back with another content; texts that became markup or a role; files that
broke the loader or led out of their folder.
undetected: damage that neither a warning on read nor `verify` reported; a warning that did not name
the file; a change or refusal that was not said, or not where and what to do.
midway: faults that met a half-written file, a removal half done or a refusal to remove, where the
fault is placed to meet one.

The batch in flight may be lost; nothing else may.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

from analysis_lib.store.store import Store
from analysis_lib.store.upkeep import compact

from . import damage, files, runs, store
from .injection import ABOUT, key, response, state


def run(short: bool, seed: int) -> pd.DataFrame:
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        folder = Path(name)
        few = 4 if short else 30
        rows = [
            files.fuzzed_files(folder / "fuzzed", 500 if short else 10_000, rng),  # tells of memory
            files.hostile_files(folder / "hostile"),
            store.kills_while_writing(folder, 8 if short else 100, rng),
            store.kills_while_compacting(folder / "compacting", few, rng),
            store.kills_while_pruning(folder / "pruning", few, rng),
            store.kills_while_replacing_checkpoints(folder / "replacing", 2 * few, rng),
            store.prunes_while_writing(folder, 200 if short else 1000),
            store.rival_writers(folder, 4, 100 if short else 500),
            damage.byte_flips(folder, 60 if short else 1000, rng),
            damage.flips_in_checkpoints(folder, 60 if short else 1000, rng),
            *damage.disk_that_fills(folder),
            damage.file_size_limit(folder),
            *runs.kills_of_the_library(folder / "library", short, rng),
        ]
    from analysis_lib import ChatModel

    from .surfaces import surfaces
    from .texts import hostile_texts

    return pd.DataFrame([*rows, *hostile_texts(surfaces(), [ChatModel.load()])])


_READ = """
import sys, time
start = time.perf_counter()
from analysis_lib.store.batches import row_key
from analysis_lib.store.store import Store
imported = time.perf_counter()
keys = [row_key(test="faults", row=i) for i in range(int(sys.argv[2]))]
before = time.perf_counter()
found = getattr(Store(sys.argv[1]), sys.argv[3])(keys)
assert len(found) == len(keys), len(found)
print(imported - start, time.perf_counter() - before)
"""


def measured(what: str, place: Path, asked: int, reader: str) -> dict[str, object]:
    """Median of 5 fresh processes: seconds to import, and to open the store and read the rows."""
    taken = []
    for _ in range(5):
        command = [sys.executable, "-c", _READ, str(place), str(asked), reader]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        taken.append([float(number) for number in done.stdout.split()])
    imported, seconds = np.median(taken, axis=0)
    kept = [path for path in place.rglob("*") if path.is_file() and path.parent.name != "writing"]
    size = sum(path.stat().st_size for path in kept) / 1e6
    row = {"what": what, "files": len(kept), "MB": size}
    return {**row, "import_s": imported, "read_s": seconds}


def speed() -> pd.DataFrame:
    table = []
    with tempfile.TemporaryDirectory(prefix="speed-") as name:
        place, spent = Path(name) / "7b", 0.0
        kept = Store(place)
        for start in range(0, 4000, 20):
            part = range(start, start + 20)
            states = np.stack([state(i, 4096) for i in part])
            begin = time.perf_counter()
            kept.write_states([key(i) for i in part], states, dtype="bfloat16", about=ABOUT)
            spent += time.perf_counter() - begin
        what = "4,000 states of width 4096, bfloat16"
        table.append(measured(what, place, 4000, "read_states"))
        compact(kept, spare=0)
        table.append(measured("the same, compacted", place, 4000, "read_states"))
        place = Path(name) / "responses"
        kept = Store(place)
        for start in range(0, 16000, 1000):
            part = range(start, start + 1000)
            rows = [response(i) for i in part]
            kept.write_responses([key(i) for i in part], rows, about=ABOUT)
        table.append(measured("16,000 responses", place, 16000, "read_responses"))
        place = Path(name) / "many"
        kept = Store(place)
        zeros = np.zeros((20, 8), np.float32)
        for start in range(0, 200_000, 20):
            keys = [key(i) for i in range(start, start + 20)]
            kept.write_states(keys, zeros, dtype="bfloat16", about=ABOUT)
        table.append(measured("20 states out of 200,000", place, 20, "read_states"))
    print(f"write: {1000 * spent / 200:.1f} ms for 20 states of width 4096, flushed to disk")
    return pd.DataFrame(table)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m faults",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--short", action="store_true", help="a few of each fault, in seconds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--speed", action="store_true", help="times instead of faults")
    args = parser.parse_args()
    if args.speed:
        print(speed().round(3).to_string(index=False))
        return 0
    table = run(args.short, args.seed)
    print(table.to_string(index=False))
    bad = table[["lost", "wrong", "undetected"]].to_numpy().sum() > 0
    return int(bad or (table["survived"] < table["tried"]).any())


if __name__ == "__main__":
    sys.exit(main())
