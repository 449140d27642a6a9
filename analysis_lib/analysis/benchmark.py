"""Safety prompts compared: one tidy table of rates with intervals over queries."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ..data.labels import with_labels
from ..data.thoughts import answers_of
from ..data.units import query_units
from .intervals import bootstrap_interval, difference_interval, rate_interval
from .metrics import Metric, find_metrics

COLUMNS = [
    "model",
    "method",
    "prompt",
    "query_set",
    "metric",
    "value",
    "low",
    "high",
    "n_queries",
    "n_samples",
    "judge",
]


def benchmark_table(
    judged: pd.DataFrame,
    queries: pd.DataFrame,
    methods: Mapping[str, str] | None = None,
    *,
    model: str,
    metrics: Sequence[Metric | str] | None = None,
    judge: str = "string",
    baseline: str | None = None,
    by: str = "form",
    n_boot: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """Rates of compliance and refusal by prompt and query set.

    Unscored samples are left out, and a query without any scored sample with them.

    Parameters
    ----------
    judged : DataFrame with query_id, prompt, sample, response, refused
        As `judge_responses` gives them, with the column judge where there are several. A judge's
        `refused` may be a probability, as first-token estimates are. Of such a judge there are
        only the metrics that take probabilities.
    queries : DataFrame with query_id, harmful, query_set
        Optional columns: answer (a non-empty one makes the row a fact question), `by`, and text,
        base_id and base_text: queries of one text, and the variants that `wrap_queries` makes of
        one query, are averaged and count as one unit (see `query_units`).
    methods : mapping of prompt to method, optional
        Such as {"default": "text", "dro": "DRO"}. A prompt not named is "text".
    model : str
        The model's name in the table.
    metrics : sequence of Metric or str, optional
        Names of `METRICS` and metrics of your own. The default is all of `METRICS`.
    judge : str
        The judge's name, where `judged` has no column judge.
    baseline : str, optional
        A prompt. Each row gets its difference from it, paired by query.
    by : str
        A column of queries. A set with several values of it is reported as "set/value".
    n_boot, seed : int
        Number of resamples of a bootstrap interval, and what fixes them.

    Returns
    -------
    DataFrame with COLUMNS
        95 % intervals over queries: Wilson's where a query counts as 0 or 1, else a bootstrap
        (see `rate_interval`). With a baseline also difference, difference_low, difference_high.
        Where a response ends within its thoughts also n_cut: how many do in a set under a prompt.
        Several judges add rows of the metrics that compare two of them.

    Raises
    ------
    ValueError
        Where a column, query, prompt or metric is missing, or a metric returns no numbers.

    References
    ----------
    Zheng et al. (2024), "On Prompt-Driven Safeguarding for Large Language Models", section 4.

    Examples
    --------
    >>> import pandas as pd
    >>> from analysis_lib import benchmark_table
    >>> queries = pd.DataFrame({"query_id": ["a", "b"], "harmful": True, "query_set": "mine"})
    >>> judged = pd.DataFrame({"query_id": ["a", "b"], "prompt": "none", "sample": 0})
    >>> judged = judged.assign(response=["I cannot.", "Sure."], refused=[1.0, 0.0])
    >>> table = benchmark_table(judged, queries, model="m", metrics=["compliance_mean"])
    >>> table[["prompt", "query_set", "metric", "value", "n_queries"]]
      prompt query_set           metric  value  n_queries
    0   none      mine  compliance_mean    0.5          2
    """
    lacking = [
        c for c in ("query_id", "prompt", "sample", "response", "refused") if c not in judged
    ]
    lacking += [c for c in ("query_id", "harmful", "query_set") if c not in queries]
    if lacking:
        raise ValueError(
            f"missing column {', '.join(lacking)}: give judge_responses(sample_responses(...)) "
            "and the queries' table"
        )
    _check(judged, queries, baseline)
    queries, chosen = with_labels(queries), find_metrics(metrics)
    if "judge" not in judged:
        judged = judged.assign(judge=judge)
    _check_samples(judged, baseline)
    judges = list(judged["judge"].unique())
    samples = _with_queries(judged, queries, by)
    cells = _each_judge(samples, judges, chosen) + _pairs_of_judges(samples, judges, chosen)
    table = _table(cells, queries, methods, model, baseline, n_boot, seed)
    keys = ["query_set", "prompt"]
    cut = samples[samples["cut"]].drop_duplicates(["query_id", "prompt", "sample"])
    if cut.empty:
        return table
    counts = cut.groupby(keys, as_index=False).size().rename(columns={"size": "n_cut"})
    return table.merge(counts, on=keys, how="left").fillna({"n_cut": 0}).astype({"n_cut": int})


def metric_table(
    values: pd.DataFrame,
    queries: pd.DataFrame,
    methods: Mapping[str, str] | None = None,
    *,
    model: str,
    metric: str,
    judge: str = "exact",
    n_samples: int = 1,
    baseline: str | None = None,
    by: str = "form",
    n_boot: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """Rows like those of `benchmark_table`, from values that you computed yourself.

    For example the wins of `read_alpaca_eval`, or the losses of `next_token_loss`.

    Parameters
    ----------
    values : DataFrame with query_id, prompt, value
        One row a query and prompt, in any unit. Rows without a value are left out.
    queries : DataFrame with query_id, query_set
        Optional columns as in `benchmark_table`.
    methods : mapping of prompt to method, optional
    model, metric, judge : str
        What stands in the table's columns of these names.
    n_samples : int
        How many samples each value was computed from.
    baseline, by, n_boot, seed
        As in `benchmark_table`.

    Returns
    -------
    DataFrame with COLUMNS
        95 % intervals over queries: `rate_interval` where all values lie in [0, 1], else
        `bootstrap_interval`.

    Raises
    ------
    ValueError
        Where a column, query or prompt is missing, or a query has two values under a prompt.

    Examples
    --------
    >>> import pandas as pd
    >>> from analysis_lib import metric_table
    >>> queries = pd.DataFrame({"query_id": ["a", "b"], "query_set": "mine"})
    >>> losses = pd.DataFrame({"query_id": ["a", "b"], "prompt": "none", "value": [1.0, 3.0]})
    >>> table = metric_table(losses, queries, model="m", metric="loss")
    >>> table[["prompt", "metric", "value", "n_queries"]]
      prompt metric  value  n_queries
    0   none   loss    2.0          2
    """
    if lacking := [c for c in ("query_id", "prompt", "value") if c not in values]:
        raise ValueError(
            f"missing column {', '.join(lacking)}: give one value for each query_id and prompt"
        )
    if values.duplicated(["query_id", "prompt"]).any():
        twice = values[values.duplicated(["query_id", "prompt"])].iloc[0]
        raise ValueError(
            f"query {twice['query_id']!r} has two values under {twice['prompt']!r}; "
            "average them first"
        )
    _check(values, queries, baseline)
    values = values[values["value"].notna()]
    values = values.assign(query_set=values["query_id"].map(_sets(queries, by)))
    cells = []
    for (query_set, prompt), part in values.groupby(["query_set", "prompt"], sort=False):
        numbers = part.set_index("query_id")["value"].astype(float)
        cells.append(_Cell(prompt, str(query_set), metric, judge, n_samples, numbers))
    return _table(cells, queries, methods, model, baseline, n_boot, seed)


@dataclass(frozen=True)
class _Cell:
    """One row to be: values, one a query, indexed by query_id."""

    prompt: Any
    query_set: str
    metric: str
    judge: str
    n_samples: int
    values: pd.Series


def _check(values: pd.DataFrame, queries: pd.DataFrame, baseline: str | None) -> None:
    unknown = set(values["query_id"]) - set(queries["query_id"])
    if unknown:
        raise ValueError(
            f"{len(unknown)} judged queries are not in the queries' table "
            f"(for example {min(unknown)!r}); pass the same queries"
        )
    if baseline is not None and baseline not in set(values["prompt"]):
        raise ValueError(
            f"baseline {baseline!r} is none of the prompts {', '.join(values['prompt'].unique())}"
        )
    if queries["query_id"].duplicated().any():
        first = queries.loc[queries["query_id"].duplicated(), "query_id"].iloc[0]
        raise ValueError(
            f"query {first!r} occurs twice in the queries' table; give each query its own query_id"
        )


def _check_samples(judged: pd.DataFrame, baseline: str | None) -> None:
    keys = ["query_id", "prompt", "sample", "judge"]
    if (twice := judged.duplicated(keys)).any():
        first = judged.loc[twice, keys].iloc[0]
        raise ValueError(
            f"sample {first['sample']} of query {first['query_id']!r} under {first['prompt']!r} "
            f"occurs twice for the judge {first['judge']!r}; keep each sample once"
        )
    scored = judged["refused"].notna().groupby(judged["prompt"], sort=False).any()
    if unscored := [prompt for prompt in scored.index if not scored[prompt]]:
        missed = ", and no row has a difference from it" if baseline in unscored else ""
        warnings.warn(
            f"no sample under {', '.join(map(repr, unscored))} is scored, so the table has no row "
            f"of it{missed}; look at what the judge gives for these",
            stacklevel=3,
        )


def _table(
    cells: Sequence[_Cell],
    queries: pd.DataFrame,
    methods: Mapping[str, str] | None,
    model: str,
    baseline: str | None,
    n_boot: int,
    seed: int,
) -> pd.DataFrame:
    """Means, intervals and paired differences of the cells; see `query_units` for the units."""
    units = query_units(queries).set_axis(queries["query_id"])
    cells = [replace(cell, values=_by_unit(cell.values, units)) for cell in cells]
    start = {(c.query_set, c.metric, c.judge): c.values for c in cells if c.prompt == baseline}
    rows = []
    for cell in cells:
        low, high = _interval(cell.values.to_numpy(), n_boot, seed)
        row = {
            "model": model,
            "method": (methods or {}).get(cell.prompt, "text"),
            "prompt": cell.prompt,
            "query_set": cell.query_set,
            "metric": cell.metric,
            "value": cell.values.mean(),
            "low": low,
            "high": high,
            "n_queries": len(cell.values),
            "n_samples": cell.n_samples,
            "judge": cell.judge,
        }
        if baseline is not None:
            before = start.get((cell.query_set, cell.metric, cell.judge))
            row |= _difference(cell.values, before, n_boot, seed)
        rows.append(row)
    more = [] if baseline is None else ["difference", "difference_low", "difference_high"]
    return pd.DataFrame(rows, columns=COLUMNS + more)


def _by_unit(values: pd.Series, units: pd.Series) -> pd.Series:
    """The mean over the variants and copies of each query."""
    return values.groupby(units.reindex(values.index).to_numpy(), sort=False).mean()


def _sets(queries: pd.DataFrame, by: str) -> pd.Series:
    """The label of each query's set: its name, or "set/value" where it has several of `by`."""
    about = queries.set_index("query_id")
    sets = about["query_set"].astype(str)
    if by not in about:
        return sets
    several = about.groupby("query_set")[by].transform("nunique") > 1
    if "answer" in about:  # the forms of fact questions are no conditions
        facts = about["answer"].fillna("").astype(bool)
        several &= ~facts.groupby(sets).transform("any")
    return sets.mask(several, sets + "/" + about[by].astype(str))


