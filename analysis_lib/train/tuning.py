"""Prompt tuning, the baseline: a soft prompt learns from judged responses."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from ..collect.inputs import check_queries
from ..data.labels import with_labels
from ..model.chat import ChatModel
from ..model.errors import ChatModelError
from ..model.forward import Forward
from ..model.passes import plan_ways, run_plan, shares_prefixes
from ..model.replies import generation_prompt_ids, reply_ids, turn_ids
from ..model.soft_prompt import SoftPrompt
from ..model.tree import Pack
from ..store.store import Store
from .kept import KeptTraining
from .loop import OnStep, check_config, train_soft_prompt


@dataclass(frozen=True)
class PromptTuningConfig:
    """How prompt tuning trains: likelihood of good responses, unlikelihood of bad ones.

    Parameters
    ----------
    learning_rate : float
        Of AdamW, above 0.
    epochs : int
        Passes over the queries.
    batch_size : int
        Queries a step. All responses of a query fall into one step, where their common tokens are
        shared.
    weight_unlikelihood : float
        Weight of the bad responses' loss, >= 0.
    max_response_tokens : int
        Longer responses are cut.
    max_grad_norm : float
        Longer gradients are clipped to this norm.
    seed : int
        Shuffles the queries.
    baseline : "ours" or "study"
        "ours" trains the tokens of the replies, each to its end. "study" does as the study's code,
        see `study_tuning`.

    Raises
    ------
    ValueError
        For a setting out of its range.

    References
    ----------
    Zheng et al. 2024, arXiv 2401.18018 (vanilla prompt tuning); Welleck et al. 2020, "Neural Text
    Generation with Unlikelihood Training", arXiv 1908.04319.

    Examples
    --------
    >>> from analysis_lib import PromptTuningConfig
    >>> PromptTuningConfig(epochs=1).batch_size
    10
    """

    learning_rate: float = 1e-3
    epochs: int = 5
    batch_size: int = 10
    weight_unlikelihood: float = 1.0
    max_response_tokens: int = 100
    max_grad_norm: float = 1.0
    seed: int = 42
    baseline: str = "ours"

    def __post_init__(self) -> None:
        check_config(self)
        if self.baseline not in ("ours", "study"):
            raise ValueError(f"no baseline {self.baseline!r}; take 'ours' or 'study'")


FIVEFOLD = ("Llama-2-7b-chat-hf", "CodeLlama-7b-Instruct-hf")
"""Models for which the study gives the unlikelihood the weight 5."""


def study_tuning(model: ChatModel, **changes: Any) -> PromptTuningConfig:
    """Prompt tuning as the study's code does it, on the study's responses.

    It differs from the default in what it trains on. Without a safety prompt (the prompt "none")
    bad responses alone are taken; under a prompt, all. A step has 50 responses, drawn over all
    queries, and what is left at an epoch's end is dropped. The trained tokens are all that the chat
    template writes from the end of the query on, role markers and the next generation prompt
    included, 101 at most. Unlikelihood has the weight 5 for Llama-2 and CodeLlama, else 1.

    Parameters
    ----------
    model : ChatModel
        Its name decides the weight.
    **changes
        Other settings of `PromptTuningConfig`.

    Returns
    -------
    PromptTuningConfig

    References
    ----------
    chujiezheng/LLM-Safeguard, code/train_unlikelihood.py at 5dbb72cf.

    Examples
    --------
    >>> from analysis_lib import ChatModel, study_tuning
    >>> config = study_tuning(ChatModel.load("organism"), epochs=1)
    >>> config.baseline, config.batch_size, config.weight_unlikelihood
    ('study', 50, 1.0)
    """
    weight = 5.0 if model.name.rpartition("/")[2] in FIVEFOLD else 1.0
    settings = {"batch_size": 50, "weight_unlikelihood": weight, "max_response_tokens": 101}
    return PromptTuningConfig(**{**settings, **changes}, baseline="study")


def train_prompt_tuning(
    model: ChatModel,
    queries: pd.DataFrame,
    judged: pd.DataFrame,
    prompt: str,
    config: PromptTuningConfig | None = None,
    *,
    name: str = "prompt_tuning",
    apart: bool = False,
    store: Store | None = None,
    on_step: OnStep | None = None,
    progress: bool | None = None,
) -> SoftPrompt:
    """Trains a soft prompt on judged responses, from a text prompt: the baseline of DRO.

    A refused harmful query and an answered harmless one are good responses (likelihood). The others
    are bad ones (unlikelihood). Unscored responses are left out.

    Parameters
    ----------
    model : ChatModel
        Stays frozen.
    queries : DataFrame
        Has the columns query_id, text and harmful.
    judged : DataFrame
        Responses to the same queries: query_id, response, refused and optionally end.
    prompt : str
        The text prompt to start from.
    config : PromptTuningConfig, optional
        Default: `PromptTuningConfig()`.
    name : str
        The soft prompt's name.
    apart, store, on_step, progress
        As in `train_dro`.

    Returns
    -------
    SoftPrompt
        Its history has the columns step, epoch, loss, likelihood, unlikelihood and gradient_norm.

    Raises
    ------
    ValueError
        Where a column is missing, no response belongs to a labelled query, or all are empty.
    ChatModelError
        Where the model's tokens cannot share a prefix, or the model is quantized.
    FloatingPointError
        Where the gradient becomes NaN or infinite.

    References
    ----------
    Zheng et al. 2024, arXiv 2401.18018 (vanilla prompt tuning).

    Examples
    --------
    >>> from analysis_lib import ChatModel, PromptTuningConfig, load_queries, train_prompt_tuning
    >>> model, queries = ChatModel.load("organism"), load_queries("anchor").head(2)
    >>> judged = queries[["query_id"]].assign(response="I am sorry.", refused=1.0)
    >>> config = PromptTuningConfig(epochs=2, batch_size=2)
    >>> soft = train_prompt_tuning(model, queries, judged, "Be kind.", config)
    >>> soft.embeddings.shape, len(soft.history)
    ((4, 128), 2)
    >>> bool(soft.history["loss"].iloc[1] < soft.history["loss"].iloc[0])
    True
    """
    config = config or PromptTuningConfig()
    table = _training_table(queries, judged)
    end = ["end"] if "end" in table else []
    columns = ("text", "harmful", "response", "refused", *end)
    values = [table[column].astype(str).tolist() for column in columns] + [["apart"]] * apart
    kept = KeptTraining(store, "prompt tuning", model, prompt, config, *values)
    if (known := kept.read(name)) is not None:
        return known
    forward = model.forward
    if not shares_prefixes(forward):
        raise ChatModelError(
            f"prompt tuning needs a model whose tokens can share a prefix; {model.name!r} cannot"
        )
    start = SoftPrompt.from_text(model, prompt, name=name, apart=apart)
    asked = table.drop_duplicates("query_id")
    rendered = model.render(asked["text"].tolist(), start)
    heads = dict(zip(asked["query_id"], (row.ids for row in rendered)))
    examples = (_by_reply if config.baseline == "study" else _by_query)(model, table, config)
    if not examples:
        raise ValueError("every judged response is empty; sample responses to train on first")

    def step(batch: NDArray[Any]) -> dict[str, float]:
        targets = [one for i in batch for one in examples[i]]
        rows = [(*_head(heads[of], reply), *reply.ids[:-1]) for of, reply in targets]
        return _tuning_loss(forward, rows, [reply for _, reply in targets], config)

    return train_soft_prompt(
        forward, start, config, len(examples), step, kept, on_step, progress, "prompt tuning",
        order=_drawn if config.baseline == "study" else None,
    )  # fmt: skip


def _training_table(queries: pd.DataFrame, judged: pd.DataFrame) -> pd.DataFrame:
    """The judged responses with text, label and whether each is good.

    Unscored and unlabelled responses are left out.
    """
    check_queries(queries, "harmful")
    queries = with_labels(queries)
    if lacking := {"query_id", "response", "refused"} - set(judged.columns):
        raise ValueError(
            f"the judged responses lack the column {', '.join(sorted(lacking))}; "
            "make them with judge_responses"
        )
    about = queries[["query_id", "text", "harmful"]]
    table = judged.merge(about, on="query_id", suffixes=("", "_query"))
    table = table[table["refused"].notna() & table["harmful"].notna()]
    if table.empty:
        raise ValueError(
            "no judged response belongs to a labelled query; "
            "judge responses to the same queries first"
        )
    return table.assign(good=(table["refused"] == 1) == table["harmful"].astype(bool))


@dataclass(frozen=True)
class Reply:
    """A reply to train on: token ids, whether it is good, how often it counts.

    n_prompt of the head's last tokens are left out: the generation prompt, where `ids` begins with it.
    """

    ids: tuple[int, ...]
    good: bool
    count: int = 1
    n_prompt: int = 0


Example = list[tuple[str, Reply]]  # what falls into one step together: (query_id, reply)


def _head(row: tuple[int, ...], reply: Reply) -> tuple[int, ...]:
    return row[: len(row) - reply.n_prompt]


def _by_query(model: ChatModel, table: pd.DataFrame, config: PromptTuningConfig) -> list[Example]:
    """The distinct replies of each query, cut; the end token belongs to those that ended."""
    ended = (table["end"] == "eos").tolist() if "end" in table else [True] * len(table)
    if model.tokenizer.eos_token_id is None:
        ended = [False] * len(table)
    counts: dict[str, dict[tuple[tuple[int, ...], bool], int]] = {}
    encoded = reply_ids(model, table["response"].tolist(), ended)
    for name, reply, good in zip(table["query_id"], encoded, table["good"]):
        if ids := reply[: config.max_response_tokens]:
            of_query = counts.setdefault(name, {})
            of_query[ids, bool(good)] = of_query.get((ids, bool(good)), 0) + 1
    return [
        [(name, Reply(ids, good, count)) for (ids, good), count in counts[name].items()]
        for name in table["query_id"].unique()
        if name in counts
    ]


def _by_reply(model: ChatModel, table: pd.DataFrame, config: PromptTuningConfig) -> list[Example]:
    """Each reply by itself, as the study's code takes them: see `study_tuning`."""
    if "prompt" not in table:
        raise ValueError(
            "baseline='study' needs the column prompt of the judged responses; "
            "make them with judge_responses"
        )
    table = table[(table["prompt"] != "none") | ~table["good"]]
    turns = turn_ids(model, [reply.strip() for reply in table["response"]])
    n_prompt = len(generation_prompt_ids(model))
    return [
        [(name, Reply(ids[: config.max_response_tokens], bool(good), n_prompt=n_prompt))]
        for name, ids, good in zip(table["query_id"], turns, table["good"])
    ]


