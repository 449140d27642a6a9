"""The store's folder: where it is, and how a file gets into it and out of it."""

from __future__ import annotations

import contextlib
import errno
import os
import uuid
from collections.abc import Iterable
from pathlib import Path

import platformdirs

from .batches import Stat, StoreError, stat_of


def default_folder() -> Path:
    """``ANALYSIS_LIB_STORE``, else the platform's cache folder; absolute. Raises StoreError."""
    named = os.environ.get("ANALYSIS_LIB_STORE")
    return absolute(named or platformdirs.user_cache_path("analysis_lib") / "store")


def absolute(folder: Path | str) -> Path:
    try:
        place = Path(folder).expanduser().absolute()
        with contextlib.suppress(OSError):
            os.stat(place)
    except (RuntimeError, ValueError, OSError) as error:  # no such user, path or current folder
        raise StoreError(
            f"the store's folder {str(folder)!r} cannot be a path ({error}); write it in full with "
            "--store or ANALYSIS_LIB_STORE"
        ) from error
    return place


def listing(folder: Path) -> list[str]:
    """Names in a folder of the store, sorted; none where it is not there. Raises StoreError."""
    try:
        return sorted(os.listdir(folder))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StoreError(
            f"cannot read the store at {folder.parent.parent}: {error.strerror}; choose another "
            "folder with --store or ANALYSIS_LIB_STORE, or mend the folder's permissions"
        ) from error


def commit(target: Path, parts: Iterable[bytes], mtime_ns: int | None = None) -> None:
    """Put a file in place, whole or not at all, over what is there. Raises StoreError."""
    root = target.parent.parent
    temporary = root / "writing" / f"{uuid.uuid4().hex}.tmp"
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(exist_ok=True)
        with open(temporary, "wb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        if mtime_ns is not None:
            os.utime(temporary, ns=(mtime_ns, mtime_ns))
        os.replace(temporary, target)
    except OSError as error:
        raise StoreError(_why_not_written(root.parent, error)) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    _sync_folder(target.parent)


def _why_not_written(folder: Path, error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        what = "no space is left"
        do = "free some, run `python -m analysis_lib cache prune --max-bytes N`"
    elif error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        what, do = "the folder is read-only for this user", "mend its permissions"
    else:
        what = error.strerror or repr(error)
        do = "make the path a folder that can be written"
    return (
        f"cannot write to the store at {folder}: {what}. This batch is not kept, what was kept "
        f"before stays readable; {do}, or choose another folder with --store or ANALYSIS_LIB_STORE"
    )


def _sync_folder(folder: Path) -> None:
    """Make a rename last over a power cut, where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def remove(path: Path) -> None:
    """Unlink a file that may be gone. Raises StoreError."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise StoreError(
            f"cannot remove {path}: {error.strerror}; mend the folder's permissions"
        ) from error


def remove_unchanged(path: Path, seen: Stat) -> bool:
    """Unlink, unless another process has put a new file in its place. Whether the file is gone."""
    try:
        if stat_of(path.stat()) != seen:
            return False
    except FileNotFoundError:
        return True
    remove(path)
    return True
