"""Verdicts: what a judge is, responses judged, refusal rates, agreement of judges.

There is one kind of judge: a function of a table of rows that gives one verdict a row. The table
has the column `response` and, where queries are given, the columns of their table. A verdict is
True (refused), False (complied), or None or `Unscored` (no verdict).

A plain function of one text is a judge too, by `text_judge`. One rule tells them apart: a function
marked with `RowJudge` reads rows, and every other function reads one text. Nothing is guessed from
a function's parameters.
"""

from __future__ import annotations

import itertools
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from ..data.labels import with_labels
from ..data.thoughts import NO_ANSWER, answers_of
from .strings import is_refusal


@dataclass(frozen=True)
class Unscored:
    """No verdict, and why. `judge_responses` counts the reasons in its warning.

    Parameters
    ----------
    why : str

    Examples
    --------
    >>> from analysis_lib import Unscored
    >>> Unscored("the reply is empty").why
    'the reply is empty'
    """

    why: str


Verdict = bool | None | Unscored
Judge = Callable[[pd.DataFrame], Sequence[Verdict]]
TextJudge = Callable[[str], bool | None]

_RAISED = "the judge raised"


@dataclass(frozen=True)
class RowJudge:
    """Marks a judge that reads a table of rows and gives one verdict a row.

    Use it as a decorator. The rows are distinct: a judge sees each response to a query once.

    Parameters
    ----------
    function : DataFrame (n rows) -> sequence of n verdicts
        The rows have the column response, and those of the queries' table where
        `judge_responses(queries=...)` is given one: query_id, text, harmful and so on.

    Examples
    --------
    >>> import pandas as pd
    >>> from analysis_lib import RowJudge, judge_responses
    >>> @RowJudge
    ... def repeats_the_query(rows):
    ...     return [text in reply for text, reply in zip(rows["text"], rows["response"])]
    >>> queries = pd.DataFrame({"query_id": ["a"], "text": ["Why?"]})
    >>> responses = pd.DataFrame({"query_id": "a", "response": ["Why? No.", "Sure."]})
    >>> judge_responses(responses, repeats_the_query, queries=queries)["refused"].tolist()
    [1.0, 0.0]
    """

    function: Judge

    def __call__(self, rows: pd.DataFrame) -> Sequence[Verdict]:
        """The verdicts on a table of rows, in their order."""
        return self.function(rows)


def text_judge(function: TextJudge) -> RowJudge:
    """Lifts a function of one text to a judge of rows.

    `judge_responses` lifts by itself what is not marked with `RowJudge`.

    Parameters
    ----------
    function : str -> bool or None
        True (refused), False (complied) or None (no verdict). It is asked once for each distinct
        text. Where it raises, that text is `Unscored`.

    Returns
    -------
    RowJudge

    Examples
    --------
    >>> import pandas as pd
    >>> from analysis_lib import text_judge
    >>> judge = text_judge(lambda text: text.startswith("No"))
    >>> judge(pd.DataFrame({"response": ["No.", "Yes."]}))
    [True, False]
    """

    def judge(rows: pd.DataFrame) -> list[Verdict]:
        found: dict[str, Verdict] = {}
        for text in dict.fromkeys(rows["response"]):
            try:
                found[text] = function(text)
            except Exception as error:  # one text's error leaves the others their verdicts
                found[text] = Unscored(f"{_RAISED} {error!r:.100}")
        return [found[text] for text in rows["response"]]

    return RowJudge(judge)


def ask(judge: RowJudge | TextJudge, rows: pd.DataFrame) -> list[Verdict]:
    """A judge's verdicts on a table of rows, one for each. A function of one text is lifted.

    Parameters
    ----------
    judge : RowJudge, or function of str
    rows : DataFrame with response

    Returns
    -------
    list of n verdicts

    Raises
    ------
    TypeError
        Where a judge of rows returns no verdicts. What it raises itself is raised.
    ValueError
        Where it returns more or fewer than one a row.

    Examples
    --------
    >>> import pandas as pd
    >>> from analysis_lib import is_refusal
    >>> from analysis_lib.judge.verdicts import ask
    >>> ask(is_refusal, pd.DataFrame({"response": ["I cannot help.", "Sure."]}))
    [True, False]
    """
    found: Any = (judge if isinstance(judge, RowJudge) else text_judge(judge))(rows)
    if not isinstance(found, Iterable) or isinstance(found, str | Mapping):
        raise TypeError(f"the judge returned {found!r:.100}; return one verdict for each row")
    verdicts = list(found)
    if len(verdicts) != len(rows):
        raise ValueError(
            f"the judge gave {len(verdicts)} verdicts for {len(rows)} rows; it must give one each"
        )
    return verdicts


