"""Parity certificates: how far computed numbers lie from the plain forward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..model.chat import ChatModel
from ..model.forward import Forward
from ..model.passes import last_states, plain_states
from ..model.precision import (
    HALF,
    TOLERANCE,
    accepted_difference,
    can_widen,
    in_float32,
    relative_difference,
)
from ..model.rendering import Rendered
from ..store.store import Store


class ParityError(RuntimeError):
    """Numbers differ from the plain pass by more than the dtype explains; nothing was stored."""


def new_certificate(model: ChatModel) -> dict[str, Any]:
    """The certificate of a capture that has not begun: see `HiddenStates`."""
    about = {"dtype": model.dtype_name, "template": model.template, "way": ""}
    counts = {"found": 0, "computed": 0, "checked": 0, "unchecked": 0}
    return {**counts, **about, "max_abs": 0.0, "max_rel": 0.0}


def certify(
    model: ChatModel,
    rows: Sequence[Rendered],
    texts: Sequence[str],
    states: NDArray[np.float32],
    layers: Sequence[int],
    chosen: NDArray[np.int64],
) -> dict[str, float]:
    """Re-runs the chosen rows (positions in rows) one by one: their largest differences.

    rows, texts and states (n, len(layers), d) belong together. Raises ParityError where a state is
    not finite, or lies further from the plain one than the dtype explains.
    """
    _refuse_infinite(model, texts, states)
    forward = model.forward
    worst = {"max_abs": 0.0, "max_rel": 0.0}
    for i in chosen:

        def plain(i: int = i) -> torch.Tensor:
            return plain_states(forward, [rows[i].ids], layers)[0].float().cpu()

        truth, mine = plain(), torch.from_numpy(states[i])
        worst["max_abs"] = max(worst["max_abs"], float((mine - truth).abs().max()))
        relative = max(relative_difference(a, b) for a, b in zip(mine, truth))
        worst["max_rel"] = max(worst["max_rel"], relative)
        limit = accepted_difference(forward, plain)
        if relative > limit:
            two = [rows[i].ids, rows[0].ids]
            ways = (
                partial(_shared, forward, two, layers),
                partial(plain_states, forward, two, layers),
            )
            if not _right_in_float32(forward, *ways):
                raise ParityError(_differs(forward, "states", relative, limit))
    return worst


def _shared(forward: Forward, rows: Sequence[Sequence[int]], layers: Sequence[int]) -> torch.Tensor:
    return last_states(forward, rows, layers)[0]


def certify_numbers(
    forward: Forward,
    what: str,
    mine: torch.Tensor,
    plain: Callable[[], torch.Tensor],
    again: Callable[[], torch.Tensor] | None = None,
    *,
    least: float = 1e-12,
) -> float:
    """The relative difference of computed numbers from `plain()`, the same computed plainly.

    Raises ParityError where rounding does not explain it: `again()` computes them once more as
    they were, and is asked in float32 where a model of half precision leaves a doubt. what: their
    name in the message. least: differences count relative to this at least.
    """
    relative = relative_difference(mine, plain(), least=least)
    limit = accepted_difference(forward, plain, least=least)
    doubted = not relative <= limit
    if doubted and not (again and _right_in_float32(forward, again, plain, least=least)):
        raise ParityError(_differs(forward, what, relative, limit))
    return relative


def _right_in_float32(
    forward: Forward,
    shared: Callable[[], torch.Tensor],
    plain: Callable[[], torch.Tensor],
    *,
    least: float = 1e-12,
) -> bool:
    """Whether rounding explains a difference in half precision: in float32 there is none."""
    if forward.dtype not in HALF or not can_widen(forward):
        return False
    with in_float32(forward):
        difference = relative_difference(shared(), plain(), least=least)
    return difference <= TOLERANCE[torch.float32]


def _differs(forward: Forward, what: str, relative: float, limit: float) -> str:
    return (
        f"{what} of {forward.name!r} differ from the plain forward pass by {relative:.2g} of their "
        f"size (limit {limit:.2g} for {forward.dtype_name}); nothing was stored: report the model, "
        "or load it with dtype='float32'"
    )


def _refuse_infinite(model: ChatModel, texts: Sequence[str], states: NDArray[np.float32]) -> None:
    bad = np.flatnonzero(~np.isfinite(states).all(axis=(1, 2)))
    if not len(bad):
        return
    half = model.dtype_name == "float16"
    advice = (
        "load the model with dtype='float32' or 'bfloat16'" if half else "its weights are damaged"
    )
    named = ", ".join(repr(texts[i][:40]) for i in bad[:3]) + ", ..." * (len(bad) > 3)
    raise ParityError(
        f"{len(bad)} of {len(states)} states of {model.name!r} hold NaN or infinity in "
        f"{model.dtype_name} ({named}); {advice}"
    )


def recall(certificate: dict[str, Any], store: Store, keys: Sequence[Sequence[str]]) -> None:
    """Adds what is known of found rows: the certificates under which they were committed."""
    kept = store.certificates([key for row in keys for key in row])
    for found in {id(c): c for cs in kept.values() for c in cs}.values():
        widen(certificate, found)
    # Of merged batches, every one must have been checked.
    checked = {key: bool(own) and all(c["checked"] for c in own) for key, own in kept.items()}
    certificate["unchecked"] += sum(not checked.get(row[0], False) for row in keys)


def widen(certificate: dict[str, Any], more: Mapping[str, Any]) -> None:
    """Makes a certificate hold for further rows as well."""
    ways = [way for one in (certificate, more) for way in one["way"].split(", ") if way]
    certificate["way"] = ", ".join(dict.fromkeys(ways))
    for key in ("max_abs", "max_rel"):
        certificate[key] = max(certificate[key], more[key])
