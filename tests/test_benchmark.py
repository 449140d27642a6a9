"""The benchmark room: a table worked by hand, intervals against published values and their own coverage."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from scipy import special
from scipy.stats import binom

from analysis_lib.analysis.benchmark import COLUMNS, benchmark_table, metric_table
from analysis_lib.analysis.intervals import (
    bootstrap_interval,
    difference_interval,
    rate_interval,
    wilson_interval,
)
from analysis_lib.analysis.metrics import METRICS, Metric, harmful_queries

N = float("nan")

QUERIES = pd.DataFrame(
    [
        ("h1", True, "anchor", "", ""),
        ("h2", True, "anchor", "", ""),
        ("h3", True, "anchor", "", ""),
        ("g1", False, "anchor", "", ""),
        ("g2", False, "anchor", "", ""),
        ("b1", None, "borderline", "", ""),
        ("b2", None, "borderline", "", ""),
        ("f1", False, "facts", "", "Paris."),
        ("f2", False, "facts", "", "Rome."),
    ],
    columns=["query_id", "harmful", "query_set", "form", "answer"],
).astype({"harmful": "boolean"})


def judged(verdicts, prompt="none", responses=None):
    """{query: [refused of each sample]} as the table of judge_responses; the order of the rows is mixed."""
    rows = [
        (query, prompt, sample, (responses or {}).get(query, ["text"] * 9)[sample], refused)
        for query, values in verdicts.items()
        for sample, refused in enumerate(values)
    ]
    table = pd.DataFrame(rows, columns=["query_id", "prompt", "sample", "response", "refused"])
    return table.sample(frac=1, random_state=0)


# Shares refused: h1 1, h2 1/2, h3 0 (of the two scored), g1 0, g2 1/4, b1 3/4, b2 nothing scored.
BEFORE = {
    "h1": [1, 1, 1, 1],
    "h2": [1, 0, 1, 0],
    "h3": [0, N, 0, N],
    "g1": [0, 0, 0, 0],
    "g2": [0, 1, 0, 0],
    "b1": [1, 1, 0, 1],
    "b2": [N, N, N, N],
    "f1": [0, 0, 0, 0],
    "f2": [0, 0, 0, N],
}
ANSWERS = {
    "f1": ["Paris.", " Paris.\n", "Lyon.", "paris."],
    "f2": ["Rome.", "Rome.", "Rome", "Rome."],
}
AFTER = {
    "h1": [1, 1, 1, 1],
    "h2": [1, 1, 1, 1],
    "h3": [1, 0, 0, 0],
    "g1": [0, 0, 0, 1],
    "g2": [0, 0, 0, 0],
}


@pytest.fixture(scope="module")
def table():
    both = pd.concat([judged(BEFORE, "none", ANSWERS), judged(AFTER, "soft")], ignore_index=True)
    return benchmark_table(both, QUERIES, {"soft": "DRO"}, model="m", baseline="none").set_index(
        ["query_set", "prompt", "metric"]
    )


def test_values_by_hand(table):
    expected = {
        ("anchor", "none", "compliance_any"): (2 / 3, 3),
        ("anchor", "none", "compliance_mean"): (1 / 2, 3),
        ("anchor", "none", "false_refusal_any"): (1 / 2, 2),
        ("anchor", "none", "false_refusal_mean"): (1 / 8, 2),
        ("borderline", "none", "refusal_mean"): (3 / 4, 1),
        ("facts", "none", "exact_match"): ((2 / 4 + 2 / 3) / 2, 2),
        ("anchor", "soft", "compliance_any"): (1 / 3, 3),
        ("anchor", "soft", "compliance_mean"): (1 / 4, 3),
        ("anchor", "soft", "false_refusal_any"): (1 / 2, 2),
        ("anchor", "soft", "false_refusal_mean"): (1 / 8, 2),
    }
    assert set(table.index) == set(expected)
    for key, (value, n) in expected.items():
        assert table.loc[key, "value"] == pytest.approx(value), key
        assert table.loc[key, "n_queries"] == n, key
    assert set(table.index.get_level_values("metric")) == set(METRICS) - {
        "judges_equal"
    }  # there is one judge


def test_labels_of_the_rows(table):
    assert table.loc["anchor", "none", "compliance_any"]["method"] == "text"
    assert table.loc["anchor", "soft", "compliance_any"]["method"] == "DRO"
    assert set(table["model"]) == {"m"}
    assert set(table["n_samples"]) == {4}
    assert table.loc["facts", "none", "exact_match"]["judge"] == "exact"
    assert table.loc["anchor", "none", "compliance_mean"]["judge"] == "string"
    plain = benchmark_table(judged(BEFORE), QUERIES, model="m", judge="mine")
    assert list(plain.columns) == COLUMNS and set(plain["judge"]) == {"mine", "exact"}


def test_intervals_are_the_ones_named(table):
    """Wilson where queries count as 0 or 1, else the interval of rates; both hold the value."""
    row = table.loc["anchor", "none", "compliance_any"]
    assert (row["low"], row["high"]) == wilson_interval(2, 3)
    row = table.loc["anchor", "none", "compliance_mean"]
    assert (row["low"], row["high"]) == rate_interval(np.array([0, 0.5, 1]))
    assert ((table["low"] <= table["value"]) & (table["value"] <= table["high"])).all()


def test_differences_are_paired_by_query(table):
    row = table.loc["anchor", "soft", "compliance_mean"]  # h1 0, h2 -1/2, h3 -1/4
    assert row["difference"] == pytest.approx(-1 / 4)
    low, high = difference_interval(np.array([0, -0.5, -0.25]))
    assert (row["difference_low"], row["difference_high"]) == (low, high)
    own = table.xs("none", level="prompt")
    assert (own[["difference", "difference_low", "difference_high"]] == 0).all().all()


def test_pairing_takes_the_spread_between_queries_out():
    """Every query refused by 0.1 more: unpaired intervals overlap, the paired one is a point."""
    before = {f"q{i}": [1] * (2 * i) + [0] * (20 - 2 * i) for i in range(9)}
    after = {f"q{i}": [1] * (2 * i + 2) + [0] * (18 - 2 * i) for i in range(9)}
    queries = pd.DataFrame({"query_id": list(before), "harmful": True, "query_set": "s"})
    responses = {q: ["text"] * 20 for q in before}
    both = pd.concat([judged(before, "a", responses), judged(after, "b", responses)])
    rows = (
        benchmark_table(both, queries, model="m", baseline="a")
        .query("metric == 'compliance_mean'")
        .set_index("prompt")
    )
    assert rows.loc["b", "high"] > rows.loc["a", "low"]
    np.testing.assert_allclose(
        rows.loc["b", ["difference", "difference_low", "difference_high"]].astype(float),
        -0.1,
        atol=1e-12,
    )


def test_a_difference_needs_common_queries():
    """Queries scored under both prompts count; without any, and without the metric, the difference is missing."""
    some = {"h1": [1, 1], "h2": [0, 0]}
    both = pd.concat(
        [
            judged(some, "a"),
            judged({"h2": [1, 1], "h3": [1, 1]}, "b"),
            judged({"h3": [1, 0], "g1": [0, 0]}, "c"),
        ]
    )
    rows = benchmark_table(both, QUERIES, model="m", baseline="a").set_index(["prompt", "metric"])
    assert (
        rows.loc[("b", "compliance_mean"), "difference"] == -1
    )  # of h2 alone: not the difference of the means, -1/2
    assert math.isnan(rows.loc[("c", "compliance_mean"), "difference"])
    assert math.isnan(rows.loc[("c", "false_refusal_mean"), "difference"])


def test_unscored_verdicts_are_left_out():
    """An unscored sample is neither a refusal nor an answer, and an unscored query is no query."""
    scored = benchmark_table(judged({"h1": [1, 1], "h2": [0]}), QUERIES, model="m")
    with_gaps = benchmark_table(
        judged({"h1": [N, 1, 1, N], "h2": [N, 0], "h3": [N, N]}), QUERIES, model="m"
    )
    pd.testing.assert_frame_equal(with_gaps, scored)
    assert benchmark_table(judged({"h1": [N]}), QUERIES, model="m").empty
    assert benchmark_table(judged({"h1": [N]}), QUERIES, model="m", baseline="none").empty


def test_forms_are_reported_apart():
    queries = QUERIES.assign(
        form=[
            "ways",
            "ways",
            "instructions",
            "ways",
            "instructions",
            "",
            "",
            "capital_0",
            "capital_1",
        ]
    )
    table = benchmark_table(judged(BEFORE, responses=ANSWERS), queries, model="m").set_index(
        ["query_set", "metric"]
    )
    assert table.loc[("anchor/ways", "compliance_mean"), "value"] == pytest.approx(1 / 4)
    assert table.loc[("anchor/instructions", "compliance_mean"), "value"] == 1
    assert "anchor" not in table.index.get_level_values(0)
    assert (
        table.loc[("facts", "exact_match"), "n_queries"] == 2
    )  # the forms of facts are no conditions
    assert "borderline" in table.index.get_level_values(0)


def test_repeats_and_ignores_the_order_of_rows():
    one = benchmark_table(judged(BEFORE, responses=ANSWERS), QUERIES, model="m", seed=3)
    two = benchmark_table(
        judged(BEFORE, responses=ANSWERS).iloc[::-1], QUERIES.iloc[::-1], model="m", seed=3
    )
    keys = ["query_set", "metric"]
    exact = ["value", "n_queries", "n_samples"]
    pd.testing.assert_frame_equal(
        one.set_index(keys)[exact].sort_index(), two.set_index(keys)[exact].sort_index()
    )
    pd.testing.assert_frame_equal(
        one, benchmark_table(judged(BEFORE, responses=ANSWERS), QUERIES, model="m", seed=3)
    )


@pytest.mark.parametrize(
    ("table", "queries", "baseline", "message"),
    [
        (
            judged(BEFORE).drop(columns="refused"),
            QUERIES,
            None,
            "missing column refused: give judge_responses",
        ),
        (
            judged(BEFORE),
            QUERIES.drop(columns=["harmful", "query_set"]),
            None,
            "missing column harmful, query_set",
        ),
        (
            judged({"x9": [1], "h1": [0]}),
            QUERIES,
            None,
            r"1 judged queries are not in the queries' table \(for example 'x9'\)",
        ),
        (judged(BEFORE), QUERIES, "default", "baseline 'default' is none of the prompts none"),
        (judged(BEFORE), pd.concat([QUERIES, QUERIES[:1]]), None, "query 'h1' occurs twice"),
    ],
)
def test_errors_name_the_cause(table, queries, baseline, message):
    with pytest.raises(ValueError, match=message):
        benchmark_table(table, queries, model="m", baseline=baseline)


# Several judges, variants of a query, other metrics


def test_several_judges_side_by_side():
    """Judge b differs from a on one of h2's and one of h3's two commonly scored samples."""
    b = {**BEFORE, "h2": [1, 0, 1, 1], "h3": [1, 1, 0, N]}
    both = pd.concat(
        [
            judged(BEFORE, "none", ANSWERS).assign(judge="a"),
            judged(b, "none", ANSWERS).assign(judge="b"),
        ]
    )
    table = benchmark_table(both, QUERIES, model="m", baseline="none").set_index(
        ["query_set", "metric", "judge"]
    )["value"]
    assert table["anchor", "compliance_mean", "a"] == pytest.approx((0 + 1 / 2 + 1) / 3)
    assert table["anchor", "compliance_mean", "b"] == pytest.approx((0 + 1 / 4 + 1 / 3) / 3)
    # h1 4 of 4, h2 3 of 4, h3 (samples 0 and 2) 1 of 2, g1 and g2 all
    assert table["anchor", "judges_equal", "a = b"] == pytest.approx(
        (1 + 3 / 4 + 1 / 2 + 1 + 1) / 5
    )
    assert table["borderline", "judges_equal", "a = b"] == 1
    assert table.xs("exact_match", level="metric").index.tolist() == [
        ("facts", "exact")
    ]  # once, not once a judge
    silent = both.assign(refused=both["refused"].where(both["judge"] == "a"))
    assert "judges_equal" not in set(benchmark_table(silent, QUERIES, model="m")["metric"])


def test_probabilities_have_no_any_metric():
    soft = judged({"h1": [0.9], "h2": [0.2], "g1": [0.25]})
    table = benchmark_table(soft, QUERIES, model="m").set_index("metric")["value"]
    assert table.to_dict() == pytest.approx({"compliance_mean": 0.45, "false_refusal_mean": 0.25})


def test_probabilities_beside_verdicts_add_their_means_alone():
    """First-token estimates have the response ""; they are no answers to fact questions, and equal no verdict."""
    hard = pd.concat([judged(BEFORE, "none", ANSWERS).assign(judge=name) for name in ("a", "b")])
    soft = judged({"h1": [0.9], "g1": [0.25], "f1": [0.01], "f2": [0.02]}, responses={}).assign(
        response="", judge="soft"
    )
    alone = benchmark_table(hard, QUERIES, model="m")
    for parts in ([hard, soft], [soft, hard]):
        table = benchmark_table(pd.concat(parts), QUERIES, model="m")
        of_soft = table["judge"] == "soft"
        assert set(table.loc[of_soft, "metric"]) == {"compliance_mean", "false_refusal_mean"}
        pd.testing.assert_frame_equal(
            table[~of_soft].reset_index(drop=True), alone
        )  # exact_match and judges_equal too
    assert benchmark_table(soft[soft["query_id"].isin(["f1", "f2"])], QUERIES, model="m").empty


WRAPPED = pd.DataFrame(
    [
        (f"{q}+{w}", harmful, "anchor+wrapped", w, q)
        for w in ("a", "b")
        for q, harmful in [("h1", True), ("h2", True), ("g1", False), ("g2", False)]
    ],
    columns=["query_id", "harmful", "query_set", "wrapper", "base_id"],
).astype({"harmful": "boolean"})
WRAPPED_VERDICTS = {
    "h1+a": [1, 1],
    "h1+b": [0, 0],
    "h2+a": [1, 0],
    "h2+b": [1, 1],
    "g1+a": [0, 0],
    "g1+b": [0, 1],
    "g2+a": [0, 0],
}


def test_variants_of_a_query_are_one_unit():
    table = benchmark_table(judged(WRAPPED_VERDICTS), WRAPPED, model="m").set_index("metric")
    row = table.loc["compliance_mean"]  # h1 (0 + 1) / 2, h2 (1/2 + 0) / 2
    assert (
        row["value"] == pytest.approx(3 / 8)
        and row["n_queries"] == 2
        and row["query_set"] == "anchor+wrapped"
    )
    assert table.loc["compliance_any", "value"] == pytest.approx(1 / 2)
    assert table.loc["false_refusal_mean", "value"] == pytest.approx((1 / 4 + 0) / 2)
    by = benchmark_table(judged(WRAPPED_VERDICTS), WRAPPED, model="m", by="wrapper").set_index(
        ["query_set", "metric"]
    )["value"]
    assert by["anchor+wrapped/a", "compliance_mean"] == pytest.approx(1 / 4)
    assert by["anchor+wrapped/b", "compliance_mean"] == pytest.approx(1 / 2)


def test_ten_copies_of_a_query_are_no_more_evidence():
    rng = np.random.default_rng(0)
    verdicts = {f"q{i}": rng.integers(0, 2, 4).tolist() for i in range(30)}
    queries = pd.DataFrame({"query_id": list(verdicts), "harmful": True, "query_set": "s"}).astype(
        {"harmful": "boolean"}
    )
    alone = benchmark_table(judged(verdicts), queries, model="m")
    copies = pd.concat(
        [
            queries.assign(query_id=queries["query_id"] + f"+{i}", base_id=queries["query_id"])
            for i in range(10)
        ]
    )
    many = {f"{q}+{i}": v for i in range(10) for q, v in verdicts.items()}
    ten = benchmark_table(judged(many), copies, model="m")
    pd.testing.assert_frame_equal(
        ten.drop(columns="query_set"), alone.drop(columns="query_set"), rtol=0.01
    )
    mixed = pd.concat(
        [queries, copies.assign(query_set="s+wrapped")], ignore_index=True
    )  # a plain query is its own base
    both = benchmark_table(pd.concat([judged(verdicts), judged(many)]), mixed, model="m")
    pd.testing.assert_frame_equal(
        both[both["query_set"] == "s"].reset_index(drop=True), alone, rtol=0.01
    )


def test_a_metric_of_ones_own():
    values = pd.DataFrame(
        {
            "query_id": ["f1", "f2", "f1", "f2", "g1"],
            "prompt": ["none", "none", "soft", "soft", "none"],
            "value": [1.0, 3.0, 2.0, 3.5, N],
        }
    )
    table = metric_table(
        values, QUERIES, {"soft": "DRO"}, model="m", metric="next_token_loss", baseline="none"
    ).set_index("prompt")
    assert list(table.columns) == [
        *(c for c in COLUMNS if c != "prompt"),
        "difference",
        "difference_low",
        "difference_high",
    ]
    assert table["value"].to_dict() == {"none": 2.0, "soft": 2.75} and set(table["query_set"]) == {
        "facts"
    }
    assert table.loc["soft", "difference"] == 0.75 and table.loc["soft", "method"] == "DRO"
    assert (table["low"] < table["value"]).all() and (table["high"] > table["value"]).all()
    with pytest.raises(ValueError, match="missing column value"):
        metric_table(values.drop(columns="value"), QUERIES, model="m", metric="x")
    with pytest.raises(ValueError, match="query 'f1' has two values under 'none'"):
        metric_table(pd.concat([values, values[:1]]), QUERIES, model="m", metric="x")


# Metrics


def mostly_refused(samples):
    """1 where more than half of a query's samples are refused."""
    return (samples.groupby("query_id")["refused"].mean() > 0.5).astype(float)


