"""The embedded chat model: a trained model organism whose true refusal probabilities are known."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from ..data.files import ROOT
from .grammar import parse_query, refusal_logit, system_shift, true_refusal_probability

FOLDER = ROOT / "organism"
DRO_LEARNING_RATE = 3e-4
"""Picked after trials at 3e-4, 4e-4, 5e-4 and 1e-3 (the study's), at which the organism's soft prompt loses facts."""

__all__ = [
    "DRO_LEARNING_RATE",
    "FOLDER",
    "parse_query",
    "system_shift",
    "true_refusal",
    "true_refusal_probability",
]


def true_refusal(
    queries: pd.DataFrame, prompts: Mapping[str, Any], *, top_p: float = 1.0
) -> pd.DataFrame:
    """What the grammar says: [query_id, prompt, true_logit, true_rate], prompts outer, queries inner.

    true_rate is the refusal probability of a perfect organism sampled at `top_p`. NaN for queries and prompts outside
    the grammar, soft prompts among them. It is the truth of the organism only, of no other model.
    """
    rows = []
    for name, prompt in prompts.items():
        for query_id, text in zip(queries["query_id"], queries["text"], strict=True):
            parsed, shift = (
                parse_query(text),
                system_shift(prompt) if isinstance(prompt, str) else None,
            )
            logit = (
                refusal_logit(parsed[0], parsed[1], shift)
                if parsed and shift is not None
                else math.nan
            )
            rate = (
                true_refusal_probability(text, prompt, top_p=top_p)
                if isinstance(prompt, str)
                else np.nan
            )
            rows.append((query_id, name, logit, rate))
    return pd.DataFrame(rows, columns=["query_id", "prompt", "true_logit", "true_rate"])
