"""Last-token hidden states, each distinct token computed once.

Rendered chats share long prefixes: the template's head, the safety prompt, the query's first words. They are
laid out as a prefix tree. The common prefix runs once; what remains is packed into sequences of many rows, in which
every token sees exactly its ancestors (a 4-D mask) at its true position; the last block's feed-forward part runs
on the rows' last tokens alone. The states are those of the plain forward pass up to floating-point order: each capture
re-runs some rows plainly and keeps the difference as a certificate.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from .chat import ChatModel, Prompt, Rendered, SoftTokens
from .store.batches import row_key
from .store.store import Store

# Largest accepted difference from the plain forward pass, relative to the states' own root mean square.
TOLERANCE = {"float64": 1e-6, "float32": 1e-3, "float16": 5e-2, "bfloat16": 2.5e-1}
PACK_TOKENS = {"cpu": 1024, "cuda": 2048}
LINE_TOKENS = {"cpu": 96, "cuda": 512}
ACTIVATION_BYTES = 1 << 29  # on a CPU; on a GPU, a quarter of the free memory
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
            raise KeyError(f"layer {layer} was not captured; captured are {self.layers}: pass layers=({layer},) to hidden_states")
        keep = np.ones(len(self.rows), dtype=bool)
        for column, value in where.items():
            if column not in self.rows:
                raise KeyError(f"no column {column!r}; the rows have {', '.join(self.rows.columns)}")
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
    _check_queries(queries)
    _check_prompts(prompts)
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
        missing, held = _fill(block, keys, store) if store is not None else (np.arange(len(rows)), set())
        certificate["found"] += len(rows) - len(missing)
        bar.add(found=len(rows) - len(missing))
        if store is not None:
            _recall(certificate, store, [keys[i] for i in np.setdiff1d(np.arange(len(rows)), missing)])
        for part in np.array_split(missing, -(-len(missing) // CHUNK_ROWS)) if len(missing) else []:
            embeddings = None if isinstance(prompt, str) else prompt.embeddings
            with torch.no_grad(), model.soft_tokens(embeddings):
                wanted = [rows[i] for i in part]
                computed, way = _with_smaller_packs(model, last_states, model, [r.ids for r in wanted], layers)
                block[part] = computed.float().cpu().numpy()
                take = max(0, min(len(part), max(min(n_check, 1), -(-checks_left // (len(prompts) - number)))))
                found = _certify(model, wanted, block[part], layers, rng.choice(len(part), take, replace=False), texts, part)
            checks_left -= take
            certificate["computed"] += len(part)
            certificate["checked"] += take
            _widen(certificate, {"way": way, **found})
            if store is not None:
                kept = {"way": way, "checked": take, **found}  # what Store.certificates knows a certificate by
                kept_as = str(torch.float32 if computed.dtype == torch.float64 else computed.dtype)  # some norms give float32
                for j, layer in enumerate(layers):
                    about = {
                        "model": model.fingerprint,
                        "model_name": model.name,
                        "prompts": [name],
                        "layer": layer,
                        "certificate": kept,
                    }
                    new = {keys[i][j]: block[i, j] for i in part if keys[i][j] not in held}  # queries may render alike
                    if new:
                        store.write_states(list(new), np.stack(list(new.values())), dtype=kept_as, about=about)
            bar.add(computed=len(part))
    bar.close()
    certificate["peak_bytes"] = peak_bytes(model) if certificate["computed"] else 0
    certificate["seconds"] = round(time.perf_counter() - start, 3)
    table = pd.concat([queries.assign(prompt=name) for name in prompts], ignore_index=True)
    return HiddenStates(
        states, table[["query_id", "prompt", *[c for c in table if c not in ("query_id", "prompt")]]], layers, certificate
    )


class Progress:
    """A tqdm bar that says what was found and computed, the rate of computing and the time left; it opens at the first
    computed row and goes when all is done. shown None: where a terminal or a notebook is there to show it."""

    def __init__(self, total: int, what: str, shown: bool | None):
        self._total, self._what, self._counts = total, what, {"found": 0, "computed": 0}
        self._shown = ("ipykernel" in sys.modules or sys.stderr.isatty()) if shown is None else shown
        self._bar: Any = None

    def add(self, *, found: int = 0, computed: int = 0) -> None:
        from tqdm.auto import tqdm

        if self._shown and self._bar is None and self._counts["found"] + found < self._total:
            with warnings.catch_warnings():  # a notebook without ipywidgets gets the plain bar
                warnings.simplefilter("ignore")
                self._bar = tqdm(total=self._total, desc=self._what, leave=False, smoothing=0)
        self._counts["found"] += found
        self._counts["computed"] += computed
        if self._bar is not None:
            self._bar.initial = self._counts["found"]  # the rate, over the whole time, is that of computing
            self._bar.set_postfix(self._counts, refresh=False)
            self._bar.update(sum(self._counts.values()) - self._bar.n)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def last_states(model: ChatModel, rows: Sequence[Sequence[int]], layers: Sequence[int] = (-1,)) -> tuple[torch.Tensor, str]:
    """Last-token states (n, len(layers), d) of token rows, differentiable, and the way taken: "tree" or "plain"."""
    if not shares_prefixes(model):
        return _plain_states(model, rows, layers), "plain"
    plan = plan_rows(rows, _pack_tokens(model), line_tokens=_line_tokens(model))
    states = torch.cat([states for _, states, _ in run_plan(model, plan, layers)])
    return states[np.argsort([i for pack in plan.packs for i in pack.rows])], "tree"


# The prefix tree


@dataclass(frozen=True)
class Pack:
    """Part of a prefix tree, laid out as b lines of t tokens, short lines padded at their end.

    tokens, depths  (b, t) ids and true positions
    sees            (b, t, t) bool: a token (second axis) sees a token of its line (third axis): its ancestors and itself
    rows, paths     the rows that end here and, for each, the flat positions (line x t + place) of its tokens after the prefix
    """

    tokens: NDArray[np.int64]
    depths: NDArray[np.int64]
    sees: NDArray[np.bool_]
    rows: list[int]
    paths: list[list[int]]


@dataclass(frozen=True)
class Plan:
    """Rows as a common prefix and packs; `n_tokens` distinct tokens are computed for `n_row_tokens` in the rows."""

    prefix: tuple[int, ...]
    packs: list[Pack]
    n_tokens: int
    n_row_tokens: int


class _Line:
    """Rows that follow each other in sorted order, as one sequence."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.depths: list[int] = []
        self.rows: list[int] = []
        self.paths: list[list[int]] = []
        self.last: Sequence[int] = ()

    def add(self, i: int, row: Sequence[int], depth: int) -> None:
        common = common_length(self.last, row)
        start = len(self.tokens)
        self.paths.append([*(self.paths[-1][:common] if common else ()), *range(start, start + len(row) - common)])
        self.tokens.extend(row[common:])
        self.depths.extend(range(depth + common, depth + len(row)))
        self.rows.append(i)
        self.last = row

    def fill_mask(self, sees: NDArray[np.bool_]) -> None:
        known = 0
        for path in self.paths:
            new = slice(known, path[-1] + 1)
            common = len(path) - (new.stop - known)
            sees[new, path[:common]] = True
            sees[new, new] = np.tri(new.stop - known, dtype=bool)
            known = new.stop


