"""Layers as the widgets show them: their names, what is given per layer, shifts in one of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd


def layer_options(layers: Sequence[int]) -> list[tuple[str, int]]:
    return [(layer_name(i), i) for i in sorted(layers, key=lambda i: (i < 0, i))]


def layer_name(layer: int) -> str:
    return {0: "0 (embedding)", -1: "-1 (final norm)"}.get(layer, str(layer))


def shift_lengths(states: np.ndarray, rows: pd.DataFrame, base: str) -> np.ndarray:
    """Distance (n,) of each state from the same query's state under `base`; NaN without one."""
    start = rows.index[rows["prompt"] == base]
    at = rows["query_id"].map(pd.Series(start, index=rows.loc[start, "query_id"]))
    known = at.notna().to_numpy()
    lengths = np.full(len(rows), np.nan)
    lengths[known] = np.linalg.norm(states[known] - states[at[known].astype(int)], axis=1)
    return lengths.round(4)


def of_layer(mapping: Mapping[int, Any], layer: int, what: str) -> Any:
    if layer not in mapping:
        raise ValueError(
            f"no {what} for layer {layer}; there are {sorted(mapping)}: add it, or pass a function"
        )
    return mapping[layer]
