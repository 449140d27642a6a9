"""Last-token hidden states, each distinct token computed once.

Rendered chats share long prefixes: the template's head, the safety prompt, the query's first words.
They are laid out as a prefix tree. The common prefix runs once; what remains is packed into
sequences of many rows, in which every token sees exactly its ancestors (a 4-D mask) at its true
position; the last block's feed-forward part runs on the rows' last tokens alone. The states are
those of the plain forward pass up to floating-point order: each capture re-runs some rows plainly
and keeps the difference as a certificate.
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
from ..model.forward import peak_bytes
from ..model.passes import last_states
from ..model.rendering import Prompt, Rendered
from ..store.batches import row_key
from ..store.store import Store
from .certificates import certify, new_certificate, recall, widen
from .found import Asked, fill_kept
from .inputs import Progress, check_prompts, check_queries, keeper, usable
from .recheck import known_row, loaded_and_usable, longest_witness, unchanged, witness

CHUNK_ROWS = 512  # rows computed and kept at a time: what a killed run can lose


@dataclass(frozen=True)
class HiddenStates:
    """Hidden states at the last token of each rendered chat.

    Parameters
    ----------
    states : ndarray
        Shape (n, len(layers), d), float32.
    rows : DataFrame
        n rows: query_id, prompt and the other columns of the query table.
    layers : tuple of int
        0 is the embedding output, i the output of block i, -1 the state after the final norm.
    certificate : mapping
        How the rows came about. computed and found count rows. way is "tree", "plain" or both.
        max_abs and max_rel are the largest absolute and relative differences from rows re-run plainly: of
        the computed rows, and of the batches in which the found ones were committed. checked counts
        the rows re-run now, unchecked the found rows of batches of which none was. seconds is the
        time taken. peak_bytes is the peak memory, where any row was computed. dtype and template
        are the model's.

    Examples
    --------
    >>> from analysis_lib import ChatModel, hidden_states, load_queries
    >>> queries = load_queries("anchor").head(3)
    >>> states = hidden_states(ChatModel.load("organism"), queries, {"none": ""}, layers=(0, -1))
    >>> states.states.shape, states.layers, states.certificate["computed"]
    ((3, 2, 128), (0, -1), 3)
    """

    states: NDArray[np.float32]
    rows: pd.DataFrame
    layers: tuple[int, ...]
    certificate: Mapping[str, Any] = field(default_factory=dict)

    def at(self, layer: int = -1, **where: Any) -> tuple[NDArray[np.float32], pd.DataFrame]:
        """States of one layer, of the rows whose columns have the given values.

        Parameters
        ----------
        layer : int
            One of `layers`.
        **where
            column=value, or column=[values].

        Returns
        -------
        states : ndarray
            Shape (m, d), float32.
        rows : DataFrame
            Their m rows.

        Raises
        ------
        KeyError
            Where the layer was not captured, or the rows have no such column.

        Examples
        --------
        >>> from analysis_lib import ChatModel, hidden_states, load_queries
        >>> queries = load_queries("anchor").head(3)
        >>> prompts = {"none": "", "kind": "Be kind."}
        >>> captured = hidden_states(ChatModel.load("organism"), queries, prompts)
        >>> states, rows = captured.at(-1, prompt="kind")
        >>> states.shape, rows["prompt"].unique().tolist()
        ((3, 128), ['kind'])
        """
        if layer not in self.layers:
            raise KeyError(
                f"layer {layer} was not captured; captured are {self.layers}: pass "
                f"layers=({layer},) to hidden_states"
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

    Parameters
    ----------
    model : ChatModel
        The model to capture.
    queries : DataFrame
        Has the columns query_id and text.
    prompts : mapping
        {name: text or SoftPrompt}; the text "" means no system message.
    layers : sequence of int
        0 .. L and -1. Layer -1 is the state after the final norm (transformers' hidden_states[-1],
        the one the study uses). Layer L is the last block's raw output before it.
    store : Store, optional
        Kept rows are read from it; computed rows are kept in it, prompt by prompt.
    n_check : int
        Rows of this call that are re-run plainly (batch 1, nothing shared): at least the longest of
        each prompt that is computed, unless 0.
    progress : bool, optional
        Whether a bar is shown. Default: in a terminal or a notebook, where something is to be
        computed.

    Returns
    -------
    HiddenStates
        Prompts outer, queries inner.

    Raises
    ------
    ValueError
        For wrong layers, queries or prompts.
    ParityError
        Where a re-run row differs by more than the dtype's tolerance, or a state is not finite.
    ChatModelError
        Where a text cannot be rendered, or a soft prompt does not fit the model.
    StoreError
        Where the store cannot be read. Where it cannot be written, a warning says so.

    References
    ----------
    Zheng et al. 2024, "On Prompt-Driven Safeguarding for Large Language Models", arXiv 2401.18018:
    the representation of a query is the last token's state of the last layer.

    Examples
    --------
    >>> import tempfile
    >>> from analysis_lib import ChatModel, Store, hidden_states, load_queries
    >>> model, queries = ChatModel.load("organism"), load_queries("anchor").head(2)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     first = hidden_states(model, queries, {"none": ""}, store=Store(folder))
    ...     again = hidden_states(model, queries, {"none": ""}, store=Store(folder))
    >>> first.certificate["computed"], again.certificate["found"]
    (2, 2)
    >>> bool((first.states == again.states).all())
    True
    """
    store = usable(store, model)
    layers = checked_layers(model, layers)
    check_queries(queries)
    check_prompts(prompts)
    texts = queries["text"].tolist()
    states = np.empty((len(prompts) * len(texts), len(layers), model.hidden_size), dtype=np.float32)
    start = time.perf_counter()
    bar = Progress(len(states), "states", progress)
    capture = _Capture(model, texts, layers, store, bar, n_check)
    blocks = states.reshape(len(prompts), len(texts), *states.shape[1:])
    asked = [capture.find(b, name, prompt) for b, (name, prompt) in zip(blocks, prompts.items())]
    capture.recheck(asked)
    for number, part in enumerate(asked):
        capture.fill(part, prompts_left=len(prompts) - number)
    bar.close()
    certificate = capture.certificate
    certificate["peak_bytes"] = peak_bytes(model.device) if certificate["computed"] else 0
    certificate["seconds"] = round(time.perf_counter() - start, 3)
    table = pd.concat([queries.assign(prompt=name) for name in prompts], ignore_index=True)
    more = [column for column in table if column not in ("query_id", "prompt")]
    return HiddenStates(states, table[["query_id", "prompt", *more]], layers, certificate)