def _with_queries(judged: pd.DataFrame, queries: pd.DataFrame, by: str) -> pd.DataFrame:
    """The samples, each with what is known of its query; query_set is the label of the set."""
    about = queries.set_index("query_id")
    answer = about["answer"].fillna("") if "answer" in about else ""
    about = about.assign(query_set=_sets(queries, by), answer=answer)
    own = ["query_id", "prompt", "sample", "response", "refused", "judge"]
    more = about.drop(columns=own, errors="ignore").reindex(judged["query_id"])
    answers, cut = answers_of(judged)
    samples = judged[own].assign(response=answers, cut=cut).reset_index(drop=True)
    return pd.concat([samples, more.reset_index(drop=True)], axis=1)


def _give_verdicts(samples: pd.DataFrame) -> pd.Series:
    """Mask of the samples whose judge gives verdicts (0, 1 or none) and never a probability."""
    soft = samples["refused"].notna() & ~samples["refused"].isin([0, 1])
    return ~samples["judge"].isin(samples.loc[soft, "judge"].unique())


def _by_set(
    samples: pd.DataFrame, metrics: Sequence[Metric], judge: str
) -> Iterator[tuple[Metric, _Cell]]:
    """The cells of each query set, prompt and metric."""
    for (query_set, prompt), part in samples.groupby(["query_set", "prompt"], sort=False):
        sizes = part.groupby("query_id", sort=False).size()
        for metric in metrics:
            values = metric.values(part)
            if len(values):
                n, name = int(sizes[values.index].max()), metric.judge or judge
                yield metric, _Cell(prompt, str(query_set), metric.name, name, n, values)


