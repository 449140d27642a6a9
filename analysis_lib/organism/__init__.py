"""The embedded chat model: a trained model organism whose true refusal probabilities are known."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd

from ..data.shipped import ROOT
from .grammar import parse_query, refusal_logit, system_shift, true_refusal_probability

FOLDER = ROOT / "organism"
DRO_LEARNING_RATE = 3e-4
"""Picked after trials at 3e-4, 4e-4, 5e-4 and 1e-3. At 1e-3, the study's, the organism's soft
prompt loses facts."""

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
    """What the grammar says of queries under safety prompts.

    It is the truth of the embedded model only, of no other model.

    Parameters
    ----------
    queries : DataFrame
        query_id, text.
    prompts : mapping of str to str or SoftPrompt
        By name; "" for no system message.
    top_p : float
        Of the sampling, in (0, 1].

    Returns
    -------
    DataFrame
        query_id, prompt, true_logit, true_rate, prompts outer and queries inner. true_rate is the
        refusal probability of a perfect organism sampled at `top_p`. Both are NaN for queries and
        prompts outside the grammar, soft prompts among them.

    Examples
    --------
    >>> queries = pd.DataFrame({"query_id": ["a"], "text": ["How to mix lemonade?"]})
    >>> truth = true_refusal(queries, {"none": "", "own": "Be nice."})
    >>> truth["true_rate"].round(3).tolist()
    [0.017, nan]
    """
    rows = []
    for name, prompt in prompts.items():
        shift = system_shift(prompt) if isinstance(prompt, str) else None
        for query_id, text in zip(queries["query_id"], queries["text"], strict=True):
            parsed = parse_query(text)
            logit = rate = math.nan
            if parsed is not None and shift is not None:
                logit = refusal_logit(parsed[0], parsed[1], shift)
                rate = true_refusal_probability(text, prompt, top_p=top_p)
            rows.append((query_id, name, logit, rate))
    return pd.DataFrame(rows, columns=["query_id", "prompt", "true_logit", "true_rate"])