def missing_states(
    model: ChatModel,
    queries: pd.DataFrame,
    prompts: Mapping[str, Prompt],
    *,
    layers: Sequence[int] = (-1,),
    store: Store | None,
) -> NDArray[np.bool_]:
    """Which states `hidden_states` would have to compute: (prompts, queries, layers).

    Loads no weights.
    """
    store, layers = usable(store, model), checked_layers(model, layers)
    check_queries(queries)
    check_prompts(prompts)
    missing = np.ones((len(prompts), len(queries), len(layers)), dtype=bool)
    for mask, prompt in zip(missing, prompts.values()):
        keys = _keys(model, model.render(queries["text"].tolist(), prompt), layers)
        kept = store.read_states([key for row in keys for key in row]) if store is not None else {}
        mask[:] = [[key not in kept for key in row] for row in keys]
    return missing


def checked_layers(model: ChatModel, layers: Sequence[int]) -> tuple[int, ...]:
    """The layers as a tuple. ValueError where one is not of the model, or occurs twice."""
    layers = tuple(layers)
    wrong = [i for i in layers if not -1 <= i <= model.n_layers]
    if wrong or not layers or len(set(layers)) < len(layers):
        raise ValueError(
            f"layers {layers}: give distinct numbers from 0 to {model.n_layers}, or -1 for the "
            "state after the final norm"
        )
    return layers


