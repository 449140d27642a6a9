"""Rows whose truth is known, and ways to stop a process in the middle of its work."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from analysis_lib import store as package
from analysis_lib.store.batches import row_key
from analysis_lib.store.store import Store
from analysis_lib.store.upkeep import verify

ABOUT = {"model": "0" * 64, "model_name": "faults", "prompts": ["none"], "layer": -1}
WIDTH = 1024
STORE = str(Path(str(package.__file__)).parent)

Report = Callable[[int], object]
Point = Callable[[FrameType], bool]


def key(i: int) -> str:
    return row_key(test="faults", row=i)


def state(i: int, width: int = WIDTH) -> np.ndarray:
    """The true state of row i: (width,) float32 that bfloat16 holds exactly."""
    bits = np.random.default_rng(i).standard_normal(width).astype(np.float32).view(np.uint32)
    return (bits & np.uint32(0xFFFF0000)).view(np.float32)


def response(i: int) -> dict[str, Any]:
    return {"row": i, "response": f"answer {i} " * (1 + i % 7)}


def compute_missing(
    store: Store, rows: Sequence[int], batch: int, report: Report = lambda i: None
) -> int:
    """What a run does: keep what is missing, batch by batch. `report` hears of each kept row."""
    keys = [key(i) for i in rows]
    kept = store.read_states(keys).keys() & store.read_responses(keys).keys()
    missing = [i for i in rows if key(i) not in kept]
    for start in range(0, len(missing), batch):
        part = missing[start : start + batch]
        names = [key(i) for i in part]
        states = np.stack([state(i) for i in part])
        store.write_states(names, states, dtype="bfloat16", about=ABOUT)
        store.write_responses(names, [response(i) for i in part], about=ABOUT)
        for i in part:
            report(i)
    return len(missing)


def audit(folder: Path, rows: Sequence[int]) -> tuple[int, int]:
    """(lost, wrong) among rows that were reported as kept, seen by a fresh reader."""
    store, keys = Store(folder), [key(i) for i in rows]
    states, responses = store.read_states(keys), store.read_responses(keys)
    lost = sum(k not in states or k not in responses for k in keys)
    wrong = sum(key(i) in states and not np.array_equal(states[key(i)], state(i)) for i in rows)
    wrong += sum(key(i) in responses and responses[key(i)] != response(i) for i in rows)
    return lost, wrong


def unsound(folder: Path) -> int:
    """Committed files that are not whole: no fault but a flipped byte may leave one."""
    return int((verify(Store(folder))["status"] != "ok").sum())


def begun(place: Path) -> bool:
    """Whether a file is half-written."""
    return any((place / "v1" / "writing").glob("*.tmp"))


def result(
    fault: str,
    tried: int,
    survived: int,
    lost: int = 0,
    wrong: int = 0,
    undetected: int = 0,
    note: str = "",
    midway: int | str = "",
) -> dict[str, Any]:
    """A row of the table."""
    row = {"fault": fault, "tried": tried, "midway": midway, "survived": survived, "lost": lost}
    return {**row, "wrong": wrong, "undetected": undetected, "note": note}


@dataclass
class Tally:
    """What became of the faults of one kind so far."""

    tried: int = 0
    survived: int = 0
    lost: int = 0
    wrong: int = 0
    undetected: int = 0
    midway: int = 0

    def add(
        self, lost: int = 0, wrong: int = 0, undetected: int = 0, *, midway: bool = False
    ) -> None:
        """One more fault."""
        self.tried += 1
        self.survived += not (lost or wrong or undetected)
        self.lost += lost
        self.wrong += wrong
        self.undetected += undetected
        self.midway += midway

    def row(self, fault: str, note: str, *, placed: bool = True) -> dict[str, Any]:
        """placed: whether the faults are placed to meet something midway."""
        counts = (self.tried, self.survived, self.lost, self.wrong, self.undetected)
        return result(fault, *counts, note, self.midway if placed else "")


# -------------------------------------------------------------------------------------- processes


@contextlib.contextmanager
def fork(work: Callable[[Report], object]) -> Iterator[tuple[int, int]]:
    """Run `work(report)` in a child.

    Yields its process id, and the read end of the pipe that `report(number)` writes to.
    """
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(read)
            work(lambda number: os.write(write, number.to_bytes(4, "little")))
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(write)
    try:
        yield child, read
    finally:
        os.close(read)


def reported(read: int) -> list[int]:
    data = b"".join(iter(lambda: os.read(read, 1 << 16), b""))
    whole = range(0, len(data) - len(data) % 4, 4)
    return [int.from_bytes(data[i : i + 4], "little") for i in whole]


def ended(child: int) -> bool:
    """Whether a child has ended, which is still to be waited for."""
    return bool(os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT))


def end(child: int) -> None:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def kill(work: Callable[[Report], object], after: float) -> list[int]:
    """Run `work` in a child and kill -9 it `after` seconds from its beginning: what it reported."""

    def begin(report: Report) -> None:
        report(0)
        work(report)

    with fork(begin) as (child, read):
        os.read(read, 4)
        until = time.perf_counter() + after
        while (left := until - time.perf_counter()) > 0 and not ended(child):
            time.sleep(min(left, 0.01))
        os.kill(child, signal.SIGKILL)
        heard = reported(read)
        os.waitpid(child, 0)
    return heard


def lines(work: Callable[[], object], point: Point, last: int = 0) -> int:
    """Run `work`: how many lines of the store's code met `point`.

    At number `last` of them, this process is killed (-9).
    """
    count, before = 0, sys.gettrace()

    def line(frame: FrameType, event: str, arg: object) -> Any:
        nonlocal count
        if event == "line" and point(frame):
            count += 1
            if count == last:
                os.kill(os.getpid(), signal.SIGKILL)
        return line

    def call(frame: FrameType, event: str, arg: object) -> Any:
        return line if frame.f_code.co_filename.startswith(STORE) else None

    sys.settrace(call)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


def half_written(frame: FrameType) -> bool:
    """Whether a line runs while the file that it commits is begun and not yet in place."""
    temporary = frame.f_locals.get("temporary")
    return frame.f_code.co_name == "commit" and temporary is not None and temporary.exists()


def within(*functions: str) -> Point:
    return lambda frame: frame.f_code.co_name in functions


def kill_at(work: Callable[[Report], object], point: Point, last: int) -> list[int]:
    """Run `work` in a child that is killed at line `last` of those at `point`: what it reported."""
    with fork(lambda report: lines(partial(work, report), point, last)) as (child, read):
        heard = reported(read)
        os.waitpid(child, 0)
    return heard


def lines_of_a_commit(folder: Path) -> int:
    """Lines of the store's code during which a file is half-written."""
    write = partial(Store(folder).write_responses, [key(0)], [response(0)], about=ABOUT)
    return lines(write, half_written)


def kill_in_turn(
    attempt: int,
    work: Callable[[Report], object],
    seconds: float,
    moments: int,
    rng: random.Random,
) -> list[int]:
    """Kill every other run at a random time, the rest while a file is half-written."""
    if attempt % 2:
        return kill(work, rng.uniform(0, seconds))
    return kill_at(work, half_written, rng.randint(1, moments))
