"""DOC analysis_lib.train.loop."""

from __future__ import annotations

import hashlib
import json
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any, ClassVar, Protocol

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from ..collect.inputs import Progress, usable
from ..model.chat import ChatModel
from ..model.forward import Forward
from ..model.soft_prompt import SoftPrompt
from ..store.store import Store, StoreError, row_key

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


OnStep = Callable[[dict[str, float], NDArray[np.float32]], bool | None]


def train_soft_prompt(
    forward: Forward,
    start: SoftPrompt,
    config: TrainingConfig,
    n: int,
    step_of: Callable[[NDArray], dict[str, float]],
    kept: KeptTraining,
    on_step: OnStep | None,
    progress: bool | None,
    label: str,
) -> SoftPrompt:
    """AdamW on the soft embeddings over shuffled batches of 0 .. n - 1; gradients clipped after backward. A whole run is kept."""
    soft = torch.nn.Parameter(
        torch.tensor(start.embeddings, dtype=forward.work_dtype, device=forward.device)
    )
    optimizer = torch.optim.AdamW([soft], lr=config.learning_rate)
    history: list[dict[str, float]] = []
    batches = list(_shuffled(n, config.batch_size, config.epochs, config.seed))
    bar = Progress(len(batches), label, progress)
    history.extend(kept.resume(config.epochs, soft, optimizer))
    bar.add(found=len(history))
    last = time.monotonic()
    for step, (epoch, batch) in enumerate(batches[len(history) :], len(history) + 1):
        optimizer.zero_grad()
        with forward.soft_tokens(soft):
            losses = step_of(batch)
        norm = torch.nn.utils.clip_grad_norm_([soft], config.max_grad_norm)
        if not torch.isfinite(norm):
            raise FloatingPointError(
                f"the gradient became NaN or infinite at step {step}; lower learning_rate ({config.learning_rate:g})"
            )
        optimizer.step()
        history.append({"step": step, "epoch": epoch, **losses, "gradient_norm": float(norm)})
        bar.add(computed=1)
        if on_step is not None and on_step(history[-1], soft.detach().float().cpu().numpy().copy()):
            break
        ended = step < len(batches) and batches[step][0] > epoch
        if ended and time.monotonic() - last >= CHECKPOINT_SECONDS:
            try:
                kept.keep(epoch, soft, optimizer, history, start.name)
            except StoreError as error:
                warnings.warn(
                    f"no checkpoint of the training of {start.name!r} is kept: {error}",
                    stacklevel=3,
                )
            last = time.monotonic()
    bar.close()
    learned = soft.detach().float().cpu().numpy()
    trained = replace(
        start,
        embeddings=learned,
        config={"method": label, **asdict(config)},
        history=pd.DataFrame(history),
    )
    if len(history) == len(batches):
        try:
            kept.write(trained)
        except (
            StoreError
        ) as error:  # the training is done: it must not be lost with the place to keep it
            warnings.warn(
                f"the training of {trained.name!r} is returned but not kept: {error}", stacklevel=3
            )
    return trained


