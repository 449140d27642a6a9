"""Sampling's next-token logits: from a cache where attention allows it, else from whole rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import pad

from .architecture import attention_mask, text_config
from .forward import Forward
from .passes import TOLERANCE, relative_difference, run_plan, shares_prefixes
from .tree import plan_rows

ROOM = 16  # tokens


class CachedStep:
    """Next-token logits from a cache: one row of keys and values a node, for its own tokens.

    The common prefix is kept once for all. A row holds the tokens after the prefix, padded on the
    left, the sampled ones, and room for up to ROOM more.
    """

    def __init__(self, forward: Forward, ids: Sequence[tuple[int, ...]]):
        self.forward, self.ids = forward, ids

    def first(self) -> torch.Tensor:
        plan = plan_rows(self.ids, self.forward.pack_tokens)
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
    """Whether a cached step gives this architecture's own logits: the model is asked, once.

    The answer is no where attention does not go through the interface of transformers, or has
    sinks. Such models sample plainly, and slowly.
    """
    known = forward.known.get("steps_from_cache")
    if known is None:
        known = shares_prefixes(forward)
        n = forward.n_embeddings
        rows = [tuple(j * 7 % n for j in range(1, 8)), (*(j * 7 % n for j in range(1, 6)), 3 % n)]
        steps = [
            (np.array([0, 1, 1]), np.array([5, 2, 9]) % n),
            (np.array([0, 2]), np.array([4, 11]) % n),
        ]
        try:
            with torch.no_grad():
                ways = [kind(forward, rows) for kind in (CachedStep, PlainStep)] if known else []
                pairs = (
                    [
                        [way.first() for way in ways],
                        *([way.next(*step) for way in ways] for step in steps),
                    ]
                    if known
                    else []
                )
            limit = TOLERANCE.get(forward.dtype_name, 1e-3)
            known = known and all(
                relative_difference(cached.float(), plain.float()) <= limit
                for cached, plain in pairs
            )
        except torch.OutOfMemoryError:
            raise
        except Exception:  # an architecture that attends in its own way fails in its own way
            known = False
        forward.known["steps_from_cache"] = known
    return known


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

    def attend(
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor,
        scaling: float,
        **options: Any,
    ) -> tuple[torch.Tensor, None]:
        """query (rows, heads, 1, d); key, value (rows, kv heads, 1, d); mask (rows, 1, 1, own).
        Exact softmax over both parts.
        """
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
        if options.get("softcap"):
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
    config = forward.model.config
    configs = {id(c): c for c in (config, text_config(config))}.values()
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
        out: list[torch.Tensor | None] = [None] * len(self.rows)
        for length in sorted(set(map(len, self.rows))):
            members = [i for i, r in enumerate(self.rows) if len(r) == length]
            for at in range(0, len(members), 32):
                part = members[at : at + 32]
                ids = torch.tensor([self.rows[i] for i in part], device=self.forward.device)
                for i, row in zip(
                    part,
                    self.forward.model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[
                        :, -1
                    ],
                ):
                    out[i] = row
        return torch.stack(out)  # type: ignore[arg-type]

    def next(self, parents: NDArray[Any], tokens: NDArray[Any]) -> torch.Tensor:
        self.rows = [(*self.rows[p], int(t)) for p, t in zip(parents, tokens)]
        return self.first()
