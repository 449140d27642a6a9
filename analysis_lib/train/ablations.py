"""Methods as rows: the baseline, DRO and its ablations trained from a table of settings, and prompt
tuning's weight chosen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from ..analysis.directions import fit_direction, grouped_folds
from ..analysis.space import AnchorSpace
from ..collect.responses import sample_responses
from ..collect.states import hidden_states
from ..judge.strings import verdict_is_final
from ..judge.verdicts import judge_responses, refusal_rates
from ..model.chat import ChatModel
from ..model.soft_prompt import SoftPrompt
from ..store.store import Store
from .dro import DROConfig, train_dro
from .tuning import PromptTuningConfig, train_prompt_tuning


@dataclass(frozen=True)
class Method:
    """One training: `prompt` is its name in every table, `method` what it is, `start` the text
    prompt it starts from.

    k: components of the anchor space (DRO only).
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
    """The study's rows and ours: prompt tuning, DRO, DRO without each of its losses, with other
    components and norm weights.

    The study's DRO itself has 4 components and norm weight 0.001.
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
    """Trains every row on the anchor data: {method.prompt: soft prompt}.

    prompts: the text prompts whose states span the anchor space; judged: judged responses to the
    queries under them. Prompt tuning learns from the responses under no prompt and under its start.
    With a store, finished trainings are read, so an interrupted run goes on where it was.
    ValueError for a name that is taken or a start that is no prompt.
    """
    names = [m.prompt for m in methods]
    if taken := [n for i, n in enumerate(names) if n in prompts or n in names[:i]]:
        raise ValueError(
            f"the name {taken[0]!r} is taken by another row or prompt; give each method its own"
        )
    if lacking := [m for m in methods if m.start not in prompts]:
        raise ValueError(
            f"{lacking[0].prompt!r} starts from {lacking[0].start!r}, which is none of "
            f"{', '.join(prompts)}"
        )
    states, rows = hidden_states(model, queries, prompts, store=store).at(-1)
    rows = rows.merge(
        refusal_rates(judged), on=["query_id", "prompt"], how="left", validate="one_to_one"
    )
    spaces = {}
    for k in sorted({m.k for m in methods if isinstance(m.config, DROConfig)}):
        space = AnchorSpace.fit(states, k=k)
        Z = space.transform(states)
        refusal = fit_direction(Z, rows["refusal_rate"], name="refusal", groups=rows["query_id"])
        spaces[k] = (
            space,
            refusal,
            fit_direction(
                Z, rows["harmful"].astype(float), name="harmfulness", groups=rows["query_id"]
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
    """Prompt tuning's unlikelihood weight judged on anchor data alone: trained on some queries,
    sampled on the others.

    Queries of one pair_id stay together. Returns one row a weight: weight, compliance (mean share
    of answered samples of held-out harmful queries), false_refusal (of refused ones of harmless
    queries) and error, the mean of both; the weight of the least error is the choice.
    """
    config = config or PromptTuningConfig()
    pairs = (
        queries["pair_id"].fillna("")
        if "pair_id" in queries
        else pd.Series("", index=queries.index)
    )
    groups = queries["query_id"].where(pairs == "", pairs)
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
