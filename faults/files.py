"""Files of users: fuzzed ones, and hostile texts as queries and prompts."""

from __future__ import annotations

import json
import os
import random
import re
import resource
import sys
import time
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from analysis_lib.data.prompts import load_safety_prompts
from analysis_lib.data.queries import load_queries
from analysis_lib.data.user_files import OPTIONAL, DataError

from .injection import result
from .texts import HOSTILE

OUTSIDE = "outside the folder"
_TOLD = "columns left out|copies count as one query"  # what the loaders warn of
_COLUMNS = ["query_id", "text", "harmful", "query_set"]
_PIECES = (
    rb"""" ' , { } [ ] : \ \ud800 text text,text harmful query_id nan NaN null true -1e999 =1+1 """
    rb"../../ /etc/hostname file:///etc/hostname <script>"
).split()
_PIECES += [b"\x00", b"\xff", b"\xef\xbb\xbf", b"\n", b"\r\n", b"\r", b"\t", b"1" * 5000]
_PIECES += [b"\xe2\x80\xae", b"\xe2\x80\xa8", b"\x1b[31m", b"\xc3\x28", b"\xed\xa0\x80"]
_VALID = {
    ".csv": b"query_id,text,harmful,form\na,How to bake?,0,f\n"
    b'b,"How to, say, bake?",harmless,f\nc,How to open?,1,g\n',
    ".jsonl": b'{"text": "How to bake?", "harmful": false}\n'
    b'{"query_id": 7, "text": "How to open?", "harmful": 1, "answer": "x"}\n',
    ".txt": b"How to bake?\nHow to open?\n\n  How to paint?\n",
    ".json": b'{"calm": "Be calm.", "kind": "Be kind and calm."}',
}


def nonsense(suffix: str, rng: random.Random) -> bytes:
    """The content of a user's file: a valid one changed, or none at all."""
    content = bytearray(_VALID[suffix])
    kind = rng.random()
    if kind < 0.12:
        return rng.randbytes(rng.randrange(300))
    if kind < 0.2:
        return content.decode().encode(
            rng.choice(["utf-16", "utf-32", "utf-16-le", "cp500", "utf-8-sig"])
        )
    if kind < 0.22:  # large: a field, a line, many columns, many rows, deep nesting
        return rng.choice(
            [
                b'text\n"' + b"x" * 300_000 + b'"\n',
                b'{"text": "' + b"x " * 1_000_000 + b'"}\n',
                b",".join(b"c%d" % i for i in range(20_000)) + b",text\n",
                b"text\n" + b"a\n" * 20_000,
                b'{"text": ' + b"[" * rng.randrange(900, 100_000),
                b'{"text": ' + b"[" * (deep := rng.randrange(1, 990)) + b"]" * deep + b"}",
            ]
        )
    for _ in range(rng.choice([1, 1, 2, 3, 8])):
        at, end = sorted(rng.randrange(len(content) + 1) for _ in range(2))
        how = rng.randrange(5)
        if how == 0:
            content[at:at] = rng.choice(_PIECES)
        elif how == 1:
            content[at : at + rng.randrange(4)] = rng.choice(_PIECES)
        elif how == 2:
            del content[at:end]
        elif how == 3:
            content[at:at] = content[at:end]
        elif content:
            content[at % len(content)] = rng.randrange(256)
    return bytes(content)


def odd_file(path: Path, outside: Path, rng: random.Random) -> None:
    """In the place of a file: a link out of the folder, to nothing or to itself, a pipe, a folder.

    Or a link to endless zeros.
    """
    kind = rng.randrange(6)
    if kind < 4:
        path.symlink_to([outside, path.parent / "nowhere", path, Path("/dev/zero")][kind])
    elif kind == 4:
        os.mkfifo(path)
    else:
        path.mkdir()


def readable(text: object) -> bool:
    """Whether a cell is a text without control characters and lone surrogates."""
    if not isinstance(text, str):
        return False
    return not any(c not in "\t\n" and unicodedata.category(c) in ("Cc", "Cs") for c in text)


