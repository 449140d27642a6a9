"""What is kept, whether it is sound, and what may go: the functions behind `cache`.

`prune` and `compact` spare every file younger than a day, by the file's time and this machine's
clock. What a run wrote within the day stays, so nothing has to be known of the processes that use
the store.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from . import checkpoints
from .about import certificates_of, sum_up, values_of
from .batches import (
    BAD_ROWS,
    FORMAT_VERSION,
    SUFFIX,
    Batch,
    Damaged,
    Group,
    Kept,
    StoreError,
    Unreadable,
    read_batch,
    read_rows,
    stat_of,
    warn,
)
from .compaction import COUNTS, compact_group
from .files import listing, remove, remove_unchanged
from .index import Index, batch_files
from .store import Store

DAY = 86400.0
SPARE = DAY  # seconds; younger files may belong to a run that is at work
_LS = (
    "kind model model_name dtype layers prompts rows files "
    "bytes certificates first_written last_written"
)
_VERIFY = "kind file model rows status bad_rows bad_keys"
_PRUNE = "kind file model rows bytes age_days action"
_COMPACT = ["kind", "model", "dtype", *COUNTS, "spared"]


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


# ---------------------------------------------------------------------------------------- looking


@dataclass(frozen=True)
class _Shelves:
    """Everything as it lies there now."""

    files: list[Kept]  # what is sound, the oldest at the front
    damaged: list[tuple[str, Path]]  # kind, file


def _look(store: Store) -> _Shelves:
    """Read the shelves anew; what is damaged is told of by warnings."""
    files: list[Kept] = []
    damaged: list[tuple[str, Path]] = []
    for kind in SUFFIX:
        index = Index(store.root, kind)
        index.scan()
        files += index.batches.values()
        damaged += [(kind, index.folder / name) for name in index.damaged]
    for path in _checkpoint_files(store):
        with contextlib.suppress(FileNotFoundError):
            try:
                files.append(checkpoints.read(path))
            except Damaged as reason:
                damaged.append((checkpoints.FOLDER, path))
                warn(path, reason, [path.name.removesuffix(checkpoints.SUFFIX)])
    return _Shelves(sorted(files, key=Kept.order), damaged)


def _checkpoint_files(store: Store) -> list[Path]:
    folder = store.root / checkpoints.FOLDER
    return [folder / name for name in listing(folder) if checkpoints.is_checkpoint(name)]


def _newer_formats(store: Store) -> list[Path]:
    """Folders of newer format versions, in order."""
    found: list[str] = []
    with contextlib.suppress(OSError):  # what reads or writes next says what is wrong
        found = [name for name in os.listdir(store.folder) if re.fullmatch(r"v[1-9]\d{0,3}", name)]
    versions = sorted(int(name[1:]) for name in found)
    folders = [store.folder / f"v{version}" for version in versions if version > FORMAT_VERSION]
    return [folder for folder in folders if folder.is_dir()]


def _leftovers(store: Store) -> Iterator[tuple[Path, os.stat_result]]:
    """What lies in writing/: a write that goes on, or one whose process was killed."""
    for name in listing(store.root / "writing"):
        path = store.root / "writing" / name
        with contextlib.suppress(FileNotFoundError):
            found = path.lstat()
            if stat.S_ISREG(found.st_mode):
                yield path, found


def ls(store: Store) -> pd.DataFrame:
    """One row per kind, model and dtype: what is kept of it, in how many files, since when.

    rows: distinct keys. certificates: one summary; equal certificates count once, since the layers
    of a batch share theirs. Warns of damage and of a newer format's folder.
    """
    if newer := _newer_formats(store):
        warnings.warn(
            f"{newer[0]} is of a newer format and not shown; update analysis_lib to use it",
            stacklevel=2,
        )
    groups: dict[tuple[str, str, str], list[Kept]] = defaultdict(list)
    for file in _look(store).files:
        groups[file.kind, str(file.about.get("model", "")), file.dtype].append(file)
    table = [_row_of_ls(*group, files) for group, files in sorted(groups.items())]
    return pd.DataFrame(table, columns=_LS.split())


def _row_of_ls(kind: str, model: str, dtype: str, files: Sequence[Kept]) -> dict[str, Any]:
    abouts = [file.about for file in files]
    times = [pd.Timestamp(file.mtime_ns // 10**9, unit="s", tz="UTC") for file in files]
    told = "{way}: {checked} checked, max_abs {max_abs:.3g}, max_rel {max_rel:.3g}"
    checks = certificates_of(abouts)
    return {
        "kind": kind,
        "model": model,
        "model_name": ", ".join(map(str, values_of(abouts, "model_name"))),
        "dtype": dtype,
        "layers": ", ".join(map(str, values_of(abouts, "layer"))),
        "prompts": ", ".join(map(str, values_of(abouts, "prompts"))),
        "rows": len({key for file in files for key in file.keys}),
        "files": len(files),
        "bytes": sum(file.size for file in files),
        "certificates": told.format(**sum_up(checks)) if checks else "",
        "first_written": min(times),
        "last_written": max(times),
    }


def info(store: Store) -> dict[str, Any]:
    """Folder, formats, counts, bytes, models, one parity certificate per model (as in `ls`).

    damaged_headers: files that cannot be used. unfinished_files: in writing/.
    """
    shelves = _look(store)
    counts: dict[str, int] = {}
    for kind in (*SUFFIX, checkpoints.FOLDER):
        files = [file for file in shelves.files if file.kind == kind]
        counts[f"{kind}_files"] = len(files)
        counts[f"{kind}_rows"] = len({key for file in files for key in file.keys})
        counts[f"{kind}_bytes"] = sum(file.size for file in files)
    models: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for file in shelves.files:
        models[str(file.about.get("model", ""))].append(file.about)
    checks = {model: certificates_of(abouts) for model, abouts in models.items()}
    return {
        "folder": str(store.folder),
        "format": FORMAT_VERSION,
        "newer_formats": [folder.name for folder in _newer_formats(store)],
        **counts,
        "bytes": sum(file.size for file in shelves.files),
        "models": sorted(models.keys() - {""}),
        "certificates": [
            {"model": model, "certificate": sum_up(found)}
            for model, found in checks.items()
            if found
        ],
        "damaged_headers": len(shelves.damaged),
        "unfinished_files": sum(path.suffix == ".tmp" for path, _ in _leftovers(store)),
    }


def verify(store: Store) -> pd.DataFrame:
    """Read every byte. One row per file; status is "ok" or what is wrong."""
    table = []
    paths = [
        (kind, store.root / kind / name)
        for kind in SUFFIX
        for name in batch_files(store.root, kind)
    ]
    paths += [(checkpoints.FOLDER, path) for path in _checkpoint_files(store)]
    for kind, path in paths:
        report = {"kind": kind, "file": path.name, "model": "", "rows": 0, "bad_rows": 0}
        with contextlib.suppress(FileNotFoundError):  # pruned or compacted meanwhile
            try:
                report |= _checked(kind, path)
            except Damaged as reason:
                report |= {"status": str(reason), "bad_keys": []}
            table.append(report)
    return pd.DataFrame(table, columns=_VERIFY.split())


def _checked(kind: str, path: Path) -> dict[str, Any]:
    """Raises Damaged, FileNotFoundError."""
    if kind == checkpoints.FOLDER:
        file: Kept = checkpoints.read(path)
        bad_keys, status = [], "ok"
    else:
        file = batch = read_batch(kind, path)
        checked = read_rows(batch, range(len(batch.keys)))
        bad_keys = [batch.keys[row] for row, data, _ in checked if data is None]
        trailing = batch.size - batch.offsets[-1]
        status = f"{trailing} bytes too many" if trailing > 0 else "ok"
    about = {"model": file.about.get("model", ""), "rows": len(file.keys)}
    status = str(BAD_ROWS) if bad_keys else status
    return {**about, "status": status, "bad_rows": len(bad_keys), "bad_keys": bad_keys}


# --------------------------------------------------------------------------------------- clearing


def too_young(written: float, spare: float) -> bool:
    """Whether something written at that time may still be needed by who wrote it."""
    return spare > 0 and time.time() - written < spare


def _span(spare: float) -> str:
    return "a day" if spare == DAY else f"{spare:g} seconds"


def prune(
    store: Store,
    *,
    older_than: float | None = None,
    model: str | None = None,
    max_bytes: int | None = None,
    spare: float = SPARE,
    dry_run: bool = False,
) -> pd.DataFrame:
    """Remove the files that meet every given condition, and what killed processes left unfinished.

    older_than: written more than so many days ago. model: the model's name, or the beginning of its
    fingerprint. max_bytes: the oldest first, until the store holds at most so many bytes. spare:
    files younger than so many seconds stay, a day by default, since a run may still need them;
    0 takes them as well, for when nothing else uses the store.

    One row per file that meets the conditions, or that was left unfinished. Its `action` is
    "removed", "would remove", or "kept: " and why. Raises ValueError without any condition, and
    StoreError where nothing is of that model.
    """
    if (older_than, model, max_bytes) == (None, None, None) or model == "":
        raise ValueError("say what to prune: older_than=days, model=name or max_bytes=n")
    files, now = _look(store).files, time.time()
    if model is not None:
        _check_model(store, files, model)
    excess = sum(file.size for file in files) - max_bytes if max_bytes is not None else 1
    table = []
    for file in files:
        if excess <= 0:
            break
        age = (now - file.mtime_ns / 1e9) / DAY
        if older_than is not None and age <= older_than:
            continue
        if model is not None and not _is_of(file, model):
            continue
        action = _removed(file, spare, dry_run)
        if max_bytes is not None and not action.startswith("kept"):
            excess -= file.size
        table.append(
            {
                "kind": file.kind,
                "file": file.path.name,
                "model": file.about.get("model", ""),
                "rows": len(file.keys),
                "bytes": file.size,
                "age_days": age,
                "action": action,
            }
        )
    table += sweep(store, spare, dry_run)
    return pd.DataFrame(table, columns=_PRUNE.split())


def _is_of(file: Kept, model: str) -> bool:
    named = model in values_of([file.about], "model_name")
    return named or str(file.about.get("model", "")).startswith(model)


def _check_model(store: Store, files: Sequence[Kept], model: str) -> None:
    if not any(_is_of(file, model) for file in files):
        names = sorted(map(str, values_of([file.about for file in files], "model_name")))
        raise StoreError(
            f"{store.folder} holds nothing of a model {model!r}; "
            f"it has {', '.join(names) or 'no model at all'}"
        )


def _removed(file: Kept, spare: float, dry_run: bool) -> str:
    """What was done about a file."""
    if too_young(file.mtime_ns / 1e9, spare):
        return f"kept: younger than {_span(spare)}"
    if dry_run:
        return "would remove"
    return "removed" if remove_unchanged(file.path, file.stat) else "kept: just written again"


def sweep(store: Store, spare: float, dry_run: bool) -> list[dict[str, Any]]:
    """Remove what lies in writing/ and is not being written."""
    table = []
    for path, found in _leftovers(store):
        # `compact` gives a new file its rows' time before it puts it in place
        touched = max(found.st_mtime, found.st_ctime)
        if not too_young(touched, spare):
            if not dry_run:
                remove(path)
            row = {"kind": "writing", "file": path.name, "model": "", "rows": 0}
            row |= {"bytes": found.st_size, "age_days": (time.time() - touched) / DAY}
            table.append(row | {"action": "would remove" if dry_run else "removed"})
    return table


def compact(
    store: Store, *, max_file_bytes: int = 64_000_000, spare: float = SPARE
) -> pd.DataFrame:
    """Merge the small batches of a model into files of at most `max_file_bytes`.

    Rows that fail their checksum are dropped, and files that cannot be used. Readers and writers
    may go on meanwhile. spare: as in `prune`; such files are counted as `spared`.

    One row per kind, model and dtype that changed or was spared: files, rows and bytes before and
    after.
    """
    shelves = _look(store)
    groups: dict[Group, list[Batch]] = defaultdict(list)
    spared: dict[Group, int] = defaultdict(int)
    for batch in (file for file in shelves.files if isinstance(file, Batch)):
        if too_young(batch.mtime_ns / 1e9, spare):
            spared[batch.group] += 1
        else:
            groups[batch.group].append(batch)
    table = []
    for group in sorted({*groups, *spared}):
        counts = compact_group(store.root, group, groups[group], max_file_bytes)
        if counts["files_before"] or spared[group]:
            kind, model, dtype, _ = group
            row = {"kind": kind, "model": model, "dtype": dtype, **counts}
            table.append(row | {"spared": spared[group]})
    for kind, path in shelves.damaged:
        table += _dropped(kind, path, spare)
    return pd.DataFrame(table, columns=_COMPACT)


def _dropped(kind: str, path: Path, spare: float) -> list[dict[str, Any]]:
    """Remove a file whose header is damaged, if it still is."""
    try:
        seen = stat_of(path.stat())
        checkpoints.read(path) if kind == checkpoints.FOLDER else read_batch(kind, path)
    except (FileNotFoundError, Unreadable):
        return []
    except Damaged:
        if not too_young(seen[1] / 1e9, spare) and remove_unchanged(path, seen):
            row = {"kind": kind, "model": "", "dtype": "", **dict.fromkeys(COUNTS, 0), "spared": 0}
            return [row | {"files_before": 1, "bytes_before": seen[0]}]
    return []