class KeptTraining:
    """A trained soft prompt in the store, under the key of all that its training depends on: its embeddings, then all else.

    While it trains, a checkpoint: soft tokens and the optimizer's two moments, bit for bit, after a row with the history.
    """

    def __init__(
        self,
        store: Store | None,
        method: str,
        model: ChatModel,
        prompt: str,
        config: Any,
        *inputs: Any,
    ):
        store = usable(store, model)
        self.store, self.model = store, model
        self.checkpoint: list[str] = []  # keys of the last one
        if store is not None:
            parts = {"kind": "soft_prompt", "method": method, **model.key_parts()}
            ids = model.render(["x"], prompt)[0].ids
            self.key = row_key(
                ids=ids,
                prompt=prompt,
                config=json.dumps(asdict(config), sort_keys=True),
                inputs=json.dumps(inputs),
                **parts,
            )

    def _tokens(self, length: int) -> list[str]:
        return [row_key(training=self.key, token=i) for i in range(length)]

    def read(self, name: str) -> SoftPrompt | None:
        row = None if self.store is None else self.store.read_responses([self.key]).get(self.key)
        if self.store is None or row is None:
            return None
        keys = self._tokens(row.pop("length"))
        found = self.store.read_states(keys)
        if len(found) < len(keys):
            return None
        row["history"] = pd.DataFrame(**row["history"])
        return SoftPrompt(
            name, np.stack([found[key] for key in keys]), model=self.model.fingerprint, **row
        )

    def _checkpoint_key(self, epoch: int) -> str:
        return row_key(training=self.key, checkpoint=epoch)

    def _checkpoint_keys(self, epoch: int, shape: Sequence[int]) -> list[str]:
        return [row_key(checkpoint=self._checkpoint_key(epoch), row=i) for i in range(3 * shape[0])]

    def resume(
        self, epochs: int, soft: torch.Tensor, optimizer: torch.optim.Optimizer
    ) -> list[dict[str, float]]:
        """Puts the last checkpoint into soft and optimizer; returns the history until there, empty without one."""
        if self.store is None:
            return []
        epoch_of = {self._checkpoint_key(epoch): epoch for epoch in range(epochs, 0, -1)}
        for key, row in self.store.read_responses(list(epoch_of)).items():
            keys = self._checkpoint_keys(epoch_of[key], soft.shape)
            found = self.store.read_states(keys)
            if len(found) == len(keys):
                bits = np.stack([found[k] for k in keys]).view(
                    np.float64 if soft.dtype == torch.float64 else np.float32
                )
                values, mean, square = (
                    torch.from_numpy(bits).to(soft.device).reshape(3, *soft.shape)
                )
                soft.data.copy_(values)
                history = pd.DataFrame(**row["history"]).to_dict("records")
                self.checkpoint = [key, *keys]
                optimizer.state[soft] = {
                    "step": torch.tensor(float(len(history))),
                    "exp_avg": mean,
                    "exp_avg_sq": square,
                }
                return history  # type: ignore[return-value]
        return []

    def keep(
        self,
        epoch: int,
        soft: torch.Tensor,
        optimizer: torch.optim.Optimizer,
        history: list[dict[str, float]],
        name: str,
    ) -> None:
        """Keeps a checkpoint in place of the last one."""
        if self.store is None:
            return
        key, keys = self._checkpoint_key(epoch), self._checkpoint_keys(epoch, soft.shape)
        parts = [
            soft.detach(),
            *(optimizer.state[soft][part] for part in ("exp_avg", "exp_avg_sq")),
        ]
        bits = torch.cat(parts).cpu().numpy().view(np.float32)
        about = {
            "model": self.model.fingerprint,
            "model_name": self.model.name,
            "prompts": [name],
            "layer": "checkpoint",
        }
        row = {"history": pd.DataFrame(history).to_dict("split", index=False)}
        self.store.write_responses([key], [row], about=about)
        self.store.write_states(keys, bits, dtype="float32", about=about)
        self.store.discard(self.checkpoint)
        self.checkpoint = [key, *keys]

    def write(self, soft: SoftPrompt) -> None:
        if self.store is None:
            return
        about = {
            "model": soft.model,
            "model_name": soft.model_name,
            "prompts": [soft.name],
            "layer": "soft tokens",
        }
        self.store.write_states(
            self._tokens(len(soft.embeddings)), soft.embeddings, dtype="float32", about=about
        )
        row = {k: getattr(soft, k) for k in ("start_text", "model_name", "template")}
        row |= {
            "config": dict(soft.config),
            "history": soft.history.to_dict("split", index=False),
            "length": len(soft.embeddings),
        }
        self.store.write_responses([self.key], [row], about=about)
        self.store.discard(self.checkpoint)


def array_digest(array: NDArray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array, dtype=np.float64).tobytes()).hexdigest()


def _shuffled(n: int, batch_size: int, epochs: int, seed: int) -> Iterator[tuple[int, NDArray]]:
    """(epoch, indices) of each step; an epoch is split evenly into about n / batch_size batches."""
    rng = np.random.default_rng(seed)
    for epoch in range(1, epochs + 1):
        for batch in np.array_split(rng.permutation(n), max(1, round(n / batch_size))):
            yield epoch, batch


def check_config(config: TrainingConfig) -> None:
    for key, value in asdict(config).items():
        if not np.isfinite(value) or value < 0:
            raise ValueError(f"{key} = {value} must be a finite number >= 0")
    if config.epochs < 1 or config.batch_size < 1 or not config.learning_rate:
        raise ValueError("epochs, batch_size and learning_rate must be above 0")
