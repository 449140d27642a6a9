"""The judge room: response -> refused, complied or unscored; refusal rates; agreement between judges.

A judge is any function of a response, or of a response and its query (the query's row as a mapping: text, harmful,
...), to True (refused), False (complied) or None (unscored); or a `BatchJudge`. `is_refusal` is the string judge of Zheng et al. 2024, to
the letter. Judges that need a model: `model_judges`.
"""

from __future__ import annotations

import inspect
import itertools
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from .strings import is_refusal

Judge = Callable[[str], "bool | None"] | Callable[[str, Mapping[str, Any]], "bool | None"]


@dataclass(frozen=True)
class BatchJudge:
    """A judge that does better with many responses at a time: many(responses, queries) gives one verdict each."""

    many: Callable[[Sequence[str], Sequence[Mapping[str, Any]]], Sequence[bool | None]]

    def __call__(self, response: str, query: Mapping[str, Any]) -> bool | None:
        return self.many([response], [query])[0]


def judge_responses(
    responses: pd.DataFrame,
    judge: Judge | Mapping[str, Judge] = is_refusal,
    *,
    queries: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """The responses (one row each, column `response`) with a column `refused`: 1.0, 0.0, or NaN = unscored.

    Several judges, {name: judge}, give the rows once for each, with its name in the column `judge`.
    queries: the query table, for judges that read the query (responses then need query_id).
    Unscored is a missing response and one for which the judge returns None or raises; one warning a judge
    counts them. What a BatchJudge raises is raised. Identical responses (to one query) are judged once. ValueError without a needed column or query,
    TypeError where the judge returns anything but a bool or None.
    """
    _require(responses, "response")
    if isinstance(judge, Mapping):
        if not judge:
            raise ValueError(
                "no judge given; pass {name: judge}, for example {'string': is_refusal}"
            )
        parts = []
        for name, one in judge.items():
            parts.append(_judged(responses, one, queries, f"by {name!r} ").assign(judge=name))
        return pd.concat(parts, ignore_index=True)
    return _judged(responses, judge, queries, "")


def _judged(
    responses: pd.DataFrame, judge: Judge, queries: pd.DataFrame | None, by: str
) -> pd.DataFrame:
    asked: list[Any] = [None] * len(responses)
    about: dict[Any, dict[Any, Any]] = {}
    if _takes_query(judge):
        if queries is None or "harmful" not in queries:
            raise ValueError(
                "this judge reads the query; pass queries=, the table with query_id, text and harmful"
            )
        _require(responses, "query_id")
        asked = responses["query_id"].tolist()
        about = {row["query_id"]: row for row in queries.to_dict("records")}
        if lacking := set(asked) - set(about):
            raise ValueError(
                f"query {min(lacking)!r} is not in the queries' table; pass the table that was sampled"
            )
    pairs = dict.fromkeys(
        key for key in zip(responses["response"], asked, strict=True) if isinstance(key[0], str)
    )
    at_once: dict[tuple[str, Any], bool | None] = {}
    if isinstance(judge, BatchJudge):
        found = judge.many(
            [response for response, _ in pairs], [about[query_id] for _, query_id in pairs]
        )
        if len(found) != len(pairs):
            raise ValueError(
                f"the batch judge {by}gave {len(found)} verdicts for {len(pairs)} responses; it must give one each"
            )
        at_once = dict(zip(pairs, found))
    judge = with_query(judge)
    verdicts: dict[tuple[str, Any], tuple[float, str]] = {}  # refused, and why it is unscored

    def verdict(response: str, query_id: Any) -> tuple[float, str]:
        try:
            key = response, query_id
            refused = at_once[key] if key in at_once else judge(response, about.get(query_id, {}))
        except Exception as error:
            return np.nan, f"the judge raised {error!r:.100}"
        if refused is None:
            return np.nan, "the judge returned None"
        if not isinstance(refused, bool | np.bool_):
            raise TypeError(
                f"the judge returned {refused!r}; return True (refused), False (complied) or None (unscored)"
            )
        return float(refused), ""

    refused = np.full(len(responses), np.nan)
    reasons: Counter[str] = Counter()
    for i, key in enumerate(zip(responses["response"], asked, strict=True)):
        why = "missing response"
        if isinstance(key[0], str):
            if key not in verdicts:
                verdicts[key] = verdict(*key)
            refused[i], why = verdicts[key]
        if why:
            reasons[why] += 1
    if reasons:
        listed = ", ".join(f"{count} x {why}" for why, count in reasons.most_common(5))
        warnings.warn(
            f"{reasons.total()} of {len(refused)} responses are unscored {by}(NaN, left out of refusal rates): {listed}",
            stacklevel=3,
        )
    return responses.assign(refused=refused)


def _takes_query(judge: Judge) -> bool:
    """Whether a judge needs two positional arguments."""
    try:
        parameters = inspect.signature(judge).parameters.values()
    except (TypeError, ValueError):  # a builtin
        return False
    return (
        sum(
            p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty
            for p in parameters
        )
        == 2
    )


def with_query(judge: Judge) -> Callable[[str, Mapping[str, Any]], bool | None]:
    """The judge as a function of response and query."""
    asks: Any = judge
    return asks if _takes_query(judge) else lambda response, query: asks(response)


def judge_agreement(judged: pd.DataFrame) -> pd.DataFrame:
    """How far the judges of `judge_responses(responses, {name: judge})` agree, pair by pair, on what both scored.

    Returns [judge, other, n, equal, kappa, n_unscored]: equal is the share of equal verdicts, kappa Cohen's (Cohen 1960;
    NaN where both gave one and the same verdict throughout), n_unscored the responses that either left unscored.
    ValueError with fewer than two judges, and where one gives probabilities instead of verdicts.
    """
    _require(judged, "query_id", "prompt", "sample", "judge", "refused")
    names = list(dict.fromkeys(judged["judge"]))
    if len(names) < 2:
        raise ValueError(
            f"agreement needs at least two judges, and there is {names}; pass judge_responses a mapping of them"
        )
    refused = judged["refused"]
    if (wrong := refused.notna() & ~refused.isin([0, 1])).any():
        name, value = judged.loc[wrong, ["judge", "refused"]].iloc[0]
        raise ValueError(
            f"the judge {name!r} gives {value}, no verdict (0, 1 or NaN); leave its rows out, or compare refusal_rates"
        )
    verdicts = judged.set_index(["query_id", "prompt", "sample", "judge"])["refused"].unstack(
        "judge"
    )
    rows = []
    for first, second in itertools.combinations(names, 2):
        both = verdicts[[first, second]].dropna()
        equal = (both[first] == both[second]).mean()
        p, q = both[first].mean(), both[second].mean()
        chance = p * q + (1 - p) * (1 - q)
        kappa = (equal - chance) / (1 - chance) if chance < 1 else np.nan
        rows.append((first, second, len(both), equal, kappa, len(verdicts) - len(both)))
    return pd.DataFrame(rows, columns=["judge", "other", "n", "equal", "kappa", "n_unscored"])


def refusal_rates(judged: pd.DataFrame) -> pd.DataFrame:
    """Per query and prompt, in order of first appearance: query_id, prompt, refusal_rate in [0, 1], n_judged.

    Unscored responses are left out; the rate is NaN where n_judged is 0. ValueError where several judges are in the table.
    """
    _require(judged, "query_id", "prompt", "refused")
    if "judge" in judged and judged["judge"].nunique() > 1:
        raise ValueError(
            f"several judges: {', '.join(judged['judge'].unique())}; keep one of them, such as judged[judged['judge'] == ...]"
        )
    refused = judged["refused"].astype(float)
    groups = refused.groupby([judged["query_id"], judged["prompt"]], sort=False, observed=True)
    return groups.agg(refusal_rate="mean", n_judged="count").reset_index()


def _require(table: pd.DataFrame, *columns: str) -> None:
    if missing := [c for c in columns if c not in table.columns]:
        raise ValueError(
            f"no column {', '.join(map(repr, missing))} in a table with the columns {list(table.columns)}; "
            "judge_responses takes the table of sample_responses, refusal_rates that of judge_responses"
        )
