"""Last-token hidden states, each distinct token computed once.

Rendered chats share long prefixes: the template's head, the safety prompt, the query's first words. They are
laid out as a prefix tree. The common prefix runs once; what remains is packed into sequences of many rows, in which
every token sees exactly its ancestors (a 4-D mask) at its true position; the last block's feed-forward part runs
on the rows' last tokens alone. The states are those of the plain forward pass up to floating-point order: each capture
re-runs some rows plainly and keeps the difference as a certificate.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from ..model.chat import ChatModel
from ..model.forward import TOLERANCE, last_states, peak_bytes, plain_states, relative_difference
from ..model.rendering import Prompt, Rendered
from ..store.store import Store, row_key
from .inputs import Progress, check_prompts, check_queries, usable

CHUNK_ROWS = 512  # rows computed and kept at a time: what a killed run can lose


class ParityError(RuntimeError):
    """States differ from the plain forward pass by more than the dtype explains; nothing was stored."""


@dataclass(frozen=True)
class HiddenStates:
    """Hidden states at the last token of each rendered chat.

    states       (n, len(layers), d) float32
    rows         n rows: query_id, prompt, and the query table's other columns
    layers       0 the embedding output, i the output of block i, -1 the state after the final norm
    certificate  rows computed and found; the way ("tree" or "plain") and the largest absolute and relative difference from
                 rows re-run plainly, of the computed rows and of the batches in which the found ones were committed; how
                 many rows were re-run now, and found rows of batches of which none was ("unchecked"); seconds; the peak
                 memory where any was computed
    """

    states: NDArray[np.float32]
    rows: pd.DataFrame
    layers: tuple[int, ...]
    certificate: Mapping[str, Any] = field(default_factory=dict)

    def at(self, layer: int = -1, **where: Any) -> tuple[NDArray[np.float32], pd.DataFrame]:
        """States (m, d) of one layer and their rows, of the rows where column == value (or is in a list of values)."""
        if layer not in self.layers:
            raise KeyError(
                f"layer {layer} was not captured; captured are {self.layers}: pass layers=({layer},) to hidden_states"
            )
        keep = np.ones(len(self.rows), dtype=bool)
        for column, value in where.items():
            if column not in self.rows:
                raise KeyError(
                    f"no column {column!r}; the rows have {', '.join(self.rows.columns)}"
                )
            wanted = value if isinstance(value, (list, tuple, set)) else [value]
            keep &= self.rows[column].isin(wanted).fillna(False).to_numpy(dtype=bool)
        return self.states[keep, self.layers.index(layer)], self.rows[keep].reset_index(drop=True)


def hidden_states(
    model: ChatModel,
    queries: pd.DataFrame,
    prompts: Mapping[str, Prompt],
    *,
    layers: Sequence[int] = (-1,),
    store: Store | None = None,
    n_check: int = 2,
    progress: bool | None = None,
) -> HiddenStates:
    """Captures the last-token state of every query under every prompt.

    queries: table with query_id and text; prompts: {name: text or SoftPrompt}, "" for no system message.
    layers: 0 .. L and -1. Layer -1 is the state after the final norm (transformers' hidden_states[-1], the one
    the study uses); layer L is the last block's raw output before it.
    store: found rows are read, computed rows are kept, prompt by prompt.
    n_check: rows of this call re-run plainly (batch 1, nothing shared), at least one of each prompt computed unless 0;
    ParityError past the dtype's tolerance.
    progress: a bar, by default where a terminal or a notebook shows it and something is to be computed.
    Order of rows: prompts outer, queries inner.
    """
    store = usable(store, model)
    layers = tuple(layers)
    wrong = [i for i in layers if not -1 <= i <= model.n_layers]
    if wrong or not layers or len(set(layers)) < len(layers):
        raise ValueError(
            f"layers {layers}: give distinct numbers from 0 to {model.n_layers}, or -1 for the state after the final norm"
        )
    check_queries(queries)
    check_prompts(prompts)
    texts = queries["text"].tolist()
    states = np.empty((len(prompts) * len(texts), len(layers), model.hidden_size), dtype=np.float32)
    certificate: dict[str, Any] = {
        "found": 0,
        "computed": 0,
        "dtype": model.dtype_name,
        "template": model.template,
        "way": "",
        "checked": 0,
        "unchecked": 0,
        "max_abs": 0.0,
        "max_rel": 0.0,
    }
    rng = np.random.default_rng(0)
    start = time.perf_counter()
    bar = Progress(len(states), "states", progress)
    checks_left = n_check
    for number, (name, prompt) in enumerate(prompts.items()):
        rows = model.render(texts, prompt)
        block = states[number * len(texts) : (number + 1) * len(texts)]
        keys = _keys(model, rows, layers) if store is not None else []
        missing, held = (
            _fill(block, keys, store) if store is not None else (np.arange(len(rows)), set())
        )
        certificate["found"] += len(rows) - len(missing)
        bar.add(found=len(rows) - len(missing))
        if store is not None:
            _recall(
                certificate, store, [keys[i] for i in np.setdiff1d(np.arange(len(rows)), missing)]
            )
        for part in np.array_split(missing, -(-len(missing) // CHUNK_ROWS)) if len(missing) else []:
            embeddings = None if isinstance(prompt, str) else prompt.embeddings
            with torch.no_grad(), model.forward.soft_tokens(embeddings):
                wanted = [rows[i] for i in part]
                computed, way = model.forward.with_smaller_packs(
                    last_states, model.forward, [r.ids for r in wanted], layers
                )
                block[part] = computed.float().cpu().numpy()
                take = max(
                    0,
                    min(
                        len(part), max(min(n_check, 1), -(-checks_left // (len(prompts) - number)))
                    ),
                )
                found = _certify(
                    model,
                    wanted,
                    block[part],
                    layers,
                    rng.choice(len(part), take, replace=False),
                    texts,
                    part,
                )
            checks_left -= take
            certificate["computed"] += len(part)
            certificate["checked"] += take
            _widen(certificate, {"way": way, **found})
            if store is not None:
                kept = {
                    "way": way,
                    "checked": take,
                    **found,
                }  # what Store.certificates knows a certificate by
                kept_as = str(
                    torch.float32 if computed.dtype == torch.float64 else computed.dtype
                )  # some norms give float32
                for j, layer in enumerate(layers):
                    about = {
                        "model": model.fingerprint,
                        "model_name": model.name,
                        "prompts": [name],
                        "layer": layer,
                        "certificate": kept,
                    }
                    new = {
                        keys[i][j]: block[i, j] for i in part if keys[i][j] not in held
                    }  # queries may render alike
                    if new:
                        store.write_states(
                            list(new), np.stack(list(new.values())), dtype=kept_as, about=about
                        )
            bar.add(computed=len(part))
    bar.close()
    certificate["peak_bytes"] = peak_bytes(model.device) if certificate["computed"] else 0
    certificate["seconds"] = round(time.perf_counter() - start, 3)
    table = pd.concat([queries.assign(prompt=name) for name in prompts], ignore_index=True)
    return HiddenStates(
        states,
        table[["query_id", "prompt", *[c for c in table if c not in ("query_id", "prompt")]]],
        layers,
        certificate,
    )


def _certify(
    model: ChatModel,
    rows: Sequence[Rendered],
    states: NDArray,
    layers: Sequence[int],
    chosen: NDArray,
    texts: Sequence[str],
    part: NDArray,
) -> dict[str, float]:
    """Re-runs the chosen rows one by one; returns the largest differences or raises ParityError."""
    worst = {"max_abs": 0.0, "max_rel": 0.0}
    bad = np.flatnonzero(~np.isfinite(states).all(axis=(1, 2)))
    if len(bad):
        advice = (
            "load the model with dtype='float32' or 'bfloat16'"
            if model.dtype_name == "float16"
            else "its weights are damaged"
        )
        named = ", ".join(repr(texts[part[i]][:40]) for i in bad[:3]) + ", ..." * (len(bad) > 3)
        raise ParityError(
            f"{len(bad)} of {len(states)} states of {model.name!r} hold NaN or infinity in {model.dtype_name} ({named}); {advice}"
        )
    for i in chosen:
        plain = plain_states(model.forward, [rows[i].ids], layers)[0].float().cpu()
        mine = torch.from_numpy(states[i])
        worst["max_abs"] = max(worst["max_abs"], float((mine - plain).abs().max()))
        worst["max_rel"] = max(
            worst["max_rel"], max(relative_difference(a, b) for a, b in zip(mine, plain))
        )
    limit = TOLERANCE.get(model.dtype_name, 1e-3)
    if worst["max_rel"] > limit:
        raise ParityError(
            f"states of {model.name!r} differ from the plain forward pass by {worst['max_rel']:.2g} of their size (limit {limit:g} for "
            f"{model.dtype_name}); nothing was stored: report the model, or load it with dtype='float32'"
        )
    return worst


def _keys(model: ChatModel, rows: Sequence[Rendered], layers: Sequence[int]) -> list[list[str]]:
    common = {"kind": "state", **model.key_parts()}
    return [[row_key(ids=r.ids, soft=r.soft, layer=i, **common) for i in layers] for r in rows]


def _fill(block: NDArray, keys: list[list[str]], store: Store) -> tuple[NDArray, set[str]]:
    """Writes the stored states into block; returns the positions of rows with any layer missing, and the keys that are kept."""
    read = store.read_states([k for row in keys for k in row])
    found = {key: state for key, state in read.items() if state.shape == block.shape[2:]}
    missing = []
    for i, row in enumerate(keys):
        if all(k in found for k in row):
            block[i] = np.stack([found[k] for k in row])
        else:
            missing.append(i)
    return np.array(missing, dtype=int), set(found)


def _recall(certificate: dict[str, Any], store: Store, keys: Sequence[Sequence[str]]) -> None:
    """Adds what is known of found rows: the certificates under which they were committed."""
    kept = store.certificates([key for row in keys for key in row])
    for found in {id(c): c for cs in kept.values() for c in cs}.values():
        _widen(certificate, found)
    checked = {
        key: bool(own) and all(c["checked"] for c in own) for key, own in kept.items()
    }  # of merged batches, every one
    certificate["unchecked"] += sum(not checked.get(row[0], False) for row in keys)


def _widen(certificate: dict[str, Any], more: Mapping[str, Any]) -> None:
    """Makes a certificate hold for further rows as well."""
    if more["way"] not in certificate["way"].split(", "):
        certificate["way"] = ", ".join(filter(None, [certificate["way"], more["way"]]))
    for key in ("max_abs", "max_rel"):
        certificate[key] = max(certificate[key], more[key])
