"""Directed Representation Optimization (DRO) of a safety prompt.

It trains the embeddings of the system message's tokens and nothing else. In each step the prefix
with the soft tokens runs once, and every distinct token after it once (see `model.passes`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from ..analysis.directions import Direction
from ..analysis.space import AnchorSpace
from ..collect.inputs import check_queries
from ..data.labels import with_labels
from ..model.chat import ChatModel
from ..model.forward import Forward
from ..model.passes import last_states, plan_ways, run_plan
from ..model.soft_prompt import SoftPrompt
from ..store.store import Store
from .kept import KeptTraining, array_digest
from .loop import OnStep, check_config, train_soft_prompt


@dataclass(frozen=True)
class DROConfig:
    """How DRO trains; the defaults are the study's settings.

    A loss of weight 0 is left out, so the ablations are rows of weights.

    Parameters
    ----------
    learning_rate : float
        Of AdamW, above 0.
    epochs : int
        Passes over the queries.
    batch_size : int
        Queries a step. An epoch is split evenly.
    weight_refusal, weight_harmfulness, weight_norm : float
        Weights of the three losses, >= 0, not all 0.
    max_grad_norm : float
        Longer gradients are clipped to this norm.
    seed : int
        Shuffles the queries.

    Raises
    ------
    ValueError
        For a setting out of its range, or three weights of 0.

    References
    ----------
    Zheng et al. 2024, "On Prompt-Driven Safeguarding for Large Language Models", arXiv 2401.18018.

    Examples
    --------
    >>> from analysis_lib import DROConfig
    >>> DROConfig(weight_norm=0.0).weight_norm, DROConfig().epochs
    (0.0, 40)
    """

    learning_rate: float = 1e-3
    epochs: int = 40
    batch_size: int = 50
    weight_refusal: float = 1.0
    weight_harmfulness: float = 0.01
    weight_norm: float = 0.001
    max_grad_norm: float = 1.0
    seed: int = 42

    def __post_init__(self) -> None:
        check_config(self)
        if not self.weight_refusal + self.weight_harmfulness + self.weight_norm > 0:
            raise ValueError(
                "all three losses have weight 0, so there is nothing to train; give one a weight"
            )


def dro_loss(
    states: torch.Tensor,
    base: torch.Tensor,
    harmful: torch.Tensor,
    geometry: Geometry,
    config: DROConfig,
) -> tuple[torch.Tensor, dict[str, float]]:
    """The DRO loss of states (n, d) under the soft prompt, and its parts.

    base (n, d) are the states under the text prompt, harmful (n,) is 0.0 or 1.0. The loss is the
    weighted sum of three parts: the binary cross-entropy of the change of the refusal logit (target
    1 for harmful, 0 for harmless), the same for harmfulness, and the mean square change in the
    d - k other directions.
    """
    new, old = (states - geometry.mean) @ geometry.basis, (base - geometry.mean) @ geometry.basis
    k = len(geometry.refusal)
    change = new - old
    parts = {
        "refusal": F.binary_cross_entropy_with_logits(change[:, :k] @ geometry.refusal, harmful),
        "harmfulness": F.binary_cross_entropy_with_logits(
            change[:, :k] @ geometry.harmfulness, harmful
        ),
        "norm": change[:, k:].pow(2).mean(),
    }
    loss = sum(getattr(config, f"weight_{name}") * value for name, value in parts.items())
    assert isinstance(loss, torch.Tensor)
    return loss, {"loss": loss.item(), **{name: value.item() for name, value in parts.items()}}


@dataclass(frozen=True)
class Geometry:
    """Anchor space and directions as tensors.

    mean (d,), basis (d, d), refusal (k,), harmfulness (k,)
    """

    mean: torch.Tensor
    basis: torch.Tensor
    refusal: torch.Tensor
    harmfulness: torch.Tensor

    @classmethod
    def of(
        cls,
        space: AnchorSpace,
        refusal: Direction,
        harmfulness: Direction,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> Geometry:
        arrays = (space.mean, space.basis, refusal.weight, harmfulness.weight)
        return cls(*(torch.tensor(a, dtype=dtype, device=device) for a in arrays))


def train_dro(
    model: ChatModel,
    queries: pd.DataFrame,
    prompt: str,
    space: AnchorSpace,
    refusal: Direction,
    harmfulness: Direction,
    config: DROConfig | None = None,
    *,
    name: str = "dro",
    apart: bool = False,
    store: Store | None = None,
    on_step: OnStep | None = None,
    progress: bool | None = None,
) -> SoftPrompt:
    """Trains a soft prompt by DRO, from a text prompt, on queries with a harmful label.

    Soft prompt and optimizer are float32 whatever the model's dtype (float64 in a float64 model).
    Equal inputs give equal results on one machine.

    Parameters
    ----------
    model : ChatModel
        Stays frozen.
    queries : DataFrame
        Has the columns query_id, text and harmful; queries without a label are left out.
    prompt : str
        The text prompt to start from.
    space : AnchorSpace
        Fitted to this model's states, d dimensions.
    refusal, harmfulness : Direction
        Fitted in that space, k components.
    config : DROConfig, optional
        Default: the study's settings.
    name : str
        The soft prompt's name.
    apart : bool
        Whether it stands apart from the text beside it, as the study's: see `SoftPrompt`.
    store : Store, optional
        A finished training of equal inputs is read from it: no weights are loaded and no step is
        taken. A training that was killed or stopped goes on from its last checkpoint. Checkpoints
        are kept at the end of an epoch, CHECKPOINT_SECONDS or more after the one before.
    on_step : function, optional
        on_step(losses, embeddings) is called after each step. Where it returns True, training ends
        and what was learned is returned.
    progress : bool, optional
        Whether a bar is shown. Default: in a terminal or a notebook.

    Returns
    -------
    SoftPrompt
        Its history has the columns step, epoch, loss, refusal, harmfulness, norm and gradient_norm.

    Raises
    ------
    ValueError
        Where queries lack a class, or space and directions do not fit the model.
    ChatModelError
        Where the model is quantized, or a text cannot be rendered.
    FloatingPointError
        Where the gradient becomes NaN or infinite.

    References
    ----------
    Zheng et al. 2024, "On Prompt-Driven Safeguarding for Large Language Models", arXiv 2401.18018.

    Examples
    --------
    Harmfulness stands for refusal here, which needs judged responses.

    >>> from analysis_lib import AnchorSpace, ChatModel, DROConfig, fit_direction
    >>> from analysis_lib import hidden_states, load_queries, train_dro
    >>> model = ChatModel.load("organism")
    >>> queries = load_queries("anchor").groupby("harmful").head(6)
    >>> states, rows = hidden_states(model, queries, {"none": ""}).at(-1)
    >>> space = AnchorSpace.fit(states, k=2)
    >>> Z, y = space.transform(states), rows["harmful"].astype(float)
    >>> harmful = fit_direction(Z, y, name="harmfulness", groups=rows["query_id"])
    >>> config = DROConfig(epochs=1, batch_size=12)
    >>> soft = train_dro(model, queries, "Be kind.", space, harmful, harmful, config)
    >>> soft.embeddings.shape, len(soft.history), soft.config["method"]
    ((4, 128), 1, 'DRO')
    """
    config = config or DROConfig()
    check_queries(queries, "harmful")
    queries = with_labels(queries)
    labelled = queries[queries["harmful"].notna()]
    _check(model, labelled, space, refusal, harmfulness)
    texts, labels = labelled["text"].tolist(), labelled["harmful"].astype(float).tolist()
    inputs = [space.mean, space.basis, refusal.weight, harmfulness.weight]
    digests = [array_digest(a) for a in inputs] + ["apart"] * apart
    kept = KeptTraining(store, "DRO", model, prompt, config, texts, labels, digests)
    if (known := kept.read(name)) is not None:
        return known
    forward = model.forward
    dtype, device = forward.work_dtype, forward.device
    geometry = Geometry.of(space, refusal, harmfulness, device, dtype)
    harmful = torch.tensor(labels, dtype=dtype, device=device)
    start = SoftPrompt.from_text(model, prompt, name=name, apart=apart)
    with torch.no_grad(), forward.soft_tokens(None):
        under_text = last_states(forward, [row.ids for row in model.render(texts, prompt)])[0]
    base = under_text[:, 0].to(dtype)
    rows = [row.ids for row in model.render(texts, start)]

    def step(batch: NDArray[Any]) -> dict[str, float]:
        """Gradients of the batch's mean loss, part by part; returns its losses."""
        total: dict[str, float] = {}
        for members, states in _parts(forward, [rows[i] for i in batch]):
            at = torch.from_numpy(batch[members]).to(device)
            loss, losses = dro_loss(states.to(dtype), base[at], harmful[at], geometry, config)
            share = len(members) / len(batch)
            (share * loss).backward()
            total = {key: total.get(key, 0.0) + share * value for key, value in losses.items()}
        return total

    n = len(texts)
    return train_soft_prompt(forward, start, config, n, step, kept, on_step, progress, "DRO")


def _check(
    model: ChatModel,
    labelled: pd.DataFrame,
    space: AnchorSpace,
    refusal: Direction,
    harmfulness: Direction,
) -> None:
    if len(space.mean) != model.hidden_size:
        raise ValueError(
            f"the space has {len(space.mean)} dimensions, the states of {model.name!r} have "
            f"{model.hidden_size}; fit it to this model's states"
        )
    if labelled["harmful"].nunique() < 2:
        raise ValueError(
            "DRO needs queries of both classes in the column harmful; 'anchor' has 100 of each"
        )
    if not len(refusal.weight) == len(harmfulness.weight) == space.k:
        raise ValueError(
            f"the space has {space.k} components, the directions {len(refusal.weight)} and "
            f"{len(harmfulness.weight)}; fit them in it"
        )


def _parts(
    forward: Forward, rows: Sequence[tuple[int, ...]]
) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Positions of some rows and their last-token states (m, d), part by part.

    Backward runs on each part before the next is asked for.
    """
    for plan in plan_ways(forward, rows, forward.backward_tokens, line_tokens=forward.line_tokens):
        for pack, states, _ in run_plan(forward, plan, backward_by_pack=True):
            yield pack.rows, states[:, 0]