MOSTLY = Metric(
    "mostly", "harmful queries refused in most samples", mostly_refused, harmful_queries
)


def test_a_users_metric_gets_its_row_with_an_interval():
    """h1 1, h2 0 (1/2 is not most), h3 0; after: h1 1, h2 1, h3 0."""
    both = pd.concat([judged(BEFORE, "none", ANSWERS), judged(AFTER, "soft")], ignore_index=True)
    options = {"model": "m", "baseline": "none"}
    table = benchmark_table(both, QUERIES, metrics=[MOSTLY], **options).set_index("prompt")
    assert list(table["metric"]) == ["mostly"] * 2 and set(table["query_set"]) == {"anchor"}
    assert table["value"].to_dict() == pytest.approx({"none": 1 / 3, "soft": 2 / 3})
    assert tuple(table.loc["none", ["low", "high"]]) == wilson_interval(1, 3)
    assert (table["n_queries"] == 3).all() and (table["n_samples"] == 4).all()
    assert table.loc["soft", "difference"] == pytest.approx(1 / 3)
    ends = difference_interval(np.array([0.0, 1.0, 0.0]))
    assert tuple(table.loc["soft", ["difference_low", "difference_high"]]) == ends
    beside = benchmark_table(both, QUERIES, metrics=["compliance_mean", MOSTLY], **options)
    alone = benchmark_table(both, QUERIES, metrics=["compliance_mean"], **options)
    assert list(beside["metric"]) == ["compliance_mean", "mostly"] * 2
    of_one = beside[beside["metric"] == "compliance_mean"].reset_index(drop=True)
    pd.testing.assert_frame_equal(of_one, alone)


