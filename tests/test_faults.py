"""The short form of `python -m faults`: every fault is survived.

And each check sees a library that would not survive it.
"""

from __future__ import annotations

import os
import random
import time
from functools import partial

import numpy as np
import pytest

from analysis_lib import (
    AnchorSpace,
    ChatModel,
    Direction,
    DROConfig,
    hidden_states,
    sample_responses,
    train_dro,
)
from analysis_lib.data import user_files as loaders
from analysis_lib.data.prompts import load_safety_prompts
from analysis_lib.data.queries import load_queries
from analysis_lib.store import checkpoints, index, upkeep
from analysis_lib.store.store import Store
from analysis_lib.store.upkeep import prune
from analysis_lib.train import dro
from faults import damage, files, injection, runs, store

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def nothing_broke(outcome):
    assert outcome["survived"] == outcome["tried"] > 0, outcome
    assert outcome["lost"] == outcome["wrong"] == outcome["undetected"] == 0, outcome
    # else the faults met nothing that could break
    assert outcome["midway"] == "" or outcome["midway"] > 0, outcome


# --------------------------------------------------------------------------------------- the store


@pytest.mark.parametrize(
    "inject",
    [
        lambda folder, rng: store.kills_while_writing(folder, 8, rng),
        lambda folder, rng: store.kills_while_compacting(folder, 4, rng),
        lambda folder, rng: store.kills_while_pruning(folder, 4, rng),
        lambda folder, rng: store.kills_while_replacing_checkpoints(folder, 8, rng),
        lambda folder, rng: store.prunes_while_writing(folder, 200),
        lambda folder, rng: store.rival_writers(folder, 4, 50),
        lambda folder, rng: damage.byte_flips(folder, 60, rng),
        lambda folder, rng: damage.flips_in_checkpoints(folder, 60, rng),
        lambda folder, rng: damage.file_size_limit(folder),
    ],
    ids=["kill while writing", "kill while compacting", "kill while pruning"]
    + ["kill while replacing a checkpoint", "prune while writing", "rival writers"]
    + ["flipped bytes", "flipped bytes in a checkpoint", "file size limit"],
)
def test_the_store_loses_nothing(tmp_path, inject):
    nothing_broke(inject(tmp_path, random.Random(1)))


def test_a_disk_that_fills_loses_nothing(tmp_path):
    for outcome in damage.disk_that_fills(tmp_path):
        if not outcome["tried"]:
            pytest.skip(outcome["note"])
        nothing_broke(outcome)


def test_the_harness_sees_a_store_without_checksums(tmp_path, monkeypatch):
    checked = index.read_rows

    def unchecked(batch, rows):
        if batch.kind == "responses":
            yield from checked(batch, rows)
        else:
            content = batch.path.read_bytes()
            for row in rows:
                data = content[batch.offsets[row] : batch.offsets[row + 1]]
                yield row, data, data

    for user in (index, upkeep):
        monkeypatch.setattr(user, "read_rows", unchecked)
    outcome = damage.byte_flips(tmp_path, 20, random.Random(0))
    assert outcome["wrong"] > 0 and outcome["undetected"] > 0


def test_the_harness_sees_checkpoints_without_checksums(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "digest", lambda data: "1" * 64)
    outcome = damage.flips_in_checkpoints(tmp_path, 40, random.Random(0))
    assert outcome["wrong"] > 0 and outcome["undetected"] > 0, outcome


