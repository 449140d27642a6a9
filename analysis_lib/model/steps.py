"""Sampling's next-token logits: from a cache where attention allows it, else from whole rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import pad

from .architecture import attention_mask, logits_at, text_config
from .forward import Forward
from .passes import exactly, first_wrong_turn, plain_inputs, rows_past, run_plan, tree_tokens
from .precision import accepted_difference, relative_difference
from .tree import plain_plan, plan_rows

ROOM = 16  # tokens


def next_logits(
    forward: Forward, ids: Sequence[tuple[int, ...]], max_new_tokens: int
) -> CachedStep | PlainStep | SplitStep:
    """What gives the next-token logits of some rows that grow by at most max_new_tokens.

    `first()` gives those of the rows (n, vocabulary). `next(parents, tokens)` gives those of new
    rows: each is an old one, named by its position, and one more token.
    """
    longest = max(map(len, ids)) + max_new_tokens
    reach = step_tokens(forward, longest)
    if not reach:
        return PlainStep(forward, ids)
    return CachedStep(forward, ids) if longest <= reach else SplitStep(forward, ids, reach)


def replayed(forward: Forward, row: tuple[int, ...]) -> torch.Tensor:
    """Next-token logits (vocabulary,) of a row whose last tokens are stepped one by one."""
    n = max(1, len(row) - 4)
    step = next_logits(forward, [row[:n]], len(row) - n)
    logits = step.first()
    for token in row[n:]:
        logits = step.next(np.array([0]), np.array([token]))
    return logits[0]


class CachedStep:
    """Next-token logits from a cache: one row of keys and values a node, for its own tokens.

    The common prefix is kept once for all. A row holds the tokens after the prefix, padded on the
    left, the sampled ones, and room for up to ROOM more.
    """

    def __init__(self, forward: Forward, ids: Sequence[tuple[int, ...]]):
        self.forward, self.ids = forward, ids

    def first(self) -> torch.Tensor:
        plan = plan_rows(self.ids, self.forward.pack_tokens)
        reach = tree_tokens(self.forward, plan.width)
        if plan.width > reach:
            plan = plan_rows(self.ids, self.forward.pack_tokens, reach=reach)
        length = len(plan.prefix)
        width = max(len(path) for pack in plan.packs for path in pack.paths)
        n, device = len(self.ids), self.forward.device
        logits: list[torch.Tensor | None] = [None] * n
        # Keys, then values, layer by layer; then row by row: (heads, width, d).
        own: list[list[torch.Tensor | None]] = []
        # Keys, then values, layer by layer: (heads, length, d).
        self.prefix: list[torch.Tensor] = []
        self.see = torch.zeros(n, width, dtype=torch.bool, device=device)
        self.positions = torch.zeros(n, width, dtype=torch.long, device=device)
        for pack, ends, cache in run_plan(
            self.forward, plan, logits_at=lambda pack: [p[-1] for p in pack.paths]
        ):
            both = [kv[0] for layer in cache.layers for kv in (layer.keys, layer.values)]
            self.prefix = self.prefix or [kv[:, :length] for kv in both]
            own = own or [[None] * n for _ in both]
            for member, (i, path) in enumerate(zip(pack.rows, pack.paths)):
                logits[i] = ends[member]
                at = torch.tensor(
                    [0] * (width - len(path)) + [length + p for p in path], device=device
                )
                for j, kv in enumerate(both):
                    own[j][i] = kv[:, at.to(kv.device)]
                self.see[i, width - len(path) :] = True
                self.positions[i, width - len(path) :] = torch.arange(
                    length, length + len(path), device=device
                )
        self.own = [torch.stack(rows) for rows in own]  # type: ignore[arg-type]
        self.length = width
        return torch.stack(logits)  # type: ignore[arg-type]

    def next(self, parents: NDArray[Any], tokens: NDArray[Any]) -> torch.Tensor:
        from transformers import DynamicCache

        device = self.forward.device
        chosen = torch.from_numpy(parents).to(device)
        if len(chosen) != len(self.see) or (parents != np.arange(len(parents))).any():
            self.see, self.positions = self.see[chosen], self.positions[chosen]
            for j, kv in enumerate(self.own):
                self.own[j] = kv.index_select(0, chosen.to(kv.device))
        if self.length == self.see.shape[1]:
            self.see, self.positions = pad(self.see, (0, ROOM)), pad(self.positions, (0, ROOM))
            for j, kv in enumerate(self.own):
                self.own[j] = pad(kv, (0, 0, 0, ROOM))
        self.forward.begin_anew()
        here = self.positions[:, self.length - 1, None] + 1
        self.see[:, self.length], self.positions[:, self.length] = True, here[:, 0]
        with attending(self.forward, self.prefix, self.own, self.length, here):
            out = self.forward.model(
                input_ids=torch.from_numpy(tokens).to(device)[:, None],
                position_ids=here,
                attention_mask=attention_mask(
                    self.forward.model.config,
                    self.see[:, None],
                    here,
                    self.positions,
                    self.forward.dtype,
                ),
                past_key_values=DynamicCache(),
                use_cache=True,
                logits_to_keep=1,
            )
        self.length += 1
        return out.logits[:, -1]


def steps_from_cache(forward: Forward) -> bool:
    """Whether a cached step gives this architecture's own logits on short rows.

    The answer is no where attention does not go through the interface of transformers, or has
    sinks. Such models sample plainly, and slowly.
    """
    return step_tokens(forward, 0) > 0


def step_tokens(forward: Forward, needed: int) -> float:
    """The most tokens of a row that a cached step continues rightly; 0 for none.

    The model is asked as in `tree_tokens`.
    """
    reach = tree_tokens(forward, needed)
    if not reach:
        return 0
    return min(reach, first_wrong_turn(forward, "steps_from_cache", needed, _steps_are_right))


def _steps_are_right(forward: Forward, turn: int) -> bool:
    """Whether cached steps past this turn give the plain pass's logits."""
    n = forward.n_embeddings
    rows = [tuple(row) for row in rows_past(forward, turn)]
    steps = [
        (np.array([0, 1, 1]), np.array([5, 2, 9]) % n),
        (np.array([0, 2]), np.array([4, 11]) % n),
    ]

    def logits(kind: type[CachedStep] | type[PlainStep]) -> torch.Tensor:
        way = kind(forward, rows)
        return torch.cat([way.first(), *(way.next(*step) for step in steps)])

    try:
        with exactly(forward):
            limit = accepted_difference(forward, lambda: logits(PlainStep))
            return relative_difference(logits(CachedStep), logits(PlainStep)) <= limit
    except torch.OutOfMemoryError:
        raise
    except Exception:  # an architecture that attends in its own way fails in its own way
        return False