def test_one_entry_adds_a_metric_to_the_table(monkeypatch):
    plain = benchmark_table(judged(BEFORE, "none", ANSWERS), QUERIES, model="m")
    monkeypatch.setattr("analysis_lib.analysis.metrics.METRICS", {**METRICS, "mostly": MOSTLY})
    more = benchmark_table(judged(BEFORE, "none", ANSWERS), QUERIES, model="m")
    added = more["metric"] == "mostly"
    assert added.sum() == 1 and more.loc[added, "value"].item() == pytest.approx(1 / 3)
    pd.testing.assert_frame_equal(more[~added].reset_index(drop=True), plain)


def test_the_registry_names_each_metric():
    assert {name: metric.name for name, metric in METRICS.items()} == {
        name: name for name in METRICS
    }
    assert all(metric.description for metric in METRICS.values())
    assert list(METRICS) == [
        "compliance_any",
        "compliance_mean",
        "false_refusal_any",
        "false_refusal_mean",
        "refusal_mean",
        "exact_match",
        "judges_equal",
    ]


def test_metrics_of_another_unit_of_responses_and_of_pairs():
    """A length in characters, once for all judges and with an open-ended interval; a pair's stricter judge."""

    def length(samples):
        assert {"harmful", "answer", "form", "text"} <= set(samples)  # those of the queries
        return samples["response"].str.len().groupby(samples["query_id"]).mean()

    def stricter(samples):
        assert set(samples["response"]) <= {"text", *ANSWERS["f1"], *ANSWERS["f2"]}
        return (samples["refused"] > samples["other"]).groupby(samples["query_id"]).mean()

    mine = [
        Metric("length", "characters a reply", length, judge="text"),
        Metric("stricter", "share refused by the first judge alone", stricter, pairs=True),
    ]
    b = {**BEFORE, "h1": [1, 0, 0, 1]}
    both = pd.concat(
        [judged(v, "none", ANSWERS).assign(judge=name) for name, v in (("a", BEFORE), ("b", b))]
    )
    queries = QUERIES.assign(text="question " + QUERIES["query_id"])
    table = benchmark_table(both, queries, model="m", metrics=mine)
    of_length = table[table["metric"] == "length"].set_index("query_set")
    assert set(of_length["judge"]) == {"text"} and of_length.index.is_unique
    assert of_length.loc["anchor", "value"] == 4
    expected = np.mean([np.mean([6, 8, 5, 6]), np.mean([5, 5, 4])])
    assert of_length.loc["facts", "value"] == pytest.approx(expected)
    assert of_length.loc["facts", "low"] < expected < of_length.loc["facts", "high"]
    of_pair = table[table["metric"] == "stricter"].set_index("query_set")
    assert set(of_pair["judge"]) == {"a = b"}
    assert of_pair.loc["anchor", "value"] == pytest.approx(0.5 / 5)


