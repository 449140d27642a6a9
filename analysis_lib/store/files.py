"""The store's folder: where it is, and how a file gets into it and out of it."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import uuid
from collections.abc import Iterable
from pathlib import Path

import platformdirs

from .batches import Stat, StoreError, stat_of


def default_folder() -> Path:
    """``ANALYSIS_LIB_STORE``, else the platform's cache folder; absolute. Raises StoreError."""
    named = os.environ.get("ANALYSIS_LIB_STORE")
    return absolute(named or platformdirs.user_cache_path("analysis_lib") / "store")


def private_by_default() -> bool:
    """``ANALYSIS_LIB_PRIVATE``. Raises StoreError for anything but 0, 1 or nothing."""
    named = os.environ.get("ANALYSIS_LIB_PRIVATE", "")
    if named not in ("", "0", "1"):
        raise StoreError(
            f"ANALYSIS_LIB_PRIVATE is {named!r}; set it to 1 for a store that only you can "
            "read, or to 0"
        )
    return named == "1"


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


def commit(
    target: Path, parts: Iterable[bytes], mtime_ns: int | None = None, *, private: bool = False
) -> None:
    """Put a file in place, whole or not at all, over what is there. Raises StoreError.

    Its permissions follow the store's folder: for the owner alone where nobody else may enter it,
    for the group too where that writes there (setgid), else as the umask says. private: closes the
    folder first.
    """
    root = target.parent.parent
    temporary = root / "writing" / f"{uuid.uuid4().hex}.tmp"
    try:
        rights = _make_folders(root, private)
        for folder in (temporary.parent, target.parent):
            _make_folder(folder, rights)
        with open(temporary, "wb", opener=_private if rights == _PRIVATE else None) as file:
            if rights == _SHARED:
                _widen(temporary, 0o060)
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


_PRIVATE, _SHARED, _USUAL = "private", "shared", "usual"


def _make_folders(root: Path, private: bool) -> str:
    """Make the folder of this format where it lacks; who may use what lies in it."""
    if private:
        root.parent.mkdir(parents=True, mode=0o700, exist_ok=True)
        root.mkdir(mode=0o700, exist_ok=True)
        if root.stat().st_mode & 0o077:  # made before it was to be private
            _close(root)
        return _PRIVATE
    if not root.exists():
        missing = [folder for folder in (root, *root.parents) if not folder.exists()]
        for folder in reversed(missing):
            _make_folder(folder, _SHARED if _shared(folder.parent) else _USUAL)
    if not root.stat().st_mode & 0o077:
        return _PRIVATE
    return _SHARED if _shared(root) else _USUAL


def _make_folder(folder: Path, rights: str) -> None:
    if not folder.exists():
        folder.mkdir(mode=0o700 if rights == _PRIVATE else 0o777, exist_ok=True)
        if rights == _SHARED:
            _widen(folder, 0o070)


def _close(root: Path) -> None:
    try:
        root.chmod(0o700)
    except PermissionError as error:
        raise StoreError(
            f"the store at {root.parent} belongs to another user, so it cannot be made private; "
            "choose a folder of your own with --store or ANALYSIS_LIB_STORE"
        ) from error


def _shared(folder: Path) -> bool:
    """Whether a group works in a folder."""
    mode = folder.stat().st_mode
    return bool(mode & stat.S_ISGID and mode & stat.S_IWGRP)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _widen(path: Path, bits: int) -> None:
    """Give the group rights, where the file system has such."""
    with contextlib.suppress(OSError):
        path.chmod(stat.S_IMODE(path.stat().st_mode) | bits)


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
