"""The published results: the paper's tables to the last digit, metrics against enumeration, tests against exact ones."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from analysis_lib.analysis import published
from analysis_lib.analysis.claims import Claim, claims_table
from analysis_lib.analysis.intervals import holm
from analysis_lib.analysis.paired import paired_differences, score_table
from analysis_lib.analysis.published import (
    MODELS,
    as_printed,
    load_published,
    query_scores,
    win_scores,
)
from analysis_lib.data.download import OFFICIAL_SETS
from analysis_lib.figures import plot_by_model

DEFAULT = {"no prompt": "none", "text": "default", "prompt tuning": "default", "DRO": "default"}
WITHOUT = ["DRO without norm", "DRO without refusal", "DRO without harmfulness"]


@pytest.fixture(scope="module")
def cells():
    return published.published_table()


@pytest.fixture(scope="module")
def scores():
    table = query_scores()
    return table[
        table["prompt"].isin(["none", "default"])
        & table["query_set"].isin(["malicious_instruct", "harmless_testset"])
    ]


@pytest.mark.parametrize(
    ("query_set", "main", "without"),
    [
        ("malicious_instruct", (46.9, 9.8, 5.0, 1.6), (1.5, 7.8, 1.8)),
        ("advbench", (49.4, 10.3, 6.8, 1.4), (1.0, 10.0, 0.5)),
        ("harmless_testset", (0.8, 7.1, 2.0, 2.0), (1.3, 2.4, 2.0)),
        ("alpaca_eval", (65.9, 62.5, 56.3, 63.5), (52.6, 61.3, 61.3)),
        ("advbench_gcg", (54.1, 13.3, 9.4, 3.1), None),
    ],
)
def test_the_papers_averages(cells, query_set, main, without):
    average = as_printed(cells, query_set)["average"]
    assert tuple(average[method, prompt] for method, prompt in DEFAULT.items()) == main
    if without:
        assert tuple(average[method, "default"] for method in WITHOUT) == without


def test_the_printed_table_has_a_paper_row():
    """A row of the paper's table 2, in its order of models, and the columns and rows around it."""
    table = as_printed(published.published_table(), "malicious_instruct")
    assert list(table.columns) == [*MODELS.values(), "average"] and len(table) == 13
    assert list(table.loc[("text", "default")])[:-1] == [1, 2, 10, 22, 31, 2, 9, 1]
    assert list(table.index[:4]) == list(DEFAULT.items())
    with pytest.raises(
        ValueError, match="no query set 'heldout_harmless'; there are malicious_instruct"
    ):
        as_printed(published.published_table(), "heldout_harmless")


def test_the_recount_from_verdicts_equals_the_cells(cells):
    """Query by query, wherever verdicts are published: 288 cells; the other 176 are the wins and the ablations."""
    keys = ["model", "method", "prompt", "query_set"]
    counted = query_scores("any of 20").groupby(keys)["value"].agg(["sum", "size"])
    both = cells.set_index(keys).join(counted)
    assert len(cells) == 464 and both["sum"].notna().sum() == 288
    recounted = both.dropna()
    np.testing.assert_array_equal(recounted["sum"], (recounted["value"] * recounted["n"]).round())
    left = both[both["sum"].isna()].reset_index()
    assert set(left["query_set"]) == {
        "alpaca_eval",
        "malicious_instruct",
        "advbench",
        "harmless_testset",
    }
    assert (left["method"].isin(WITHOUT) | left["query_set"].eq("alpaca_eval")).all()


def test_positions_are_the_queries_of_the_official_sets():
    table = query_scores()
    assert set(table["query_set"]) - {"advbench_gcg"} <= set(OFFICIAL_SETS)
    assert set(table.groupby(["model", "method", "prompt", "query_set"])["query"].agg(tuple)) == {
        tuple(range(100))
    }


@pytest.mark.parametrize("m", [1, 2, 7, 20])
def test_any_of_m_is_the_share_of_drawings_with_an_event(m):
    """Against the formula, for two samples against all 190 pairs, and at its ends: the mean rate, and at least one."""
    _, complied = load_published()
    k = complied["complied"].where(complied["kind"] == "harmful", 20 - complied["complied"])
    table = query_scores(f"any of {m}")
    value = table["value"].reindex(k.index)
    expected = {int(e): 1 - math.comb(20 - int(e), m) / math.comb(20, m) for e in k.unique()}
    np.testing.assert_allclose(value, k.map(expected), atol=1e-12)
    if m == 1:
        np.testing.assert_allclose(value, k / 20, atol=1e-12)
    if m == 2:
        for events in (1, 3):
            pairs = [any(i < events for i in pair) for pair in itertools.combinations(range(20), 2)]
            assert expected[events] == pytest.approx(np.mean(pairs))
    if m == 20:
        pd.testing.assert_series_equal(table["value"], query_scores("at least 1 of 20")["value"])


