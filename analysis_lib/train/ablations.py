"""Methods as rows of a table: the baseline, DRO and its ablations, and their training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from ..analysis.directions import fit_direction
from ..analysis.estimators import grouped_folds
from ..analysis.space import AnchorSpace
from ..collect.responses import sample_responses
from ..collect.states import hidden_states
from ..data.labels import read_labels, with_labels
from ..data.units import query_units
from ..judge.strings import verdict_is_final
from ..judge.verdicts import judge_responses, refusal_rates
from ..model.chat import ChatModel
from ..model.soft_prompt import SoftPrompt
from ..store.store import Store
from .dro import DROConfig, train_dro
from .tuning import PromptTuningConfig, train_prompt_tuning


@dataclass(frozen=True)
class Method:
    """One training as a row of a table.

    prompt  its name in every table
    method  what it is
    start   the text prompt it starts from
    config  its settings
    k       components of the anchor space (DRO only)
    """

    prompt: str
    method: str
    start: str
    config: DROConfig | PromptTuningConfig
    k: int = 4


def ablations(
    start: str = "default",
    dro: DROConfig | None = None,
    tuning: PromptTuningConfig | None = None,
    *,
    components: Sequence[int] = (2, 8, 16),
    norm_weights: Sequence[float] = (0.01, 0.1, 1.0),
) -> tuple[Method, ...]:
    """The study's rows and ours: prompt tuning, DRO, and DRO with one thing changed.

    DRO is trained without each of its losses, with other numbers of components and with other norm
    weights. The study's DRO itself has 4 components and norm weight 0.001.

    Parameters
    ----------
    start : str
        Name of the text prompt that every row starts from.
    dro : DROConfig, optional
        Settings of DRO. Default: the study's.
    tuning : PromptTuningConfig, optional
        Settings of prompt tuning. Default: `PromptTuningConfig()`.
    components : sequence of int
        Numbers of components, one row each.
    norm_weights : sequence of float
        Weights of the norm loss, one row each.

    Returns
    -------
    tuple of Method
        Each with prompt (its name in every table), method, start, config and k.

    References
    ----------
    Zheng et al. 2024, arXiv 2401.18018.

    Examples
    --------
    >>> from analysis_lib import ablations
    >>> methods = ablations(components=(2,), norm_weights=())
    >>> [method.prompt for method in methods[:3]], methods[-1].k
    (['tuned', 'dro', 'dro_without_refusal'], 2)
    """
    dro, tuning = dro or DROConfig(), tuning or PromptTuningConfig()
    rows = [Method("tuned", "prompt tuning", start, tuning), Method("dro", "DRO", start, dro)]
    without = {
        "refusal": replace(dro, weight_refusal=0.0),
        "harmfulness": replace(dro, weight_harmfulness=0.0),
        "norm": replace(dro, weight_norm=0.0),
    }
    rows += [
        Method(f"dro_without_{loss}", f"DRO without {loss}", start, config)
        for loss, config in without.items()
    ]
    rows += [
        Method(f"dro_{k}_components", f"DRO, {k} components", start, dro, k) for k in components
    ]
    rows += [
        Method(f"dro_norm_{w:g}", f"DRO, norm weight {w:g}", start, replace(dro, weight_norm=w))
        for w in norm_weights
    ]
    return tuple(rows)


def train_methods(
    model: ChatModel,
    queries: pd.DataFrame,
    prompts: Mapping[str, str],
    judged: pd.DataFrame,
    methods: Sequence[Method],
    *,
    store: Store | None = None,
    progress: bool | None = None,
) -> dict[str, SoftPrompt]:
    """Trains every row on the anchor data.

    Parameters
    ----------
    model : ChatModel
        Stays frozen.
    queries : DataFrame
        The anchor queries: query_id, text and harmful.
    prompts : mapping
        {name: text}: the text prompts whose states span the anchor space.
    judged : DataFrame
        Judged responses to the queries under these prompts. Prompt tuning learns from those under
        no prompt ("none") and under its start.
    methods : sequence of Method
        The rows, such as `ablations()`.
    store : Store, optional
        Finished trainings are read from it, so an interrupted run goes on where it was.
    progress : bool, optional
        Whether bars are shown. Default: in a terminal or a notebook.

    Returns
    -------
    dict
        {method.prompt: SoftPrompt}.

    Raises
    ------
    ValueError
        For a name that is taken, or a start that is no prompt. Else as `train_dro` and
        `train_prompt_tuning`.

    Examples
    --------
    >>> from analysis_lib import ChatModel, PromptTuningConfig, ablations, load_queries
    >>> from analysis_lib import train_methods
    >>> model, queries = ChatModel.load("organism"), load_queries("anchor").head(2)
    >>> judged = queries.assign(prompt="none", sample=0, response="I am sorry.", refused=1.0)
    >>> tuning = ablations("kind", tuning=PromptTuningConfig(epochs=1))[:1]
    >>> prompts = {"none": "", "kind": "Be kind."}
    >>> trained = train_methods(model, queries, prompts, judged, tuning)
    >>> list(trained), trained["tuned"].start_text
    (['tuned'], 'Be kind.')
    """
    names = [m.prompt for m in methods]
    if taken := [n for i, n in enumerate(names) if n in prompts or n in names[:i]]:
        raise ValueError(
            f"the name {taken[0]!r} is taken by another row or prompt; give each method its own"
        )
    if lacking := [m for m in methods if m.start not in prompts]:
        raise ValueError(
            f"{lacking[0].prompt!r} starts from "
            f"{lacking[0].start!r}, which is none of {', '.join(prompts)}"
        )
    states, rows = hidden_states(model, queries, prompts, store=store).at(-1)
    rows = rows.merge(
        refusal_rates(judged), on=["query_id", "prompt"], how="left", validate="one_to_one"
    )
    spaces = {}
    for k in sorted({m.k for m in methods if isinstance(m.config, DROConfig)}):
        space = AnchorSpace.fit(states, k=k)
        Z = space.transform(states)
        refusal = fit_direction(Z, rows["refusal_rate"], name="refusal", groups=query_units(rows))
        spaces[k] = (
            space,
            refusal,
            fit_direction(
                Z,
                read_labels(rows["harmful"]).astype(float),
                name="harmfulness",
                groups=query_units(rows),
            ),
        )
    trained = {}
    for m in methods:
        options: dict[str, Any] = {"name": m.prompt, "store": store, "progress": progress}
        if isinstance(m.config, DROConfig):
            trained[m.prompt] = train_dro(
                model, queries, prompts[m.start], *spaces[m.k], m.config, **options
            )
        else:
            seen = judged[judged["prompt"].isin(["none", m.start])]
            trained[m.prompt] = train_prompt_tuning(
                model, queries, seen, prompts[m.start], m.config, **options
            )
    return trained


def cross_validate_unlikelihood(
    model: ChatModel,
    queries: pd.DataFrame,
    judged: pd.DataFrame,
    prompt: str,
    config: PromptTuningConfig | None = None,
    *,
    weights: Sequence[float] = (1.0, 0.1, 0.02, 0.0),
    n_splits: int = 2,
    n_samples: int = 5,
    store: Store | None = None,
) -> pd.DataFrame:
    """Judges prompt tuning's unlikelihood weight on anchor data alone.

    A soft prompt is trained on some queries and sampled on the others. Queries of one pair_id stay
    together.

    Parameters
    ----------
    model : ChatModel
        Stays frozen.
    queries : DataFrame
        The anchor queries: query_id, text, harmful and optionally pair_id.
    judged : DataFrame
        Judged responses to them, as in `train_prompt_tuning`.
    prompt : str
        The text prompt to start from.
    config : PromptTuningConfig, optional
        All other settings; its seed also splits the queries.
    weights : sequence of float
        The weights to judge.
    n_splits : int
        Parts that the queries are split into.
    n_samples : int
        Responses to each held-out query.
    store : Store, optional
        As in `train_prompt_tuning` and `sample_responses`.

    Returns
    -------
    DataFrame
        One row a weight: weight, compliance (mean share of answered samples of held-out harmful
        queries), false_refusal (of refused ones of harmless queries) and error, the mean of both,
        all in [0, 1]. The weight of the least error is the choice.

    Raises
    ------
    ValueError, ChatModelError
        As `train_prompt_tuning` and `sample_responses`.

    Examples
    --------
    >>> from analysis_lib import ChatModel, PromptTuningConfig, load_queries
    >>> from analysis_lib import cross_validate_unlikelihood
    >>> model = ChatModel.load("organism")
    >>> queries = load_queries("anchor").groupby("harmful").head(2)
    >>> judged = queries.assign(response="I am sorry.", refused=1.0)
    >>> table = cross_validate_unlikelihood(
    ...     model, queries, judged, "Be kind.", PromptTuningConfig(epochs=1),
    ...     weights=(1.0,), n_samples=1,
    ... )
    >>> table.columns.tolist(), len(table)
    (['weight', 'compliance', 'false_refusal', 'error'], 1)
    """
    config = config or PromptTuningConfig()
    queries = with_labels(queries)
    groups = query_units(queries, pairs=True)
    folds = grouped_folds(groups.to_numpy(), n_splits, config.seed)
    harmful = queries.set_index("query_id")["harmful"]
    rows = []
    for weight in weights:
        rates = []
        for held_out in folds:
            chosen = replace(config, weight_unlikelihood=weight)
            seen = judged[judged["query_id"].isin(queries["query_id"][~held_out])]
            soft = train_prompt_tuning(model, queries[~held_out], seen, prompt, chosen, store=store)
            responses = sample_responses(
                model,
                queries[held_out],
                {"tuned": soft},
                n_samples=n_samples,
                stop_when=verdict_is_final,
                store=store,
            )
            rates.append(refusal_rates(judge_responses(responses)))
        rate = pd.concat(rates).set_index("query_id")["refusal_rate"]
        by_class = rate.groupby(harmful.reindex(rate.index).to_numpy(dtype=bool)).mean()
        rows.append(
            (
                weight,
                1 - by_class[True],
                by_class[False],
                (1 - by_class[True] + by_class[False]) / 2,
            )
        )
    return pd.DataFrame(rows, columns=["weight", "compliance", "false_refusal", "error"])