@contextmanager
def attending(
    forward: Forward,
    prefix: list[torch.Tensor],
    own: list[torch.Tensor],
    length: int,
    here: torch.Tensor,
) -> Iterator[None]:
    """Within this context, each row gets one new token, which sees the row and the prefix.

    The token stands behind the row's `length` own tokens. prefix and own hold keys, then values,
    layer by layer: (heads, tokens, d) and (rows, heads, tokens and room, d). here: the new tokens'
    positions (rows, 1).
    """
    from transformers import AttentionInterface

    whole, text = forward.model.config, text_config(forward.model.config)
    configs = {id(c): c for c in (whole, text)}.values()
    # What transformers calls sdpa leaves a cap out. The plain pass is what is asked for.
    caps = text._attn_implementation != "sdpa"

    def attend(
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor,
        scaling: float,
        **options: Any,
    ) -> tuple[torch.Tensor, None]:
        """query (rows, heads, 1, d); key, value (rows, kv heads, 1, d); mask (rows, 1, 1, own)."""
        rows, heads, _, d = query.shape
        layer = slice(2 * module.layer_idx, 2 * module.layer_idx + 2)
        shared_key, shared_value = prefix[layer]
        own_key, own_value = own[layer]
        own_key[:, :, length], own_value[:, :, length] = key[:, :, 0], value[:, :, 0]
        kv_heads, n_shared = shared_key.shape[:2]
        each = heads // kv_heads  # -1 has no answer where nothing is shared
        query = query.reshape(rows, kv_heads, each, d)
        # All rows meet the prefix in one product a head.
        stacked = query.transpose(0, 1).reshape(kv_heads, -1, d)
        shared = (stacked @ shared_key.transpose(1, 2)).view(kv_heads, rows, each, n_shared)
        both = [shared.transpose(0, 1), query @ own_key.transpose(2, 3)]
        scores = torch.cat(both, dim=-1) * scaling
        if options.get("softcap") and caps:
            scores = torch.tanh(scores / options["softcap"]) * options["softcap"]
        scores[..., n_shared:] += mask
        if options.get("sliding_window"):
            far = here - torch.arange(n_shared, device=here.device) >= options["sliding_window"]
            scores[..., :n_shared].masked_fill_(
                far[:, None, None].to(scores.device), torch.finfo(scores.dtype).min
            )
        weight = torch.softmax(scores, dim=-1, dtype=forward.work_dtype).to(value.dtype)
        stacked = weight[..., :n_shared].transpose(0, 1).reshape(kv_heads, rows * each, n_shared)
        out = (stacked @ shared_value).view(kv_heads, rows, -1, d).transpose(0, 1)
        out = out + weight[..., n_shared:] @ own_value
        return out.reshape(rows, 1, heads, d), None

    AttentionInterface.register("analysis_lib_shared_prefix", attend)
    before = [c._attn_implementation for c in configs]
    for config in configs:
        config._attn_implementation = "analysis_lib_shared_prefix"
    try:
        yield
    finally:
        for config, name in zip(configs, before):
            config._attn_implementation = name


