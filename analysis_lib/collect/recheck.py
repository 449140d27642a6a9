"""Whether the loaded model still computes what the store keeps of it.

A key covers configuration, modules and weights (see `fingerprint`), and `tampering` knows the
common ways around it. What neither sees is found here: before a call with loaded weights reads or
keeps anything, it computes one known state anew and compares. What may have changed is the model,
not a row, so one row a call is enough. A model whose weights are not loaded cannot have been
changed.

The known state is that of the longest found row. Replies, probabilities and trainings hold no
state, and a sampled text is no measure: in half precision it changes with the batch, and a small
change of the model leaves most texts as they are. So each batch of these names one of its rows and
what the last state was there, its witness. Where nothing was found, a witness of any batch of the
model is taken: a changed model then keeps nothing beside the rows of the clean one.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..model.chat import ChatModel
from ..model.errors import ChatModelError
from ..model.fingerprint import digest_in_memory
from ..model.passes import plain_states
from ..model.precision import accepted_difference
from ..model.rendering import Rendered
from ..store.about import depth_and_length
from ..store.store import Store
from .inputs import usable

WITNESS_NUMBERS = 64  # of a state, spread over it
# States are kept as float32 at the most, relative to their root mean square.
FLOAT32_ROUNDING = 1e-5


@dataclass(frozen=True)
class Known:
    """A row, and what the model gave there.

    ids     token ids
    soft    digest of the soft embeddings that the ids stand for, "" for none
    layers  L of them
    states  (L, m) numbers of the states, float
    places  (m,) which numbers of a state these are
    sizes   (L,) root mean square of the whole states
    """

    ids: tuple[int, ...]
    soft: str
    layers: tuple[int, ...]
    states: NDArray[Any]
    places: NDArray[np.int64]
    sizes: NDArray[Any]


def known_row(row: Rendered, states: NDArray[np.float32], layers: Sequence[int]) -> Known:
    """A found row with its states (L, d)."""
    whole = np.asarray(states, dtype=np.float64)
    sizes = np.sqrt((whole**2).mean(axis=1))
    return Known(row.ids, row.soft, tuple(layers), whole, np.arange(whole.shape[1]), sizes)


def witness(row: Rendered, state: NDArray[Any], layer: int, dtype: str) -> dict[str, Any]:
    """What the `about` of a batch says of one of its rows, whose state (d,) at a layer is given."""
    whole = np.asarray(state, dtype=np.float64)
    chosen = whole[_places(len(whole))]
    return {
        "ids": list(row.ids),
        "soft": row.soft,
        "layer": layer,
        "dtype": dtype,
        "width": len(whole),
        "size": float(np.sqrt((whole**2).mean())),
        "state": [float(f"{number:.9g}") for number in chosen],
    }


def _places(width: int) -> NDArray[np.int64]:
    return np.unique(np.linspace(0, width - 1, WITNESS_NUMBERS).astype(np.int64))


def _of_witness(found: Mapping[str, Any]) -> Known:
    numbers = np.array([found["state"]], dtype=np.float64)
    places, sizes = _places(found["width"]), np.array([found["size"]])
    layers = (int(found["layer"]),)
    return Known(tuple(found["ids"]), found["soft"], layers, numbers, places, sizes)


def longest_witness(
    store: Store | None, model: ChatModel, keys: Sequence[str] = (), soft: str = ""
) -> Known | None:
    """The best witness of the batches that hold these responses, else of the model's batches.

    It is the longest of the deepest layer, which sees most of the model.

    Of rows with soft tokens only those of the digest `soft` can be computed. None where the store
    has no witness.
    """
    if store is None or not store.recheck or not model.loaded:
        return None
    fits = [
        found
        for found in store.witnesses(keys, model.fingerprint)
        if found["soft"] in ("", soft) and _fits(found, model)
    ]
    return _of_witness(max(fits, key=depth_and_length)) if fits else None


def _fits(found: Mapping[str, Any], model: ChatModel) -> bool:
    """Whether a witness can be of this model; files of a store may come from anywhere."""
    return (
        found["dtype"] == model.dtype_name
        and found["width"] == model.hidden_size
        and len(found["state"]) == len(_places(model.hidden_size))
        and -1 <= found["layer"] <= model.n_layers
        and min(found["ids"]) >= 0
        and (found["soft"] != "" or max(found["ids"]) < model.n_embeddings)
    )


def row_witness(model: ChatModel, rows: Sequence[Rendered]) -> dict[str, Any]:
    """The witness of the longest of some rows: its state after the final norm, computed plainly.

    Call it where the soft tokens of the rows stand for their embeddings.
    """
    row = max(rows, key=lambda row: len(row.ids))
    state = plain_states(model.forward, [list(row.ids)], (-1,))[0, 0]
    return witness(row, state.double().cpu().numpy(), -1, model.dtype_name)


def unchanged(
    store: Store | None, model: ChatModel, known: Known | None, prompt: Any = None
) -> Store | None:
    """The store, or None with a warning where the model does not compute what is known of it.

    prompt: the soft prompt or the soft embeddings that the known row holds. Nothing is computed for
    a model that is not loaded, for `Store(recheck=False)`, or where nothing is known.
    """
    if store is None or not store.recheck or not model.loaded or known is None:
        return store
    soft = getattr(prompt, "embeddings", prompt) if known.soft else None

    def plain() -> torch.Tensor:
        return plain_states(model.forward, [list(known.ids)], known.layers)[0]

    with torch.no_grad(), model.forward.soft_tokens(soft):
        new = plain().double().cpu().numpy()[:, known.places]
        off = np.abs(new - known.states).max(axis=1) / np.maximum(known.sizes, 1e-12)
        if (off <= FLOAT32_ROUNDING).all():
            return store
        limit = accepted_difference(model.forward, plain)
    if (off <= limit).all():
        return store
    warnings.warn(
        f"{model.name!r} does not compute what the store keeps of it: a state differs by "
        f"{off.max():.2g} of its size (limit {limit:.2g} for {model.dtype_name}). {_cause(model)} "
        "Nothing is read from the store and nothing kept",
        stacklevel=3,
    )
    return None


def loaded_and_usable(store: Store | None, model: ChatModel) -> Store | None:
    """The store after the weights are loaded, which a call that has to compute needs anyway."""
    if store is None or model.loaded:
        return store
    _ = model.forward
    return usable(store, model)


def _cause(model: ChatModel) -> str:
    """Why a state differs, as far as the model shows it. The digest is taken for this alone."""
    if not model.source:
        before = model.fingerprint
        try:
            now = digest_in_memory(model.model, model.name, model.quantization)
        except ChatModelError:
            now = before
        if now != before:
            return (
                "The cause: its weights were changed through .data, which torch does not count; "
                "change them in place under torch.no_grad(), or wrap the model again."
            )
    return (
        "The cause is not known: the model was changed in a way that leaves its modules and "
        "weights as they are (.data, a tensor kept as an attribute, a function), or it was when "
        "the rows were kept. Undo the change, or load the model anew; if it still differs, remove "
        "the rows with `python -m analysis_lib cache prune --model`."
    )
