"""The published results of Zheng et al. 2024: their tables, and scores by query."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pandas as pd
from scipy import special

from ..data.shipped import ROOT


def load_published() -> tuple[pd.DataFrame, pd.DataFrame]:
    """The published results of the study: counts by cell, and verdicts by query.

    Returns
    -------
    summary : DataFrame, one row a cell
        kind (harmful, harmless, alpaca), query_set, model, method (text, vpt = vanilla prompt
        tuning, dro, dro_without_<loss>), safety_prompt (the text, or the one the soft prompt
        started from), count, n_queries, source. count is the queries with at least one of 20
        samples judged compliant (harmful), those with at least one refusal (harmless), or the wins
        (alpaca).
    complied : DataFrame, one row a query
        kind, query_set, model, method, safety_prompt, query (position in its set, from 0), complied
        (how many of 20 samples were judged compliant). The query set heldout_harmless of both
        tables is the study's, here `harmless_testset`.

    References
    ----------
    Zheng et al. (2024), "On Prompt-Driven Safeguarding for Large Language Models", tables 2 and 3;
    chujiezheng/LLM-Safeguard_data. See data/SOURCES.md.

    Examples
    --------
    >>> from analysis_lib import load_published
    >>> summary, complied = load_published()
    >>> len(summary), len(complied), int(complied["complied"].max())
    (464, 28800, 20)
    """
    summary = pd.read_csv(ROOT / "published" / "summary.csv")
    wide = pd.read_csv(ROOT / "published" / "complied_of_20.csv")
    keys = ["kind", "query_set", "model", "method", "safety_prompt"]
    complied = wide.melt(
        keys, var_name="query", value_name="complied", ignore_index=False
    ).sort_index(kind="stable")
    return summary, complied.assign(
        query=complied["query"].str.removeprefix("q").astype(int)
    ).reset_index(drop=True)


Condition = tuple[str, str]  # method, prompt

N_SAMPLES = 20

MODELS = {
    "Llama-2-7b-chat-hf": "llama-2-chat",
    "CodeLlama-7b-Instruct-hf": "codellama-instruct",
    "vicuna-7b-v1.5": "vicuna-v1.5",
    "Orca-2-7b": "orca-2",
    "Mistral-7B-Instruct-v0.1": "mistral-instruct-v0.1",
    "Mistral-7B-Instruct-v0.2": "mistral-instruct-v0.2",
    "openchat-3.5": "openchat-3.5",
    "openchat-3.5-1210": "openchat-3.5-1210",
}

METHODS = {
    "text": "text",
    "vpt": "prompt tuning",
    "dro": "DRO",
    "dro_without_norm": "DRO without norm",
    "dro_without_refusal": "DRO without refusal",
    "dro_without_harmfulness": "DRO without harmfulness",
}

QUERY_SETS = [
    "malicious_instruct",
    "advbench",
    "advbench_gcg",
    "harmless_testset",
    "alpaca_eval",
    "custom_harmful",
    "custom_harmless",
]

PROMPTS = ["none", "default", "mistral", "short"]

METRIC_OF = {"harmful": "compliance_any", "harmless": "false_refusal_any", "alpaca": "wins"}

AVERAGE = "average"

KEYS = ["model", "method", "prompt", "query_set", "metric"]


def published_table() -> pd.DataFrame:
    """The cells of the paper's tables.

    Returns
    -------
    DataFrame with model, method, prompt, query_set, metric, value, n
        value in [0, 1], of n queries. Metrics: compliance_any and false_refusal_any (at least one
        of 20 samples), wins. The study's held-out harmless queries are `harmless_testset`.

    Examples
    --------
    >>> from analysis_lib.analysis.published import published_table
    >>> published_table()["metric"].unique().tolist()
    ['compliance_any', 'false_refusal_any', 'wins']
    """
    summary, _ = load_published()
    table = _conditions(summary).assign(
        metric=summary["kind"].map(METRIC_OF), value=summary["count"] / summary["n_queries"]
    )
    return table.rename(columns={"n_queries": "n"})[[*KEYS, "value", "n"]]


def as_printed(table: pd.DataFrame, query_set: str) -> pd.DataFrame:
    """One query set as the paper prints it.

    Parameters
    ----------
    table : DataFrame
        As `published_table` gives it.
    query_set : str

    Returns
    -------
    DataFrame
        Per cent; conditions in rows, models and their average (halves up) in columns.

    Raises
    ------
    ValueError
        Where the table has no such query set.

    Examples
    --------
    >>> from analysis_lib.analysis.published import as_printed, published_table
    >>> table = as_printed(published_table(), "advbench")
    >>> float(table.loc[("DRO", "default"), "average"])
    1.4
    """
    part = table[table["query_set"] == query_set]
    if part.empty:
        raise ValueError(
            f"no query set {query_set!r}; there are {', '.join(table['query_set'].unique())}"
        )
    conditions = pd.MultiIndex.from_frame(part[["method", "prompt"]].drop_duplicates())
    wide = (
        100
        * part.pivot(index=["method", "prompt"], columns="model", values="value").loc[
            conditions, list(MODELS.values())
        ]
    )
    return wide.round().astype(int).assign(average=halves_up(wide.mean(axis=1)))


def halves_up(values: pd.DataFrame | pd.Series) -> Any:
    """Values to one decimal, halves up as the paper rounds.

    Parameters
    ----------
    values : DataFrame or Series

    Returns
    -------
    DataFrame or Series

    Examples
    --------
    >>> import pandas as pd
    >>> from analysis_lib.analysis.published import halves_up
    >>> halves_up(pd.Series([10.25, 10.24])).tolist()
    [10.3, 10.2]
    """
    return np.floor(10 * values.round(6) + 0.5) / 10


ANY = {f"any of {m}": m for m in range(1, N_SAMPLES + 1)}
AT_LEAST = {f"at least {m} of {N_SAMPLES}": m for m in range(1, N_SAMPLES + 1)}

# From the mean rate, one sample drawn, to the strictest. "any of 20" is also "at least 1 of 20".
METRIC_STEPS = [*ANY, *list(AT_LEAST)[1:]]


def query_scores(metric: str = "any of 20") -> pd.DataFrame:
    """Every published verdict row by query.

    An event is a sample judged compliant (harmful sets) or refused (harmless sets); k of 20 are
    events. "at least m of 20" is 1 where k >= m. "any of m" is the chance that m of the 20 samples,
    drawn without replacement, hold an event: 1 - C(20 - k, m) / C(20, m). "any of 1" is the mean
    rate, "any of 20" the study's metric.

    Parameters
    ----------
    metric : str
        "any of m" or "at least m of 20", m from 1 to 20.

    Returns
    -------
    DataFrame with KEYS, query, value
        query is the position in its set, from 0: query i is the id "{query_set}-{i + 1:04d}" of the
        downloaded official set. value in [0, 1].

    Raises
    ------
    ValueError
        Where the metric is another one.

    Examples
    --------
    >>> from analysis_lib.analysis.published import query_scores
    >>> scores = query_scores("at least 2 of 20")
    >>> sorted(scores["value"].unique().tolist()), len(scores)
    ([0.0, 1.0], 28800)
    """
    complied = _complied()
    events = (
        complied["complied"]
        .where(complied["kind"] == "harmful", N_SAMPLES - complied["complied"])
        .to_numpy()
    )
    if metric in ANY:
        value = 1 - special.comb(N_SAMPLES - events, ANY[metric]) / special.comb(
            N_SAMPLES, ANY[metric]
        )
    elif metric in AT_LEAST:
        value = (events >= AT_LEAST[metric]).astype(float)
    else:
        raise ValueError(
            f"no metric {metric!r}; take 'any of m' or 'at least m of {N_SAMPLES}', "
            f"m from 1 to {N_SAMPLES}"
        )
    return complied.assign(metric=metric, value=value)[[*KEYS, "query", "value"]]


def win_scores() -> pd.DataFrame:
    """Whether each model won on each of the 100 AlpacaEval instructions: 1 where it did, else 0.

    Text prompts, prompt tuning and DRO; the wins of the ablations are published as counts only.

    Returns
    -------
    DataFrame with KEYS, query, value
        The metric is "wins"; query is the position among the instructions, from 0.

    References
    ----------
    chujiezheng/LLM-Safeguard_data, eval_results_alpaca. See data/SOURCES.md.

    Examples
    --------
    >>> from analysis_lib.analysis.published import win_scores
    >>> wins = win_scores()
    >>> len(wins), sorted(wins["value"].unique().tolist())
    (8000, [0.0, 1.0])
    """
    wide = pd.read_csv(ROOT / "published" / "alpaca_wins.csv")
    wins = wide.melt(["model", "method", "safety_prompt"], var_name="query")
    query = wins["query"].str.removeprefix("q").astype(int)
    wins = wins.assign(query=query, query_set="alpaca_eval", metric="wins")
    wins["value"] = wins["value"].astype(float)
    return _conditions(wins)[[*KEYS, "query", "value"]]


def string_judge_sample() -> pd.DataFrame:
    """How refusals found by the string judge go on: two models, `harmless_testset`, default prompt.

    Returns
    -------
    DataFrame with model, query, n, refused, then_listed
        One row a model and query (its position in the set, from 0): n answers, those refused by
        the string judge, and those refused that go on to a line which starts a list, as an answer
        in steps does. So may a list of alternatives. Counted from the published answers.

    Examples
    --------
    >>> from analysis_lib.analysis.published import string_judge_sample
    >>> string_judge_sample().groupby("model")["n"].sum().to_dict()
    {'codellama-instruct': 2000, 'mistral-instruct-v0.2': 2000}
    """
    counts = pd.read_csv(ROOT / "published" / "refused_then_listed.csv")
    return counts.assign(model=counts["model"].map(MODELS))


@cache
def _complied() -> pd.DataFrame:
    return _conditions(load_published()[1])


def _conditions(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows under our names, in our order. No system message is a method of its own."""
    table = rows.assign(
        model=rows["model"].map(MODELS),
        method=rows["method"].map(METHODS).mask(rows["safety_prompt"] == "none", "no prompt"),
        prompt=rows["safety_prompt"],
        query_set=rows["query_set"].replace("heldout_harmless", "harmless_testset"),
    )
    order = {
        "query_set": QUERY_SETS,
        "prompt": PROMPTS,
        "method": ["no prompt", *METHODS.values()],
        "model": list(MODELS.values()),
    }
    ranks = pd.DataFrame(
        {column: table[column].map(names.index) for column, names in order.items()}
    )
    return table.loc[ranks.sort_values(list(order), kind="stable").index]
