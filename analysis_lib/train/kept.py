"""A training in the store: read when finished, resumed when it was killed, kept when it ends."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from ..collect.inputs import usable
from ..collect.recheck import loaded_and_usable, longest_witness, row_witness, unchanged
from ..model.chat import ChatModel
from ..model.soft_prompt import SoftPrompt
from ..store.batches import StoreError, row_key
from ..store.store import Store

MOMENTS = ("exp_avg", "exp_avg_sq")  # what AdamW knows of each number


def array_digest(array: NDArray[Any]) -> str:
    """SHA-256 of an array's float64 values."""
    return hashlib.sha256(np.ascontiguousarray(array, dtype=np.float64).tobytes()).hexdigest()


class KeptTraining:
    """One training under the key of all that it depends on.

    Its embeddings are kept first, then a row with the rest. While it trains, the store holds its
    last checkpoint: soft tokens, the optimizer's moments and the history, bit for bit. Without a
    store, nothing is found and nothing kept.
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
        self.store, self.model, self.prompt = usable(store, model), model, prompt
        if self.store is not None:
            self.key = row_key(
                kind="soft_prompt",
                method=method,
                ids=model.render(["x"], prompt)[0].ids,
                prompt=prompt,
                config=json.dumps(asdict(config), sort_keys=True),
                inputs=json.dumps(inputs),
                **model.key_parts(),
            )

    def _tokens(self, length: int) -> list[str]:
        return [row_key(training=self.key, token=i) for i in range(length)]

    def _about(self, name: str, layer: str) -> dict[str, Any]:
        about = {"model": self.model.fingerprint, "model_name": self.model.name}
        return {**about, "prompts": [name], "layer": layer}

    def read(self, name: str) -> SoftPrompt | None:
        """The finished training as a soft prompt of that name; None where it is not kept."""
        if self.store is None:
            return None
        row = self.store.read_responses([self.key]).get(self.key)
        if row is None:
            return None
        keys = self._tokens(row.pop("length"))
        found = self.store.read_states(keys)
        if len(found) < len(keys) or not self._is_unchanged([self.key]):
            return None
        row["history"] = pd.DataFrame(**row["history"])
        embeddings = np.stack([found[key] for key in keys])
        return SoftPrompt(name, embeddings, model=self.model.fingerprint, **row)

    def _is_unchanged(self, keys: Sequence[str]) -> bool:
        """Whether the model computes what the store keeps of it; gives the store up where not."""
        self.store = loaded_and_usable(self.store, self.model) if not keys else self.store
        known = longest_witness(self.store, self.model, keys)
        self.store = unchanged(self.store, self.model, known)
        return self.store is not None

    def resume(
        self, soft: torch.Tensor, optimizer: torch.optim.Optimizer
    ) -> list[dict[str, float]]:
        """Puts the last checkpoint into soft and optimizer; returns the history until there.

        The history is empty without a checkpoint.
        """
        if self.store is None or not self._is_unchanged([]):
            return []
        found = self.store.read_checkpoint(self.key)
        if found is None:
            return []
        tensors, about = found
        history = pd.DataFrame(**about["history"]).to_dict("records")
        values = {name: torch.from_numpy(a.copy()).to(soft.device) for name, a in tensors.items()}
        soft.data.copy_(values.pop("soft"))
        optimizer.state[soft] = {"step": torch.tensor(float(len(history))), **values}
        return history  # type: ignore[return-value]

    def checkpoint(
        self,
        soft: torch.Tensor,
        optimizer: torch.optim.Optimizer,
        history: Sequence[Mapping[str, float]],
        name: str,
    ) -> None:
        """Keeps a checkpoint in place of the last one; warns where the store cannot."""
        if self.store is None:
            return
        tensors = {"soft": soft.detach(), **{m: optimizer.state[soft][m] for m in MOMENTS}}
        arrays = {part: tensor.cpu().numpy() for part, tensor in tensors.items()}
        rows = pd.DataFrame(history).to_dict("split", index=False)
        about = {**self._about(name, "checkpoint"), "history": rows}
        try:
            self.store.write_checkpoint(self.key, arrays, about)
        except StoreError as error:
            told = f"no checkpoint of the training of {name!r} is kept: {error}"
            warnings.warn(told, stacklevel=4)

    def write(self, soft: SoftPrompt) -> None:
        """Keeps the finished training; warns where the store cannot, so that it is not lost."""
        if self.store is None:
            return
        row = {key: getattr(soft, key) for key in ("start_text", "model_name", "template", "apart")}
        row |= {
            "config": dict(soft.config),
            "history": soft.history.to_dict("split", index=False),
            "length": len(soft.embeddings),
        }
        with torch.no_grad():
            seen = row_witness(self.model, self.model.render(["x"], self.prompt))
        about = self._about(soft.name, "soft tokens") | {"witness": seen}
        keys = self._tokens(len(soft.embeddings))
        try:
            self.store.write_states(keys, soft.embeddings, dtype="float32", about=about)
            self.store.write_responses([self.key], [row], about=about)
            self.store.drop_checkpoint(self.key)
        except StoreError as error:
            told = f"the training of {soft.name!r} is returned but not kept: {error}"
            warnings.warn(told, stacklevel=4)