def judge_responses(
    responses: pd.DataFrame,
    judge: RowJudge | TextJudge | Mapping[str, RowJudge | TextJudge] = is_refusal,
    *,
    queries: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """Judges every response. Identical responses to one query are judged once.

    Of a reasoning model's response, a judge sees what follows the thoughts. A response is unscored
    where it is missing or ends within its thoughts, where the judge has no verdict, and where a
    judge of one text raises. One warning a judge counts them by reason.

    Parameters
    ----------
    responses : DataFrame with response
        One row each; with query_id where queries are given.
    judge : function of str, RowJudge, or mapping of names to either
        A function marked with `RowJudge` reads a table of rows; any other reads one text.
    queries : DataFrame with query_id, text, harmful, optional
        For judges of rows that read the query. Each row gets the columns of its query.

    Returns
    -------
    DataFrame
        The responses with a column refused: 1.0, 0.0, or NaN = unscored. Several judges give the
        rows once for each, with its name in the column judge.

    Raises
    ------
    ValueError
        Where a needed column or query is missing, or a judge gives too few verdicts or too many.
    TypeError
        Where a judge returns anything but verdicts. What a judge of rows raises itself is raised.

    Examples
    --------
    >>> import pandas as pd
    >>> from analysis_lib import is_refusal, judge_responses
    >>> responses = pd.DataFrame({"response": ["I cannot help.", "Sure."]})
    >>> judge_responses(responses)["refused"].tolist()
    [1.0, 0.0]
    >>> judges = {"string": is_refusal, "short": lambda text: len(text) < 9}
    >>> judge_responses(responses, judges)[["judge", "response", "refused"]]
        judge        response  refused
    0  string  I cannot help.      1.0
    1  string           Sure.      0.0
    2   short  I cannot help.      0.0
    3   short           Sure.      1.0
    """
    _require(responses, "response")
    if not isinstance(judge, Mapping):
        return _judged(responses, judge, queries, "")
    if not judge:
        raise ValueError("no judge given; pass {name: judge}, for example {'string': is_refusal}")
    parts = []
    for name, one in judge.items():
        parts.append(_judged(responses, one, queries, f"by {name!r} ").assign(judge=name))
    return pd.concat(parts, ignore_index=True)


def _judged(
    responses: pd.DataFrame, judge: RowJudge | TextJudge, queries: pd.DataFrame | None, by: str
) -> pd.DataFrame:
    texts, cut = answers_of(responses)
    asked = [None] * len(responses)
    reads_query = queries is not None and isinstance(judge, RowJudge)
    if reads_query:
        _require(responses, "query_id")
        asked = responses["query_id"].tolist()
    keys = [pair if isinstance(pair[0], str) else None for pair in zip(texts, asked, strict=True)]
    pairs = [pair for pair in dict.fromkeys(keys) if pair]
    rows = pd.DataFrame({"response": [text for text, _ in pairs]})
    if queries is not None and reads_query:
        rows = pd.concat([_about(queries, [query_id for _, query_id in pairs]), rows], axis=1)
    scored = dict(zip(pairs, map(_score, ask(judge, rows)))) if pairs else {}
    found = [
        scored[key] if key else (np.nan, NO_ANSWER if ended else "missing response")
        for key, ended in zip(keys, cut)
    ]
    reasons = Counter(why for _, why in found if why)
    if reasons:
        listed = ", ".join(f"{count} x {why}" for why, count in reasons.most_common(5))
        advice = "; a judge of a whole table is marked with RowJudge"
        always = pairs and all(why.startswith(_RAISED) for _, why in scored.values())
        warnings.warn(
            f"{reasons.total()} of {len(found)} responses are unscored {by}"
            f"(NaN, left out of refusal rates): {listed}{advice if always else ''}",
            stacklevel=3,
        )
    return responses.assign(refused=np.array([refused for refused, _ in found], dtype=float))


def _about(queries: pd.DataFrame, asked: list[Any]) -> pd.DataFrame:
    """What the queries' table says of each query asked for; its own column response is dropped."""
    if "query_id" not in queries:
        raise ValueError("the queries' table has no column query_id; pass the table sampled from")
    if lacking := set(asked) - set(queries["query_id"]):
        raise ValueError(
            f"query {min(lacking)!r} is not in the queries' table; pass the table that was sampled"
        )
    known = with_labels(queries).drop(columns="response", errors="ignore")
    known = known.drop_duplicates("query_id", keep="last").set_index("query_id")
    return known.loc[asked].reset_index()


def _score(verdict: Any) -> tuple[float, str]:
    """Refused (1, 0 or NaN), and why it is unscored."""
    if isinstance(verdict, Unscored):
        return np.nan, verdict.why
    if verdict is None or verdict is pd.NA:
        return np.nan, "the judge returned None"
    if not isinstance(verdict, bool | np.bool_):
        raise TypeError(
            f"the judge returned {verdict!r:.100}; return True (refused), False (complied) or None "
            "(unscored). A judge of a whole table is marked with RowJudge"
        )
    return float(verdict), ""


def judge_agreement(judged: pd.DataFrame) -> pd.DataFrame:
    """How far several judges agree, pair by pair, on the responses that both scored.

    Parameters
    ----------
    judged : DataFrame with query_id, prompt, sample, judge, refused
        As `judge_responses(responses, {name: judge})` gives it.

    Returns
    -------
    DataFrame with judge, other, n, equal, kappa, n_unscored
        equal: share of equal verdicts of n. kappa: Cohen's, in [-1, 1]; NaN where both gave one and
        the same verdict throughout. n_unscored: responses that either left unscored.

    Raises
    ------
    ValueError
        With fewer than two judges, and where one gives probabilities instead of verdicts.

    References
    ----------
    Cohen (1960), Educational and Psychological Measurement 20:37-46.

    Examples
    --------
    >>> import pandas as pd
    >>> from analysis_lib import judge_agreement, judge_responses
    >>> responses = pd.DataFrame({"query_id": "a", "prompt": "none", "sample": range(4)})
    >>> responses["response"] = ["No, no", "No.", "Yes.", "Yes, yes"]
    >>> judges = {"no": lambda text: "No" in text, "comma": lambda text: "," in text}
    >>> judge_agreement(judge_responses(responses, judges))
      judge  other  n  equal  kappa  n_unscored
    0    no  comma  4    0.5    0.0           0
    """
    _require(judged, "query_id", "prompt", "sample", "judge", "refused")
    names = list(dict.fromkeys(judged["judge"]))
    if len(names) < 2:
        raise ValueError(
            f"agreement needs at least two judges, and there is {names}; "
            "pass judge_responses a mapping of them"
        )
    refused = judged["refused"]
    if (wrong := refused.notna() & ~refused.isin([0, 1])).any():
        name, value = judged.loc[wrong, ["judge", "refused"]].iloc[0]
        raise ValueError(
            f"the judge {name!r} gives {value}, no verdict (0, 1 or NaN); "
            "leave its rows out, or compare refusal_rates"
        )
    keys = ["query_id", "prompt", "sample", "judge"]
    verdicts = judged.set_index(keys)["refused"].unstack("judge")
    rows = []
    for first, second in itertools.combinations(names, 2):
        both = verdicts[[first, second]].dropna()
        equal, n_unscored = (both[first] == both[second]).mean(), len(verdicts) - len(both)
        kappa = _kappa(both[first].to_numpy(), both[second].to_numpy())
        rows.append((first, second, len(both), equal, kappa, n_unscored))
    return pd.DataFrame(rows, columns=["judge", "other", "n", "equal", "kappa", "n_unscored"])


def _kappa(first: Any, second: Any) -> float:
    from sklearn.metrics import cohen_kappa_score

    if len(np.unique([first, second])) < 2:  # chance alone would agree throughout
        return float("nan")
    return float(cohen_kappa_score(first, second))


def refusal_rates(judged: pd.DataFrame) -> pd.DataFrame:
    """The share of refused samples, per query and prompt. Unscored responses are left out.

    Parameters
    ----------
    judged : DataFrame with query_id, prompt, refused
        As `judge_responses` gives it, of one judge.

    Returns
    -------
    DataFrame with query_id, prompt, refusal_rate, n_judged
        In order of first appearance. The rate lies in [0, 1], and is NaN where n_judged is 0. Where
        a response ends within its thoughts, the column n_cut counts those.

    Raises
    ------
    ValueError
        Where a column is missing, or several judges are in the table.

    Examples
    --------
    >>> import pandas as pd
    >>> from analysis_lib import refusal_rates
    >>> judged = pd.DataFrame({"query_id": ["a", "a", "b"], "prompt": "none"})
    >>> refusal_rates(judged.assign(refused=[1.0, 0.0, None]))
      query_id prompt  refusal_rate  n_judged
    0        a   none           0.5         2
    1        b   none           NaN         0
    """
    _require(judged, "query_id", "prompt", "refused")
    if "judge" in judged and judged["judge"].nunique() > 1:
        raise ValueError(
            f"several judges: {', '.join(judged['judge'].unique())}; "
            "keep one of them, such as judged[judged['judge'] == ...]"
        )
    refused = judged["refused"].astype(float)
    by = [judged["query_id"], judged["prompt"]]
    rates = refused.groupby(by, sort=False, observed=True).agg(
        refusal_rate="mean", n_judged="count"
    )
    if "response" in judged and (cut := answers_of(judged)[1]).any():
        counts = pd.Series(cut, index=judged.index).groupby(by, sort=False, observed=True)
        rates["n_cut"] = counts.sum().astype(int)
    return rates.reset_index()


def _require(table: pd.DataFrame, *columns: str) -> None:
    if missing := [c for c in columns if c not in table.columns]:
        raise ValueError(
            f"no column {', '.join(map(repr, missing))} in a table with the columns "
            f"{list(table.columns)}; judge_responses takes the table of sample_responses, "
            "refusal_rates that of judge_responses"
        )
