"""Which states a call asks for, and what the store holds of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..model.rendering import Prompt, Rendered
from ..store.store import Store


@dataclass(frozen=True, eq=False)
class Asked:
    """The rows under one prompt: their states, their keys by layer, and what is found of them."""

    block: NDArray[np.float32]  # (queries, layers, d)
    name: str
    prompt: Prompt
    rows: Sequence[Rendered]
    keys: Sequence[list[str]] = ()
    missing: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    held: set[str] = field(default_factory=set)

    def found(self) -> NDArray[np.int64]:
        return np.setdiff1d(np.arange(len(self.rows)), self.missing)


def fill_kept(
    block: NDArray[Any],
    keys: Sequence[list[str]],
    store: Store,
    at: NDArray[np.int64] | None = None,
) -> tuple[NDArray[np.int64], set[str]]:
    """Writes the stored states of the rows `at` into block; None for all rows.

    Returns the positions of rows with any layer missing, and the keys that are kept.
    """
    at = np.arange(len(keys)) if at is None else at
    read = store.read_states([key for i in at for key in keys[i]])
    found = {key: state for key, state in read.items() if state.shape == block.shape[2:]}
    missing = []
    for i in at:
        if all(key in found for key in keys[i]):
            block[i] = np.stack([found[key] for key in keys[i]])
        else:
            missing.append(i)
    return np.array(missing, dtype=np.int64), set(found)
