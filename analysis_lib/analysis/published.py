"""DOC analysis_lib.analysis.published."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
from scipy import special, stats

from ..data.files import ROOT
from .intervals import difference_interval, holm, rate_interval, sign_flips


def load_published() -> tuple[pd.DataFrame, pd.DataFrame]:
    """The published results of Zheng et al. 2024: (summary, complied).

    summary, one row per cell: kind (harmful, harmless, alpaca), query_set, model, method (text, vpt =
    vanilla prompt tuning, dro, dro_without_<loss>), safety_prompt (the text, or the one the soft prompt
    started from), count, n_queries, source. count is the queries with at least one of 20 samples judged
    compliant (harmful), those with at least one refusal (harmless), or the wins (alpaca).

    complied, one row per query: kind, query_set, model, method, safety_prompt, query (position in its set,
    from 0), complied (how many of 20 samples were judged compliant). The query set heldout_harmless of
    both tables is the study's, here `harmless_testset`.
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

METRICS = {"harmful": "compliance_any", "harmless": "false_refusal_any", "alpaca": "wins"}

AVERAGE = "average"

MARGIN = 0.05  # the loss of wins that "costs no wins" still allows

KEYS = ["model", "method", "prompt", "query_set", "metric"]


def published_table() -> pd.DataFrame:
    """The cells of the paper's tables: model, method, prompt, query_set, metric, value in [0, 1], n queries.

    Metrics: compliance_any and false_refusal_any (at least one of 20 samples), wins. The study's held-out harmless queries
    are `harmless_testset`, as in OFFICIAL_SETS.
    """
    summary, _ = load_published()
    table = _conditions(summary).assign(
        metric=summary["kind"].map(METRICS), value=summary["count"] / summary["n_queries"]
    )
    return table.rename(columns={"n_queries": "n"})[[*KEYS, "value", "n"]]


def as_printed(table: pd.DataFrame, query_set: str) -> pd.DataFrame:
    """One query set as the paper prints it: per cent, conditions in rows, models and their average (halves up) in columns."""
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
    """Values to one decimal, halves up as the paper rounds: 10.25 is 10.3 (pandas' own `round` takes it to the even 10.2)."""
    return np.floor(10 * values.round(6) + 0.5) / 10


ANY = {f"any of {m}": m for m in range(1, N_SAMPLES + 1)}

AT_LEAST = {f"at least {m} of {N_SAMPLES}": m for m in range(1, N_SAMPLES + 1)}

# From the mean rate (one sample drawn) to the strictest: the study's metric is "any of 20", the same as "at least 1 of 20".
METRIC_STEPS = [*ANY, *list(AT_LEAST)[1:]]


