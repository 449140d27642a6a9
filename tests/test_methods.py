"""Methods as rows: each row is the training it names, kept in the store; the weight's cross-validation keeps folds apart."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from analysis_lib import (
    AnchorSpace,
    ChatModel,
    DROConfig,
    PromptTuningConfig,
    Store,
    fit_direction,
    hidden_states,
    judge_responses,
    load_queries,
    load_safety_prompts,
    refusal_rates,
    sample_responses,
    train_dro,
    train_prompt_tuning,
    verdict_is_final,
)
from analysis_lib.train import ablations as methods
from analysis_lib.train.ablations import (
    Method,
    ablations,
    cross_validate_unlikelihood,
    train_methods,
)

DRO = DROConfig(epochs=1, learning_rate=3e-4)
TUNING = PromptTuningConfig(epochs=1, learning_rate=3e-4, weight_unlikelihood=0.02)
PROMPTS = {name: text for name, text in load_safety_prompts().items() if name in ("none", "short")}


@pytest.fixture(scope="module")
def anchor():
    """The organism, 16 anchor queries in pairs, and their judged responses under both prompts."""
    model, queries = ChatModel.load("organism"), load_queries("anchor")
    queries = queries[queries["pair_id"].isin(queries["pair_id"].unique()[::12][:8])].reset_index(
        drop=True
    )
    judged = judge_responses(
        sample_responses(model, queries, PROMPTS, n_samples=4, stop_when=verdict_is_final)
    )
    return model, queries, judged


def test_the_rows():
    rows = {m.prompt: m for m in ablations("short", DRO, TUNING)}
    assert len(rows) == 11 and {m.start for m in rows.values()} == {"short"}
    assert rows["tuned"].config == TUNING and rows["dro"].config == DRO and rows["dro"].k == 4
    for loss in ("refusal", "harmfulness", "norm"):
        assert rows[f"dro_without_{loss}"].config == replace(DRO, **{f"weight_{loss}": 0.0})
    assert {m.k for m in rows.values()} == {2, 4, 8, 16}
    assert {m.config.weight_norm for m in rows.values() if isinstance(m.config, DROConfig)} == {
        0.0,
        0.001,
        0.01,
        0.1,
        1.0,
    }
    assert len({m.method for m in rows.values()}) == 11


def test_each_row_is_the_training_it_names(anchor, tmp_path):
    model, queries, judged = anchor
    rows = [
        m
        for m in ablations("short", DRO, TUNING, components=(2,), norm_weights=())
        if m.prompt != "dro_without_norm"
    ]
    store = Store(tmp_path / "store")
    trained = train_methods(model, queries, PROMPTS, judged, rows, store=store)
    assert list(trained) == [m.prompt for m in rows] == [s.name for s in trained.values()]

    states, about = hidden_states(model, queries, PROMPTS).at(-1)
    about = about.merge(refusal_rates(judged), on=["query_id", "prompt"])
    for m in rows:
        if isinstance(m.config, DROConfig):
            space = AnchorSpace.fit(states, k=m.k)
            Z = space.transform(states)
            refusal = fit_direction(Z, about["refusal_rate"], name="r", groups=about["query_id"])
            harmfulness = fit_direction(
                Z, about["harmful"].astype(float), name="h", groups=about["query_id"]
            )
            expected = train_dro(
                model, queries, PROMPTS["short"], space, refusal, harmfulness, m.config
            )
        else:
            expected = train_prompt_tuning(model, queries, judged, PROMPTS["short"], m.config)
        np.testing.assert_allclose(trained[m.prompt].embeddings, expected.embeddings, atol=1e-6)
    pairs = [(a, b) for i, a in enumerate(trained.values()) for b in list(trained.values())[:i]]
    assert min(np.abs(a.embeddings - b.embeddings).max() for a, b in pairs) > 1e-5

    def again(*args, **kwargs):
        raise AssertionError("a kept training was repeated")

    with pytest.MonkeyPatch.context() as patch:  # an interrupted run goes on from the store
        patch.setattr("analysis_lib.train.dro.train_soft_prompt", again)
        kept = train_methods(model, queries, PROMPTS, judged, rows, store=store)
    assert all((kept[name].embeddings == soft.embeddings).all() for name, soft in trained.items())


def test_names_and_starts_are_checked(anchor):
    model, queries, judged = anchor
    for name in ("short", "dro"):
        with pytest.raises(ValueError, match=f"the name '{name}' is taken"):
            train_methods(
                model,
                queries,
                PROMPTS,
                judged,
                [Method("dro", "DRO", "short", DRO), Method(name, "DRO", "short", DRO)],
            )
    with pytest.raises(ValueError, match="'dro' starts from 'mine', which is none of none, short"):
        train_methods(model, queries, PROMPTS, judged, [Method("dro", "DRO", "mine", DRO)])


def test_the_weight_is_judged_on_queries_it_was_not_trained_on(anchor, monkeypatch):
    model, queries, judged = anchor
    seen, sampled = [], []
    train, sample = methods.train_prompt_tuning, methods.sample_responses

    def training(model, part, responses, prompt, config, **kwargs):
        assert set(responses["query_id"]) <= set(part["query_id"])
        seen.append((config.weight_unlikelihood, set(part["pair_id"])))
        return train(model, part, responses, prompt, config, **kwargs)

    def sampling(model, part, prompts, **kwargs):
        table = sample(model, part, prompts, **kwargs)
        sampled.append((set(part["pair_id"]), judge_responses(table)))
        return table

    monkeypatch.setattr(methods, "train_prompt_tuning", training)
    monkeypatch.setattr(methods, "sample_responses", sampling)
    table = cross_validate_unlikelihood(
        model, queries, judged, PROMPTS["short"], TUNING, weights=(1.0, 0.02), n_samples=3
    )
    assert [weight for weight, _ in seen] == [1.0, 1.0, 0.02, 0.02]
    for (_, trained_on), (held_out, _) in zip(seen, sampled, strict=True):
        assert not trained_on & held_out and trained_on | held_out == set(queries["pair_id"])
    for at, (_, row) in enumerate(table.iterrows()):
        verdicts = pd.concat([t for _, t in sampled[2 * at : 2 * at + 2]]).merge(
            queries[["query_id", "harmful"]]
        )
        rate = verdicts.groupby("harmful")[
            "refused"
        ].mean()  # equal numbers of samples: the mean of the queries' means
        assert row["compliance"] == pytest.approx(1 - rate[True]) and row[
            "false_refusal"
        ] == pytest.approx(rate[False])
        assert row["error"] == pytest.approx((row["compliance"] + row["false_refusal"]) / 2)