class PlainStep:
    """Next-token logits without a cache, from whole rows in batches of equal length.

    This is right for every architecture, and slow.
    """

    def __init__(self, forward: Forward, ids: Sequence[tuple[int, ...]]):
        self.forward, self.rows = forward, [tuple(r) for r in ids]

    def first(self) -> torch.Tensor:
        parts, order = [], []
        for pack in plain_plan(self.rows, self.forward.pack_tokens).packs:
            last = torch.tensor([pack.tokens.shape[1] - 1], device=self.forward.device)
            inputs = plain_inputs(self.forward, pack.tokens)
            parts.append(logits_at(self.forward.model, last, **inputs)[:, 0])
            order += pack.rows
        return torch.cat(parts)[np.argsort(order)]

    def next(self, parents: NDArray[Any], tokens: NDArray[Any]) -> torch.Tensor:
        self.rows = [(*self.rows[p], int(t)) for p, t in zip(parents, tokens)]
        return self.first()


class SplitStep:
    """Next-token logits where only rows of at most `reach` tokens are stepped from a cache."""

    def __init__(self, forward: Forward, ids: Sequence[tuple[int, ...]], reach: float):
        self.forward, self.reach, self.rows = forward, reach, [tuple(r) for r in ids]
        self.near = [i for i, row in enumerate(self.rows) if len(row) <= reach]
        self.cached = CachedStep(forward, [self.rows[i] for i in self.near])

    def first(self) -> torch.Tensor:
        return self._joined(self.cached.first() if self.near else None)

    def next(self, parents: NDArray[Any], tokens: NDArray[Any]) -> torch.Tensor:
        place = {row: at for at, row in enumerate(self.near)}
        self.rows = [(*self.rows[p], int(t)) for p, t in zip(parents, tokens)]
        self.near = [
            i for i, p in enumerate(parents) if p in place and len(self.rows[i]) <= self.reach
        ]
        if not self.near:
            return self._joined(None)
        own = np.array([place[parents[i]] for i in self.near])
        return self._joined(self.cached.next(own, tokens[self.near]))

    def _joined(self, near: torch.Tensor | None) -> torch.Tensor:
        """Logits of all rows, of which `near` are those of the near ones."""
        far = [i for i in range(len(self.rows)) if i not in set(self.near)]
        parts = [] if near is None else [near]
        if far:
            parts.append(PlainStep(self.forward, [self.rows[i] for i in far]).first())
        return torch.cat(parts)[np.argsort([*self.near, *far])]
