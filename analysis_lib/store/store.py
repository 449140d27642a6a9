"""The crash-safe, content-addressed store of hidden states and sampled responses.

Layout, under the store's folder (``--store``, else ``ANALYSIS_LIB_STORE``, else the platform's cache folder)::

    v1/states/<name>.safetensors    one committed batch: tensor ``states`` (n, d) in BF16, F16 or F32
    v1/responses/<name>.jsonl       one committed batch: a header line, then one line {"key", "row"} per row
    v1/writing/<host>.<pid>-<start>...  files not yet committed, and one journal per process that names what it committed

The header of a batch (the safetensors header, or the first line) lists under ``analysis_lib.store.v1`` the key and the
SHA-256 of every row, and what the batch is about. ``<name>`` is the SHA-256 of that header, so the name covers every byte
of the file: a flipped byte shows either as a header that does not match its name or as a row that does not match its
checksum. A batch is written to ``writing/``, flushed to disk and renamed into place; it never changes afterwards. Stores
may be merged by copying files.

There is no lock and no index on disk. Each process keeps an index in memory, built by reading the headers of files it has
not seen, and lists the folder again at every request. An index file would have to be kept right by several machines over
shared folders whose file locks cannot be trusted; reading headers costs about 0.05 ms a file (bench/faults.py --speed), once
per process, and `compact` brings the number of files down.

Two batches may hold the same key (two processes computed the same row). Of several copies of a row, the one with the smallest
checksum is used, and where it is damaged the next one: everybody takes the same, whatever the times of the files, the machines,
the order in which stores were merged, and before and after `compact`. A file's time is its age for `ls` and `prune`, no more.

There is no earlier format yet, so nothing to migrate: rows of another version than `FORMAT_VERSION` are refused (earlier) or
told of (newer), never read.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shlex
import shutil
import socket
import stat
import time
import uuid
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pandas as pd
import platformdirs

FORMAT_VERSION = 1
"""Part of every key and of the folder's layout: rows of another version are never taken for rows of this one."""

_SUFFIX = {"states": ".safetensors", "responses": ".jsonl"}

_DTYPES = {"bfloat16": ("BF16", 2), "float16": ("F16", 2), "float32": ("F32", 4)}

_KEY = re.compile(r"[0-9a-f]{64}")

_KEYS = re.compile(r"(?:[0-9a-f]{64} )+")

_WRITING = re.compile(r"[A-Za-z0-9-]+\.[1-9][0-9]*(-[0-9]+)?\.([0-9a-f]+\.)?(journal|tmp)")

_DAY = 86400.0

_REPORT = ["kind", "file", "model", "rows", "bytes", "age_days", "action"]


class StoreError(RuntimeError):
    """The store cannot be read or written; the message says what to do."""


class StoreFormatError(StoreError):
    """The store holds rows of an earlier format version."""


class StoreDamage(UserWarning):
    """Kept rows failed their checksum; they are not used, and computed again by whoever needs them.

    The file is always named; its keys too, unless the damage is in the header and hits a key itself.
    """


class _Damaged(Exception):
    """Why a file, or a row of it, cannot be used."""

    advice = "`python -m analysis_lib cache compact` drops what is damaged"


class _Unreadable(_Damaged):
    """The system refuses to read the file now; its content may be sound."""

    advice = "`compact` leaves it alone: mend its permissions or its disk, or move it out of the store"


_BAD_ROWS = _Damaged("rows fail their checksum, or are none of this store")


# ---------------------------------------------------------------------------------------------------------------- keys


def row_key(**parts: Any) -> str:
    """Key of a row: hex SHA-256 of the canonical JSON of `parts` and the format version.

    Parts are str, int, float (finite), bool, None, or lists and tuples of them; list and tuple are the same, 1 and 1.0 and
    True are not. The order of the arguments does not matter. Pass what can change the row (model fingerprint, token ids,
    layer, dtype, sampling settings, sample index), not what cannot (file names, prompt names, order).

    Raises TypeError for any other type and ValueError for NaN or infinity.
    """
    for name, value in parts.items():
        _check_part(name, value)
    try:
        text = json.dumps([FORMAT_VERSION, parts], sort_keys=True, separators=(",", ":"), allow_nan=False)
    except ValueError as error:
        raise ValueError("a key part is NaN or infinite; only finite numbers can be part of a key") from error
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def _check_part(name: str, value: Any) -> None:
    kind = type(value)
    if kind in (str, int, float, bool) or value is None:
        return
    if kind not in (list, tuple):
        raise TypeError(
            f"key part {name!r} holds a {kind.__module__}.{kind.__qualname__}; give str, int, float, bool, None or a list "
            "of them (int(x), x.tolist() or the hex digest of its bytes)"
        )
    if all(type(item) is int for item in value):  # token ids: the long ones
        return
    for item in value:
        _check_part(name, item)


# -------------------------------------------------------------------------------------------------------------- batches


_Stat = tuple[int, int, int]  # bytes, modification time in ns, inode: the same only for the same committed file


@dataclass(frozen=True, slots=True, eq=False)
class _Batch:
    """The verified header of one committed file."""

    kind: str
    path: Path
    keys: Sequence[str]  # n
    row: Mapping[str, int]  # key -> its row
    digests: Sequence[str]  # n, hex SHA-256 of each row's bytes
    offsets: Sequence[int]  # n + 1, where rows begin and end in the file
    about: Mapping[str, Any]
    dtype: str  # "" for responses
    stat: _Stat

    @property
    def size(self) -> int:
        """Bytes."""
        return self.stat[0]

    @property
    def mtime_ns(self) -> int:
        return self.stat[1]

    def age(self) -> tuple[int, str]:
        """Sorts batches from the oldest."""
        return self.mtime_ns, self.path.name

    def rank(self, key: str) -> tuple[str, str]:
        """Sorts the copies of a row from the one to use. Equal ranks hold the same row."""
        return self.digests[self.row[key]], self.dtype

    @property
    def group(self) -> tuple:
        """Batches of one group may be compacted into one file."""
        width = self.offsets[1] - self.offsets[0] if self.kind == "states" else 0
        return self.kind, str(self.about.get("model", "")), self.dtype, width


