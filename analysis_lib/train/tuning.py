"""Prompt tuning, the baseline: a soft prompt learns from judged responses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from numpy.typing import NDArray

from ..collect.inputs import check_queries
from ..model.chat import ChatModel
from ..model.errors import ChatModelError
from ..model.forward import Forward
from ..model.passes import run_plan, shares_prefixes
from ..model.soft_prompt import SoftPrompt
from ..model.tree import Pack, plan_rows
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

    def __post_init__(self) -> None:
        check_config(self)


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
    replies = _distinct_replies(model, table, config.max_response_tokens)
    names = [name for name in heads if replies[name]]
    if not names:
        raise ValueError("every judged response is empty; sample responses to train on first")

    def step(batch: NDArray[Any]) -> dict[str, float]:
        rows, targets = [], []
        for i in batch:
            for (reply, is_good), count in replies[names[i]].items():
                rows.append((*heads[names[i]], *reply[:-1]))
                targets.append((reply, is_good, count))
        return _tuning_loss(forward, rows, targets, config)

    n = len(names)
    return train_soft_prompt(
        forward, start, config, n, step, kept, on_step, progress, "prompt tuning"
    )


def _training_table(queries: pd.DataFrame, judged: pd.DataFrame) -> pd.DataFrame:
    """The judged responses with text, label and whether each is good.

    Unscored and unlabelled responses are left out.
    """
    check_queries(queries, "harmful")
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


Replies = dict[tuple[tuple[int, ...], bool], int]  # (token ids, whether good) -> how often


def _distinct_replies(model: ChatModel, table: pd.DataFrame, longest: int) -> dict[str, Replies]:
    """The distinct replies of each query, of at most `longest` tokens.

    The end token belongs to those that ended.
    """
    found: dict[str, Replies] = {name: {} for name in table["query_id"]}
    encoded = model.tokenizer(table["response"].tolist(), add_special_tokens=False)["input_ids"]
    ends = table["end"] if "end" in table else ["eos"] * len(table)
    eos = model.tokenizer.eos_token_id
    stop = [] if eos is None else [eos]
    for name, reply, end, good in zip(table["query_id"], encoded, ends, table["good"]):
        ids = tuple((list(reply) + (stop if end == "eos" else []))[:longest])
        if ids:
            key = ids, bool(good)
            found[name][key] = found[name].get(key, 0) + 1
    return found


def _tuning_loss(
    forward: Forward,
    rows: Sequence[tuple[int, ...]],
    targets: Sequence[tuple[tuple[int, ...], bool, int]],
    config: PromptTuningConfig,
) -> dict[str, float]:
    """Gradients of the mean token losses of good and of bad replies; returns the losses.

    targets: (reply, good, count) for each row.
    """
    # The heads without their last token.
    most = min(len(row) - len(reply) for row, (reply, _, _) in zip(rows, targets, strict=True))
    plan = plan_rows(rows, forward.backward_tokens, most=most)
    n_tokens = {
        kind: max(1, sum(count * len(reply) for reply, good, count in targets if good is kind))
        for kind in (True, False)
    }
    weights = {True: 1.0, False: config.weight_unlikelihood}
    sums = {True: 0.0, False: 0.0}

    def reply_nodes(pack: Pack) -> list[int]:
        return sorted(
            {node for i, path in zip(pack.rows, pack.paths) for node in path[-len(targets[i][0]) :]}
        )

    for pack, logits, _ in run_plan(forward, plan, logits_at=reply_nodes, backward_by_pack=True):
        place = {node: j for j, node in enumerate(reply_nodes(pack))}
        log_p = torch.log_softmax(logits.to(forward.work_dtype), dim=-1)
        losses = []
        for kind in (True, False):
            chosen = [
                (path, *targets[i])
                for i, path in zip(pack.rows, pack.paths)
                if targets[i][1] is kind
            ]
            if not chosen:
                continue
            at = [place[node] for path, reply, _, _ in chosen for node in path[-len(reply) :]]
            tokens = [token for _, reply, _, _ in chosen for token in reply]
            counts = torch.tensor(
                [float(count) for _, reply, _, count in chosen for _ in reply],
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
