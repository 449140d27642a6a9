"""The one loop that trains soft prompts, for DRO and for prompt tuning."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from typing import Any, ClassVar, Protocol

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from ..collect.certificates import certify_numbers
from ..collect.inputs import Progress
from ..model.forward import Forward
from ..model.passes import shares_prefixes
from ..model.soft_prompt import SoftPrompt
from .kept import KeptTraining

CHECKPOINT_SECONDS = 30.0  # the least time between two checkpoints of a training


class TrainingConfig(Protocol):
    """What every training is configured by; a frozen dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def learning_rate(self) -> float: ...
    @property
    def epochs(self) -> int: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def max_grad_norm(self) -> float: ...
    @property
    def seed(self) -> int: ...


Order = Callable[[int, int, int, int], Iterator[tuple[int, NDArray[Any]]]]

OnStep = Callable[[dict[str, float], NDArray[np.float32]], bool | None]


def train_soft_prompt(
    forward: Forward,
    start: SoftPrompt,
    config: TrainingConfig,
    n: int,
    step_of: Callable[[NDArray[Any]], dict[str, float]],
    kept: KeptTraining,
    on_step: OnStep | None,
    progress: bool | None,
    label: str,
    *,
    order: Order | None = None,
) -> SoftPrompt:
    """AdamW on the soft embeddings over shuffled batches of 0 .. n - 1.

    order(n, batch_size, epochs, seed) gives (epoch, batch) of each step; default: `evenly`.

    step_of(batch) leaves the gradient of the batch's loss in the soft tokens, and returns its
    losses. Gradients are clipped after backward. A whole run is kept.
    """
    values = torch.tensor(start.embeddings, dtype=forward.work_dtype, device=forward.device)
    soft = torch.nn.Parameter(values)
    optimizer = torch.optim.AdamW([soft], lr=config.learning_rate)
    batches = list((order or evenly)(n, config.batch_size, config.epochs, config.seed))
    bar = Progress(len(batches), label, progress)
    history = kept.resume(soft, optimizer)
    _certify(forward, soft, step_of, batches[0][1][:2])
    bar.add(found=len(history))
    last = time.monotonic()
    for step, (epoch, batch) in enumerate(batches[len(history) :], len(history) + 1):
        optimizer.zero_grad()
        with forward.soft_tokens(soft):
            losses = step_of(batch)
        norm = torch.nn.utils.clip_grad_norm_([soft], config.max_grad_norm)
        if not torch.isfinite(norm):
            raise FloatingPointError(
                f"the gradient became NaN or infinite at step {step}; lower learning_rate "
                f"({config.learning_rate:g})"
            )
        optimizer.step()
        history.append({"step": step, "epoch": epoch, **losses, "gradient_norm": float(norm)})
        bar.add(computed=1)
        if on_step is not None and on_step(history[-1], _learned(soft).copy()):
            break
        epoch_ended = step < len(batches) and batches[step][0] > epoch
        if epoch_ended and time.monotonic() - last >= CHECKPOINT_SECONDS:
            kept.checkpoint(soft, optimizer, history, start.name)
            last = time.monotonic()
    bar.close()
    settings = {"method": label, **asdict(config)}
    trained = replace(
        start, embeddings=_learned(soft), config=settings, history=pd.DataFrame(history)
    )
    if len(history) == len(batches):
        kept.write(trained)
    return trained


def _certify(
    forward: Forward,
    soft: torch.Tensor,
    step_of: Callable[[NDArray[Any]], dict[str, float]],
    batch: NDArray[Any],
) -> None:
    """Compares a small batch's gradient with that of plain passes, near the soft tokens' start.

    Not at the start itself, where a loss of changes may have no gradient. Raises ParityError.
    """
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(soft.shape, generator=generator).to(soft)
    near = soft.detach() + 0.1 * soft.detach().pow(2).mean().sqrt() * noise

    def gradient() -> torch.Tensor:
        tokens = near.clone().requires_grad_()
        with forward.soft_tokens(tokens):
            step_of(batch)
        assert tokens.grad is not None
        return tokens.grad

    def plain() -> torch.Tensor:
        with forward.run_plainly():
            return gradient()

    if shares_prefixes(forward) and torch.isfinite(mine := gradient()).all():
        certify_numbers(forward, "gradients", mine, plain, least=1e-6)


def _learned(soft: torch.Tensor) -> NDArray[np.float32]:
    return soft.detach().float().cpu().numpy()


def evenly(n: int, batch_size: int, epochs: int, seed: int) -> Iterator[tuple[int, NDArray[Any]]]:
    """(epoch, indices) of each step; an epoch is split evenly into about n / batch_size batches."""
    rng = np.random.default_rng(seed)
    for epoch in range(1, epochs + 1):
        for batch in np.array_split(rng.permutation(n), max(1, round(n / batch_size))):
            yield epoch, batch


def check_config(config: TrainingConfig) -> None:
    for key, value in asdict(config).items():
        if not isinstance(value, str) and (not np.isfinite(value) or value < 0):
            raise ValueError(f"{key} = {value} must be a finite number >= 0")
    if config.epochs < 1 or config.batch_size < 1 or not config.learning_rate:
        raise ValueError("epochs, batch_size and learning_rate must be above 0")
