"""Speed and memory against the plain way, in one process, in alternating runs.

    python -m bench [--only ROW] [--organism FOLDER] [--out FILE.json]
                                    about 8 minutes on two cores
    python -m bench --quick         2 minutes: are the results equal? Times are not judged
    python -m bench --gpu [--gpu-shape 7b|tiny] [--device cuda|cpu]
                                    absolute figures of a 7B shape in bfloat16

bench/results/README.md says how to read the figures. The exit status is 1 where a result differs
from the plain one. A missed speed goal is shown and is no failure.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import transformers

from analysis_lib import ChatModel

from .gpu import GPU_SIZES, gpu_rows
from .rows import FULL, QUICK, ROWS, cpu_rows
from .table import as_json, head, line, machine


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="few queries: are the results equal?")
    parser.add_argument("--only", choices=["import", *ROWS], help="one kind of row")
    parser.add_argument(
        "--organism", default="organism", metavar="FOLDER", help="another folder of the small model"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="write the results as JSON too, for example bench/results/NAME.json",
    )
    parser.add_argument("--gpu", action="store_true", help="absolute figures on a GPU instead")
    parser.add_argument("--gpu-shape", choices=list(GPU_SIZES), default="7b")
    parser.add_argument("--device", default="cuda", help="where --gpu runs")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print a table, and write it where asked.

    Parameters
    ----------
    arguments : sequence of str or None
        The command line; None takes the process's own.

    Returns
    -------
    int
        1 where a result differs from the plain one, else 0.
    """
    args = parse(arguments)
    transformers.logging.set_verbosity_error()
    begin = time.perf_counter()
    organism = ChatModel.load(args.organism, device="cpu", dtype="float32")
    about = machine(args.device if args.gpu else "cpu") | {
        "organism": organism.fingerprint,
        "quick": args.quick,
    }
    print(json.dumps(about))
    print(head(timed=not args.quick), flush=True)
    if args.gpu:
        made = gpu_rows(organism, args.gpu_shape, args.device)
    else:
        sizes, repeats = (QUICK, 1) if args.quick else (FULL, 5)
        made = cpu_rows(organism, sizes, args.only, repeats)
    rows = []
    for row in made:
        print(line(row, timed=not args.quick), flush=True)
        rows.append(row)
    different = [row for row in rows if row.equal is False]
    missed = [row for row in rows if not all(met for _, met in row.goals().values())]
    seconds = time.perf_counter() - begin
    told = "" if args.quick else f"; {len(missed)} miss a goal"
    print(f"{len(rows)} rows in {seconds:.0f} s; {len(different)} differ{told}")
    if args.out:
        args.out.write_text(as_json(rows, about, seconds), encoding="utf-8")
    return int(bool(different))


if __name__ == "__main__":
    sys.exit(main())
