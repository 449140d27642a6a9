"""What the tables of Zheng et al. 2024 claim, and which of it the published results bear out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from .intervals import holm
from .paired import paired_differences
from .published import AVERAGE, PROMPTS, Condition, published_table, query_scores, win_scores

MARGIN = 0.05  # the loss of wins that "costs no wins" still allows
LENIENT = " with the margin"  # of a method whose values got it on top


@dataclass(frozen=True)
class Claim:
    """A difference that the paper's tables show.

    Parameters
    ----------
    text : str
        The claim in words.
    query_set : str
    first, second : (method, prompt)
        The conditions compared.
    direction : str
        The first is "lower", "higher" or "not lower" than the second.

    Examples
    --------
    >>> from analysis_lib.analysis.claims import Claim
    >>> text, dro = ("text", "default"), ("DRO", "default")
    >>> Claim("DRO lowers it further", "advbench", dro, text, "lower").direction
    'lower'
    """

    text: str
    query_set: str
    first: Condition
    second: Condition
    direction: str


def published_claims() -> list[Claim]:
    """The claims of the paper: its main tables under three prompts, its ablations under one.

    Returns
    -------
    list of Claim

    Examples
    --------
    >>> from analysis_lib.analysis.claims import published_claims
    >>> len(published_claims()), published_claims()[0].text
    (44, 'a text prompt lowers compliance')
    """
    none, prompts = ("no prompt", "none"), PROMPTS[1:]
    harmful = [(s, p) for p in prompts for s in ("malicious_instruct", "advbench")]
    harmful.append(("advbench_gcg", "default"))
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
    norm, refusal, harmfulness = (
        (f"DRO without {loss}", "default") for loss in ("norm", "refusal", "harmfulness")
    )
    harms = "the refusal loss lowers compliance"
    return claims + [
        Claim("the norm loss keeps wins", "alpaca_eval", norm, dro, "lower"),
        Claim(harms, "malicious_instruct", refusal, dro, "higher"),
        Claim(harms, "advbench", refusal, dro, "higher"),
        Claim("the harmfulness loss keeps wins", "alpaca_eval", harmfulness, dro, "lower"),
    ]


def claims_table(
    claims: Sequence[Claim] | None = None,
    *,
    n_flips: int = 99_999,
    seed: int = 0,
    level: float = 0.05,
) -> pd.DataFrame:
    """What holds of each claim, over the average of the eight models.

    Parameters
    ----------
    claims : sequence of Claim, optional
        The default is `published_claims()`.
    n_flips, seed : int
        As in `paired_differences`.
    level : float
        A claim is told apart from chance where p_holm lies below it.

    Returns
    -------
    DataFrame, one row a claim
        claim, query_set, first, second. estimate: a difference of shares, first minus second; low,
        high: its 95 % interval. unit, what they and the test are taken over: "queries" where
        verdicts or wins by query are published (see `paired_differences`), else "models" (a
        t-interval and a t-test of eight pairs). p; p_holm, over all claims; p_max. models: "for-against", ties
        left out. without: the estimate least in favour when one model is left out. verdict:
        "survives", "reversed" or "not separable". "not lower" is tested against -MARGIN, one-sided.

    Examples
    --------
    >>> from analysis_lib.analysis.claims import Claim, claims_table
    >>> text, dro = ("text", "default"), ("DRO", "default")
    >>> claim = Claim("DRO lowers it further", "advbench", dro, text, "lower")
    >>> claims_table([claim], n_flips=999)[["claim", "models", "verdict"]]
                       claim models   verdict
    0  DRO lowers it further    5-0  survives
    """
    claims = published_claims() if claims is None else claims
    keys = ["query_set", "method", "prompt", "model"]
    cells = published_table().set_index(keys)["value"].sort_index()
    tested = _tested_by_queries(claims, n_flips, seed)
    rows = []
    for claim in claims:
        first, second = (" / ".join(c) for c in (claim.first, claim.second))
        named = {
            "claim": claim.text,
            "query_set": claim.query_set,
            "first": first,
            "second": second,
        }
        one, other = (cells.loc[(claim.query_set, *c)] for c in (claim.first, claim.second))
        models = (one - other).to_numpy()
        mean, sign = models.mean(), -1 if claim.direction == "lower" else 1
        test = tested.get(_key(claim)) or _tested_by_models(claim, models)
        agreeing = int((sign * models > 0).sum()), int((sign * models < 0).sum())
        left_out = (models.sum() - models) / (len(models) - 1)
        told = {
            "estimate": mean,
            "models": f"{agreeing[0]}-{agreeing[1]}",
            "without": left_out[np.argmin(sign * left_out)],
            "as_claimed": claim.direction == "not lower" or sign * mean > 0,
        }
        rows.append(named | test | told)
    table = pd.DataFrame(rows)
    table["p_holm"] = holm(table["p"].to_numpy())
    separable = np.where(table["as_claimed"], "survives", "reversed")
    table["verdict"] = np.where(table["p_holm"] < level, separable, "not separable")
    order = ["claim", "query_set", "first", "second", "estimate", "low", "high", "unit"]
    return table[[*order, "p", "p_holm", "p_max", "models", "without", "verdict"]]


def _tested_by_queries(
    claims: Sequence[Claim], n_flips: int, seed: int
) -> dict[tuple[str, str, str, str], dict[str, Any]]:
    """{(query_set, first, second, direction): interval and test}, where they are known by query.

    A claim of "not lower" is a comparison of its own, in which the first condition gets MARGIN on
    top. The test is then one-sided: flips are symmetric, so it has half of the two-sided p.
    """
    scores = pd.concat([query_scores(), win_scores()]).assign(metric="published")
    have = set(scores[["query_set", "method", "prompt"]].itertuples(index=False, name=None))
    known = [c for c in claims if {(c.query_set, *c.first), (c.query_set, *c.second)} <= have]
    if not known:
        return {}
    lenient = scores.assign(method=scores["method"] + LENIENT, value=scores["value"] + MARGIN)
    scores = pd.concat([scores, lenient], ignore_index=True)
    pairs = dict.fromkeys((_compared(claim), claim.second) for claim in known)
    differences = paired_differences(scores, pairs, n_flips=n_flips, seed=seed)
    averages = differences[differences["model"] == AVERAGE]
    rows = {(row["query_set"], row["first"], row["second"]): row for _, row in averages.iterrows()}
    found: dict[tuple[str, str, str, str], dict[str, Any]] = {}
    for claim in known:
        first, second = " / ".join(_compared(claim)), " / ".join(claim.second)
        row = rows[claim.query_set, first, second]
        test = {"unit": "queries", **{name: row[name] for name in ("low", "high", "p", "p_max")}}
        if claim.direction == "not lower":
            above = row["difference"] > 0
            test |= {name: test[name] - MARGIN for name in ("low", "high")}
            test |= {
                name: test[name] / 2 if above else 1 - test[name] / 2 for name in ("p", "p_max")
            }
        found[_key(claim)] = test
    return found


def _compared(claim: Claim) -> Condition:
    """The first condition as it is tested."""
    method, prompt = claim.first
    return (method + LENIENT * (claim.direction == "not lower"), prompt)


def _key(claim: Claim) -> tuple[str, str, str, str]:
    return (claim.query_set, " / ".join(claim.first), " / ".join(claim.second), claim.direction)


def _tested_by_models(claim: Claim, differences: np.ndarray) -> dict[str, Any]:
    """Interval and test over the eight models."""
    least = -MARGIN if claim.direction == "not lower" else 0.0
    side = "greater" if least else "two-sided"
    test = stats.ttest_1samp(differences, least, alternative=side)
    low, high = stats.ttest_1samp(differences, 0).confidence_interval()
    return {"unit": "models", "low": low, "high": high, "p": float(test.pvalue), "p_max": np.nan}