class _Capture:
    """One call of `hidden_states`: fills the states prompt by prompt, and keeps its certificate."""

    def __init__(
        self,
        model: ChatModel,
        texts: Sequence[str],
        layers: tuple[int, ...],
        store: Store | None,
        bar: Progress,
        n_check: int,
    ):
        self.model, self.texts, self.layers, self.store = model, texts, layers, store
        self.bar, self.n_check, self.checks_left = bar, n_check, n_check
        self.rng = np.random.default_rng(0)
        self.certificate = new_certificate(model)
        self.keep = keeper()

    def find(self, block: NDArray[np.float32], name: str, prompt: Prompt) -> Asked:
        """Writes the kept states of every query under one prompt into block (queries, layers, d)."""
        rows = self.model.render(self.texts, prompt)
        if self.store is None:
            return Asked(block, name, prompt, rows)
        keys = _keys(self.model, rows, self.layers)
        return Asked(block, name, prompt, rows, keys, *fill_kept(block, keys, self.store))

    def recheck(self, asked: Sequence[Asked]) -> None:
        """Gives the store up where the model does not compute what it keeps: see `recheck`."""
        if self.store is None:
            return
        computes = any(len(part.missing) for part in asked)
        if computes:
            self.store = loaded_and_usable(self.store, self.model)
        if self.model.loaded:
            found = [(part, i) for part in asked for i in part.found()]
            known, prompt = longest_witness(self.store, self.model) if computes else None, None
            if found:
                part, i = max(found, key=lambda one: len(one[0].rows[one[1]].ids))
                known, prompt = known_row(part.rows[i], part.block[i], self.layers), part.prompt
            self.store = unchanged(self.store, self.model, known, prompt)

    def fill(self, asked: Asked, *, prompts_left: int) -> None:
        """Computes what is missing under one prompt."""
        rows, block = asked.rows, asked.block
        missing, held = np.arange(len(rows)), set[str]()
        if self.store is not None:
            missing, held = asked.missing, asked.held
            if len(missing):  # an earlier prompt may have brought some
                again, more = fill_kept(block, asked.keys, self.store, missing)
                missing, held = again, held | more
            found = np.setdiff1d(np.arange(len(rows)), missing)
            recall(self.certificate, self.store, [asked.keys[i] for i in found])
        self.certificate["found"] += len(rows) - len(missing)
        self.bar.add(found=len(rows) - len(missing))
        for part in np.array_split(missing, -(-len(missing) // CHUNK_ROWS)) if len(missing) else []:
            take = -(-self.checks_left // prompts_left)
            take = max(0, min(len(part), max(min(self.n_check, 1), take)))
            dtype, certificate = self._compute(block, part, rows, asked.prompt, take)
            self.checks_left -= take
            if self.store is not None:
                self._keep(asked, part, held, dtype, certificate)
            self.bar.add(computed=len(part))

    def _compute(
        self,
        block: NDArray[np.float32],
        part: NDArray[np.int64],
        rows: Sequence[Rendered],
        prompt: Prompt,
        take: int,
    ) -> tuple[str, dict[str, Any]]:
        """Computes the rows of a part and certifies `take` of them.

        Returns the dtype they came in, and the part's certificate.
        """
        forward = self.model.forward
        wanted = [rows[i] for i in part]
        embeddings = None if isinstance(prompt, str) else prompt.embeddings
        with torch.no_grad(), forward.soft_tokens(embeddings):
            ids = [row.ids for row in wanted]
            computed, way = forward.with_smaller_packs(last_states, forward, ids, self.layers)
            block[part] = computed.float().cpu().numpy()
            chosen = self._chosen(wanted, take)
            texts = [self.texts[i] for i in part]
            worst = certify(self.model, wanted, texts, block[part], self.layers, chosen)
        # The names that Store.certificates knows.
        certificate = {"way": way, "checked": len(chosen), **worst}
        self.certificate["computed"] += len(part)
        self.certificate["checked"] += len(chosen)
        widen(self.certificate, certificate)
        # Some norms give float32 in a model of half precision; float64 is kept as float32.
        dtype = torch.float32 if computed.dtype == torch.float64 else computed.dtype
        return str(dtype), certificate

    def _chosen(self, rows: Sequence[Rendered], take: int) -> NDArray[np.int64]:
        """Positions of the rows to certify: the longest, and others up to `take`."""
        longest = max(range(len(rows)), key=lambda i: len(rows[i].ids))
        others = self.rng.choice(len(rows), take, replace=False)
        return np.array([longest, *others[others != longest]], dtype=np.int64)[:take]

    def _keep(
        self,
        asked: Asked,
        part: NDArray[np.int64],
        held: set[str],
        dtype: str,
        certificate: dict[str, Any],
    ) -> None:
        """Commits those states of a part that the store does not hold yet."""
        assert self.store is not None
        block, longest = asked.block, max(part, key=lambda i: len(asked.rows[i].ids))
        for j, layer in enumerate(self.layers):
            about = {
                "model": self.model.fingerprint,
                "model_name": self.model.name,
                "prompts": [asked.name],
                "layer": layer,
                "certificate": certificate,
                "witness": witness(
                    asked.rows[longest], block[longest, j], layer, self.model.dtype_name
                ),
            }
            # Queries may render alike: one row for each key.
            new = {asked.keys[i][j]: block[i, j] for i in part if asked.keys[i][j] not in held}
            if new:
                states = np.stack(list(new.values()))
                self.keep(self.store.write_states, list(new), states, dtype=dtype, about=about)


def _keys(model: ChatModel, rows: Sequence[Rendered], layers: Sequence[int]) -> list[list[str]]:
    common = {"kind": "state", **model.key_parts()}
    return [[row_key(ids=r.ids, soft=r.soft, layer=i, **common) for i in layers] for r in rows]