def plan_rows(
    rows: Sequence[Sequence[int]], pack_tokens: int, *, most: int | None = None, line_tokens: int | None = None
) -> Plan:
    """Lays token rows out as a prefix tree, in packs of at most pack_tokens and lines of at most line_tokens (one row at least).

    Without line_tokens a pack is one line. The common prefix has at most `most` tokens, and never a row's last one.
    """
    if not rows or min(map(len, rows)) < 2:
        raise ValueError("rows of at least 2 tokens are needed")
    order = sorted(range(len(rows)), key=lambda i: tuple(rows[i]))
    first, last = rows[order[0]], rows[order[-1]]
    longest = min(map(len, rows)) - 1
    shared = min(common_length(first, last), longest if most is None else min(most, longest))
    lines = [_Line()]
    for i in order:
        row = rows[i][shared:]
        if lines[-1].tokens and len(lines[-1].tokens) + len(row) > min(line_tokens or pack_tokens, pack_tokens):
            lines.append(_Line())
        lines[-1].add(i, row, shared)
    groups: list[list[_Line]] = [[]]
    for line in sorted(lines, key=lambda line: len(line.tokens)):  # lines of like length: little padding
        if groups[-1] and (line_tokens is None or len(line.tokens) * (len(groups[-1]) + 1) > pack_tokens):
            groups.append([])
        groups[-1].append(line)
    n_tokens = shared + sum(len(line.tokens) for line in lines)
    return Plan(tuple(first[:shared]), [_pack(group) for group in groups], n_tokens, sum(map(len, rows)))


