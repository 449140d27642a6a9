"""Parity certificates: how far captured states lie from the plain forward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..model.chat import ChatModel
from ..model.passes import TOLERANCE, plain_states, relative_difference
from ..model.rendering import Rendered
from ..store.store import Store


class ParityError(RuntimeError):
    """States differ from the plain pass by more than the dtype explains; nothing was stored."""


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
    worst = {"max_abs": 0.0, "max_rel": 0.0}
    for i in chosen:
        plain = plain_states(model.forward, [rows[i].ids], layers)[0].float().cpu()
        mine = torch.from_numpy(states[i])
        worst["max_abs"] = max(worst["max_abs"], float((mine - plain).abs().max()))
        relative = max(relative_difference(a, b) for a, b in zip(mine, plain))
        worst["max_rel"] = max(worst["max_rel"], relative)
    limit = TOLERANCE.get(model.dtype_name, 1e-3)
    if worst["max_rel"] > limit:
        raise ParityError(
            f"states of {model.name!r} differ from the plain forward pass by "
            f"{worst['max_rel']:.2g} of their size (limit {limit:g} for {model.dtype_name}); "
            "nothing was stored: report the model, or load it with dtype='float32'"
        )
    return worst


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
    if more["way"] not in certificate["way"].split(", "):
        certificate["way"] = ", ".join(filter(None, [certificate["way"], more["way"]]))
    for key in ("max_abs", "max_rel"):
        certificate[key] = max(certificate[key], more[key])
