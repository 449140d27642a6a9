"""Faults of the store: processes that are killed, or that write, prune and compact at once."""

from __future__ import annotations

import contextlib
import os
import random
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from analysis_lib.store.store import Store
from analysis_lib.store.upkeep import compact, prune, verify

from .injection import (
    ABOUT,
    Report,
    Tally,
    audit,
    begun,
    compute_missing,
    end,
    ended,
    fork,
    half_written,
    key,
    kill_at,
    kill_in_turn,
    lines,
    lines_of_a_commit,
    reported,
    response,
    result,
    state,
    unsound,
    within,
)


def clear(place: Path) -> None:
    """What dead processes left unfinished goes."""
    prune(Store(place), max_bytes=10**12, spare=0)


def kills_while_writing(folder: Path, kills: int, rng: random.Random) -> dict[str, Any]:
    """kill -9 at random moments of a run, every other one while a file is half-written.

    The next run goes on where it stopped.
    """
    n, batch = 400, 20
    start = time.perf_counter()
    compute_missing(Store(folder / "undisturbed"), range(5 * batch), batch)
    seconds = 4 * (time.perf_counter() - start) / 5
    moments = 8 * lines_of_a_commit(folder / "one")
    tally, again, stores = Tally(), 0, 0
    kept: set[int] = set()
    place = folder / "kills-0"
    for attempt in range(kills):
        run = partial(compute_missing, Store(place), range(n), batch)
        heard = kill_in_turn(attempt, run, seconds, moments, rng)
        again += len(kept.intersection(heard))  # a row kept before was computed again
        kept |= set(heard)
        hit = begun(place)
        clear(place)
        tally.add(*audit(place, sorted(kept)), unsound(place) + begun(place), midway=hit)
        if len(kept) == n:
            kept, stores = set(), stores + 1
            place = folder / f"kills-{stores}"
    compute_missing(Store(place), range(n), batch)
    lost, wrong = audit(place, range(n))
    tally.lost, tally.wrong = tally.lost + lost + again, tally.wrong + wrong
    note = f"{tally.midway} half-written files, {again} kept rows computed again, "
    return tally.row("kill -9 while writing", note + f"{stores + 1} runs of {n} rows finished")


def kills_while_compacting(folder: Path, kills: int, rng: random.Random) -> dict[str, Any]:
    """kill -9 while the new file is half-written, and while it takes the place of the old ones."""
    n = 200

    def work(place: Path, report: Report = lambda i: None) -> None:
        compact(Store(place), spare=0)
        report(1)

    def fresh(name: str) -> Path:
        compute_missing(Store(folder / name), range(n), 10)
        return folder / name

    removal = within("replace_pile", "remove_unchanged", "remove")
    points = [
        (point, lines(partial(work, fresh(name)), point))
        for name, point in (("1", half_written), ("2", removal))
    ]
    tally, new, old = Tally(), 0, 0
    for attempt in range(kills):
        place = fresh(f"compact-{attempt}")
        before = {*place.glob("v1/*/*.safetensors"), *place.glob("v1/*/*.jsonl")}
        point, count = points[attempt % 2]
        kill_at(partial(work, place), point, rng.randint(1, count))
        half_new = begun(place)
        half_old = 0 < sum(not path.exists() for path in before) < len(before)
        new, old = new + half_new, old + half_old
        lost, wrong = audit(place, range(n))
        half = unsound(place)
        work(place)  # goes on where it stopped
        more, worse = audit(place, range(n))
        half += unsound(place) + len(list(place.glob("v1/states/*"))) - 1
        tally.add(lost + more, wrong + worse, half, midway=half_new or half_old)
    note = f"{new} half-written files, {old} half-done removals of the old ones"
    return tally.row("kill -9 while compacting", note)


def kills_while_pruning(folder: Path, kills: int, rng: random.Random) -> dict[str, Any]:
    """kill -9 during a prune of one of two models.

    Another killed process had left a half-written file.
    """
    n = 100
    commit, other = lines_of_a_commit(folder / "one"), {**ABOUT, "model": "1" * 64}
    other["model_name"] = "other"
    pruned = range(n, 2 * n)

    def write(store: Store, report: Report) -> None:
        compute_missing(store, range(n), 10)
        for start in pruned[::10]:
            part = range(start, start + 10)
            rows = [response(i) for i in part]
            store.write_responses([key(i) for i in part], rows, about=other)
        third = partial(compute_missing, store, range(2 * n, 3 * n), 10)
        lines(third, half_written, rng.randint(1, commit))

    def fresh(name: str) -> Path:
        with fork(partial(write, Store(folder / name))) as (child, _):  # it is killed
            os.waitpid(child, 0)
        return folder / name

    def work(place: Path, report: Report = lambda i: None) -> None:
        prune(Store(place), model="other", spare=0)
        report(1)

    point = within("sweep", "remove_unchanged", "remove")
    count = lines(partial(work, fresh("undisturbed")), point)
    tally = Tally()
    for attempt in range(kills):
        place = fresh(f"prune-{attempt}")
        before = {*place.glob("v1/*/*")}
        done = kill_at(partial(work, place), point, rng.randint(1, count))
        midway = not done and any(not path.exists() for path in before)
        left = Store(place).read_responses([key(i) for i in pruned])
        lost, wrong = audit(place, range(n))
        wrong += sum(left.get(key(i), response(i)) != response(i) for i in pruned)
        half = unsound(place)
        clear(place)
        if left:
            work(place)
        half += begun(place) + len(Store(place).read_responses([key(i) for i in pruned]))
        tally.add(lost, wrong, half, midway=midway)
    note = f"{tally.midway} half-done removals; what a second prune leaves counts as undetected"
    return tally.row("kill -9 while pruning", note)