def test_metrics_get_stricter_step_by_step():
    means = [query_scores(metric)["value"].mean() for metric in published.METRIC_STEPS]
    assert len(means) == 39 and means[0] == pytest.approx(query_scores("any of 1")["value"].mean())
    assert np.all(np.diff(means[:20]) > 0) and np.all(np.diff(means[19:]) < 0)


@pytest.mark.parametrize("metric", ["any of 0", "any of 21", "at least 3 of 10", "mean"])
def test_unknown_metrics_are_refused(metric):
    with pytest.raises(
        ValueError,
        match=f"no metric {metric!r}; take 'any of m' or 'at least m of 20', m from 1 to 20",
    ):
        query_scores(metric)


def test_scores_have_intervals_and_an_average(scores):
    table = score_table(scores).set_index(["query_set", "method", "model"])
    assert len(table) == 2 * 4 * 9 and (table["n"] == 100).all()
    assert ((table["low"] <= table["value"]) & (table["value"] <= table["high"])).all()
    average, one = (
        table.loc[("malicious_instruct", "text", m)] for m in ("average", "mistral-instruct-v0.1")
    )
    assert average["value"] == pytest.approx(0.0975) and one["value"] == pytest.approx(0.31)
    assert average["high"] - average["low"] < one["high"] - one["low"]


DRO, TUNED = ("DRO", "default"), ("prompt tuning", "default")


def test_differences_by_hand(scores):
    """The estimate from the printed cells; p of one model against the exact test of McNemar; the same signs for all models."""
    table = paired_differences(scores, [(TUNED, ("text", "default"))], n_flips=50_000).set_index(
        ["query_set", "model"]
    )
    assert len(table) == 2 * 9
    assert table.loc[("malicious_instruct", "average"), "difference"] == pytest.approx(
        (40 - 78) / 800
    )
    wide = scores.pivot_table("value", ["query_set", "query"], ["method", "prompt", "model"])
    for query_set, model in (("malicious_instruct", "orca-2"), ("harmless_testset", "vicuna-v1.5")):
        one, other = (wide.loc[query_set][(*c, model)] for c in (TUNED, ("text", "default")))
        better, worse = int((one < other).sum()), int((one > other).sum())
        exact = stats.binomtest(better, better + worse).pvalue
        row = table.loc[(query_set, model)]
        assert row["p"] == pytest.approx(
            exact, abs=4 * math.sqrt(exact * (1 - exact) / 50_000) + 1e-4
        )
        assert row["difference"] == pytest.approx((worse - better) / 100)
    assert (
        (table["p"] <= table["p_max"]) & (table["p_max"] <= 1) & (table["p"] <= table["p_holm"])
    ).all()
    assert (
        table.loc[("malicious_instruct", "mistral-instruct-v0.2"), "p"] == 1
    )  # one query each way


def planted(rng, effect):
    """Scores of eight models on 100 queries: difficulty shared by models, and an effect of DRO."""
    harder = rng.random(100)
    rows = []
    for model, (method, prompt) in itertools.product(MODELS.values(), (DRO, TUNED)):
        p = np.clip(harder**4 - (effect if method == "DRO" else 0), 0, 1)
        values = (rng.random(100) < p).astype(float)
        rows.append(
            pd.DataFrame(
                {
                    "model": model,
                    "method": method,
                    "prompt": prompt,
                    "query": range(100),
                    "value": values,
                }
            )
        )
    return pd.concat(rows, ignore_index=True).assign(query_set="planted", metric="any of 20")


def test_a_planted_difference_is_found_and_none_is_invented():
    """Of 60 null studies about 5 % have p < 0.05 in the average; p_max errs on any model in about 5 %, p in far more."""
    found = paired_differences(planted(np.random.default_rng(0), 0.1), [(DRO, TUNED)], n_flips=999)
    assert found.set_index("model").loc["average", "p_holm"] < 0.01
    null = [
        paired_differences(planted(np.random.default_rng(s), 0.0), [(DRO, TUNED)], n_flips=499)
        for s in range(1, 61)
    ]
    hits = np.mean([t.loc[t["model"] == "average", "p"].iloc[0] < 0.05 for t in null])
    any_model = np.mean([(t.loc[t["model"] != "average", "p_max"] < 0.05).any() for t in null])
    unadjusted = np.mean([(t.loc[t["model"] != "average", "p"] < 0.05).any() for t in null])
    assert hits <= 0.11 and any_model <= 0.11 < unadjusted


