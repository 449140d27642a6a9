"""A study measures what the functions it calls measure, once, and only when asked."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace
from functools import cache

import numpy as np
import pandas as pd
import pytest
import tiny_models

import analysis_lib
from analysis_lib import (
    AnchorSpace,
    ChatModel,
    SoftPrompt,
    Store,
    Study,
    fit_direction,
    hidden_states,
    is_refusal,
    judge_responses,
    load_queries,
    load_safety_prompts,
    normalized_verdict_is_final,
    refusal_rates,
    sample_responses,
    string_normalized,
    verdict_is_final,
)
from analysis_lib.analysis import study as room
from analysis_lib.data.user_files import DataError

SMALL = {"layers": (2, -1), "k": 3, "n_samples": 4, "seed": 5}


@cache
def organism():
    return ChatModel.load("organism")


def queries(n=10):
    return load_queries("anchor").groupby("harmful", sort=False).head(n)


def two_prompts():
    return {name: load_safety_prompts()[name] for name in ("none", "short")}


def small(**options):
    return Study(organism(), queries(), two_prompts(), **SMALL | options)


@pytest.fixture
def counted(monkeypatch):
    """How often each function that the room calls was called."""
    calls = {}

    def count(name):
        function = getattr(room, name)

        def counting(*args, **kwargs):
            calls[name] = calls.get(name, 0) + 1
            return function(*args, **kwargs)

        monkeypatch.setattr(room, name, counting)

    for name in (
        "hidden_states",
        "sample_responses",
        "judge_responses",
        "refusal_rates",
        "fit_direction",
    ):
        count(name)
    fit = AnchorSpace.fit.__func__

    def fitting(cls, *args, **kwargs):
        calls["space"] = calls.get("space", 0) + 1
        return fit(cls, *args, **kwargs)

    monkeypatch.setattr(AnchorSpace, "fit", classmethod(fitting))
    return calls


def test_every_number_is_that_of_the_long_way():
    study = small()
    captured = hidden_states(organism(), queries(), two_prompts(), layers=(2, -1))
    replies = sample_responses(
        organism(), queries(), two_prompts(), n_samples=4, seed=5, stop_when=verdict_is_final
    )
    judged = judge_responses(replies)
    states, rows = captured.at(-1)
    rows = rows.merge(refusal_rates(judged), on=["query_id", "prompt"])
    space = AnchorSpace.fit(states, k=3)
    Z = space.transform(states)
    refusal = fit_direction(Z, rows["refusal_rate"], name="refusal", groups=rows["query_id"])
    labels = rows["harmful"].astype(float)
    harmfulness = fit_direction(Z, labels, name="harmfulness", groups=rows["query_id"])

    assert np.array_equal(study.states.states, captured.states)
    assert study.states.layers == (2, -1)
    pd.testing.assert_frame_equal(study.responses, replies)
    pd.testing.assert_frame_equal(study.judged, judged)
    pd.testing.assert_frame_equal(study.rates, refusal_rates(judged))
    pd.testing.assert_frame_equal(study.rows, rows)
    assert np.array_equal(study.space.basis, space.basis)
    assert np.array_equal(study.coordinates, Z)
    for ours, theirs in ((study.refusal, refusal), (study.harmfulness, harmfulness)):
        assert ours.name == theirs.name and ours.bias == theirs.bias
        assert np.array_equal(ours.weight, theirs.weight) and ours.scores == theirs.scores


def test_points_are_those_that_figures_make():
    from analysis_lib.figures import points_table

    study = small()
    expected = points_table(study.coordinates, study.states.at(-1)[1])
    pd.testing.assert_frame_equal(study.points, expected)


def test_nothing_is_computed_before_it_is_asked_for(counted):
    study = small()
    assert counted == {} and "nothing yet" in repr(study)
    _ = study.states, study.states
    assert counted == {"hidden_states": 1}
    _ = study.harmfulness, study.points
    assert counted == {"hidden_states": 1, "space": 1, "fit_direction": 1}
    assert "measured: states, space, harmfulness" in repr(study)
    _ = study.rates
    assert counted["sample_responses"] == counted["judge_responses"] == 1


def test_each_result_is_computed_once(counted):
    study = small()
    for _ in range(2):
        for name in (*room.MEASURED, "rows", "points", "coordinates"):
            getattr(study, name)
    assert counted.pop("fit_direction") == 2  # refusal and harmfulness
    assert set(counted.values()) == {1} and len(counted) == 5


def test_a_second_study_reads_the_store(tmp_path, monkeypatch):
    store = Store(tmp_path)
    first = small(store=store)
    _ = first.rows
    again = Study("organism", queries(), two_prompts(), store=Store(tmp_path), **SMALL)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", None)
    assert np.array_equal(again.states.states, first.states.states)
    pd.testing.assert_frame_equal(again.rows, first.rows)
    assert again.states.certificate["computed"] == 0 and not again.model.loaded


def test_names_and_files_stand_for_what_they_load(tmp_path):
    (tmp_path / "mine.txt").write_text("Be careful.", encoding="utf-8")
    (tmp_path / "asked.csv").write_text("text,harmful\nHow to bake bread?,false\n")
    study = Study("organism", "facts")
    assert study.model.name == "organism" and list(study.prompts) == list(load_safety_prompts())
    pd.testing.assert_frame_equal(study.queries, load_queries("facts"))
    study = Study(organism(), tmp_path / "asked.csv", str(tmp_path / "mine.txt"))
    assert study.model is organism() and study.prompts["mine"] == "Be careful."
    assert study.queries["text"].tolist() == ["How to bake bread?"]


def test_what_was_given_cannot_change_under_a_study():
    table, prompts = queries(), two_prompts()
    study = Study(organism(), table, prompts)
    prompts["more"], table["text"] = "x", "changed"
    assert list(study.prompts) == ["none", "short"] and "changed" not in set(study.queries["text"])
    with pytest.raises(FrozenInstanceError):
        study.k = 2
    other = replace(study, k=2)
    assert (other.k, study.k) == (2, 4) and other.model is study.model


def test_a_replaced_setting_is_measured_anew():
    study = small()
    _ = study.states
    other = replace(study, queries=queries(6))
    assert len(other.states.rows) == 24 and len(study.states.rows) == 40
    assert other.layers == study.layers and other.seed == 5


def test_other_prompts_are_seen_in_the_same_space():
    study = small()
    soft = SoftPrompt.from_text(organism(), "You are careful.", name="soft")
    other = study.under({"none": "", "soft": soft})
    states, rows = hidden_states(organism(), queries(), {"none": "", "soft": soft}).at(-1)
    assert np.array_equal(other.coordinates, study.space.transform(states))
    assert other.rows["prompt"].tolist() == rows["prompt"].tolist()
    assert other.space is study.space
    assert other.refusal is study.refusal and other.harmfulness is study.harmfulness
    few = other.under({"none": ""}, queries="facts", n_samples=1)
    assert few.space is study.space and len(few.responses) == len(load_queries("facts"))


def test_the_string_judge_alone_ends_replies_early():
    def short(text):
        return len(text) < 20

    assert small().sampling["stop_when"] is verdict_is_final
    normalized = small(judge=string_normalized).sampling["stop_when"]
    assert normalized is normalized_verdict_is_final
    assert small(judge=is_refusal, stop_when=None).sampling["stop_when"] is None
    study = small(judge=short, max_new_tokens=12, n_samples=1)
    assert study.sampling["stop_when"] is None
    verdicts = [float(len(text) < 20) for text in study.responses["response"]]
    assert study.judged["refused"].tolist() == verdicts
    assert small(judge=short, stop_when=verdict_is_final).sampling["stop_when"] is verdict_is_final


def test_rows_without_rate_or_label_are_left_out_of_a_fit():
    study = small()
    rates = study.rates.assign(
        refusal_rate=study.rates["refusal_rate"].where(study.rates.index > 2)
    )
    table = queries().assign(harmful=queries()["harmful"].where(queries().index != 0))
    other = Study(organism(), table, two_prompts(), **SMALL, known={"rates": rates})
    known = other.rows["refusal_rate"].notna().to_numpy()
    assert known.sum() == 37
    expected = fit_direction(
        other.coordinates[known],
        other.rows["refusal_rate"][known],
        name="refusal",
        groups=other.rows["query_id"][known],
    )
    assert np.array_equal(other.refusal.weight, expected.weight)
    assert np.isfinite(other.harmfulness.weight).all()
    unlabelled = Study(organism(), "borderline", two_prompts())
    with pytest.raises(ValueError, match="no row has a value that 'harmfulness'"):
        unlabelled.harmfulness  # noqa: B018
    with pytest.raises(ValueError, match="no column 'harmful'"):
        replace(study, queries=queries().drop(columns="harmful")).harmfulness  # noqa: B018


def test_what_is_known_is_taken_as_it_is(counted):
    first = small()
    rates = first.rates.assign(refusal_rate=0.5)
    study = small(known={"states": first.states, "rates": rates})
    counted.clear()
    assert study.rows["refusal_rate"].eq(0.5).all() and counted == {}
    assert "rates" not in vars(study.under({"none": ""}))
    with pytest.raises(ValueError, match=r"known = \['rate'\]: names are states"):
        small(known={"rate": rates})


def test_the_space_lies_in_the_last_of_the_layers():
    assert small(layers=(-1, 0, 2)).layer == -1
    study = small(layers=[1, 3])
    assert study.layer == 3 and small(layers=2).layers == (2,)
    expected = AnchorSpace.fit(study.states.at(3)[0], 3)
    assert np.array_equal(study.space.mean, expected.mean)


def test_where_a_training_starts():
    soft = SoftPrompt.from_text(organism(), "You are careful.", name="soft")
    assert Study(organism(), "facts").start == "default"
    assert small().start == "short"
    own = {"none": "", "default": load_safety_prompts()["default"], "soft": soft, "mine": "x"}
    assert small().under(own).start == "mine"
    with pytest.raises(ValueError, match=r"no prompt of \['none', 'soft'\] is a text"):
        small().under({"none": "", "soft": soft}).start  # noqa: B018


def test_the_caption_of_figures():
    assert "nothing about 7B models" in small().note
    other = tiny_models.chat("llama")
    assert Study(other, "facts", {"none": ""}).note == other.name


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": 5}, TypeError, "model = 5: give a name or a ChatModel; ChatModel.wrap"),
        ({"model": "no such folder/x/y"}, Exception, "no such folder"),
        ({"queries": ["How to bake?"]}, TypeError, "give a table, or a name or file"),
        ({"queries": "ancor"}, DataError, "no query set 'ancor'; sets: anchor"),
        ({"queries": pd.DataFrame({"text": ["x"]})}, ValueError, "lack the column query_id"),
        ({"queries": queries().head(0)}, ValueError, "the table of queries is empty"),
        ({"prompts": {}}, ValueError, "give {name: text or SoftPrompt}"),
        ({"prompts": ["Be careful."]}, ValueError, "give {name: text or SoftPrompt}"),
        ({"prompts": "Be careful."}, DataError, "unknown kind of file"),
        ({"layers": ()}, ValueError, "layers (): give distinct numbers from 0 to 4"),
        ({"layers": (-1, -1)}, ValueError, "layers (-1, -1): give distinct numbers"),
        ({"layers": (9,)}, ValueError, "layers (9,): give distinct numbers from 0 to 4"),
        ({"k": 0}, ValueError, "k = 0: give a number of components from 1 to 128"),
        ({"judge": {"string": is_refusal}}, TypeError, "give one function, such as is_refusal"),
        ({"stop_when": "final"}, ValueError, "give a function, 'auto' or None"),
    ],
)
def test_a_wrong_input_is_told_before_anything_is_computed(change, error, message, counted):
    given = {"model": organism(), "queries": queries(), "prompts": two_prompts()} | change
    with pytest.raises(error) as told:
        Study(**given)
    assert message in str(told.value) and counted == {}


def test_the_name_is_public():
    assert analysis_lib.Study is Study and "Study" in analysis_lib.__all__
