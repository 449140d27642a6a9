"""Scores by query: means with intervals, and paired differences of two conditions."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pandas as pd

from .intervals import difference_interval, holm, rate_interval, sign_flips
from .published import AVERAGE, KEYS, MODELS, Condition


def score_table(scores: pd.DataFrame) -> pd.DataFrame:
    """Means of `query_scores` with 95 % intervals over queries; of the model "average" too.

    Parameters
    ----------
    scores : DataFrame
        As `query_scores` gives them, of one metric or several.

    Returns
    -------
    DataFrame with KEYS, value, low, high, n
        In [0, 1]; n queries.

    Examples
    --------
    >>> from analysis_lib.analysis.paired import score_table
    >>> from analysis_lib.analysis.published import query_scores
    >>> table = score_table(query_scores().query("query_set == 'advbench' and method == 'DRO'"))
    >>> len(table), bool((table["low"] <= table["value"]).all())
    (27, True)
    """
    rows = []
    for key, part in _with_average(scores).groupby(KEYS, sort=False):
        low, high = rate_interval(part["value"].to_numpy())
        rows.append((*key, part["value"].mean(), low, high, len(part)))
    return pd.DataFrame(rows, columns=[*KEYS, "value", "low", "high", "n"])


def paired_differences(
    scores: pd.DataFrame,
    comparisons: Iterable[tuple[Condition, Condition]],
    *,
    n_flips: int = 9999,
    seed: int = 0,
) -> pd.DataFrame:
    """First minus second condition, paired by query, wherever a query set has both.

    Parameters
    ----------
    scores : DataFrame
        As `query_scores` and `win_scores` give them, of one metric.
    comparisons : iterable of (first, second)
        Each a condition (method, prompt).
    n_flips, seed : int
        Number of sign flips, and what fixes them.

    Returns
    -------
    DataFrame, one row a query set, comparison and model; the model "average" last
        query_set, metric, first, second, model, difference. low, high: `difference_interval` over
        n queries. p: a sign-flip test in which all models of a query flip together. p_holm and
        p_max (the greatest studentized difference, flipped jointly) adjust for all rows of the
        same level: averages among themselves, models among themselves. n.

    Raises
    ------
    ValueError
        Where no query set has both conditions, or scores of several metrics are given.

    Examples
    --------
    >>> from analysis_lib.analysis.paired import paired_differences
    >>> from analysis_lib.analysis.published import query_scores
    >>> pair = [(("DRO", "default"), ("text", "default"))]
    >>> scores = query_scores().query("query_set == 'advbench'")
    >>> table = paired_differences(scores, pair, n_flips=99).set_index("model")
    >>> round(float(table.loc["average", "difference"]), 3)
    -0.089
    """
    wide = _with_average(scores).pivot_table(
        "value", ["query_set", "query"], ["method", "prompt", "model"], sort=False
    )
    metric = _only(scores["metric"])
    rows, columns = [], []
    for first, second in comparisons:
        named = {"first": " / ".join(first), "second": " / ".join(second)}
        for query_set, part in wide.groupby(level="query_set", sort=False):
            part = part.dropna(axis=1)
            if not {first, second} <= {(c[0], c[1]) for c in part.columns}:
                continue
            for model in (*MODELS.values(), AVERAGE):
                d = (part[(*first, model)] - part[(*second, model)]).to_numpy()
                low, high = difference_interval(d)
                row = {"query_set": query_set, "metric": metric, **named, "model": model}
                rows.append(row | {"difference": d.mean(), "low": low, "high": high, "n": len(d)})
                columns.append(d)
    if not rows:
        raise ValueError(
            f"no query set holds both conditions of a comparison; conditions: {_listed(scores)}"
        )
    table = pd.DataFrame(rows)
    table[["p", "p_holm", "p_max"]] = np.nan
    for level in (table["model"] == AVERAGE, table["model"] != AVERAGE):
        chosen = table.index[level]
        sets = list(table.loc[chosen, "query_set"])
        p, p_max = sign_flips([columns[i] for i in chosen], sets, n_flips, seed)
        table.loc[chosen, ["p", "p_max", "p_holm"]] = np.column_stack([p, p_max, holm(p)])
    return table[[c for c in table if c != "n"] + ["n"]]


def _with_average(scores: pd.DataFrame) -> pd.DataFrame:
    means = scores.groupby([*KEYS[1:], "query"], sort=False)["value"].mean().reset_index()
    return pd.concat([scores, means.assign(model=AVERAGE)], ignore_index=True)


def _only(values: pd.Series) -> str:
    if len(found := values.unique()) != 1:
        raise ValueError(
            f"scores of one metric are compared, these hold {', '.join(map(str, found))}; "
            "call it once for each"
        )
    return str(found[0])


def _listed(scores: pd.DataFrame) -> str:
    conditions = scores[["method", "prompt"]].drop_duplicates()
    return ", ".join(f"({m!r}, {p!r})" for m, p in conditions.itertuples(index=False))