def test_queries_of_a_set_flip_together_in_all_models():
    """Eight copies of one model in one set are one test, so the greatest adjusts nothing; a second set flips apart."""
    scores = planted(np.random.default_rng(3), 0.02)
    one = scores[scores["model"] == "orca-2"]
    copies = pd.concat([one.assign(model=model) for model in MODELS.values()])
    table = paired_differences(copies, [(DRO, TUNED)], n_flips=999)
    assert 0.05 < table["p"].iloc[0] < 0.95 and table["p"].nunique() == 1
    np.testing.assert_array_equal(table["p_max"], table["p"])
    both = paired_differences(
        pd.concat([copies, copies.assign(query_set="again")]), [(DRO, TUNED)], n_flips=999
    )
    assert (both["p_max"] > both["p"] + 0.02).all()


def test_differences_refuse(scores):
    with pytest.raises(
        ValueError, match=r"no query set holds both conditions .*\('no prompt', 'none'\)"
    ):
        paired_differences(scores, [(DRO, ("text", "mine"))])
    with pytest.raises(
        ValueError, match="scores of one metric are compared, these hold any of 20, any of 1"
    ):
        paired_differences(pd.concat([scores, query_scores("any of 1")]), [(DRO, TUNED)])


def test_holm():
    """Four p-values by hand: times 4, 3, 2, 1 in order of size, never falling, at most 1."""
    np.testing.assert_allclose(holm(np.array([0.04, 0.01, 0.03, 0.005])), [0.06, 0.03, 0.06, 0.02])
    np.testing.assert_allclose(holm(np.array([0.5, 0.9])), [1, 1])


@pytest.fixture(scope="module")
def claims():
    return claims_table(n_flips=9999)


def test_claims_follow_from_the_tables(claims, cells):
    assert len(claims) == 44 and not claims.duplicated(["query_set", "first", "second"]).any()
    at = claims.set_index(["query_set", "first", "second"])
    row = at.loc[("advbench", "DRO / default", "prompt tuning / default")]
    assert (
        row["estimate"] == pytest.approx((11 - 54) / 800)
        and row["models"] == "7-1"
        and row["unit"] == "queries"
    )
    assert row["without"] == pytest.approx(
        (-43 + 20) / 700
    )  # without mistral-instruct-v0.1, 6 against 26
    assert row["verdict"] == "survives"
    row = at.loc[("alpaca_eval", "DRO without norm / default", "DRO / default")]
    wins = cells[(cells["query_set"] == "alpaca_eval") & (cells["prompt"] == "default")].pivot(
        index="model", columns="method", values="value"
    )
    d = wins["DRO without norm"] - wins["DRO"]
    error = d.std() / math.sqrt(8)
    assert (row["low"], row["high"]) == pytest.approx(
        (d.mean() - 2.364624 * error, d.mean() + 2.364624 * error)
    )
    assert (
        row["p"] == pytest.approx(2 * stats.t.sf(abs(d.mean()) / error, 7))
        and row["unit"] == "models"
    )
    lenient = Claim(
        "costs no wins", "alpaca_eval", ("DRO without norm", "default"), DRO, "not lower"
    )
    (p,) = claims_table([lenient], n_flips=999)["p"]
    assert p == pytest.approx(stats.t.sf((d.mean() + 0.05) / error, 7))
    np.testing.assert_allclose(claims["p_holm"], holm(claims["p"].to_numpy()))
    assert claims["p_max"].notna().eq(claims["unit"] == "queries").all()


def test_verdicts(claims):
    """What is said of the paper: DRO's lead on harmful queries survives everywhere; five of nine claims on wins do; ablations are not separable."""
    survives = claims["verdict"].eq("survives").groupby(claims["claim"]).agg(["sum", "size"])
    assert tuple(survives.loc["DRO lowers it more than prompt tuning"]) == (7, 7)
    of_wins = ["prompt tuning costs wins", "DRO costs no wins", "DRO wins more than prompt tuning"]
    assert [tuple(survives.loc[claim]) for claim in of_wins] == [(2, 3), (1, 3), (2, 3)]
    assert set(claims["verdict"]) == {"survives", "not separable"}
    inside = (claims["low"] <= claims["estimate"]) & (claims["estimate"] <= claims["high"])
    assert inside.all()


def test_wins_by_instruction_add_up_to_the_printed_counts(cells):
    wins = win_scores()
    keys = ["model", "method", "prompt"]
    counted = wins.groupby(keys)["value"].agg(["mean", "size"])
    printed = cells[cells["query_set"] == "alpaca_eval"].set_index(keys)["value"]
    assert len(counted) == 80 and (counted["size"] == 100).all()
    np.testing.assert_allclose(counted["mean"], printed.loc[counted.index])