@pytest.mark.filterwarnings("ignore::analysis_lib.store.batches.StoreDamage")
def test_the_harness_sees_checkpoints_that_are_written_in_place(tmp_path, monkeypatch):
    def replace(temporary, target):
        content = temporary.read_bytes()
        with open(target, "wb") as file:
            file.write(content[: len(content) // 2])
            file.flush()
            time.sleep(0.01)
            file.write(content[len(content) // 2 :])

    monkeypatch.setattr(os, "replace", replace)
    outcome = store.kills_while_replacing_checkpoints(tmp_path, 16, random.Random(0))
    assert outcome["lost"] > 0 and outcome["undetected"] > 0, outcome


def test_the_harness_sees_a_prune_that_spares_nothing(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(store, "prune", partial(prune, spare=0))
    outcome = store.prunes_while_writing(tmp_path, 200)
    assert outcome["lost"] > 0 and outcome["midway"] == outcome["survived"] == 0, outcome


# ------------------------------------------------------------------------------ the library's runs


def test_killed_captures_samplings_and_trainings_go_on_where_they_stopped(tmp_path):
    for outcome in runs.kills_of_the_library(tmp_path, True, random.Random(2)):
        nothing_broke(outcome)


@pytest.mark.parametrize(
    ("plant", "column"),
    [("told too early", "lost"), ("begins anew", "lost"), ("by process", "wrong")],
)
def test_the_harness_sees_runs_that_lose_or_change_rows(tmp_path, monkeypatch, plant, column):
    keys = [injection.key(i) for i in range(400)]
    write, waiting = Store.write_states, []

    def write_late(kept, names, states, **options):
        waiting.append((names, states))
        if len(waiting) == 4:
            write(
                kept,
                [k for names, _ in waiting for k in names],
                np.concatenate([states for _, states in waiting]),
                **options,
            )
            waiting.clear()

    def work(store):
        found = {} if plant == "begins anew" else store.read_states(keys)
        for start in range(0, 400, 20):
            missing = [i for i in range(start, start + 20) if keys[i] not in found]
            states = np.array([injection.state(i, 8) for i in missing], np.float32).reshape(-1, 8)
            if plant == "by process":
                states += os.getpid()
            store.write_states(
                [keys[i] for i in missing], states, dtype="float32", about=injection.ABOUT
            )
        return None

    if plant == "told too early":
        monkeypatch.setattr(Store, "write_states", write_late)
    outcome = runs.kills_in_a_run(
        "planted", tmp_path, 40, random.Random(3), work, lambda a, b: True
    )
    assert outcome[column] > 0, outcome


def test_the_harness_sees_a_training_that_is_not_kept_whole(tmp_path, monkeypatch):
    def train(store):
        key = "0" * 64
        if not store.read_responses([key]):
            store.write_states(
                [key],
                np.full((1, 4), os.getpid(), np.float32),
                dtype="float32",
                about=injection.ABOUT,
            )
            store.write_responses([key], [{}], about=injection.ABOUT)
        return dro.SoftPrompt("s", store.read_states([key])[key][None], "text", "model")

    outcome = runs.kills_in_training(tmp_path, 6, random.Random(0), train)
    assert outcome["wrong"] > 0, outcome


# ------------------------------------------------------------------------------------ users' files


def test_fuzzed_files_are_tables_or_refused(tmp_path):
    nothing_broke(files.fuzzed_files(tmp_path / "a", 500, random.Random(4)))


@pytest.mark.parametrize(
    ("plant", "column"),
    [
        (
            lambda monkeypatch: monkeypatch.setattr(os.path, "realpath", lambda path: "/same"),
            "wrong",
        ),  # links are followed
        (
            lambda monkeypatch: monkeypatch.setattr(
                loaders, "check_text", lambda text, where: None
            ),
            "wrong",
        ),
        (
            lambda monkeypatch: monkeypatch.setattr(
                loaders.json, "loads", lambda text, **k: {"text": [][0]}
            ),
            "wrong",
        ),
        (
            lambda monkeypatch: monkeypatch.setattr(loaders, "shown", repr),
            "undetected",
        ),  # messages of any length
    ],
    ids=["links", "control characters", "another exception", "long messages"],
)
def test_the_harness_sees_loaders_that_break(tmp_path, monkeypatch, plant, column):
    with monkeypatch.context() as patch:
        plant(patch)
        outcome = files.fuzzed_files(tmp_path / "a", 1500, random.Random(5), shown=0)
    assert outcome[column] > 0, outcome


# ---------------------------------------------------------------------------------- a filled store


def test_a_filled_store_answers_without_the_models_weights(tmp_path, monkeypatch):
    queries, prompts = load_queries("anchor").iloc[::40], load_safety_prompts()
    space = AnchorSpace.fit(
        np.random.default_rng(0).standard_normal((20, ChatModel.load().hidden_size))
    )
    directions = [
        Direction(name, np.array([1.0, 0.5, 0.2, 0.1]), 0.0, {})
        for name in ("refusal", "harmfulness")
    ]

    def notebook():
        model, store = ChatModel.load(), Store(tmp_path)
        config = DROConfig(epochs=1, batch_size=5)
        soft = train_dro(model, queries, prompts["short"], space, *directions, config, store=store)
        asked = {"none": "", "short": prompts["short"], "dro": soft}
        states = hidden_states(model, queries, asked, layers=(1, -1), store=store)
        responses = sample_responses(
            model, queries, asked, n_samples=2, max_new_tokens=8, store=store
        )
        return soft.embeddings.tobytes(), states.states.tobytes(), responses

    first = notebook()
    monkeypatch.setattr(
        ChatModel, "model", property(lambda self: pytest.fail("the weights were loaded"))
    )
    again = notebook()
    assert again[:2] == first[:2] and again[2].equals(first[2])
    with pytest.raises(pytest.fail.Exception, match="the weights were loaded"):
        hidden_states(
            ChatModel.load(), queries, {"mistral": prompts["mistral"]}, store=Store(tmp_path)
        )
