"""Faults of the disk: bytes that flip, disks that are full or read-only."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import subprocess
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from analysis_lib.store.batches import StoreDamage, StoreError
from analysis_lib.store.store import Store
from analysis_lib.store.upkeep import verify

from .injection import (
    ABOUT,
    Report,
    Tally,
    audit,
    compute_missing,
    fork,
    key,
    reported,
    response,
    result,
    state,
)

WIDTH = 32


def flip(path: Path, rng: random.Random) -> bytes:
    """Change one byte of a file; its content before."""
    content = path.read_bytes()
    at = rng.randrange(len(content))
    changed = bytes([content[at] ^ rng.randrange(1, 256)])
    path.write_bytes(content[:at] + changed + content[at + 1 :])
    return content


def committed(place: Path) -> list[Path]:
    files = (place / "v1").rglob("*")
    return sorted(path for path in files if path.suffix in (".safetensors", ".jsonl"))


def keep(store: Store, rows: Sequence[int], batch: int = 12) -> None:
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        names = [key(i) for i in part]
        states = np.stack([state(i, WIDTH) for i in part])
        store.write_states(names, states, dtype="bfloat16", about=ABOUT)
        store.write_responses(names, [response(i) for i in part], about=ABOUT)


def missing_and_wrong(store: Store, rows: Sequence[int]) -> tuple[list[int], list[int], int]:
    """Rows without a state, rows without a response, and how many rows are wrong."""
    keys = [key(i) for i in rows]
    states, responses = store.read_states(keys), store.read_responses(keys)
    no_state = [i for i in rows if key(i) not in states]
    no_response = [i for i in rows if key(i) not in responses]
    found = [(states[key(i)], state(i, WIDTH)) for i in rows if key(i) in states]
    wrong = sum(not np.array_equal(row, truth) for row, truth in found)
    wrong += sum(responses.get(key(i), response(i)) != response(i) for i in rows)
    return no_state, no_response, wrong


def byte_flips(folder: Path, flips: int, rng: random.Random) -> dict[str, Any]:
    """One byte of one file changed; then what a run does: read, compute what is missing, read."""
    place, rows = folder / "flips", range(48)
    keep(Store(place), rows)
    files = committed(place)
    sizes = [path.stat().st_size for path in files]
    survived = lost = wrong = undetected = named = gone = 0
    for _ in range(flips):
        path = rng.choices(files, sizes)[0]
        content = flip(path, rng)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            store = Store(place)
            no_state, no_response, bad = missing_and_wrong(store, rows)
            told = [str(one.message) for one in caught if one.category is StoreDamage]
            said, missing = " ".join(told), {*no_state, *no_response}
            gone, named = gone + len(missing), named + sum(key(i) in said for i in missing)
            undetected += bool(missing) and path.name not in said
            undetected += bool((verify(Store(place))["status"] == "ok").all())
            if no_state:
                again = np.stack([state(i, WIDTH) for i in no_state])
                names = [key(i) for i in no_state]
                store.write_states(names, again, dtype="bfloat16", about=ABOUT)
            names = [key(i) for i in no_response]
            store.write_responses(names, [response(i) for i in no_response], about=ABOUT)
            left = missing_and_wrong(Store(place), rows)
        survived += left == ([], [], 0)
        wrong, lost = wrong + bad, lost + len({*left[0], *left[1]})
        for other in {*committed(place)} - {*files}:
            other.unlink()
        path.write_bytes(content)
    note = f"{gone} rows refused, {named} of them named by their keys (not where these were hit); "
    note += "a file not named is undetected"
    return result("flipped bytes", flips, survived, lost, wrong, undetected, note)


def flips_in_checkpoints(folder: Path, flips: int, rng: random.Random) -> dict[str, Any]:
    """One byte of a checkpoint changed: it is refused, and the next one takes its place."""
    place, tally = folder / "checkpoint flips", Tally()
    tensors = {"a": state(1, WIDTH), "b": state(2, WIDTH).astype(np.float64)}
    Store(place).write_checkpoint(key(0), tensors, ABOUT)
    (path,) = committed(place)
    for _ in range(flips):
        flip(path, rng)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            wrong = Store(place).read_checkpoint(key(0)) is not None
        said = any(path.name in str(one.message) for one in caught)
        undetected = (not said) + bool((verify(Store(place))["status"] == "ok").all())
        Store(place).write_checkpoint(key(0), tensors, ABOUT)
        found = Store(place).read_checkpoint(key(0))
        lost = found is None or any(not np.array_equal(found[0][n], tensors[n]) for n in tensors)
        tally.add(int(lost), int(wrong), undetected)
    note = f"{tally.survived} refused, and replaced by the next checkpoint"
    return tally.row("flipped bytes in a checkpoint", note, placed=False)


# ------------------------------------------------------------------------------------- full disks


def fill(
    place: Path, store: Store, note: str, tried: int = 1, free: Callable[[], object] | None = None
) -> dict[str, Any]:
    """Write until the store says that it cannot.

    Everything kept so far is there then, and room makes it go on.
    """
    kept: list[int] = []
    clear = False
    try:
        compute_missing(store, range(4000), 20, kept.append)
    except StoreError as error:
        clear = "no space is left" in str(error) and str(place) in str(error)
        clear = clear and isinstance(error.__cause__, OSError)
    half = sum(1 for _ in (place / "v1" / "writing").glob("*.tmp"))
    lost, wrong = audit(place, kept)
    if free:
        free()
        compute_missing(Store(place), range(len(kept) + 40), 20)
        more_lost, more_wrong = audit(place, range(len(kept) + 40))
        lost, wrong = lost + more_lost, wrong + more_wrong
    fine = clear and bool(kept) and not (half or lost or wrong)
    note = f"{note}; {len(kept)} rows kept, clear error: {clear}, half-written files: {half}"
    return result("disk full", tried, int(fine) * tried, lost, wrong, note=note)


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A tmpfs of its own. Raises PermissionError where mounting is not allowed."""
    disk = folder / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)]
    done = subprocess.run(mount, capture_output=True, text=True)
    if done.returncode:
        disk.rmdir()
        raise PermissionError(done.stderr.strip() or "mount failed")
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def disk_that_fills(folder: Path) -> list[dict[str, Any]]:
    try:
        with small_disk(folder, "1m") as disk:
            filler, place = disk / "filler", disk / "store"
            filler.write_bytes(bytes(600_000))
            full = fill(place, Store(place), "tmpfs of 1 MB", free=filler.unlink)
            subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
            try:
                Store(place).write_responses([key(-1)], [response(0)], about=ABOUT)
                clear = False
            except StoreError as error:
                clear = "read-only" in str(error)
            lost, wrong = audit(place, range(40))
            fine = int(clear and not (lost or wrong))
            note = "tmpfs remounted"
            return [full, result("disk read-only", 1, fine, lost, wrong, note=note)]
    except (PermissionError, FileNotFoundError) as error:
        note = f"not tried, mounting is not allowed here: {error}"
        return [result("disk full", 0, 0, note=note)]


def file_size_limit(folder: Path) -> dict[str, Any]:
    """RLIMIT_FSIZE in a child: the system lets no file grow, in the middle of a batch."""
    place = folder / "limit"
    compute_missing(Store(place), range(40), 20)

    def work(report: Report) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8000, resource.RLIM_INFINITY))
        try:
            compute_missing(Store(place), range(80), 20)
        except StoreError as error:
            report(int("no space is left" in str(error)))

    with fork(work) as (child, read):
        clear = reported(read) == [1]
        os.waitpid(child, 0)
    half = sum(1 for _ in (place / "v1" / "writing").glob("*.tmp"))
    lost, wrong = audit(place, range(40))
    fine = clear and not (half or lost or wrong)
    note = f"clear error: {clear}, half-written files: {half}"
    return result("file size limit", 1, int(fine), lost, wrong, note=note)