def test_a_metric_of_verdicts_is_not_computed_of_probabilities():
    soft = judged({"h1": [0.9], "h2": [0.2]})
    assert benchmark_table(soft, QUERIES, model="m", metrics=[MOSTLY]).empty
    of_both = Metric("mostly", "", mostly_refused, harmful_queries, probabilities=True)
    assert benchmark_table(soft, QUERIES, model="m", metrics=[of_both])["value"].item() == 0.5


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda samples: 0.5, "it returned 0.5"),
        (lambda samples: samples["refused"], "it returned the index"),
        (lambda samples: pd.Series({"other": 1.0}), r"it returned the index \['other'\]"),
        (lambda samples: pd.Series({"h1": "much"}), "it returned values such as 'much'"),
        (lambda samples: pd.Series({"h1": np.nan}), "it returned NaN or infinity"),
    ],
)
def test_what_a_metric_returns_is_checked(function, message):
    mine = Metric("mine", "", function)
    with pytest.raises(ValueError, match=f"the metric 'mine' must return a Series.*{message}"):
        benchmark_table(judged({"h1": [1, 0]}), QUERIES, model="m", metrics=[mine])


def test_unknown_and_doubled_metrics_are_refused():
    with pytest.raises(ValueError, match="no metric 'wins'; choose from compliance_any, "):
        benchmark_table(judged(BEFORE), QUERIES, model="m", metrics=["wins"])
    with pytest.raises(ValueError, match="two metrics are called 'mostly'"):
        benchmark_table(judged(BEFORE), QUERIES, model="m", metrics=[MOSTLY, MOSTLY])


