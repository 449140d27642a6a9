"""What a committed batch is, byte by byte: keys, header, rows, and what can be wrong with one."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import stat
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

FORMAT_VERSION = 1
"""Part of every key and of the folder's layout: rows of another version are never found."""

TAG = f"analysis_lib.store.v{FORMAT_VERSION}"
SUFFIX = {"states": ".safetensors", "responses": ".jsonl"}  # the kinds of batches
DTYPES = {"bfloat16": ("BF16", 2), "float16": ("F16", 2), "float32": ("F32", 4)}
KEY = re.compile(r"[0-9a-f]{64}")
_KEYS = re.compile(r"(?:[0-9a-f]{64} )+")
_SURROGATES = re.compile("[\ud800-\udbff][\udc00-\udfff]")  # JSON makes one character of the two
_DEEPEST = 100

Group = tuple[str, str, str, int]
"""Kind, model, dtype and bytes of a row (0 for responses)."""

Stat = tuple[int, int, int]
"""Bytes, modification time in ns, inode: the same only for the same committed file."""


class StoreError(RuntimeError):
    """The store cannot be read or written; the message says what to do."""


class StoreDamage(UserWarning):
    """Something kept failed its checksum. It is not used; whoever needs it computes it again.

    The file is always named. Its keys are named too, unless the damage is in the keys themselves.
    """


class Damaged(Exception):
    """Why a file, or a row of it, cannot be used."""

    advice = "`python -m analysis_lib cache compact` drops what is damaged and older than a day"


class Unreadable(Damaged):
    """The system refuses to read the file now; its content may be sound."""

    advice = (
        "`compact` leaves it alone: mend its permissions or its disk, or move it out of the store"
    )


BAD_ROWS = Damaged("rows fail their checksum, or are none of this store")


def warn(path: Path, why: Damaged, keys: Sequence[str]) -> None:
    named = ", ".join(keys[:20]) + (f" and {len(keys) - 20} more" if len(keys) > 20 else "")
    named = named or "rows that cannot be made out"
    warnings.warn(
        f"{path}: {why}; not used and to be computed again: {named}. {why.advice}",
        StoreDamage,
        stacklevel=2,
    )


# ------------------------------------------------------------------------------------------- keys