def checkpoint(step: int) -> dict[str, np.ndarray]:
    """The true checkpoint of a step."""
    return {"soft": state(step).reshape(4, -1), "moment": state(step + 10**6).astype(float)}


def kills_while_replacing_checkpoints(
    folder: Path, kills: int, rng: random.Random
) -> dict[str, Any]:
    """kill -9 while a checkpoint is replaced: it is the last one, or the one in flight, and whole.

    lost: an earlier one, or none.
    """

    def work(place: Path, report: Report) -> None:
        store = Store(place)
        found = store.read_checkpoint(key(0))
        begin = 0 if found is None else int(found[1]["step"]) + 1
        for step in range(begin, begin + 20):
            store.write_checkpoint(key(0), checkpoint(step), {**ABOUT, "step": step})
            report(step)

    place, tally, last = folder / "checkpoints", Tally(), -1
    moments = 4 * lines_of_a_commit(folder / "one")
    start = time.perf_counter()
    work(folder / "undisturbed", lambda step: None)
    seconds = (time.perf_counter() - start) / 2
    for attempt in range(kills):
        heard = kill_in_turn(attempt, partial(work, place), seconds, moments, rng)
        last = max([last, *heard])
        hit = begun(place)
        clear(place)
        found = Store(place).read_checkpoint(key(0))
        step, wrong = -1, False
        if found is not None:
            step = int(found[1]["step"])
            truth = checkpoint(step)
            wrong = not all(np.array_equal(found[0][name], truth[name]) for name in truth)
        tally.add(int(step < last), int(wrong), unsound(place) + begun(place), midway=hit)
    note = f"{tally.midway} half-written files, {last + 1} checkpoints reported"
    return tally.row("kill -9 while replacing a checkpoint", note)


def prunes_while_writing(folder: Path, rows: int) -> dict[str, Any]:
    """Everything pruned and compacted without a pause, while another process writes.

    What it wrote stays, since it is younger than a day. `compact` is told to spare nothing: it
    moves rows to other files under the hands of who writes and reads.
    """
    place = folder / "pruned"

    def write(report: Report) -> None:
        compute_missing(Store(place), range(rows), 10, report)
        time.sleep(600)  # alive until it is killed

    prunes, refused, kept = 0, 0, b""
    with fork(write) as (child, read):
        os.set_blocking(read, False)
        while len(kept) < 4 * rows and not ended(child):
            actions = prune(Store(place), max_bytes=0)["action"]
            prunes += 1
            refused += any(action == "kept: younger than a day" for action in actions)
            compact(Store(place), spare=0)
            with contextlib.suppress(BlockingIOError):
                kept += os.read(read, 1 << 16)
        lost, wrong = audit(place, range(rows))
        half = unsound(place)
        end(child)
    prune(Store(place), max_bytes=0, spare=0)
    half += len(verify(Store(place)))  # nobody's any more
    note = f"{refused} refused; pruned when told to spare nothing: {not half}"
    survived = prunes * (not (lost or wrong or half))
    return result("prune while writing", prunes, survived, lost, wrong, half, note, refused)


def rival_writers(folder: Path, writers: int, rows: int) -> dict[str, Any]:
    """Writers that overlap by half, while others compact and read without a pause."""
    place = folder / "rivals"
    spans = [range(w * rows // 2, w * rows // 2 + rows) for w in range(writers)]
    every = range(spans[0].start, spans[-1].stop)
    truth = {key(i): i for i in every}

    def write(span: range, report: Report) -> None:
        store = Store(place)
        for start in range(span.start, span.stop, 25):
            compute_missing(store, range(start, min(start + 25, span.stop)), 25, report)

    def disturb(report: Report) -> None:
        while True:
            compact(Store(place), spare=0)
            time.sleep(0.02)

    def read(report: Report) -> None:
        store = Store(place)
        while True:
            states, responses = store.read_states(list(truth)), store.read_responses(list(truth))
            wrong = sum(not np.array_equal(row, state(truth[k])) for k, row in states.items())
            report(wrong + sum(row != response(truth[k]) for k, row in responses.items()))

    with contextlib.ExitStack() as stack:
        reader, seen = stack.enter_context(fork(read))
        disturber, _ = stack.enter_context(fork(disturb))
        children = [stack.enter_context(fork(partial(write, span))) for span in spans]
        heard = [i for _, pipe in children for i in reported(pipe)]
        failed = sum(os.waitpid(child, 0)[1] != 0 for child, _ in children)
        for child in (reader, disturber):
            end(child)
        looks = reported(seen)
    lost, wrong = audit(place, every)
    note = f"{len(heard)} rows reported, {len(set(heard))} distinct, "
    note += f"{len(looks)} reads of all rows meanwhile"
    counts = (writers, writers - failed, lost, wrong + sum(looks), unsound(place))
    return result(f"{writers} writers x {rows} rows at once", *counts, note)
