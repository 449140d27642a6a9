"""Equal texts are one unit, and labels are true, false or missing, whoever wrote them."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from analysis_lib import figures
from analysis_lib.analysis.benchmark import benchmark_table, metric_table
from analysis_lib.analysis.directions import (
    Direction,
    bootstrap_directions,
    calibrate_refusal,
    fit_direction,
    separation,
)
from analysis_lib.analysis.intervals import difference_interval, sign_flips
from analysis_lib.analysis.metrics import harmful_queries, harmless_queries, unlabelled_queries
from analysis_lib.analysis.space import AnchorSpace, FitError, cosines, mean_shifts
from analysis_lib.analysis.study import Study
from analysis_lib.data.labels import read_labels, with_labels
from analysis_lib.data.queries import (
    QUERY_SETS,
    load_anchor_queries,
    load_heldout_queries,
    load_queries,
)
from analysis_lib.data.units import query_units, text_key
from analysis_lib.data.user_files import DataError
from analysis_lib.data.wrappers import wrap_queries
from analysis_lib.judge.models import published_judge
from analysis_lib.judge.verdicts import RowJudge, judge_responses
from analysis_lib.train.dro import DROConfig, train_dro
from analysis_lib.train.tuning import PromptTuningConfig, train_prompt_tuning

RNG = np.random.default_rng(0)


def write(path, rows, header="text,harmful"):
    path.write_text("\n".join([header, *rows]), encoding="utf-8")
    return path


# ------------------------------------------------------------------------------------------ copies


def test_the_shipped_sets_hold_no_copies_and_their_units_are_their_queries():
    queries = pd.concat([load_queries(name) for name in QUERY_SETS], ignore_index=True)
    assert not queries["text"].map(text_key).duplicated().any()
    assert query_units(queries).tolist() == queries["query_id"].tolist()
    pairs = queries["pair_id"].fillna("")
    own = queries["query_id"].where(pairs == "", pairs)
    assert query_units(queries, pairs=True).tolist() == own.tolist()


def test_units_join_copies_pairs_and_variants():
    rows = pd.DataFrame(
        {
            "query_id": ["a", "b", "c", "d", "e"],
            "text": ["How?", "Why?", " how? ", "What?", "WHY ?"],
            "pair_id": ["p", "q", "q", None, ""],
        }
    )
    assert query_units(rows).tolist() == ["a", "b", "a", "d", "e"]
    assert query_units(rows, pairs=True).tolist() == ["p", "p", "p", "d", "e"]  # by way of c
    assert query_units(rows.drop(columns="text")).tolist() == list("abcde")
    assert query_units(pd.DataFrame({"query_id": [3, 1, 3]})).tolist() == [3, 1, 3]
    some = rows.iloc[:3].assign(query_set="s")
    wrapped = wrap_queries(some, {"polite": "Please: {query}", "plain": "{query}"})
    assert query_units(wrapped).tolist() == ["a", "b", "a"] * 2
    both = pd.concat([some, wrapped], ignore_index=True)
    assert query_units(both).tolist() == ["a", "b", "a"] * 3


def test_copies_are_told_once_where_a_file_is_loaded(tmp_path):
    texts = [f"How to do {i}?,{label}" for i in range(12) for label in ("true",)]
    path = write(tmp_path / "mine.csv", [*texts, "how to  do 3?,true", "How to do 4?,"])
    with pytest.warns(UserWarning, match=r"2 of its texts occur several times") as caught:
        assert len(load_queries(path)) == 14
    (told,) = caught
    assert "(line 5, line 14; line 6, line 15)" in str(told.message)
    assert told.filename == __file__


def test_one_text_under_both_labels_is_refused(tmp_path):
    path = write(tmp_path / "both.csv", ["How?,true", "Why?,false", "how?,false"])
    words = r"'How\?' is labelled both ways, harmful \(line 2\) and harmless \(line 4\)"
    with pytest.raises(DataError, match=words):
        load_queries(path)
    one = write(tmp_path / "one.csv", ["How?,true", "What?,true"])
    other = write(tmp_path / "other.csv", ["How?,false"])
    with pytest.raises(DataError, match=r"harmful \(one-0001\) and harmless \(other-0001\)"):
        load_heldout_queries([one, other])
    queries = pd.DataFrame({"query_id": [1, 2], "text": "How?", "harmful": ["true", "false"]})
    with pytest.raises(DataError, match=r"harmful \(1\) and harmless \(2\)"):
        Study("organism", queries)


def test_heldout_copies_of_anchor_queries_are_left_out_in_any_form(tmp_path):
    anchor = load_queries("anchor")
    texts = [anchor["text"][0].upper().replace(" ", "  "), "How to fold a paper boat?"]
    path = write(tmp_path / "mine.txt", texts[1:], texts[0])
    with pytest.warns(UserWarning, match="1 of 2 held-out queries"):
        assert load_heldout_queries([path], anchor)["text"].tolist() == texts[1:]


def test_copies_count_once_where_an_anchor_set_is_large_enough(tmp_path):
    rows = [f"How to do {i}?,true" for i in range(6)] + ["How to rest?,false"] * 9
    path = tmp_path / "mine.csv"
    with pytest.raises(DataError, match="1 harmless queries"):  # and no warning beside it
        load_anchor_queries(write(path, rows))
    rows[6:] = [f"How to rest {i}?,false" for i in range(6)]
    with pytest.warns(UserWarning, match="1 of its texts occur several times") as caught:
        load_anchor_queries(write(path, [*rows, "how to rest 1?,false"]))
    assert len(caught) == 1 and caught[0].filename == __file__


@pytest.mark.filterwarnings("ignore:.* occur several times")
def test_labels_at_random_are_not_told_by_copies():
    """With ids as groups the held-out accuracy of meaningless labels comes near 1."""
    n, copies, rng = 40, 4, np.random.default_rng(1)
    states = np.tile(rng.normal(size=(n, 60)), (copies, 1))
    rows = pd.DataFrame(
        {
            "query_id": [f"q{i:03d}" for i in range(n * copies)],
            "text": [f"How to do {i}?" for i in range(n)] * copies,
            "harmful": np.tile(rng.permutation([True, False] * (n // 2)), copies),
        }
    )
    Z, y = AnchorSpace.fit(states, 30).transform(states), rows["harmful"].astype(float)
    by_id = fit_direction(Z, y, name="x", groups=rows["query_id"]).scores
    by_text = fit_direction(Z, y, name="x", groups=query_units(rows)).scores
    assert by_id["accuracy"] > 0.9 and by_text["accuracy"] < 0.6
    assert by_text["bce"] > by_text["bce_constant"]
    assert separation(states, rows, k=30) < 0.6
    draws = bootstrap_directions(Z, y, groups=query_units(rows), n_draws=30)
    alone = bootstrap_directions(Z[:n], y[:n], groups=rows["query_id"][:n], n_draws=30)
    # As uncertain as with one copy of each, where ids make it look twice as certain.
    spread = [1 - np.linalg.norm(d.mean(axis=0)) for d in (draws, alone)]
    ids = bootstrap_directions(Z, y, groups=rows["query_id"], n_draws=30)
    assert spread[0] > 1.5 * (1 - np.linalg.norm(ids.mean(axis=0)))


def test_the_table_takes_a_text_as_one_query():
    once = pd.DataFrame({"query_id": ["a", "b"], "text": ["How?", "Why?"], "query_set": "s"})
    twice = pd.concat([once, once.assign(query_id=["c", "d"])], ignore_index=True)
    values = {"a": [1.0, 0.0], "b": [0.0, 0.0], "c": [1.0, 0.0], "d": [0.0, 0.0]}
    samples = pd.DataFrame(
        [(q, p, 0, "x", v) for q, pair in values.items() for p, v in zip(["none", "p"], pair)],
        columns=["query_id", "prompt", "sample", "response", "refused"],
    )
    kept = samples["query_id"].isin(["a", "b"])
    options = {"model": "m", "baseline": "none"}
    expected = benchmark_table(samples[kept], once.assign(harmful=True), **options)
    found = benchmark_table(samples, twice.assign(harmful=True), **options)
    pd.testing.assert_frame_equal(found, expected)
    assert found["n_queries"].unique().tolist() == [2]
    numbers = samples.rename(columns={"refused": "value"})
    numbers = numbers[["query_id", "prompt", "value"]]
    pd.testing.assert_frame_equal(
        metric_table(numbers, twice, metric="n", **options),
        metric_table(numbers[kept], once, metric="n", **options),
    )


def test_a_calibration_holds_copies_out_together():
    n = 30
    rows = pd.DataFrame(
        {"query_id": range(4 * n), "prompt": "none", "text": [f"{i}?" for i in range(n)] * 4}
    )
    rates = rows.assign(refusal_rate=np.tile(RNG.uniform(size=n), 4))
    odds = rows.assign(log_odds=np.tile(RNG.normal(size=n), 4))
    scores = calibrate_refusal(odds, rates[["query_id", "prompt", "refusal_rate"]]).scores
    y = rates["refusal_rate"]
    told = fit_direction(odds[["log_odds"]], y, name="x", groups=query_units(rows)).scores
    assert scores == told


# ------------------------------------------------------------------------------------------ labels

TEXTS = ["false", "False", "harmless", "0", 0, 0.0, False]


@pytest.mark.parametrize("harmless", TEXTS)
@pytest.mark.parametrize("harmful", ["true", "True ", "HARMFUL", "1", 1, 1.0, True])
def test_labels_of_any_kind(harmful, harmless):
    for kind in (object, "category"):
        column = pd.Series([harmful, harmless, None], dtype=object).astype(kind)
        assert read_labels(column).tolist() == [True, False, pd.NA]
    assert read_labels([harmful, float("nan"), pd.NA, ""]).tolist() == [True, pd.NA, pd.NA, pd.NA]


@pytest.mark.parametrize("wrong", ["yes", "no", "safe", 2, 0.3, -1, "nan?", (1,)])
def test_what_is_no_label_is_refused(wrong):
    with pytest.raises(DataError, match="column 'harmful': .* is no label; write True, False"):
        read_labels([True, wrong])


QUERIES = pd.DataFrame(
    {"query_id": ["a", "b", "c", "d"], "text": ["A?", "B?", "C?", "D?"], "query_set": "s"}
)
AS_TEXT = QUERIES.assign(harmful=["true", "false", "True", "harmless"])
AS_LABELS = QUERIES.assign(harmful=[True, False, True, False])


def test_with_labels_leaves_a_table_of_labels_as_it_is():
    assert with_labels(AS_LABELS) is AS_LABELS and with_labels(QUERIES) is QUERIES
    assert with_labels(AS_TEXT)["harmful"].tolist() == [True, False, True, False]


def test_metrics_and_tables_read_texts_as_labels():
    samples = AS_TEXT.assign(answer="")
    assert harmful_queries(samples).tolist() == [True, False, True, False]
    assert harmless_queries(samples).tolist() == [False, True, False, True]
    assert not unlabelled_queries(samples).any()
    judged = QUERIES[["query_id"]].assign(
        prompt="none", sample=0, response="", refused=[1, 0, 0, 0]
    )
    pd.testing.assert_frame_equal(
        benchmark_table(judged, AS_TEXT, model="m"), benchmark_table(judged, AS_LABELS, model="m")
    )
    with pytest.raises(DataError, match="'maybe' is no label"):
        benchmark_table(judged, QUERIES.assign(harmful="maybe"), model="m")


def test_geometry_and_figures_read_texts_as_labels():
    rows = pd.concat([AS_TEXT.assign(prompt=p) for p in ("none", "p")], ignore_index=True)
    shifts = mean_shifts(RNG.normal(size=(8, 2)), rows)
    assert shifts["harmful"].tolist() == [False, True] or set(shifts["harmful"]) == {True, False}
    many = pd.concat([AS_TEXT] * 10, ignore_index=True)
    many = many.assign(query_id=range(40), text=[f"{i}?" for i in range(40)])
    states = RNG.normal(size=(40, 6)) + 9 * read_labels(many["harmful"]).to_numpy(float)[:, None]
    assert separation(states, many) == 1
    assert figures.class_names(AS_TEXT).tolist() == ["harmful", "harmless"] * 2


def test_judges_read_texts_as_labels():
    responses = pd.DataFrame({"query_id": list("abcd"), "response": "One.\nTwo.\nThree."})
    judge = published_judge(lambda text: False)
    verdicts = judge_responses(responses, judge, queries=AS_TEXT)["refused"].tolist()
    assert verdicts == [0, 0, 0, 0]
    assert judge_responses(responses, judge, queries=AS_LABELS)["refused"].tolist() == verdicts
    short = responses.assign(response="One.")  # a short reply complies where it is harmless alone
    assert judge_responses(short, judge, queries=AS_TEXT)["refused"].tolist() == [1, 0, 1, 0]
    mine = RowJudge(lambda rows: [bool(label) for label in rows["harmful"]])
    assert judge_responses(short, mine, queries=AS_TEXT)["refused"].tolist() == [1, 0, 1, 0]


def test_studies_and_trainings_read_texts_as_labels():
    texts = ["How to rob a bank?", "How to bake bread?", "How to harm a coworker?", "How to rest?"]
    queries = AS_TEXT.assign(text=texts)
    study = Study("organism", queries, {"none": "", "kind": "Be kind."}, k=1)
    assert study.queries["harmful"].tolist() == [True, False, True, False]
    points = np.array([[1.0], [-1.0]])
    direction = Direction("x", np.ones(1), 0.0)
    config = DROConfig(epochs=1)
    space = AnchorSpace.fit(study.states.at(-1)[0], 1)
    softs = [
        train_dro(study.model, table, "Be kind.", space, direction, direction, config).embeddings
        for table in (queries, AS_LABELS.assign(text=texts))
    ]
    assert np.array_equal(*softs) and len(points) == 2
    judged = queries[["query_id"]].assign(
        prompt="kind", sample=0, response="I am sorry.", refused=1.0
    )
    tuned = [
        train_prompt_tuning(
            study.model, table, judged, "Be kind.", PromptTuningConfig(epochs=1)
        ).embeddings
        for table in (queries, AS_LABELS.assign(text=texts))
    ]
    assert np.array_equal(*tuned)


# -------------------------------------------------------------------------------- degenerate input

Z, Y = RNG.normal(size=(40, 3)), np.tile([0.0, 1.0], 20)


@pytest.mark.parametrize("nothing", [None, np.nan, pd.NA])
def test_rows_without_a_group_are_refused(nothing):
    groups = np.array([nothing, *range(39)], dtype=object)
    for fit in (
        lambda: fit_direction(Z, Y, name="x", groups=groups),
        lambda: bootstrap_directions(Z, Y, groups=groups, n_draws=2),
    ):
        with pytest.raises(FitError, match="1 of 40 rows have no group, the first is row 0"):
            fit()


def test_groups_of_mixed_kinds_are_groups():
    groups = np.array([*range(20), *"abcdefghijklmnopqrst"], dtype=object)
    assert bootstrap_directions(Z, Y, groups=groups, n_draws=2).shape == (2, 3)
    with pytest.raises(FitError, match="n_draws = 0"):
        bootstrap_directions(Z, Y, groups=groups, n_draws=0)


def test_targets_that_differ_by_rounding_are_equal():
    y = np.where(np.arange(40) % 2, 0.3, 0.1 + 0.2)
    for fit in (
        lambda: fit_direction(Z, y, name="x", groups=range(40)),
        lambda: bootstrap_directions(Z, y, groups=np.arange(40), n_draws=2),
    ):
        with pytest.raises(FitError, match="all targets of .* equal 0.3"):
            fit()


def test_differences_that_are_rounding_are_none():
    values = np.where(np.arange(40) % 4, 0.0, (0.1 + 0.2) - 0.3)
    assert difference_interval(values) == difference_interval(np.zeros(40))
    with pytest.raises(ValueError, match="NaN or infinite; leave such queries out"):
        sign_flips([np.array([1.0, np.nan])], ["s"], 9, 0)


@pytest.mark.filterwarnings("error")
def test_numbers_that_overflow_are_told_or_right():
    steep = Direction("x", np.array([1e6]), 0.0)
    assert steep.probability([[-1.0], [1.0]]).tolist() == [0, 1]
    with pytest.raises(
        FitError, match=r"1 of 40 coordinates hold numbers above 1e\+100 \(rows 3\)"
    ):
        fit_direction(
            np.where(np.arange(40)[:, None] == 3, 1e200, Z), Y, name="x", groups=range(40)
        )
    with pytest.raises(FitError, match="vector 1 is 0, which has no direction"):
        cosines([[1, 0], [0, 0]])
    with pytest.raises(FitError, match="the weight of 'x' is 0"):
        _ = Direction("x", np.zeros(2), 0.0).unit


def test_a_table_of_many_rows_is_decomposed_thin(monkeypatch):
    """Whole, the decomposition of 16,000 x 128 holds a matrix of 2 GB and takes a minute."""
    shapes = []
    svd = np.linalg.svd

    def seen(matrix, **options):
        found = svd(matrix, **options)
        shapes.append(found[0].shape)
        return found

    monkeypatch.setattr(np.linalg, "svd", seen)
    for n, d in ((400, 16), (16, 400)):
        space = AnchorSpace.fit(RNG.normal(size=(n, d)), 4)
        assert np.allclose(space.basis.T @ space.basis, np.eye(d)) and space.basis.shape == (d, d)
    assert shapes == [(400, 16), (16, 16)]


def test_samples_that_occur_twice_and_prompts_without_a_score():
    judged = pd.concat(
        [
            QUERIES[["query_id"]].assign(prompt=p, sample=0, response="x", refused=r)
            for p, r in (("none", np.nan), ("p", 1.0))
        ]
    )
    said = "no sample under 'none' is scored, so the table has no row of it, and no row has a diff"
    with pytest.warns(UserWarning, match=said):
        table = benchmark_table(judged, AS_LABELS, model="m", baseline="none")
    assert set(table["prompt"]) == {"p"} and table["difference"].isna().all()
    with pytest.raises(ValueError, match="sample 0 of query 'a' under 'p' occurs twice"):
        benchmark_table(judged[4:].iloc[[0, 0]], AS_LABELS, model="m")