def row_key(**parts: Any) -> str:
    """Key of a row: hex SHA-256 of the canonical JSON of `parts` and the format version.

    Parts are str, int, float (finite), bool, None, or lists and tuples of them. List and tuple are
    the same; 1, 1.0 and True are not. The order of the arguments does not matter. Pass what can
    change the row (model fingerprint, token ids, layer, dtype, sampling settings, sample index).
    Leave out what cannot (file names, prompt names, order).

    Raises TypeError for any other type and ValueError for NaN or infinity.
    """
    for name, value in parts.items():
        _check_part(name, value)
    versioned = [FORMAT_VERSION, parts]
    try:
        text = json.dumps(versioned, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except ValueError as error:
        raise ValueError(
            "a key part is NaN or infinite; only finite numbers can be part of a key"
        ) from error
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def _check_part(name: str, value: Any) -> None:
    kind = type(value)
    if kind in (str, int, float, bool) or value is None:
        return
    if kind not in (list, tuple):
        raise TypeError(
            f"key part {name!r} holds a {kind.__module__}.{kind.__qualname__}; "
            "give str, int, float, bool, None or a list of them (int(x), "
            "x.tolist() or the hex digest of its bytes)"
        )
    if all(type(item) is int for item in value):  # token ids: the long ones
        return
    for item in value:
        _check_part(name, item)


def check_key(key: object) -> None:
    """Raises ValueError where `key` is none."""
    if not isinstance(key, str) or not KEY.fullmatch(key):
        raise ValueError(f"{key!r} is not a key; make keys with row_key(...)")


# ------------------------------------------------------------------------------------------- JSON


def digest(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()


def dump(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def comes_back(value: Any, depth: int = 0) -> bool:
    """Whether JSON gives `value` back as it was."""
    if isinstance(value, str):
        return value.isascii() or not _SURROGATES.search(value)
    if value is None or isinstance(value, int | float):
        return True
    if depth == _DEEPEST:
        return False
    if isinstance(value, list):
        return all(comes_back(inner, depth + 1) for inner in value)
    return isinstance(value, dict) and all(
        isinstance(name, str) and comes_back(name) and comes_back(inner, depth + 1)
        for name, inner in value.items()
    )


def depth_of(value: dict[str, Any] | list[Any]) -> int:
    """How many dicts and lists lie in one another."""
    inner = value.values() if isinstance(value, dict) else value
    return 1 + max([depth_of(item) for item in inner if isinstance(item, dict | list)], default=0)


# ---------------------------------------------------------------------------------------- reading


@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    """A committed file that has been read and found sound, its rows aside."""

    kind: str
    path: Path
    keys: Sequence[str]  # n
    about: Mapping[str, Any]
    dtype: str  # "" for responses
    stat: Stat

    @property
    def size(self) -> int:
        """Bytes."""
        return self.stat[0]

    @property
    def mtime_ns(self) -> int:
        return self.stat[1]

    def order(self) -> tuple[int, str]:
        """Sorts files from the oldest."""
        return self.mtime_ns, self.path.name


@dataclass(frozen=True, slots=True, eq=False)
class Batch(Kept):
    """The verified header of a batch."""

    row: Mapping[str, int]  # key -> its row
    digests: Sequence[str]  # n, hex SHA-256 of each row's bytes
    offsets: Sequence[int]  # n + 1, where rows begin and end in the file

    def rank(self, key: str) -> tuple[str, str]:
        """Sorts the copies of a row from the one to use. Equal ranks hold the same row."""
        return self.digests[self.row[key]], self.dtype

    @property
    def group(self) -> Group:
        """Batches of one group may be compacted into one file."""
        width = self.offsets[1] - self.offsets[0] if self.kind == "states" else 0
        return self.kind, str(self.about.get("model", "")), self.dtype, width


def stat_of(result: os.stat_result) -> Stat:
    return result.st_size, result.st_mtime_ns, result.st_ino


@contextlib.contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """A committed file, to be read. Raises Unreadable, FileNotFoundError."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # to open a pipe would be to wait
            raise Unreadable("is no regular file")
        with open(path, "rb") as file:
            yield file
    except FileNotFoundError as error:
        if path.is_symlink():
            raise Unreadable("is a link to nothing") from error
        raise
    except OSError as error:
        raise Unreadable(f"cannot be read ({error.strerror})") from error


def read_batch(kind: str, path: Path) -> Batch:
    """The header of a committed batch. Raises Damaged, FileNotFoundError."""
    with opened(path) as file:
        found = stat_of(os.fstat(file.fileno()))
        head = file.readline() if kind == "responses" else _states_head_of(file, found[0])
    if digest(head) != path.name.split(".")[0]:
        raise Damaged("header does not match its name")
    try:
        return _parse_head(kind, path, head, found)
    except (KeyError, TypeError, ValueError, StopIteration, RecursionError) as error:
        raise Damaged(f"not a batch of this store ({error!r:.120})") from error


def _states_head_of(file: BinaryIO, size: int) -> bytes:
    head = file.read(8)
    length = int.from_bytes(head, "little")
    if length > size:
        raise Damaged("header does not match its name")
    return head + file.read(length)


def _parse_head(kind: str, path: Path, head: bytes, found: Stat) -> Batch:
    """What is not as this store writes it, another program has written: raises."""
    parsed = json.loads(head[8:] if kind == "states" else head)
    meta = json.loads(parsed["__metadata__"][TAG]) if kind == "states" else parsed[TAG]
    keys, digests, about = meta["keys"], meta["sha256"], meta["about"]
    n = len(keys)
    for what in (keys, digests):
        joined = " ".join([*what, ""]) if type(what) is list else ""
        if len(joined) != 65 * n or not _KEYS.fullmatch(joined):
            raise ValueError("keys and sha256 must be as many hex digests each")
    row = dict(zip(keys, range(n), strict=True))
    if len(row) != n or type(about) is not dict or depth_of(about) > 20:
        raise ValueError("a key occurs twice, or `about` is no plain dict")
    if kind == "states":
        dtype, width = _dtype_and_width(parsed["states"], n)
        offsets: Sequence[int] = range(len(head), len(head) + n * width + 1, width)
    else:
        dtype, sizes = "", meta["sizes"]
        if len(sizes) != n or not all(type(size) is int and size > 0 for size in sizes):
            raise ValueError("sizes must be as many numbers as there are keys")
        offsets = list(accumulate(sizes, initial=len(head)))
    return Batch(kind, path, keys, about, dtype, found, row, digests, offsets)


def _dtype_and_width(tensor: Any, n: int) -> tuple[str, int]:
    """The dtype of the states, and the bytes of one."""
    dtype = next(name for name, (code, _) in DTYPES.items() if code == tensor["dtype"])
    rows, columns = tensor["shape"]
    width = columns * DTYPES[dtype][1]
    if columns < 1 or rows != n or tensor["data_offsets"] != [0, n * width]:
        raise ValueError(f"shape {tensor['shape']} for {n} keys")
    return dtype, width


def read_rows(batch: Batch, rows: Iterable[int]) -> Iterator[tuple[int, bytes | None, Any]]:
    """(row, its bytes, its value) of each of `rows`; None and None where it is damaged.

    The value of a response is its dict; that of a state is its bytes, see `decode_states`. Raises
    Unreadable, FileNotFoundError.
    """
    with opened(batch.path) as file:
        size = os.fstat(file.fileno()).st_size
        for row in sorted(rows):
            start, end = batch.offsets[row], batch.offsets[row + 1]
            data = value = None
            if end <= size:  # else cut short, or promised by another program's header
                if file.tell() != start:
                    file.seek(start)
                data = file.read(end - start)
                if digest(data) == batch.digests[row]:
                    states = batch.kind == "states"
                    value = data if states else _decode_response(batch.keys[row], data)
            yield row, None if value is None else data, value


def keys_in_damaged_head(path: Path) -> list[str]:
    """The keys that can still be made out, for the warning alone."""
    try:
        with open(path, "rb") as file:
            head = file.read(1 << 20)
    except OSError:
        return []
    end = b'"sha256' if path.suffix == ".jsonl" else b'\\"sha256'
    return [key.decode() for key in re.findall(rb"[0-9a-f]{64}", head.partition(end)[0])]


# ---------------------------------------------------------------------------------------- writing


def safetensors_head(meta: Mapping[str, Any], tensors: Mapping[str, Any]) -> bytes:
    """By hand: the format is this simple, and equal content must give equal bytes."""
    header = dump({"__metadata__": {TAG: dump(meta)}, **tensors}).encode("ascii")
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header


def states_head(
    keys: Sequence[str], rows: Sequence[bytes], about: Mapping[str, Any], dtype: str
) -> bytes:
    name, width = DTYPES[dtype]
    n, length = len(rows), len(rows[0])
    tensor = {"dtype": name, "shape": [n, length // width], "data_offsets": [0, n * length]}
    meta = {"keys": list(keys), "sha256": [digest(row) for row in rows], "about": about}
    return safetensors_head(meta, {"states": tensor})


def responses_head(keys: Sequence[str], rows: Sequence[bytes], about: Mapping[str, Any]) -> bytes:
    meta = {"keys": list(keys), "sha256": [digest(row) for row in rows]}
    return (
        dump({TAG: {**meta, "sizes": [len(row) for row in rows], "about": about}}).encode() + b"\n"
    )


def encode_states(keys: Sequence[str], states: np.ndarray, dtype: str) -> list[bytes]:
    """Each row in `dtype`. Raises ValueError where that cannot hold a value exactly."""
    bits = np.ascontiguousarray(states).view(np.uint32)
    if dtype == "bfloat16":
        kept = (bits >> 16).astype("<u2")
        exact = (bits & 0xFFFF) == 0
    elif dtype == "float16":
        with np.errstate(over="ignore"):
            half = states.astype("<f2")
        kept, exact = half, half.astype(np.float32).view(np.uint32) == bits
    else:
        kept, exact = states.astype("<f4"), np.True_
    if not np.all(exact):
        row, column = np.argwhere(~exact)[0]
        raise ValueError(
            f"{dtype} cannot hold states[{row}, {column}] = {states[row, column]!r} exactly (key "
            f"{keys[row]}); give the dtype in which the model "
            "computed the states, or dtype='float32'"
        )
    return [row.tobytes() for row in kept]


def decode_states(data: Sequence[bytes], dtype: str) -> np.ndarray:
    """States (n, d) float32 of rows of one dtype and width."""
    joined = b"".join(data)
    if dtype == "bfloat16":
        wide = np.frombuffer(joined, "<u2").astype(np.uint32)
        wide <<= 16
        states = wide.view(np.float32)
    else:
        states = np.frombuffer(joined, "<f2" if dtype == "float16" else "<f4").astype(np.float32)
    return states.reshape(len(data), -1)


def encode_response(key: str, row: Mapping[str, Any]) -> bytes:
    try:
        line = dump({"key": key, "row": row})
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"the response of key {key} is not JSON: {error}; "
            "give str, int, finite float, bool, None"
        ) from error
    if not isinstance(row, dict) or not comes_back(row):
        raise ValueError(
            f"the response of key {key} does not come back from JSON as it was: "
            f"{row!r}; use lists and str keys"
        )
    return line.encode("ascii") + b"\n"


def _decode_response(key: str, data: bytes) -> dict[str, Any] | None:
    try:
        line = json.loads(data)
        if line["key"] == key and type(line["row"]) is dict:
            return line["row"]
    except (KeyError, TypeError, ValueError, RecursionError):
        pass
    return None