def _stat(result: os.stat_result) -> _Stat:
    return result.st_size, result.st_mtime_ns, result.st_ino


def _digest(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()


def _dump(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def _tag() -> str:
    return f"analysis_lib.store.v{FORMAT_VERSION}"


def _about(about: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return json.loads(_dump(dict(about)))
    except (TypeError, ValueError) as error:
        raise ValueError(f"`about` must be JSON (str, finite numbers, bool, None, lists, dicts): {error}") from error


def _states_head(keys: Sequence[str], rows: Sequence[bytes], about: Mapping, dtype: str) -> bytes:
    # Written by hand: the format is this simple, and the name needs the same bytes for the same content.
    name, width = _DTYPES[dtype]
    meta = _dump({"keys": list(keys), "sha256": [_digest(row) for row in rows], "about": about})
    tensor = {"dtype": name, "shape": [len(rows), len(rows[0]) // width], "data_offsets": [0, len(rows) * len(rows[0])]}
    header = _dump({"__metadata__": {_tag(): meta}, "states": tensor}).encode("ascii")
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header


def _responses_head(keys: Sequence[str], rows: Sequence[bytes], about: Mapping) -> bytes:
    sizes = [len(row) for row in rows]
    meta = {"keys": list(keys), "sha256": [_digest(row) for row in rows], "sizes": sizes, "about": about}
    return _dump({_tag(): meta}).encode("ascii") + b"\n"


def _read_head(kind: str, path: Path) -> _Batch:
    """Header of a committed file. Raises _Damaged, FileNotFoundError."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # to open a pipe would be to wait
            raise _Unreadable("is no regular file")
        with open(path, "rb") as file:
            found = _stat(os.fstat(file.fileno()))
            head = _head_bytes(kind, file, found[0])
    except FileNotFoundError as error:
        if path.is_symlink():
            raise _Unreadable("is a link to nothing") from error
        raise
    except OSError as error:
        raise _Unreadable(f"cannot be read ({error.strerror})") from error
    if _digest(head) != path.name.split(".")[0]:
        raise _Damaged("header does not match its name")
    try:
        return _Batch(kind, path, *_parse_head(kind, head), found)
    except (KeyError, TypeError, ValueError, StopIteration, RecursionError) as error:
        raise _Damaged(f"not a batch of this store ({error!r:.120})") from error


def _parse_head(kind: str, head: bytes) -> tuple[list[str], dict[str, int], list[str], Sequence[int], dict[str, Any], str]:
    """(keys, row, digests, offsets, about, dtype). What is not as this store writes it, another program has written: raises."""
    parsed = json.loads(head[8:] if kind == "states" else head)
    meta = json.loads(parsed["__metadata__"][_tag()]) if kind == "states" else parsed[_tag()]
    keys, digests, about = meta["keys"], meta["sha256"], meta["about"]
    n, dtype = len(keys), ""
    for what in (keys, digests):
        if type(what) is not list or not _KEYS.fullmatch(joined := " ".join([*what, ""])) or len(joined) != 65 * n:
            raise ValueError("keys and sha256 must be as many hex digests each")
    row = dict(zip(keys, range(n)))
    if len(row) != n or type(about) is not dict or _depth(about) > 20:
        raise ValueError("a key occurs twice, or `about` is no plain dict")
    offsets: Sequence[int]
    if kind == "states":
        tensor = parsed["states"]
        dtype = next(name for name, (code, _) in _DTYPES.items() if code == tensor["dtype"])
        rows, columns = tensor["shape"]
        width = columns * _DTYPES[dtype][1]
        if columns < 1 or rows != n or tensor["data_offsets"] != [0, n * width]:
            raise ValueError(f"shape {tensor['shape']} for {n} keys")
        offsets = range(len(head), len(head) + n * width + 1, width)
    else:
        sizes = meta["sizes"]
        if len(sizes) != n or not all(type(size) is int and size > 0 for size in sizes):
            raise ValueError("sizes must be as many numbers as there are keys")
        offsets = list(accumulate(sizes, initial=len(head)))
    return keys, row, digests, offsets, about, dtype


def _depth(value: dict | list) -> int:
    inner = value.values() if isinstance(value, dict) else value
    return 1 + max([_depth(item) for item in inner if isinstance(item, (dict, list))], default=0)


def _head_bytes(kind: str, file: BinaryIO, size: int) -> bytes:
    if kind == "responses":
        return file.readline()
    head = file.read(8)
    length = int.from_bytes(head, "little")
    if length > size:
        raise _Damaged("header does not match its name")
    return head + file.read(length)


def _read_rows(batch: _Batch, rows: Iterable[int]) -> Iterator[tuple[int, bytes | None]]:
    """(row, bytes), bytes None where the row is damaged. Raises _Unreadable, FileNotFoundError."""
    try:
        with open(batch.path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            for row in sorted(rows):
                start, end = batch.offsets[row], batch.offsets[row + 1]
                if end > size:  # cut short, or another program's header that promises what is not there
                    yield row, None
                    continue
                if file.tell() != start:
                    file.seek(start)
                data = file.read(end - start)
                sound = _digest(data) == batch.digests[row]
                if sound and batch.kind == "responses":
                    sound = _is_response(batch.keys[row], data)
                yield row, data if sound else None
    except FileNotFoundError:
        raise
    except OSError as error:
        raise _Unreadable(f"cannot be read ({error.strerror})") from error


def _encode_states(keys: Sequence[str], states: np.ndarray, dtype: str) -> list[bytes]:
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
            f"{dtype} cannot hold states[{row}, {column}] = {states[row, column]!r} exactly (key {keys[row]}); give the "
            "dtype in which the model computed the states, or dtype='float32'"
        )
    return [row.tobytes() for row in kept]


def _decode_states(data: Sequence[bytes], dtype: str) -> np.ndarray:
    joined = b"".join(data)
    if dtype == "bfloat16":
        wide = np.frombuffer(joined, "<u2").astype(np.uint32)
        wide <<= 16
        states = wide.view(np.float32)
    else:
        states = np.frombuffer(joined, "<f2" if dtype == "float16" else "<f4").astype(np.float32)
    return states.reshape(len(data), -1)


def _encode_response(key: str, row: Mapping[str, Any]) -> bytes:
    try:
        line = _dump({"key": key, "row": row})
    except (TypeError, ValueError) as error:
        raise ValueError(f"the response of key {key} is not JSON: {error}; give str, int, finite float, bool, None") from error
    if json.loads(line)["row"] != row:
        raise ValueError(f"the response of key {key} does not come back from JSON as it was: {row!r}; use lists and str keys")
    return line.encode("ascii") + b"\n"


def _is_response(key: str, data: bytes) -> bool:
    try:
        line = json.loads(data)
        return line["key"] == key and type(line["row"]) is dict
    except (KeyError, TypeError, ValueError, RecursionError):
        return False


def _merge_about(abouts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What batches have in common; a field in which they differ becomes the list of its values."""
    merged: dict[str, Any] = {}
    for name in sorted({name for about in abouts for name in about}):
        values = _values(abouts, name)
        listed = any(isinstance(about.get(name), list) for about in abouts)
        merged[name] = values if listed or len(values) != 1 else values[0]
    return merged


def _values(abouts: Iterable[Mapping[str, Any]], name: str) -> list[Any]:
    """Distinct values of a field over batches, in order of first appearance; lists are taken apart."""
    seen: dict[str, Any] = {}
    for about in abouts:
        value = about.get(name)
        for item in value if isinstance(value, list) else [value] if value is not None else []:
            seen.setdefault(json.dumps(item, sort_keys=True), item)
    return list(seen.values())


def _certificates(abouts: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The distinct parity certificates of batches; none of another program's."""
    return [
        value
        for value in _values(abouts, "certificate")
        if isinstance(value, dict)
        and isinstance(value.get("way"), str)
        and all(type(value.get(name)) in (int, float) for name in ("checked", "max_abs", "max_rel"))
    ]


def _sum_up(certificates: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One certificate for several, at least one: every way, rows checked in all, the largest differences."""
    return {
        "way": ", ".join(dict.fromkeys(one["way"] for one in certificates)),
        "checked": sum(one["checked"] for one in certificates),
        "max_abs": max(one["max_abs"] for one in certificates),
        "max_rel": max(one["max_rel"] for one in certificates),
    }


# ---------------------------------------------------------------------------------------------------------------- store


def default_folder() -> Path:
    """``ANALYSIS_LIB_STORE``, else the folder for caches by the platform's convention; absolute. Raises StoreError."""
    return _absolute(os.environ.get("ANALYSIS_LIB_STORE") or platformdirs.user_cache_path("analysis_lib") / "store")


def _absolute(folder: Path | str) -> Path:
    try:
        place = Path(folder).expanduser().absolute()
        with contextlib.suppress(OSError):
            os.stat(place)
    except (RuntimeError, ValueError, OSError) as error:  # no such user, no possible path, no current folder
        raise StoreError(
            f"the store's folder {str(folder)!r} cannot be a path ({error}); write it in full with --store or ANALYSIS_LIB_STORE"
        ) from error
    return place


def parse_days(text: str) -> float:
    """Days in "45m", "12h", "30d", "4w" or a bare number of days."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([mhdw]?)\s*", text)
    if not match:
        raise ValueError(f"{text!r} is not an age; write 45m, 12h, 30d or 4w")
    return float(match[1]) * {"m": 1 / 1440, "h": 1 / 24, "d": 1, "": 1, "w": 7}[match[2]]


def parse_bytes(text: str) -> int:
    """Bytes in "500MB", "2GB", "1.5G", "300K" (powers of 1000) or a bare number of bytes."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)B?\s*", text.upper())
    if not match:
        raise ValueError(f"{text!r} is not a size; write 500MB or 2GB")
    size = float(match[1]) * 1000 ** " KMGT".index(match[2] or " ")
    if size == float("inf"):
        raise ValueError("no store is that large; write 500MB or 2GB")
    return int(size)


@dataclass
class _Index:
    """What this process knows of the files of one kind."""

    batches: dict[str, _Batch] = field(default_factory=dict)  # by file name
    damaged: dict[str, _Stat] = field(default_factory=dict)  # file name -> its stat, when its header was bad
    where: dict[str, _Batch] = field(default_factory=dict)  # key -> a batch that holds it
    several: dict[str, list[_Batch]] = field(default_factory=dict)  # key -> all of them, where there are more

    def enter(self, batch: _Batch) -> None:
        for key in batch.row.keys() & self.where.keys():
            self.several.setdefault(key, [self.where[key]]).append(batch)
        self.where.update(dict.fromkeys(batch.keys, batch))

    def copies(self, key: str) -> list[_Batch]:
        """The batches that hold a kept row, the one to use first."""
        return sorted(self.several[key], key=lambda batch: batch.rank(key)) if key in self.several else [self.where[key]]


class Store:
    """Rows kept in a folder, by key. Nothing is created before the first write; several processes may share one folder.

    Raises StoreError where the folder cannot be a path; one that cannot be read or written, at the first use.
    """

    def __init__(self, folder: Path | str | None = None) -> None:
        self.folder = _absolute(folder) if folder is not None else default_folder()
        self._index = {kind: _Index() for kind in _SUFFIX}

    def __repr__(self) -> str:
        return f"Store({str(self.folder)!r})"

    # -- rows

    def read_states(self, keys: Sequence[str]) -> dict[str, np.ndarray]:
        """{key: state (d,) float32} for those of `keys` that are kept, in the order of `keys`.

        Rows that fail their checksum are left out, with a StoreDamage warning that names them. Raises StoreError.
        """
        parts: dict[tuple, list[tuple[str, bytes]]] = defaultdict(list)
        for key, (batch, data) in self._fetch("states", keys).items():
            parts[batch.dtype, len(data)].append((key, data))
        found = {
            key: state
            for (dtype, _), rows in parts.items()
            for (key, _), state in zip(rows, _decode_states([data for _, data in rows], dtype), strict=True)
        }
        return {key: found[key] for key in dict.fromkeys(keys) if key in found}

    def certificates(self, keys: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
        """{key: parity certificates of what a kept state was committed with}, as the files were at the last read of states.

        Several where a row was committed twice, or batches were compacted; none of another program's.
        """
        index, known = self._index["states"], dict[tuple[str, ...], list[dict[str, Any]]]()
        found = {}
        for key in keys:
            if key in index.where:
                batches = index.copies(key)
                names = tuple(batch.path.name for batch in batches)
                if names not in known:
                    known[names] = _certificates(batch.about for batch in batches)
                found[key] = known[names]
        return found

    def write_states(self, keys: Sequence[str], states: np.ndarray, *, dtype: str, about: Mapping[str, Any]) -> None:
        """Commit one batch: states (n, d) float32, kept as `dtype` ("bfloat16", "float16", "float32").

        `about` (JSON) describes the batch for `ls` and `prune`: model (fingerprint), model_name, prompts, layer,
        certificate. It does not take part in finding rows. Raises ValueError where `dtype` cannot hold a value exactly,
        StoreError where the folder cannot be written; nothing is kept of the batch then.
        """
        dtype = dtype.removeprefix("torch.")
        if dtype not in _DTYPES:
            raise ValueError(f"dtype {dtype!r} is not kept; choose one of {', '.join(_DTYPES)}")
        if not isinstance(states, np.ndarray) or states.dtype != np.float32 or states.ndim != 2 or 0 in states.shape[1:]:
            what = f"{states.dtype} {states.shape}" if isinstance(states, np.ndarray) else type(states).__name__
            raise ValueError(f"states must be a float32 array of shape (n, d), not {what}")
        if not self._check_batch(keys, len(states)):
            return
        rows = _encode_states(keys, states, dtype)
        self._commit("states", _states_head(keys, rows, _about(about), dtype), rows)

    def read_responses(self, keys: Sequence[str]) -> dict[str, dict[str, Any]]:
        """{key: row} for those of `keys` that are kept, in the order of `keys`; damage and errors as in `read_states`."""
        found = self._fetch("responses", keys)
        return {key: json.loads(found[key][1])["row"] for key in dict.fromkeys(keys) if key in found}

    def write_responses(self, keys: Sequence[str], rows: Sequence[Mapping[str, Any]], *, about: Mapping[str, Any]) -> None:
        """Commit one batch of JSON rows; `about` and errors as in `write_states`."""
        if not self._check_batch(keys, len(rows)):
            return
        lines = [_encode_response(key, row) for key, row in zip(keys, rows, strict=True)]
        self._commit("responses", _responses_head(keys, lines, _about(about)), lines)

    def discard(self, keys: Iterable[str]) -> None:
        """Remove the batches that hold nothing but these rows: steps towards what has been kept since.

        What another live process has committed stays.
        """
        gone = set(keys)
        for kind, index in self._index.items():
            self._scan(kind)
            found = [batch for batch in index.batches.values() if gone.issuperset(batch.keys)]
            in_use = self._in_use() if found else {}
            for batch in found:
                if batch.path.name not in in_use:
                    _remove_unchanged(batch.path, batch.stat)

    # -- the shelves

    def ls(self) -> pd.DataFrame:
        """One row per kind, model and dtype: rows (distinct keys), files, bytes, prompts, layers, certificates, dates.

        certificates: one summary; certificates that are equal count once (the layers of a batch share theirs). Warns of a
        newer format's folder.
        """
        if newer := self._formats(newer=True):
            warnings.warn(
                f"{newer[0]} is of a newer format, of which nothing is shown; update analysis_lib to use it", stacklevel=2
            )
        groups: dict[tuple, list[_Batch]] = defaultdict(list)
        for batch in self._all_batches():
            groups[batch.group[:3]].append(batch)
        table = []
        for (kind, model, dtype), batches in sorted(groups.items()):
            abouts = [batch.about for batch in batches]
            times = [pd.Timestamp(batch.mtime_ns // 10**9, unit="s", tz="UTC") for batch in batches]
            checks = _certificates(abouts)
            table.append(
                {
                    "kind": kind,
                    "model": model,
                    "model_name": ", ".join(map(str, _values(abouts, "model_name"))),
                    "dtype": dtype,
                    "layers": ", ".join(map(str, _values(abouts, "layer"))),
                    "prompts": ", ".join(map(str, _values(abouts, "prompts"))),
                    "rows": len({key for batch in batches for key in batch.keys}),
                    "files": len(batches),
                    "bytes": sum(batch.size for batch in batches),
                    "certificates": "{way}: {checked} checked, max_abs {max_abs:.3g}, max_rel {max_rel:.3g}".format(
                        **_sum_up(checks)
                    )
                    if checks
                    else "",
                    "first_written": min(times),
                    "last_written": max(times),
                }
            )
        columns = "kind model model_name dtype layers prompts rows files bytes certificates first_written last_written"
        return pd.DataFrame(table, columns=columns.split())

    def info(self) -> dict[str, Any]:
        """Folder, formats, counts, bytes, models, one parity certificate per model (as in `ls`), damage, unfinished files."""
        batches = self._all_batches()
        counts = {
            f"{kind}_{what}": value
            for kind in _SUFFIX
            for what, value in (
                ("files", sum(batch.kind == kind for batch in batches)),
                ("rows", len(self._index[kind].where)),
                ("bytes", sum(batch.size for batch in batches if batch.kind == kind)),
            )
        }
        models: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
        for batch in batches:
            models[str(batch.about.get("model", ""))].append(batch.about)
        checks = {model: _certificates(abouts) for model, abouts in models.items()}
        writing = self._leftovers()
        return {
            "folder": str(self.folder),
            "format": FORMAT_VERSION,
            "newer_formats": [folder.name for folder in self._formats(newer=True)],
            **counts,
            "bytes": sum(batch.size for batch in batches),
            "models": sorted(models.keys() - {""}),
            "certificates": [{"model": model, "certificate": _sum_up(found)} for model, found in checks.items() if found],
            "damaged_headers": sum(len(index.damaged) for index in self._index.values()),
            "unfinished_files": sum(path.suffix == ".tmp" for path in writing),
            "live_writers": len({_process_of(path) for path in writing if path.suffix == ".journal" and _alive(path)}),
        }

    def verify(self) -> pd.DataFrame:
        """Read every byte. One row per file: kind, file, model, rows, status ("ok" or what is wrong), bad_rows, bad_keys."""
        self._refuse_older()
        table = []
        for kind, name in [(shelf, name) for shelf in _SUFFIX for name in self._files(shelf)]:
            report: dict[str, Any] = {"kind": kind, "file": name, "model": "", "rows": 0, "bad_rows": 0, "bad_keys": []}
            with contextlib.suppress(FileNotFoundError):  # pruned or compacted meanwhile
                try:
                    batch = _read_head(kind, self._root / kind / name)
                    report |= {"model": batch.about.get("model", ""), "rows": len(batch.keys)}
                    checked = _read_rows(batch, range(len(batch.keys)))
                    report["bad_keys"] = [batch.keys[row] for row, data in checked if data is None]
                    report["bad_rows"] = len(report["bad_keys"])
                    trailing = batch.size - batch.offsets[-1]
                    report["status"] = (
                        str(_BAD_ROWS) if report["bad_rows"] else f"{trailing} bytes too many" if trailing > 0 else "ok"
                    )
                except _Damaged as reason:
                    report["status"] = str(reason)
                table.append(report)
        return pd.DataFrame(table, columns=["kind", "file", "model", "rows", "status", "bad_rows", "bad_keys"])

    def prune(
        self,
        *,
        older_than: float | None = None,
        model: str | None = None,
        max_bytes: int | None = None,
        older_formats: bool = False,
        dry_run: bool = False,
    ) -> pd.DataFrame:
        """Remove the batches that meet every given condition, and what killed processes left half-written.

        older_than: committed more than so many days ago. model: the model's name or the beginning of its fingerprint.
        max_bytes: oldest first, until the store holds at most so many bytes. older_formats: everything of earlier format
        versions instead. What another live process has committed or is writing stays; a process of another machine counts as
        live for a day after its last commit. One row per batch (or leftover) that meets the conditions: kind, file, model,
        rows, bytes, age_days, action. Raises ValueError without any condition or with older_formats and another, and
        StoreError where no batch is of that model.
        """
        conditions = (older_than, model, max_bytes)
        if older_formats:
            if conditions != (None, None, None):
                raise ValueError("older_formats goes without another condition: prune earlier formats first, then the rest")
            return self._prune_older(dry_run)
        if conditions == (None, None, None) or model == "":
            raise ValueError("say what to prune: older_than=days, model=name, max_bytes=n or older_formats=True")
        now = time.time()
        batches = self._all_batches()

        def of_model(batch: _Batch) -> bool:
            about = batch.about
            return model is None or model in _values([about], "model_name") or str(about.get("model", "")).startswith(model)

        if not any(map(of_model, batches)) and model is not None:
            names = sorted(map(str, _values([batch.about for batch in batches], "model_name")))
            raise StoreError(f"{self.folder} holds nothing of a model {model!r}; it has {', '.join(names) or 'no model at all'}")
        in_use = self._in_use()  # after the listing: a journal names a file before it appears
        excess = sum(batch.size for batch in batches) - max_bytes if max_bytes is not None else 0
        table = []
        for batch in batches:
            age = (now - batch.mtime_ns / 1e9) / _DAY
            if older_than is not None and age <= older_than:
                continue
            if not of_model(batch):
                continue
            if max_bytes is not None and excess <= 0:
                break
            report: dict[str, Any] = {"kind": batch.kind, "file": batch.path.name, "model": batch.about.get("model", "")}
            report |= {"rows": len(batch.keys), "bytes": batch.size, "age_days": age}
            if batch.path.name in in_use:
                host, process = in_use[batch.path.name].split(".")
                report["action"] = f"kept: in use by process {process.partition('-')[0]} on {host}"
            elif dry_run or _remove_unchanged(batch.path, batch.stat):
                report["action"] = "would remove" if dry_run else "removed"
                excess -= batch.size
            else:
                report["action"] = "kept: just written again"
            table.append(report)
        table += self._sweep(dry_run)
        return pd.DataFrame(table, columns=_REPORT)

    def compact(self, *, max_file_bytes: int = 64_000_000) -> pd.DataFrame:
        """Merge the small batches of a model into files of at most `max_file_bytes`, and drop rows that fail their checksum.

        Readers and writers may go on meanwhile. One row per group that changed: kind, model, dtype, files_before,
        files_after, rows, dropped_rows, bytes_before, bytes_after.
        """
        groups: dict[tuple, list[_Batch]] = defaultdict(list)
        for batch in self._all_batches():
            groups[batch.group].append(batch)
        in_use = self._in_use()
        table = [self._compact(group, batches, max_file_bytes, in_use) for group, batches in sorted(groups.items())]
        for kind, name in [(kind, name) for kind, index in self._index.items() for name in index.damaged]:
            path = self._root / kind / name
            try:
                seen = _stat(path.stat())
                _read_head(kind, path)
            except (FileNotFoundError, _Unreadable):
                continue
            except _Damaged:
                _remove_unchanged(path, seen)
                row = {"kind": kind, "model": "", "dtype": "", "files_before": 1, "files_after": 0, "bytes_before": seen[0]}
                table.append(row | {"rows": 0, "bytes_after": 0})
        columns = "kind model dtype files_before files_after rows dropped_rows bytes_before bytes_after"
        return pd.DataFrame([row for row in table if row], columns=columns.split())

    # -- inside

    @property
    def _root(self) -> Path:
        return self.folder / f"v{FORMAT_VERSION}"

    def _listing(self, kind: str) -> list[str]:
        try:
            return sorted(os.listdir(self._root / kind))
        except FileNotFoundError:
            return []
        except OSError as error:
            raise StoreError(
                f"cannot read the store at {self.folder}: {error.strerror}; choose another folder with --store or "
                "ANALYSIS_LIB_STORE, or mend the folder's permissions"
            ) from error

    def _files(self, kind: str) -> list[str]:
        suffix = _SUFFIX[kind]
        return [name for name in self._listing(kind) if name.endswith(suffix) and _KEY.fullmatch(name.removesuffix(suffix))]

    def _all_batches(self) -> list[_Batch]:
        """Every sound batch as it lies there now, the oldest at the front."""
        self._index = {kind: _Index() for kind in _SUFFIX}  # a file may have been replaced by a sound copy of itself
        for kind in _SUFFIX:
            self._scan(kind)
        batches = [batch for index in self._index.values() for batch in index.batches.values()]
        return sorted(batches, key=_Batch.age)

    def _formats(self, *, newer: bool) -> list[Path]:
        """Folders of other format versions, in order."""
        found = {}
        with contextlib.suppress(OSError):  # what reads or writes next says what is wrong
            found = {int(name[1:]): name for name in os.listdir(self.folder) if re.fullmatch("v(0|[1-9][0-9]{0,3})", name)}
        versions = [version for version in sorted(found) if (version > FORMAT_VERSION if newer else version < FORMAT_VERSION)]
        return [self.folder / found[version] for version in versions if os.path.isdir(self.folder / found[version])]

    def _refuse_older(self) -> None:
        if older := self._formats(newer=False):
            raise StoreFormatError(
                f"{older[0]} holds rows of an earlier format, whose keys this version (format {FORMAT_VERSION}) cannot ask for; "
                f"remove them with `python -m analysis_lib cache prune --older-formats --store {shlex.quote(str(self.folder))}`, "
                "or choose another folder with --store or ANALYSIS_LIB_STORE"
            )

    def _scan(self, kind: str) -> None:
        """Bring the index up to the files that are there now."""
        self._refuse_older()
        index = self._index[kind]
        for _ in range(3):
            before = self._changed(kind)
            names = set(self._files(kind))
            if gone := index.batches.keys() - names:
                index.batches = {name: batch for name, batch in index.batches.items() if name not in gone}
                index.where, index.several = {}, {}
                for batch in index.batches.values():
                    index.enter(batch)
            index.damaged = {name: entry for name, entry in index.damaged.items() if name in names}
            for name in sorted(names - index.batches.keys()):
                self._learn(kind, name)
            if self._changed(kind) == before:  # else a file may have slipped past the listing (compaction)
                return

    def _changed(self, kind: str) -> int:
        try:
            return (self._root / kind).stat().st_mtime_ns
        except OSError:
            return 0

    def _learn(self, kind: str, name: str) -> None:
        index, path = self._index[kind], self._root / kind / name
        try:
            if name in index.damaged and index.damaged[name] == _stat(path.lstat()):
                return
            batch = _read_head(kind, path)
        except FileNotFoundError:
            return
        except _Damaged as reason:
            with contextlib.suppress(FileNotFoundError):
                index.damaged[name] = _stat(path.lstat())
            _warn(path, reason, [] if isinstance(reason, _Unreadable) else _keys_in_damaged_head(path))
            return
        index.batches[name] = batch
        index.enter(batch)

    def _fetch(self, kind: str, keys: Sequence[str]) -> dict[str, tuple[_Batch, bytes]]:
        """Verified bytes of the rows that are kept."""
        index, found = self._index[kind], dict[str, tuple[_Batch, bytes]]()
        bad: dict[str, tuple[_Batch, _Damaged]] = {}
        for _ in range(3):
            self._scan(kind)
            bad, vanished, turn = {}, False, 0
            todo = [key for key in dict.fromkeys(keys) if key not in found and key in index.where]
            while todo:  # copies of a row, the one to use at the first turn
                wanted: dict[_Batch, dict[int, str]] = defaultdict(dict)
                for key in todo:
                    copies = index.copies(key)
                    if turn < len(copies):
                        wanted[copies[turn]][copies[turn].row[key]] = key
                for batch, names in wanted.items():
                    try:
                        for row, data in _read_rows(batch, names):
                            if data is None:
                                bad[names[row]] = batch, _BAD_ROWS
                            else:
                                found[names[row]] = batch, data
                    except FileNotFoundError:
                        vanished = True
                    except _Damaged as reason:
                        bad |= {key: (batch, reason) for key in names.values() if key not in found}
                todo = [key for names in wanted.values() for key in names.values() if key not in found]
                turn += 1
            if not vanished:  # else compacted or pruned since the listing: look again
                break
        failed: dict[tuple[_Batch, _Damaged], list[str]] = defaultdict(list)
        for key, where in bad.items():
            if key not in found:
                failed[where].append(key)
        for (batch, why), lost in failed.items():
            _warn(batch.path, why, lost)
        return found

    def _commit(
        self, kind: str, head: bytes, rows: Sequence[bytes], mtime_ns: int | None = None, users: Iterable[str] = ()
    ) -> str:
        """Put a batch in place, whole or not at all; its name. `users`: other live processes whose rows it takes over."""
        self._refuse_older()
        name = _digest(head) + _SUFFIX[kind]
        writing, target = self._root / "writing", self._root / kind / name
        process = _this_process()
        temporary = writing / f"{process}.{uuid.uuid4().hex}.tmp"
        try:
            writing.mkdir(parents=True, exist_ok=True)
            target.parent.mkdir(exist_ok=True)
            for user in [process, *(f"{user}.{uuid.uuid4().hex}" for user in users)]:
                with open(writing / f"{user}.journal", "a", encoding="ascii") as journal:
                    journal.write(f"\n{name}\n")  # a full disk may have left half a line before
            with open(temporary, "wb") as file:
                file.write(head)
                file.writelines(rows)
                file.flush()
                os.fsync(file.fileno())
            if mtime_ns is not None:
                os.utime(temporary, ns=(mtime_ns, mtime_ns))
            os.replace(temporary, target)
        except OSError as error:
            raise StoreError(self._why_not_written(error)) from error
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        _sync_folder(target.parent)
        return name

    def _why_not_written(self, error: OSError) -> str:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            what, do = "no space is left", "free some, run `python -m analysis_lib cache prune --max-bytes N`"
        elif error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            what, do = "the folder is read-only for this user", "mend its permissions"
        else:
            what, do = error.strerror or repr(error), "make the path a folder that can be written"
        return (
            f"cannot write to the store at {self.folder}: {what}. This batch is not kept, rows kept before stay readable; "
            f"{do}, or choose another folder with --store or ANALYSIS_LIB_STORE"
        )

    @staticmethod
    def _check_batch(keys: Sequence[str], n: int) -> bool:
        """Whether there is anything to write."""
        if len(keys) != n:
            raise ValueError(f"{len(keys)} keys for {n} rows; give one key per row")
        if wrong := next((key for key in keys if not isinstance(key, str) or not _KEY.fullmatch(key)), None):
            raise ValueError(f"{wrong!r} is not a key; make keys with row_key(...)")
        if len(set(keys)) != n:
            twice = next(key for i, key in enumerate(keys) if key in keys[:i])
            raise ValueError(f"key {twice} occurs twice in one batch; write each row once")
        return n > 0

    def _in_use(self) -> dict[str, str]:
        """{file name: "host.pid-start"} of what other live processes have committed."""
        used: dict[str, str] = {}
        for path in self._leftovers():
            process = _process_of(path)
            if path.suffix == ".journal" and process != _this_process() and _alive(path):
                with contextlib.suppress(FileNotFoundError):
                    used |= dict.fromkeys(path.read_text(encoding="ascii", errors="replace").split(), process)
        return used

    def _leftovers(self) -> list[Path]:
        writing = self._root / "writing"
        names = [name for name in self._listing("writing") if _WRITING.fullmatch(name)]
        return [writing / name for name in names if os.path.isfile(writing / name)]

    def _sweep(self, dry_run: bool) -> list[dict[str, Any]]:
        """Remove what dead processes left in writing/."""
        table = []
        for path in self._leftovers():
            with contextlib.suppress(FileNotFoundError):
                left = path.stat()
                if not _alive(path):
                    if not dry_run:
                        _unlink(path)
                    age = (time.time() - left.st_mtime) / _DAY
                    row = {"kind": "writing", "file": path.name, "bytes": left.st_size, "age_days": age, "rows": 0}
                    table.append(row | {"model": "", "action": "would remove" if dry_run else "removed"})
        return table

    def _prune_older(self, dry_run: bool) -> pd.DataFrame:
        table = []
        for folder in self._formats(newer=False):
            files = [path for path in folder.rglob("*") if path.is_file()]
            row = {"kind": "format", "file": folder.name, "bytes": sum(path.stat().st_size for path in files)}
            if not dry_run:
                try:
                    folder.unlink() if folder.is_symlink() else shutil.rmtree(folder)
                except OSError as error:
                    raise StoreError(f"cannot remove {folder}: {error.strerror}; mend the folder's permissions") from error
            table.append(row | {"action": "would remove" if dry_run else "removed"})
        return pd.DataFrame(table, columns=_REPORT)

    def _compact(self, group: tuple, batches: Sequence[_Batch], max_bytes: int, in_use: Mapping[str, str]) -> dict[str, Any]:
        """Rewrite the batches of a group that are small or damaged."""
        kind, model, dtype, _ = group
        counts = dict.fromkeys(["files_before", "files_after", "rows", "dropped_rows", "bytes_before", "bytes_after"], 0)
        taken: list[_Batch] = []
        rows: dict[str, bytes] = {}
        rank: dict[str, tuple[str, str]] = {}  # key -> that of its best copy so far, among `rows` and in files that stay
        poor = 0

        def flush() -> None:
            nonlocal taken, rows, poor
            if len(taken) > 1 or poor:
                name = ""
                if rows:
                    about, data = _merge_about([batch.about for batch in taken]), list(rows.values())
                    head = (
                        _states_head(list(rows), data, about, dtype)
                        if kind == "states"
                        else _responses_head(list(rows), data, about)
                    )
                    users = {in_use[batch.path.name] for batch in taken if batch.path.name in in_use}
                    name = self._commit(kind, head, data, max(batch.mtime_ns for batch in taken), users)
                    counts["files_after"] += 1
                    counts["bytes_after"] += len(head) + sum(map(len, data))
                for batch in taken:
                    if batch.path.name != name:
                        _remove_unchanged(batch.path, batch.stat)
                    counts["files_before"] += 1
                    counts["bytes_before"] += batch.size
                counts["rows"] += len(rows)
                counts["dropped_rows"] += poor
            taken, rows, poor = [], {}, 0

        for batch in batches:
            try:
                read = dict(_read_rows(batch, range(len(batch.keys))))
            except (FileNotFoundError, _Damaged):  # gone meanwhile, or the disk cannot give it now
                continue
            good = {row: data for row, data in read.items() if data is not None}
            stays = len(good) == len(read) and batch.size > max_bytes / 2
            if not stays:
                if taken and sum(one.size for one in taken) + batch.size > max_bytes:
                    flush()
                taken.append(batch)
                poor += len(read) - len(good)
            for row, data in good.items():
                key = batch.keys[row]
                if key not in rank or batch.rank(key) < rank[key]:
                    rank[key] = batch.rank(key)
                    if not stays:
                        rows[key] = data
        flush()
        return {"kind": kind, "model": model, "dtype": dtype, **counts} if counts["files_before"] else {}


# -------------------------------------------------------------------------------------------------------- files, processes


def _keys_in_damaged_head(path: Path) -> list[str]:
    """The keys that can still be made out, for the warning alone."""
    try:
        with open(path, "rb") as file:
            head = file.read(1 << 20)
    except OSError:
        return []
    keys = head.partition(b'"sha256')[0] if path.suffix == ".jsonl" else head.partition(b'\\"sha256')[0]
    return [key.decode() for key in re.findall(rb"[0-9a-f]{64}", keys)]


def _warn(path: Path, why: _Damaged, keys: Sequence[str]) -> None:
    named = ", ".join(keys[:20]) + (f" and {len(keys) - 20} more" if len(keys) > 20 else "")
    warnings.warn(
        f"{path}: {why}; not used and to be computed again: {named or 'rows that cannot be made out'}. {why.advice}",
        StoreDamage,
        stacklevel=2,
    )


def _sync_folder(folder: Path) -> None:
    """Make a rename last over a power cut, where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _unlink(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise StoreError(f"cannot remove {path}: {error.strerror}; mend the folder's permissions") from error


def _remove_unchanged(path: Path, seen: _Stat) -> bool:
    """Unlink, unless another process has put a sound copy in the file's place. Whether the file is gone."""
    try:
        if _stat(path.stat()) != seen:
            return False
        _unlink(path)
    except FileNotFoundError:
        pass
    return True


def _host() -> str:
    """This machine since it was started, and its process-id space: process ids mean nothing outside of them.

    Machines and containers may share a host name.
    """
    boot, space = "", 0
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()[:8]
        space = os.stat("/proc/self/ns/pid").st_ino
    return re.sub(r"[^A-Za-z0-9-]", "-", f"{socket.gethostname()}-{boot}-{space}")


def _started(pid: int) -> int:
    """When a process was started, in clock ticks since its machine was; 0 where the system does not tell, -1 if it has ended."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return -1 if state == b"Z" else int(fields[18])
    except (OSError, ValueError, IndexError):
        return 0


def _this_process() -> str:
    """The name of this process's files in writing/: "host.pid-start", since process ids are used again."""
    return f"{_host()}.{os.getpid()}-{_started(os.getpid())}"


def _process_of(path: Path) -> str:
    """The "host.pid-start" that a file in writing/ is named after."""
    return path.name.rsplit(".", path.name.count(".") - 1)[0]


def _alive(path: Path) -> bool:
    """Whether the process that a file in writing/ is named after may still be at work."""
    try:
        age = time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return False
    host, process = _process_of(path).split(".")
    if host != _host() or os.name == "nt":  # a process can be asked after on its own machine only
        return age <= _DAY
    pid, _, start = process.partition("-")
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return _started(int(pid)) in (0, int(start or 0))