def sound(loaded: pd.DataFrame | dict[str, str]) -> bool:
    """Whether a table of queries, or the prompts, keep what their loader promises."""
    if isinstance(loaded, dict):
        return all(
            (name.isprintable() and Path(name).name == name)
            and (readable(text) and bool(text.strip()) == (name != "none"))
            for name, text in loaded.items()
        )
    columns = list(loaded.columns)
    fit = columns[:4] == _COLUMNS and set(columns[4:]) <= set(OPTIONAL)
    fit = fit and str(loaded["harmful"].dtype) == "boolean"
    cells = loaded[[c for c in columns if c != "harmful"]].to_numpy().ravel()
    ids = loaded["query_id"]
    whole = loaded["text"].str.strip().ne("").all() and ids.is_unique and ids.ne("").all()
    return bool(len(loaded)) and fit and bool(whole) and all(map(readable, cells))


def loading(path: Path, load: Callable[[Path], Any]) -> tuple[str, str]:
    """What a file became: ("table" or "refused", ""), else ("wrong" or "unsaid", what happened)."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            loaded = load(path)
        except DataError as error:
            said = str(error)
            clear = path.name in said and ";" in said and len(said) < 2000 and said.isprintable()
            return ("refused", "") if clear else ("unsaid", said[:300])
        except BaseException as error:
            return "wrong", f"{type(error).__name__}: {error}"[:300]
    if any(not re.search(_TOLD, str(one.message)) for one in caught):
        return "unsaid", str(caught[0].message)[:300]
    if not sound(loaded) or OUTSIDE in repr(loaded):
        return "wrong", repr(loaded)[:300]
    return "table", ""


def fuzzed_file(place: Path, i: int, outside: Path, rng: random.Random) -> tuple[str, str]:
    """A file that no program wrote, as queries or as prompts: what became of it, as `loading`."""
    suffix = rng.choice(list(_VALID))
    path = place / f"mine-{i}{suffix}"
    as_prompts = suffix == ".json" or (suffix == ".txt" and rng.random() < 0.5)
    if rng.random() < 0.03:
        odd_file(path, outside, rng)
    else:
        path.write_bytes(nonsense(suffix, rng))
    asked = path
    if as_prompts and suffix == ".txt" and rng.random() < 0.5:
        asked = place  # the folder as a whole
    try:
        if asked == path and path.is_symlink() and path.readlink() == outside:
            return "named", ""  # a link that the user names is the user's choice
        return loading(asked, load_safety_prompts if as_prompts else load_queries)
    finally:
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        else:
            path.unlink()


def fuzzed_files(folder: Path, n: int, rng: random.Random, shown: int = 5) -> dict[str, Any]:
    """Files that no program wrote; the first `shown` bad outcomes are printed."""
    outside, place = folder / "outside.txt", folder / "own"
    folder.mkdir(exist_ok=True)
    place.mkdir()
    outside.write_text(OUTSIDE)
    memory, slowest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0.0
    outcomes: Counter[str] = Counter()
    for i in range(n):
        start = time.process_time()
        outcome, what = fuzzed_file(place, i, outside, rng)
        slowest = max(slowest, time.process_time() - start)
        outcomes[outcome] += 1
        if what and outcomes["wrong"] + outcomes["unsaid"] <= shown:
            print(f"{outcome}: {what}", file=sys.stderr)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
    note = f", slowest {slowest:.2f} s, {max(0, memory) / 1e3:.0f} MB more memory"
    return row_of("fuzzed user files", outcomes, note)


def row_of(fault: str, outcomes: Counter[str], more: str = "") -> dict[str, Any]:
    tried, wrong, unsaid = outcomes.total(), outcomes["wrong"], outcomes["unsaid"]
    note = f"{outcomes['table']} tables, {outcomes['refused']} refused{more}"
    return result(fault, tried, tried - wrong - unsaid, 0, wrong, unsaid, note)


def hostile_files(folder: Path, texts: Sequence[str] = HOSTILE) -> dict[str, Any]:
    """Each text as the query of three kinds of files, and as a prompt and its name in a .json."""
    folder.mkdir(exist_ok=True)
    outcomes: Counter[str] = Counter()
    for i, text in enumerate(texts):
        quoted = text.replace('"', '""')
        contents = {
            ".csv": f'text\n"{quoted}"\n',
            ".jsonl": json.dumps({"text": text}),
            ".txt": text,
            ".json": json.dumps({f"name {i}": text, text: "text"}),
        }
        for suffix, content in contents.items():
            path = folder / f"hostile-{i}{suffix}"
            path.write_bytes(content.encode("utf-8", "surrogatepass"))
            load: Callable[[Path], Any] = load_safety_prompts if suffix == ".json" else load_queries
            outcomes[loading(path, load)[0]] += 1
    return row_of("hostile texts: files", outcomes)