def _drawn(n: int, batch_size: int, epochs: int, seed: int) -> Iterator[tuple[int, NDArray[Any]]]:
    """(epoch, indices) of each step in the study's order; a rest of an epoch is dropped."""
    if n < batch_size:
        raise ValueError(
            f"{n} responses are fewer than the {batch_size} of one step; "
            "give more, or lower batch_size"
        )
    generator, order = random.Random(seed), list(range(n))
    for epoch in range(1, epochs + 1):
        generator.shuffle(order)
        for at in range(0, n - batch_size + 1, batch_size):
            yield epoch, np.array(order[at : at + batch_size])


def _tuning_loss(
    forward: Forward,
    rows: Sequence[tuple[int, ...]],
    replies: Sequence[Reply],
    config: PromptTuningConfig,
) -> dict[str, float]:
    """Gradients of the mean token losses of good and of bad replies, one a row; returns the losses."""
    # The heads without their last token.
    most = min(len(row) - len(reply.ids) for row, reply in zip(rows, replies, strict=True))
    plans = plan_ways(forward, rows, forward.backward_tokens, most=most, most_rows=1)
    n_tokens = {
        kind: max(1, sum(one.count * len(one.ids) for one in replies if one.good is kind))
        for kind in (True, False)
    }
    weights = {True: 1.0, False: config.weight_unlikelihood}
    sums = {True: 0.0, False: 0.0}

    def reply_nodes(pack: Pack) -> list[int]:
        return sorted(
            {
                node
                for i, path in zip(pack.rows, pack.paths)
                for node in path[-len(replies[i].ids) :]
            }
        )

    runs = (run_plan(forward, plan, logits_at=reply_nodes, backward_by_pack=True) for plan in plans)
    for pack, logits, _ in chain.from_iterable(runs):
        place = {node: j for j, node in enumerate(reply_nodes(pack))}
        log_p = torch.log_softmax(logits.to(forward.work_dtype), dim=-1)
        losses = []
        for kind in (True, False):
            chosen = [
                (path, replies[i])
                for i, path in zip(pack.rows, pack.paths)
                if replies[i].good is kind
            ]
            if not chosen:
                continue
            at = [place[node] for path, reply in chosen for node in path[-len(reply.ids) :]]
            tokens = [token for _, reply in chosen for token in reply.ids]
            counts = torch.tensor(
                [float(reply.count) for _, reply in chosen for _ in reply.ids],
                dtype=log_p.dtype,
                device=log_p.device,
            )
            likely = log_p[at, tokens]
            loss = -likely if kind else -torch.log((1 - likely.exp()).clamp(min=1e-5))
            mean = (loss * counts).sum() / n_tokens[kind]
            sums[kind] += mean.item()
            losses.append(weights[kind] * mean)
        torch.stack(losses).sum().backward()
    return {
        "loss": sums[True] + weights[False] * sums[False],
        "likelihood": sums[True],
        "unlikelihood": sums[False],
    }