def _pack(lines: Sequence[_Line]) -> Pack:
    b, t = len(lines), max(len(line.tokens) for line in lines)
    tokens, depths, sees = np.zeros((b, t), np.int64), np.zeros((b, t), np.int64), np.zeros((b, t, t), bool)
    paths = []
    for j, line in enumerate(lines):
        n = len(line.tokens)
        tokens[j, :n], depths[j, :n] = line.tokens, line.depths
        line.fill_mask(sees[j])
        paths += [[j * t + place for place in path] for path in line.paths] if j else line.paths
    return Pack(tokens, depths, sees, [i for line in lines for i in line.rows], paths)


def common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """Number of equal tokens at the beginning of both."""
    n = 0
    for x, y in zip(a, b):
        if x != y:
            break
        n += 1
    return n


def run_plan(
    model: ChatModel,
    plan: Plan,
    layers: Sequence[int] = (-1,),
    *,
    logits_at: Callable[[Pack], Sequence[int]] | None = None,
    backward_by_pack: bool = False,
) -> Iterator[tuple[Pack, torch.Tensor, Any]]:
    """For each pack: its rows' last states (rows, len(layers), d) and its key-value cache (prefix and pack). Differentiable.

    With logits_at, the vocabulary logits (m, vocabulary) at those m positions of the pack (of one line) instead of states.
    With backward_by_pack, the caller runs backward on each pack's own loss before asking for the next pack, and the
    prefix is run backward once at the end: the same gradient, with one pack's activations in memory.
    """
    from transformers import DynamicCache

    device, length = model.device, len(plan.prefix)
    before = torch.arange(length, device=device)
    prefix: Any = DynamicCache()
    if length:
        see = torch.ones(length, length, dtype=torch.bool, device=device).tril()
        with _last_feed_forward_at(model, torch.zeros(1, dtype=torch.long)):  # only keys and values are asked for
            model.body(
                input_ids=torch.tensor([plan.prefix], device=device),
                position_ids=before[None],
                attention_mask=attention_mask(model, see[None], before[None], before[None]),
                past_key_values=prefix,
                use_cache=True,
            )
    ends = [tensor for layer in prefix.layers for tensor in (layer.keys, layer.values)]
    leaves = [tensor.detach().requires_grad_() for tensor in ends] if backward_by_pack else ends
    for pack in plan.packs:
        b, t = pack.tokens.shape
        cache = DynamicCache()
        for i in range(len(prefix.layers)):
            cache.update(leaves[2 * i].expand(b, -1, -1, -1), leaves[2 * i + 1].expand(b, -1, -1, -1), i)
        depths = torch.from_numpy(pack.depths).to(device)
        see = torch.cat([torch.ones(b, t, length, dtype=torch.bool), torch.from_numpy(pack.sees)], dim=2).to(device)
        columns = torch.cat([before.expand(b, -1), depths], dim=1)
        inputs = {
            "input_ids": torch.from_numpy(pack.tokens).to(device),
            "position_ids": depths,
            "attention_mask": attention_mask(model, see, depths, columns),
            "past_key_values": cache,
            "use_cache": True,
        }
        if logits_at is not None:
            at = torch.tensor(list(logits_at(pack)), dtype=torch.long, device=device)
            yield pack, model.model(**inputs, logits_to_keep=at).logits[0], cache
            continue
        at = torch.tensor([path[-1] for path in pack.paths])
        with _recorded(model, layers) as recorded, _last_feed_forward_at(model, at.unique()):  # rows may be equal
            last = model.body(**inputs).last_hidden_state
        states = [(last if i == -1 else recorded[i]).flatten(0, 1) for i in layers]
        yield pack, torch.stack([state[at.to(state.device)].to(device) for state in states], dim=1), cache
    if backward_by_pack:
        reached = [(end, leaf.grad) for end, leaf in zip(ends, leaves) if leaf.grad is not None]
        torch.autograd.backward([end for end, _ in reached], [grad for _, grad in reached])