@pytest.mark.parametrize("prompt", ["default", "short"])
def test_a_margin_is_tested_by_one_sided_flips(claims, prompt):
    """Against flips drawn here: a query's eight wins and losses change sides together."""
    wide = win_scores().pivot_table("value", "query", ["method", "prompt", "model"])
    d = (wide["DRO", prompt] - wide["text", prompt]).mean(axis=1).to_numpy()
    at = claims.set_index(["query_set", "first", "second"])
    row = at.loc[("alpaca_eval", f"DRO / {prompt}", f"text / {prompt}")]
    assert row["unit"] == "queries" and row["estimate"] == pytest.approx(d.mean())
    assert row["low"] < d.mean() < row["high"]
    signs = np.random.default_rng(7).choice([-1.0, 1.0], size=(50_000, len(d)))
    flipped = signs @ (d + 0.05) / len(d)
    p = (flipped >= d.mean() + 0.05).mean()
    assert row["p"] == pytest.approx(p, abs=4 * math.sqrt(p / 9999) + 1e-3)


def test_a_claim_turned_round_is_reversed():
    turned = [Claim("turned", "advbench", TUNED, DRO, "lower")]
    row = claims_table(turned, n_flips=999).iloc[0]
    assert row["verdict"] == "reversed" and row["models"] == "1-7" and row["estimate"] > 0


def test_refusals_that_go_on_to_a_list():
    table = published.string_judge_sample()
    assert (
        len(table) == 200
        and (table["n"] == 20).all()
        and (table["then_listed"] <= table["refused"]).all()
    )
    totals = table.groupby("model")[["refused", "then_listed"]].sum()
    assert (
        tuple(totals.loc["mistral-instruct-v0.2"]) == (10, 8)
        and totals.loc["codellama-instruct", "refused"] == 82
    )
    # The sample is the cell of held-out harmless queries under the default prompt, query by query.
    cell = query_scores("any of 1").query(
        "query_set == 'harmless_testset' and method == 'text' and prompt == 'default'"
    )
    for model, part in table.groupby("model"):
        np.testing.assert_allclose(
            part["refused"] / 20, cell[cell["model"] == model].sort_values("query")["value"]
        )


# The figure


@pytest.fixture(scope="module")
def table(scores):
    both = pd.concat(
        [
            scores.assign(metric=name, value=scores["value"] * factor)
            for name, factor in (("whole", 1), ("half", 0.5))
        ]
    )
    return score_table(both)


def dot(table, query_set, method, model, metric):
    keys = {"query_set": query_set, "method": method, "model": model, "metric": metric}
    return table[(table[list(keys)] == pd.Series(keys)).all(axis=1)].iloc[0]


def test_the_figure_shows_each_model_and_the_slider_each_metric(table):
    fig = plot_by_model(table, start="half")
    assert len(fig.data) == 2 * 4 and fig.layout.sliders[0].active == 1
    at = [t.name for t in fig.data].index("DRO / default")
    assert fig.data[at].text[4] == "mistral-instruct-v0.1, DRO / default"
    for metric, step in zip(("whole", "half"), fig.layout.sliders[0].steps, strict=True):
        (change,) = step.args
        row = dot(table, "malicious_instruct", "DRO", "mistral-instruct-v0.1", metric)
        assert step.label == metric and change["x"][at][4] == pytest.approx(row["value"], abs=1e-4)
        assert change["error_x.array"][at][4] == pytest.approx(row["high"] - row["value"], abs=2e-4)
        assert change["error_x.arrayminus"][at][4] == pytest.approx(
            row["value"] - row["low"], abs=2e-4
        )
        assert len(change["x"]) == len(fig.data)
    first = fig.layout.sliders[0].steps[1].args[0]
    np.testing.assert_array_equal([t.x for t in fig.data], first["x"])
    ends = [axis.range for axis in (fig.layout.xaxis, fig.layout.xaxis2)]
    for (low, high), (_, part) in zip(ends, table.groupby("query_set", sort=False), strict=True):
        assert low <= 0 and high >= part["high"].max()


def test_one_metric_needs_no_slider_and_order_does_not_matter(table):
    one = table[table["metric"] == "whole"]
    fig = plot_by_model(one, note="<b>note</b>")
    assert not fig.layout.sliders and "&lt;b&gt;note" in fig.layout.annotations[-1].text
    mixed = plot_by_model(pd.concat([one[:1], one[1:].sample(frac=1, random_state=0)]))
    dots = {
        (text, panel, x)
        for t in fig.data
        for text, panel, x in zip(t.text, [t.xaxis] * 9, t.x, strict=True)
    }
    panels = {a.text for a in fig.layout.annotations} - {"&lt;b&gt;note&lt;/b&gt;"}
    assert panels == {a.text for a in mixed.layout.annotations}
    assert {(text, x) for text, _, x in dots} == {
        (text, x) for t in mixed.data for text, x in zip(t.text, t.x, strict=True)
    }


def test_the_figure_refuses(table):
    with pytest.raises(ValueError, match="give one row for each model, condition, set and metric"):
        plot_by_model(table[1:])
    with pytest.raises(ValueError, match="start 'third' must be one of"):
        plot_by_model(table, start="third")
