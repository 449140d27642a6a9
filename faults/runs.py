"""Kills of the library's own runs: captures, samplings and trainings of the embedded model."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from analysis_lib.store.store import Store
from analysis_lib.store.upkeep import info

from .injection import (
    Report,
    Tally,
    begun,
    fork,
    half_written,
    kill_in_turn,
    lines,
    lines_of_a_commit,
    reported,
    unsound,
)
from .store import clear


class Telling(Store):
    """A store that tells of each key once its row is kept."""

    def __init__(self, folder: Path, tell: Callable[[str], object]) -> None:
        super().__init__(folder)
        self.tell = tell

    def write_states(self, keys: Sequence[str], states: np.ndarray, **options: Any) -> None:
        super().write_states(keys, states, **options)
        for k in keys:
            self.tell(k)

    def write_responses(
        self, keys: Sequence[str], rows: Sequence[Mapping[str, Any]], **options: Any
    ) -> None:
        super().write_responses(keys, rows, **options)
        for k in keys:
            self.tell(k)


def short(k: str) -> int:
    """A key as a number that `report` takes."""
    return int(k[:8], 16)


def kept_of(store: Store, keys: Sequence[str]) -> dict[str, Any]:
    found: dict[str, Any] = {k: row.tobytes() for k, row in store.read_states(keys).items()}
    return found | store.read_responses(keys)


def kills_in_a_run(
    fault: str,
    folder: Path,
    kills: int,
    rng: random.Random,
    work: Callable[[Store], Any],
    same: Callable[[Any, Any], bool],
    in_flight: int = 0,
) -> dict[str, Any]:
    """kill -9 at random moments of `work`, every other one while a file is half-written.

    It is begun again after each, and its outcome at the end is held against an unbroken one.
    in_flight: rows of the batch in flight that may be kept already, where several files keep one
    batch.
    """

    def reporting(place: Path, report: Report) -> object:
        return work(Telling(place, lambda k: report(short(k))))

    keys: list[str] = []
    start = time.process_time()  # a busy machine makes no run longer by this clock
    expected = work(Telling(folder / "unbroken", keys.append))
    seconds = time.process_time() - start
    truth = kept_of(Store(folder / "unbroken"), keys)
    files = (folder / "unbroken" / "v1").rglob("*")
    commits = sum(path.suffix in (".safetensors", ".jsonl") for path in files)
    moments = commits * lines_of_a_commit(folder / "one")
    tally, again, resumed, unequal = Tally(), 0, 0, 0
    kept: set[int] = set()
    place = folder / "0"
    for attempt in range(kills):
        heard = kill_in_turn(attempt, partial(reporting, place), seconds, moments, rng)
        again += max(0, len(kept.intersection(heard)) - in_flight)
        kept |= set(heard)
        hit = begun(place)
        clear(place)
        found = kept_of(store := Store(place), keys)
        lost = len(kept - {short(k) for k in found})
        wrong = sum(row != truth[k] for k, row in found.items())
        tally.add(lost, wrong, unsound(place), midway=hit)
        if len(found) == len(truth):
            unequal += not same(work(store), expected)
            resumed += 1
            kept, place = set(), folder / str(resumed)
    unequal += not same(work(Store(place)), expected)
    tally.lost, tally.wrong = tally.lost + again, tally.wrong + unequal
    note = f"{tally.midway} half-written files, {again} kept rows of earlier batches computed "
    note += f"again, {resumed + 1} resumed runs of {len(truth)} rows finished, {unequal} of them "
    return tally.row(f"kill -9 in {fault}", note + "unequal to the unbroken one")


def kills_in_training(
    folder: Path, kills: int, rng: random.Random, train: Callable[[Store], Any]
) -> dict[str, Any]:
    """kill -9 at random moments of `train`.

    A kept soft prompt is whole and the right one, and is not trained again.
    """
    from analysis_lib.train import dro

    def report_end(place: Path, report: Report) -> None:
        train(Store(place))
        report(1)

    def count(report: Report) -> None:
        report(lines(partial(train, Store(folder / "unbroken")), half_written))

    with fork(count) as (child, read):  # a process that ran backward is better not forked
        (moments,) = reported(read)
        _, _, used = os.wait4(child, 0)
    seconds = 4 * (used.ru_utime + used.ru_stime)
    trained_again = AssertionError("trained again")
    untrained = mock.patch.object(dro, "train_soft_prompt", side_effect=trained_again)
    with untrained:
        expected = train(Store(folder / "unbroken"))

    def right(place: Path) -> bool:
        with untrained:
            found = train(Store(place))
        equal = np.array_equal(found.embeddings, expected.embeddings)
        return equal and found.history.equals(expected.history)

    tally, finished = Tally(), 0
    for attempt in range(kills):
        place = folder / str(attempt)
        done = bool(kill_in_turn(attempt, partial(report_end, place), seconds, moments, rng))
        there = info(Store(place))["responses_rows"] > 0  # written last
        finished += done
        wrong = there and not right(place)
        tally.add(int(done and not there), int(wrong), midway=begun(place))
    with fork(partial(report_end, place)) as (child, read):
        resumed = reported(read) == [1]
        os.waitpid(child, 0)
    tally.wrong += not (resumed and right(place))
    note = f"{tally.midway} half-written files, {finished} had finished and were kept; begun again "
    note += f"after the last kill, the outcome is the unbroken one: {resumed}"
    return tally.row("kill -9 in train_dro", note)


def kills_of_the_library(folder: Path, brief: bool, rng: random.Random) -> list[dict[str, Any]]:
    """Kills in a capture, a sampling and a training; `brief`: a few of each."""
    import torch

    from analysis_lib import ChatModel, load_queries

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a pool of threads does not outlive a fork
    try:
        model, queries = ChatModel.load(), load_queries("anchor")
        table = kills_of_collecting(folder, brief, rng, model, queries)
        training = folder / "training"
        train = a_training(model, queries, queries.iloc[:: 25 if brief else 10])
        return [*table, kills_in_training(training, 2 if brief else 10, rng, train)]
    finally:
        torch.set_num_threads(threads)


def kills_of_collecting(
    folder: Path, brief: bool, rng: random.Random, model: Any, queries: Any
) -> list[dict[str, Any]]:
    """The runs are cut into batches that are small enough to be hit between them."""
    from analysis_lib import SoftPrompt, hidden_states, load_safety_prompts, sample_responses
    from analysis_lib.collect import responses as sampling
    from analysis_lib.collect import states as capture

    prompts, split = load_safety_prompts(), sampling._batches
    asked: dict[str, Any] = {name: prompts[name] for name in ("none", "short")}
    asked["soft"] = SoftPrompt.from_text(model, prompts["default"], name="soft")
    many, few = queries.iloc[:: 5 if brief else 1], queries.iloc[:: 25 if brief else 10]
    kills = 4 if brief else 45

    def one_query_each(*arguments: Any) -> list[dict[Any, Any]]:
        return [dict([job]) for batch in split(*arguments) for job in batch.items()]

    def capture_all(store: Store) -> Any:
        return hidden_states(model, many, asked, layers=(1, -1), store=store)

    def sample_all(store: Store) -> Any:
        options: dict[str, Any] = {"n_samples": 2, "max_new_tokens": 12}
        return sample_responses(model, few, asked, **options, store=store)

    def same_states(a: Any, b: Any) -> bool:
        return a.states.tobytes() == b.states.tobytes() and a.rows.equals(b.rows)

    with (
        mock.patch.object(capture, "CHUNK_ROWS", 16),
        mock.patch.object(sampling, "_batches", one_query_each),
    ):
        place = folder / "capture"  # a batch is kept layer by layer
        run = partial(kills_in_a_run, "hidden_states", place, kills, rng, in_flight=16)
        table = [run(capture_all, same_states)]
        place = folder / "sampling"
        run = partial(kills_in_a_run, "sample_responses", place, kills, rng)
        return [*table, run(sample_all, lambda a, b: a.equals(b))]


def a_training(model: Any, queries: Any, few: Any) -> Callable[[Store], Any]:
    """An epoch of DRO that ends in seconds."""
    from analysis_lib import (
        AnchorSpace,
        DROConfig,
        fit_direction,
        hidden_states,
        load_safety_prompts,
        train_dro,
    )

    states, rows = hidden_states(model, queries, {"none": ""}).at()
    space = AnchorSpace.fit(states)
    labels = {"y": rows["harmful"].astype(float), "groups": rows["query_id"]}
    Z, start = space.transform(states), load_safety_prompts()["short"]
    directions = [fit_direction(Z, name=name, **labels) for name in ("refusal", "harmfulness")]
    config = DROConfig(epochs=1)

    def train(store: Store) -> Any:
        return train_dro(model, few, start, space, *directions, config, store=store)

    return train