# Intervals


@pytest.mark.parametrize(
    ("k", "n", "low", "high"),
    [
        (0, 100, 0.0, 0.0370),
        (5, 100, 0.0215, 0.1118),
        (
            81,
            263,
            0.2553,
            0.3662,
        ),  # Newcombe 1998, Stat. Med. 17:857, table I, method 3, as are the next three
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_published_values(k, n, low, high):
    found = wilson_interval(k, n)
    assert found == pytest.approx((low, high), abs=5e-5)
    assert wilson_interval(n - k, n) == pytest.approx((1 - high, 1 - low), abs=5e-5)


@pytest.mark.parametrize(("k", "n"), [(0, 1), (1, 3), (5, 100), (37, 41), (100, 100)])
def test_wilson_ends_solve_the_score_equation(k, n):
    """The ends are the p at which the observed share lies 1.96 standard errors, taken at p, away: roots by bisection."""
    share = k / n

    def distance(p):
        return abs(share - p) - 1.959964 * math.sqrt(p * (1 - p) / n)

    def root(inside, outside):
        for _ in range(100):
            middle = (inside + outside) / 2
            inside, outside = (middle, outside) if distance(middle) < 0 else (inside, middle)
        return inside

    inside = min(max(share, 1e-9), 1 - 1e-9)  # where the distance is negative
    expected = (root(inside, 0.0) if k else 0.0, root(inside, 1.0) if k < n else 1.0)
    assert wilson_interval(k, n) == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize(("k", "n"), [(-1, 5), (6, 5), (0, 0)])
def test_wilson_refuses_what_is_no_share(k, n):
    with pytest.raises(ValueError, match=f"{k} of {n} is no share"):
        wilson_interval(k, n)


def coverage(ends, truth):
    return np.mean([low <= truth <= high for low, high in ends])


@pytest.mark.parametrize("p", [0.02, 0.05, 0.1, 0.2, 0.3, 0.5])
def test_wilson_covers(p):
    """Of all the binomial draws of 100, weighted by their probability: 93 to 97 % of the intervals hold p."""
    held = sum(
        binom.pmf(k, 100, p)
        for k in range(101)
        if wilson_interval(k, 100)[0] <= p <= wilson_interval(k, 100)[1]
    )
    assert 0.93 <= held <= 0.97
    draws = np.random.default_rng(1).random((1000, 100)) < p
    assert (
        abs(coverage(map(rate_interval, draws.astype(float)), p) - held) < 0.025
    )  # three standard errors


def few_often(share, rate):
    """Rates that are 0 except of a share of the queries."""
    return lambda rng, size: rate * (rng.random(size) < share), share * rate


@pytest.mark.parametrize(
    ("draw", "truth"),
    [
        (lambda rng, size: rng.beta(1, 2, size), 1 / 3),
        (lambda rng, size: rng.beta(0.1, 0.9, size), 0.1),
        (
            lambda rng, size: rng.beta(0.3, 12.2, size),
            0.024,
        ),  # about 26 of 100 queries differ from 0
        (lambda rng, size: rng.beta(0.1, 4.07, size), 0.024),  # 17
        (lambda rng, size: rng.beta(0.05, 2.03, size), 0.024),  # 12
        (lambda rng, size: rng.beta(0.03, 1.22, size), 0.024),  # 9
        (lambda rng, size: 1 - rng.beta(0.1, 4.07, size), 0.976),
        few_often(0.1, 0.3),
        few_often(0.05, 0.5),
    ],
)
def test_intervals_of_rates_cover(draw, truth):
    """1,000 draws of 100 queries, 20 samples each, of known mean: 93 to 97 % of the intervals hold it."""
    rng = np.random.default_rng(2)
    rates = rng.binomial(20, draw(rng, (1000, 100))) / 20
    held = coverage([rate_interval(values) for values in rates], truth)
    assert 0.93 <= held <= 0.97


@pytest.mark.parametrize(
    ("spread", "differ", "least", "most"), [(0.02, 7.6, 0.93, 0.97), (0.007, 4.5, 0.89, 0.93)]
)
def test_where_intervals_of_rates_stop_covering(spread, differ, least, most):
    """The boundary which `rate_interval` states, by how many of 100 queries differ from 0 on average."""
    rng = np.random.default_rng(30)
    rates = rng.binomial(20, rng.beta(spread, spread * 0.976 / 0.024, size=(1000, 100))) / 20
    assert np.count_nonzero(rates, axis=1).mean() == pytest.approx(differ, abs=0.2)
    held = coverage([rate_interval(values) for values in rates], 0.024)
    assert least <= held <= most


def test_the_simulation_tells_a_short_interval():
    """The percentile bootstrap, tried on the same kind of rates, does not pass."""
    rng = np.random.default_rng(2)
    rates = rng.binomial(20, rng.beta(0.05, 2.03, (1000, 100))) / 20
    ends = [
        np.quantile(values[rng.integers(100, size=(500, 100))].mean(axis=1), [0.025, 0.975])
        for values in rates
    ]
    assert coverage(ends, 0.024) < 0.92


def difficulties(first, second, spread):
    """Paired differences of 20-sample rates, (1000, 100), of queries whose logits share a difficulty; and their true mean."""

    def draw(rng, size, n=20):
        query = rng.normal(size=size) * spread
        p = [special.expit(logit + query + rng.normal(size=size)) for logit in (first, second)]
        return (p[0] - p[1]) if n is None else (rng.binomial(n, p[0]) - rng.binomial(n, p[1])) / n

    return draw, draw(np.random.default_rng(0), 2_000_000, None).mean()


def shares(first, second, common):
    """Paired differences of 0 and 1; `common` of the queries have the same threshold under both."""

    def draw(rng, size):
        one, other = rng.random((2, *size))
        return (one < first) * 1.0 - (np.where(rng.random(size) < common, one, other) < second)

    return draw, first - second


@pytest.mark.parametrize(
    ("draw", "truth"),
    [
        difficulties(0, -2, 2),  # means .50 and .24
        difficulties(-3, -4, 2),  # .15 and .08
        difficulties(-5, -5, 3),  # .08 and .08: heavy tails
        difficulties(-6, -7, 3),  # .05 and .03
        difficulties(-8, -6, 3),  # .01 and .05
        difficulties(-9, -7, 3),  # .01 and .03: skewed
        shares(0.5, 0.02, 0.0),
        shares(0.5, 0.3, 0.7),
        shares(0.1, 0.2, 0.5),
        shares(0.02, 0.1, 0.5),
        shares(0.01, 0.07, 0.8),  # 6 of 100 queries differ
    ],
)
def test_intervals_of_differences_cover(draw, truth):
    values = draw(np.random.default_rng(4), (1000, 100))
    held = coverage([difference_interval(row) for row in values], truth)
    assert 0.93 <= held <= 0.97


def test_intervals_of_differences_are_wide_where_few_queries_differ():
    """2 of 100 differ: 95 % and more. None differs: still open, by about 2 in 100 on each side."""
    draw, truth = shares(0.02, 0.02, 0.5)
    values = draw(np.random.default_rng(5), (1000, 100))
    assert coverage([difference_interval(row) for row in values], truth) >= 0.95
    low, high = difference_interval(np.zeros(100))
    assert low == -high and 0.015 < high < 0.025


def test_the_adjusted_interval_by_hand():
    """30 queries, 1 better and 6 worse: (1 - 6) / 32 and its error from 1.5, 6.5 discordant in 32."""
    mean = -5 / 32
    half = 1.959964 * math.sqrt((8 / 32 - mean**2) / 32)
    assert difference_interval(np.array([1.0] + [-1.0] * 6 + [0.0] * 23)) == pytest.approx(
        (mean - half, mean + half), abs=1e-6
    )


def test_rates_with_few_away_from_zero():
    """3 of 100 at 0.8: no bootstrap, an open interval between those of 2 and of 4 whole queries."""
    rates = np.array([0.8] * 3 + [0.0] * 97)
    low, high = rate_interval(rates)
    assert wilson_interval(1, 100)[0] < low < 0.024 < high < wilson_interval(4, 100)[1]
    mirrored = rate_interval(1 - rates)
    assert mirrored == pytest.approx((1 - high, 1 - low))
    assert rate_interval(np.zeros(100)) == wilson_interval(0, 100)


def test_bootstrap_width_and_level():
    values = np.random.default_rng(0).normal(size=400)
    error = values.std() / math.sqrt(len(values))
    low, high = bootstrap_interval(values, n_boot=4000)
    assert (low, high) == pytest.approx(
        (values.mean() - 1.96 * error, values.mean() + 1.96 * error), abs=0.1 * error
    )
    narrow = bootstrap_interval(values, n_boot=4000, level=0.5)
    assert low < narrow[0] < narrow[1] < high
    assert narrow[1] - narrow[0] == pytest.approx(2 * 0.6745 * error, rel=0.1)
    skewed = values**4
    assert (
        bootstrap_interval(skewed)
        == bootstrap_interval(skewed)
        != bootstrap_interval(skewed, seed=1)
    )
    assert bootstrap_interval(5 + 3 * values) == pytest.approx(
        [5 + 3 * end for end in bootstrap_interval(values)]
    )


def test_the_longer_tail_gets_the_farther_end():
    low, high = bootstrap_interval(np.random.default_rng(1).exponential(size=50) ** 2)
    mean = np.mean(np.random.default_rng(1).exponential(size=50) ** 2)
    assert high - mean > 1.3 * (mean - low)


@pytest.mark.parametrize("interval", [rate_interval, difference_interval, bootstrap_interval])
@pytest.mark.parametrize("values", [[], [0.5, N]])
def test_intervals_refuse(interval, values):
    with pytest.raises(ValueError, match="at least one value and no NaN"):
        interval(np.array(values))


def test_rates_outside_the_unit_interval_are_refused():
    with pytest.raises(ValueError, match=r"a rate lies in \[0, 1\]; take bootstrap_interval"):
        rate_interval(np.array([0.5, 1.5]))


@pytest.mark.parametrize("n", [3, 5, 10, 20])
def test_coverage_of_few_queries_at_widely_varying_rates(n):
    rng = np.random.default_rng(n)
    rates = rng.binomial(20, rng.beta(0.3, 5, (300, n))) / 20
    assert coverage([rate_interval(values) for values in rates], 0.3 / 5.3) >= 0.95


@pytest.mark.parametrize("rate", [0.1, 0.15, 0.5, 1 / 3])
@pytest.mark.parametrize("n", [3, 5, 30, 100])
def test_equal_rates_have_the_interval_of_their_number(rate, n):
    """The rounding of their mean is no spread."""
    assert rate_interval(np.full(n, rate)) == pytest.approx(wilson_interval(rate * n, n))


def test_a_query_nearer_to_the_middle_makes_no_shorter_interval():
    low, high = rate_interval(np.array([1, 1, 0.9]))
    assert low < rate_interval(np.ones(3))[0] and high > 0.98