def query_scores(metric: str = "any of 20") -> pd.DataFrame:
    """Every published verdict row by query: KEYS, query (position in its set, from 0), value in [0, 1].

    An event is a sample judged compliant (harmful sets) or refused (harmless sets); k of 20 are events. "at least m of 20"
    is 1 where k >= m. "any of m" is the chance that m of the 20 samples, drawn without replacement, hold an event:
    1 - C(20 - k, m) / C(20, m), the hypergeometric expectation. "any of 1" is the mean rate.
    Query i of a set is the id "{query_set}-{i + 1:04d}" of the downloaded official set.
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
            f"no metric {metric!r}; take 'any of m' or 'at least m of {N_SAMPLES}', m from 1 to {N_SAMPLES}"
        )
    return complied.assign(metric=metric, value=value)[[*KEYS, "query", "value"]]


def score_table(scores: pd.DataFrame) -> pd.DataFrame:
    """Means of `query_scores` with 95 % intervals over queries: KEYS, value, low, high, n; model "average" too."""
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
    """First minus second condition, paired by query, wherever a query set has both; per model and for the "average" model.

    Columns: query_set, metric, first, second, model, difference, low, high, p, p_holm, p_max, n. low, high:
    `difference_interval` over queries. p: a sign-flip test (under the null a query's two conditions change places; all
    models of a query flip together). p_holm and p_max (the greatest studentized difference, flipped jointly) adjust for all
    rows of the same level: averages among themselves, models among themselves.
    """
    wide = _with_average(scores).pivot_table(
        "value", ["query_set", "query"], ["method", "prompt", "model"], sort=False
    )
    metric = _only(scores["metric"])
    rows, columns = [], []
    for first, second in comparisons:
        for query_set, part in wide.groupby(level="query_set", sort=False):
            part = part.dropna(axis=1)
            if not {first, second} <= {(c[0], c[1]) for c in part.columns}:
                continue
            for model in (*MODELS.values(), AVERAGE):
                d = (part[(*first, model)] - part[(*second, model)]).to_numpy()
                low, high = difference_interval(d)
                rows.append(
                    (
                        query_set,
                        metric,
                        " / ".join(first),
                        " / ".join(second),
                        model,
                        d.mean(),
                        low,
                        high,
                        len(d),
                    )
                )
                columns.append(d)
    if not rows:
        raise ValueError(
            "no query set holds both conditions of a comparison; conditions: " + _listed(scores)
        )
    names = ["query_set", "metric", "first", "second", "model", "difference", "low", "high", "n"]
    table = pd.DataFrame(rows, columns=names)
    table[["p", "p_holm", "p_max"]] = np.nan
    for level in (table["model"] == AVERAGE, table["model"] != AVERAGE):
        chosen = table.index[level]
        p, p_max = sign_flips(
            [columns[i] for i in chosen], list(table.loc[chosen, "query_set"]), n_flips, seed
        )
        table.loc[chosen, "p"], table.loc[chosen, "p_max"], table.loc[chosen, "p_holm"] = (
            p,
            p_max,
            holm(p),
        )
    return table[[*names[:-1], "p", "p_holm", "p_max", "n"]]


@dataclass(frozen=True)
class Claim:
    """A difference that the paper's tables show: first against second is "lower", "higher" or "not lower"."""

    text: str
    query_set: str
    first: Condition
    second: Condition
    direction: str


def _claims() -> list[Claim]:
    none, prompts = ("no prompt", "none"), PROMPTS[1:]
    harmful = [(s, p) for p in prompts for s in ("malicious_instruct", "advbench")] + [
        ("advbench_gcg", "default")
    ]
    claims = []
    for query_set, prompt in harmful:
        text, tuned, dro = ("text", prompt), ("prompt tuning", prompt), ("DRO", prompt)
        claims += [
            Claim("a text prompt lowers compliance", query_set, text, none, "lower"),
            Claim("prompt tuning lowers it further", query_set, tuned, text, "lower"),
            Claim("DRO lowers it further", query_set, dro, text, "lower"),
            Claim("DRO lowers it more than prompt tuning", query_set, dro, tuned, "lower"),
        ]
    text, tuned, dro = ("text", "default"), ("prompt tuning", "default"), ("DRO", "default")
    claims += [
        Claim("a text prompt raises false refusals", "harmless_testset", text, none, "higher"),
        Claim("prompt tuning lowers false refusals", "harmless_testset", tuned, text, "lower"),
        Claim("DRO lowers false refusals", "harmless_testset", dro, text, "lower"),
    ]
    for prompt in prompts:
        text, tuned, dro = ("text", prompt), ("prompt tuning", prompt), ("DRO", prompt)
        claims += [
            Claim("prompt tuning costs wins", "alpaca_eval", tuned, text, "lower"),
            Claim("DRO costs no wins", "alpaca_eval", dro, text, "not lower"),
            Claim("DRO wins more than prompt tuning", "alpaca_eval", dro, tuned, "higher"),
        ]
    dro = ("DRO", "default")
    without = {
        loss: (f"DRO without {loss}", "default") for loss in ("norm", "refusal", "harmfulness")
    }
    return claims + [
        Claim("the norm loss keeps wins", "alpaca_eval", without["norm"], dro, "lower"),
        Claim(
            "the refusal loss lowers compliance",
            "malicious_instruct",
            without["refusal"],
            dro,
            "higher",
        ),
        Claim("the refusal loss lowers compliance", "advbench", without["refusal"], dro, "higher"),
        Claim(
            "the harmfulness loss keeps wins", "alpaca_eval", without["harmfulness"], dro, "lower"
        ),
    ]