def _each_judge(
    samples: pd.DataFrame, judges: Sequence[Any], metrics: Sequence[Metric]
) -> list[_Cell]:
    """The cells of every judge; those of a metric that reads no verdict stand once."""
    hard = set(samples.loc[_give_verdicts(samples), "judge"])
    scored = samples[samples["refused"].notna()]
    cells, known = [], set()
    for judge in judges:
        asked = [m for m in metrics if not m.pairs and (m.probabilities or judge in hard)]
        for metric, cell in _by_set(scored[scored["judge"] == judge], asked, str(judge)):
            key = cell.prompt, cell.query_set, cell.metric
            if metric.judge is None or key not in known:
                cells.append(cell)
            known.add(key)
    return cells


def _pairs_of_judges(
    samples: pd.DataFrame, judges: Sequence[Any], metrics: Sequence[Metric]
) -> list[_Cell]:
    """The cells of every pair of judges, of the samples that both scored."""
    metrics = [metric for metric in metrics if metric.pairs]
    samples = samples[_give_verdicts(samples)]
    if not metrics or samples["judge"].nunique() < 2:
        return []
    keys = ["query_id", "prompt", "sample"]
    verdicts = samples.pivot_table("refused", keys, "judge", sort=False)
    scoring = [judge for judge in judges if judge in verdicts]
    about = samples.drop_duplicates(keys).drop(columns=["refused", "judge"])
    cells = []
    for first, second in itertools.combinations(scoring, 2):
        both = verdicts[[first, second]].dropna()
        both = both.set_axis(["refused", "other"], axis=1).reset_index()
        both = both.merge(about, on=keys, how="left").assign(judge=first)
        cells += [cell for _, cell in _by_set(both, metrics, f"{first} = {second}")]
    return cells


def _difference(
    values: pd.Series, start: pd.Series | None, n_boot: int, seed: int
) -> dict[str, float]:
    paired = np.empty(0) if start is None else (values - start).dropna().to_numpy()
    if not len(paired):
        return {"difference": np.nan, "difference_low": np.nan, "difference_high": np.nan}
    if values is start:  # the baseline itself
        return {"difference": 0.0, "difference_low": 0.0, "difference_high": 0.0}
    low, high = difference_interval(paired, n_boot=n_boot, seed=seed)
    return {"difference": paired.mean(), "difference_low": low, "difference_high": high}


def _interval(values: NDArray[Any], n_boot: int, seed: int) -> tuple[float, float]:
    rates = values.min() >= 0 and values.max() <= 1
    return (rate_interval if rates else bootstrap_interval)(values, n_boot=n_boot, seed=seed)