@contextmanager
def _last_feed_forward_at(model: ChatModel, at: torch.Tensor) -> Iterator[None]:
    """Within this context the last block's feed-forward part runs at the distinct flat positions `at` alone, and gives 0 elsewhere.

    No later block reads its other outputs. A block without a part named `mlp` runs whole.
    """
    part = getattr(model.blocks[-1], "mlp", None)
    if part is None:
        yield
        return
    shape: list[torch.Size] = []

    def gather(module: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        shape.append(args[0].shape)
        return args[0].flatten(0, -2)[at.to(args[0].device)][None], *args[1:]

    def scatter(module: Any, args: Any, output: Any) -> Any:
        out = output[0] if isinstance(output, tuple) else output
        whole = out.new_zeros(shape[-1][:-1].numel(), out.shape[-1]).index_copy(0, at.to(out.device), out.flatten(0, -2))
        whole = whole.view(*shape[-1][:-1], out.shape[-1])
        return (whole, *output[1:]) if isinstance(output, tuple) else whole

    handles = [part.register_forward_pre_hook(gather), part.register_forward_hook(scatter)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def attention_mask(model: ChatModel, see: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> Any:
    """The additive 4-D mask (batch, 1, q, k) of see (batch, q, k), for tokens at positions rows (batch, q) and columns (batch, k).

    Layers with a sliding window are also cut by these positions; models that mix both kinds get one mask of each.
    """

    def additive(allowed: torch.Tensor) -> torch.Tensor:
        mask = torch.zeros(allowed.shape, dtype=model.dtype, device=model.device)
        return mask.masked_fill(~allowed, torch.finfo(model.dtype).min)[:, None]

    window = getattr(model.text_config, "sliding_window", None)
    kinds = set(getattr(model.text_config, "layer_types", None) or [])
    if window is None or (kinds and "sliding_attention" not in kinds):
        return additive(see)
    near = additive(see & (rows[:, :, None] - columns[:, None, :] < window))
    return {"full_attention": additive(see), "sliding_attention": near} if "full_attention" in kinds else near


class _recorded:
    """Outputs of the embedding (0) and of blocks (i) during a forward pass, by hooks."""

    def __init__(self, model: ChatModel, layers: Sequence[int]):
        self.model, self.layers = model, [i for i in layers if i >= 0]

    def __enter__(self) -> dict[int, torch.Tensor]:
        self.seen: dict[int, torch.Tensor] = {}
        self.handles = []
        blocks = self.model.blocks if self.layers else []
        for i in self.layers:
            if i == 0:
                self.handles.append(blocks[0].register_forward_pre_hook(self._keep_input, with_kwargs=True))
            else:
                self.handles.append(blocks[i - 1].register_forward_hook(self._keep_output(i)))
        return self.seen

    def _keep_input(self, module: Any, args: tuple, kwargs: dict) -> None:
        self.seen[0] = args[0] if args else kwargs["hidden_states"]

    def _keep_output(self, i: int) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            self.seen[i] = output[0] if isinstance(output, tuple) else output

        return hook

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()


def shares_prefixes(model: ChatModel) -> bool:
    """Whether this architecture's states come out right in a prefix tree: asked of the model itself, once.

    Recurrent and hybrid models, and those without explicit positions or masks, answer no and run plainly; so do models with
    chunked attention, whose chunks are longer than the question.
    """
    known = model.__dict__.get("_shares_prefixes")
    if "chunked_attention" in (getattr(model.text_config, "layer_types", None) or []):
        known = False
    if known is None:
        n = model.n_embeddings
        rows = [
            [j * 7 % n for j in range(1, 9)],
            [*(j * 7 % n for j in range(1, 6)), 3 % n, 2 % n],
            [*(j * 7 % n for j in range(1, 6)), 3 % n, 5 % n, 8 % n],
        ]
        with torch.no_grad():
            plain = _plain_states(model, rows, (-1,)).float()
            try:
                tree = torch.empty_like(plain)
                for pack, states, _ in run_plan(model, plan_rows(rows, 64, line_tokens=8)):
                    tree[torch.tensor(pack.rows)] = states.float()
                known = _relative(tree, plain) <= TOLERANCE.get(model.dtype_name, 1e-3)
            except torch.OutOfMemoryError:
                raise
            except Exception:  # an architecture without such a cache or mask fails in its own way
                known = False
        model.__dict__["_shares_prefixes"] = known
    return bool(known)


def _plain_states(model: ChatModel, rows: Sequence[Sequence[int]], layers: Sequence[int], *, batch: int = 32) -> torch.Tensor:
    """Whole rows in batches of equal length, without padding, mask or cache: right for every architecture."""
    out: list[torch.Tensor | None] = [None] * len(rows)
    by_length: dict[int, list[int]] = {}
    for i, row in enumerate(rows):
        by_length.setdefault(len(row), []).append(i)
    for members in by_length.values():
        for at in range(0, len(members), batch):
            part = members[at : at + batch]
            with _recorded(model, layers) as recorded:
                last = model.body(
                    input_ids=torch.tensor([list(rows[i]) for i in part], device=model.device), use_cache=False
                ).last_hidden_state
            ends = [(last if i == -1 else recorded[i])[:, -1].to(model.device) for i in layers]
            states = torch.stack(ends, dim=1)
            for i, state in zip(part, states):
                out[i] = state
    return torch.stack(out)  # type: ignore[arg-type]


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
            "load the model with dtype='float32' or 'bfloat16'" if model.dtype_name == "float16" else "its weights are damaged"
        )
        named = ", ".join(repr(texts[part[i]][:40]) for i in bad[:3]) + ", ..." * (len(bad) > 3)
        raise ParityError(
            f"{len(bad)} of {len(states)} states of {model.name!r} hold NaN or infinity in {model.dtype_name} ({named}); {advice}"
        )
    for i in chosen:
        plain = _plain_states(model, [rows[i].ids], layers)[0].float().cpu()
        mine = torch.from_numpy(states[i])
        worst["max_abs"] = max(worst["max_abs"], float((mine - plain).abs().max()))
        worst["max_rel"] = max(worst["max_rel"], max(_relative(a, b) for a, b in zip(mine, plain)))
    limit = TOLERANCE.get(model.dtype_name, 1e-3)
    if worst["max_rel"] > limit:
        raise ParityError(
            f"states of {model.name!r} differ from the plain forward pass by {worst['max_rel']:.2g} of their size (limit {limit:g} for "
            f"{model.dtype_name}); nothing was stored: report the model, or load it with dtype='float32'"
        )
    return worst


def _relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest absolute difference relative to the root mean square of b."""
    return float((a - b).abs().max() / b.pow(2).mean().sqrt().clamp(min=1e-12))


def _pack_tokens(model: ChatModel) -> int:
    """Tokens of a pack: enough to fill the device's matrix units, few enough that its activations stay near them."""
    most = PACK_TOKENS.get(model.device.type, PACK_TOKENS["cuda"])
    return max(1, most // model.__dict__.get("_pack_divisor", 1))


def _backward_tokens(model: ChatModel) -> int:
    """Tokens of a pack that is run backward: what is kept of them meanwhile, some 34 numbers of a state's size a block, must fit."""
    kept = 34 * model.n_layers * model.hidden_size * torch.finfo(model.dtype).bits // 8
    room = torch.cuda.mem_get_info(model.device)[0] // 4 if model.device.type == "cuda" else ACTIVATION_BYTES
    return max(1, min(_pack_tokens(model), max(64, room // kept)))


def _line_tokens(model: ChatModel) -> int:
    """Tokens of a line: attention costs a line's square, a new line another copy of the prefix."""
    return LINE_TOKENS.get(model.device.type, LINE_TOKENS["cuda"])


def _with_smaller_packs(model: ChatModel, function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls the function; where the device runs out of memory, halves the packs of this model and calls it again."""
    while True:
        try:
            return function(*arguments)
        except torch.OutOfMemoryError:
            if _pack_tokens(model) <= 64:
                raise
        model.__dict__["_pack_divisor"] = 2 * model.__dict__.get("_pack_divisor", 1)
        torch.cuda.empty_cache()


def peak_bytes(model: ChatModel) -> int:
    """High-water mark of this process: allocated memory of a GPU, else resident memory; 0 where the system keeps none."""
    if model.device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(model.device))
    try:
        import resource
    except ImportError:
        return 0
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * (1 if sys.platform == "darwin" else 1024)


def usable(store: Store | None, model: ChatModel) -> Store | None:
    """The store, or None with a warning where a forward hook may change what the model computes: no key knows of it."""
    if store is not None and (name := model.hooked):
        warnings.warn(
            f"{name} of {model.name!r} has a forward hook, which no key in the store knows of: nothing is read from the store and "
            "nothing kept; remove the hook for that",
            stacklevel=3,
        )
        return None
    return store


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
    checked = {key: bool(own) and all(c["checked"] for c in own) for key, own in kept.items()}  # of merged batches, every one
    certificate["unchecked"] += sum(not checked.get(row[0], False) for row in keys)


def _widen(certificate: dict[str, Any], more: Mapping[str, Any]) -> None:
    """Makes a certificate hold for further rows as well."""
    if more["way"] not in certificate["way"].split(", "):
        certificate["way"] = ", ".join(filter(None, [certificate["way"], more["way"]]))
    for key in ("max_abs", "max_rel"):
        certificate[key] = max(certificate[key], more[key])


def _check_queries(queries: pd.DataFrame, *more: str) -> None:
    lacking = {"query_id", "text", *more} - set(queries.columns)
    if lacking:
        raise ValueError(f"the queries lack the column {', '.join(sorted(lacking))}; load them with load_queries")
    twice = queries["query_id"][queries["query_id"].duplicated()]
    if len(twice):
        raise ValueError(f"query_id {twice.iloc[0]!r} occurs twice; every query needs its own")
    wrong = queries["query_id"][[not isinstance(text, str) or not text.strip() for text in queries["text"]]]
    if len(wrong):
        raise ValueError(f"query {wrong.iloc[0]!r} has no text; drop such rows, or load the file with load_queries")


def _check_prompts(prompts: Mapping[str, Prompt]) -> None:
    if not isinstance(prompts, Mapping) or not prompts or not all(isinstance(p, (str, SoftTokens)) for p in prompts.values()):
        raise ValueError(f"prompts = {prompts!r:.100}: give {{name: text or SoftPrompt}}, such as load_safety_prompts()")