def claims_table(*, n_flips: int = 99_999, seed: int = 0, level: float = 0.05) -> pd.DataFrame:
    """What the paper's tables claim, and what holds, over the average of the eight models.

    Columns: claim, query_set, first, second, estimate (a difference of shares), low, high, unit, p, p_holm (over all claims),
    p_max, models ("for-against", ties left out), without (the estimate least in favour when one model is left out),
    verdict. unit "queries": verdicts by query are published, and the test is that of `paired_differences`. unit "models":
    only counts are, and eight paired models make a t-interval and a t-test. "not lower" is tested against -MARGIN, one-sided.
    verdict: "survives" or "reversed" where p_holm < level, else "not separable".
    """
    claims, cells = (
        _claims(),
        published_table()
        .set_index(["query_set", "method", "prompt", "model"])["value"]
        .sort_index(),
    )
    pairs = list(dict.fromkeys((c.first, c.second) for c in claims))
    by_query = paired_differences(query_scores(), pairs, n_flips=n_flips, seed=seed)
    averages = by_query[by_query["model"] == AVERAGE]
    tested = dict(
        zip(
            averages[["query_set", "first", "second"]].itertuples(index=False, name=None),
            averages.index,
            strict=True,
        )
    )
    rows = []
    for claim in claims:
        first, second = (" / ".join(c) for c in (claim.first, claim.second))
        models = (
            cells.loc[(claim.query_set, *claim.first)] - cells.loc[(claim.query_set, *claim.second)]
        ).to_numpy()
        mean, sign = models.mean(), -1 if claim.direction == "lower" else 1
        p_max = np.nan
        if (at := tested.get((claim.query_set, first, second))) is not None:
            unit, (low, high, p, p_max) = "queries", averages.loc[at, ["low", "high", "p", "p_max"]]
        else:
            least = -MARGIN if claim.direction == "not lower" else 0.0
            test = stats.ttest_1samp(models, least, alternative="greater" if least else "two-sided")
            low, high = stats.ttest_1samp(models, 0).confidence_interval()
            unit, p = "models", float(test.pvalue)
        agreeing = [int((sign * models > 0).sum()), int((sign * models < 0).sum())]
        left_out = (models.sum() - models) / (len(models) - 1)
        rows.append(
            {
                "claim": claim.text,
                "query_set": claim.query_set,
                "first": first,
                "second": second,
                "estimate": mean,
                "low": low,
                "high": high,
                "unit": unit,
                "p": p,
                "p_max": p_max,
                "models": "{}-{}".format(*agreeing),
                "without": left_out[np.argmin(sign * left_out)],
                "as_claimed": claim.direction == "not lower" or sign * mean > 0,
            }
        )
    table = pd.DataFrame(rows)
    table["p_holm"] = holm(table["p"].to_numpy())
    separable = np.where(table["as_claimed"], "survives", "reversed")
    table["verdict"] = np.where(table["p_holm"] < level, separable, "not separable")
    order = "claim query_set first second estimate low high unit p p_holm p_max models without verdict".split()
    return table[order]


def string_judge_sample() -> pd.DataFrame:
    """How refusals found by the string judge go on: two models, `harmless_testset`, default prompt.

    One row a model and query: model, query (its position in the set, from 0), n answers, refused (by
    the string judge), then_listed (refused, yet a line starts a list, as an answer in steps does; so
    may a list of alternatives). Counted from the published answers.
    """
    counts = pd.read_csv(ROOT / "published" / "refused_then_listed.csv")
    return counts.assign(model=counts["model"].map(MODELS))


@cache
def _complied() -> pd.DataFrame:
    return _conditions(load_published()[1])


def _conditions(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows under our names (no system message is a method of its own), in the order of QUERY_SETS, PROMPTS, METHODS, MODELS."""
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


def _with_average(scores: pd.DataFrame) -> pd.DataFrame:
    average = (
        scores.groupby([*KEYS[1:], "query"], sort=False)["value"]
        .mean()
        .reset_index()
        .assign(model=AVERAGE)
    )
    return pd.concat([scores, average], ignore_index=True)


def _only(values: pd.Series) -> str:
    if len(found := values.unique()) != 1:
        raise ValueError(
            f"scores of one metric are compared, these hold {', '.join(map(str, found))}; call it once for each"
        )
    return str(found[0])


def _listed(scores: pd.DataFrame) -> str:
    return ", ".join(
        f"({m!r}, {p!r})"
        for m, p in scores[["method", "prompt"]].drop_duplicates().itertuples(index=False)
    )
