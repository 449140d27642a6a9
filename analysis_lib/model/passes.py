"""Passes of rows through a model: as a prefix tree, or plainly, and whether both agree.

The common prefix of the rows runs once. What remains is packed into sequences of many rows, in
which every token sees exactly its ancestors (a 4-D mask) at its true position. The last block's
feed-forward part runs on the rows' last tokens alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from .architecture import attends_in_chunks, attention_mask, last_feed_forward_at
from .forward import Forward
from .tree import Pack, Plan, plan_rows

# Largest accepted difference from the plain pass, relative to the states' own root mean square.
TOLERANCE = {"float64": 1e-6, "float32": 1e-3, "float16": 5e-2, "bfloat16": 2.5e-1}


def last_states(
    forward: Forward, rows: Sequence[Sequence[int]], layers: Sequence[int] = (-1,)
) -> tuple[torch.Tensor, str]:
    """Last-token states (n, len(layers), d) of token rows, and the way taken: "tree" or "plain".

    They are differentiable.
    """
    if not shares_prefixes(forward):
        return plain_states(forward, rows, layers), "plain"
    plan = plan_rows(rows, forward.pack_tokens, line_tokens=forward.line_tokens)
    states = torch.cat([states for _, states, _ in run_plan(forward, plan, layers)])
    return states[np.argsort([i for pack in plan.packs for i in pack.rows])], "tree"


def run_plan(
    forward: Forward,
    plan: Plan,
    layers: Sequence[int] = (-1,),
    *,
    logits_at: Callable[[Pack], Sequence[int]] | None = None,
    backward_by_pack: bool = False,
) -> Iterator[tuple[Pack, torch.Tensor, Any]]:
    """For each pack: its rows' last states (rows, len(layers), d) and its key-value cache.

    The cache holds prefix and pack; all is differentiable. With logits_at, the vocabulary logits
    (m, vocabulary) at those m positions of the pack (of one line) come instead of states. With
    backward_by_pack, the caller runs backward on each pack's own loss before asking for the next
    pack, and the prefix is run backward once at the end. The gradient is the same, with one pack's
    activations in memory.
    """
    prefix = _prefix_cache(forward, plan.prefix)
    ends = [tensor for layer in prefix.layers for tensor in (layer.keys, layer.values)]
    leaves = [tensor.detach().requires_grad_() for tensor in ends] if backward_by_pack else ends
    for pack in plan.packs:
        inputs = _inputs(forward, pack, leaves, len(plan.prefix))
        cache = inputs["past_key_values"]
        if logits_at is not None:
            at = torch.tensor(list(logits_at(pack)), dtype=torch.long, device=forward.device)
            yield pack, forward.model(**inputs, logits_to_keep=at).logits[0], cache
        else:
            yield pack, _ends_of(forward, pack, inputs, layers), cache
    if backward_by_pack:
        reached = [(end, leaf.grad) for end, leaf in zip(ends, leaves) if leaf.grad is not None]
        torch.autograd.backward([end for end, _ in reached], [grad for _, grad in reached])


def _prefix_cache(forward: Forward, prefix: Sequence[int]) -> Any:
    """Keys and values of the common prefix, which runs once."""
    from transformers import DynamicCache

    cache: Any = DynamicCache()
    if prefix:
        places = torch.arange(len(prefix), device=forward.device)[None]
        see = torch.ones(
            1, len(prefix), len(prefix), dtype=torch.bool, device=forward.device
        ).tril()
        # Only keys and values are asked for: the last feed-forward part need not run.
        with last_feed_forward_at(forward.blocks[-1], torch.zeros(1, dtype=torch.long)):
            forward.body(
                input_ids=torch.tensor([prefix], device=forward.device),
                position_ids=places,
                attention_mask=attention_mask(
                    forward.model.config, see, places, places, forward.dtype
                ),
                past_key_values=cache,
                use_cache=True,
            )
    return cache


def _inputs(
    forward: Forward, pack: Pack, prefix: Sequence[torch.Tensor], length: int
) -> dict[str, Any]:
    """What the model is called with for a pack behind a prefix of `length` tokens.

    The prefix holds keys, then values, layer by layer.
    """
    from transformers import DynamicCache

    device, (b, t) = forward.device, pack.tokens.shape
    cache = DynamicCache()
    for i in range(len(prefix) // 2):
        keys, values = prefix[2 * i].expand(b, -1, -1, -1), prefix[2 * i + 1].expand(b, -1, -1, -1)
        cache.update(keys, values, i)
    depths = torch.from_numpy(pack.depths).to(device)
    before = torch.arange(length, device=device).expand(b, -1)
    own = torch.from_numpy(pack.sees)
    see = torch.cat([torch.ones(b, t, length, dtype=torch.bool), own], dim=2).to(device)
    columns = torch.cat([before, depths], dim=1)
    return {
        "input_ids": torch.from_numpy(pack.tokens).to(device),
        "position_ids": depths,
        "attention_mask": attention_mask(forward.model.config, see, depths, columns, forward.dtype),
        "past_key_values": cache,
        "use_cache": True,
    }


def _ends_of(
    forward: Forward, pack: Pack, inputs: dict[str, Any], layers: Sequence[int]
) -> torch.Tensor:
    """States (rows, len(layers), d) at the last tokens of a pack's rows."""
    at = torch.tensor([path[-1] for path in pack.paths])
    only_ends = last_feed_forward_at(forward.blocks[-1], at.unique())  # rows may be equal
    with _recorded(forward, layers) as recorded, only_ends:
        last = forward.body(**inputs).last_hidden_state
    states = [(last if i == -1 else recorded[i]).flatten(0, 1) for i in layers]
    ends = [state[at.to(state.device)].to(forward.device) for state in states]
    return torch.stack(ends, dim=1)


class _recorded:
    """Outputs of the embedding (0) and of blocks (i) during a forward pass, by hooks."""

    def __init__(self, forward: Forward, layers: Sequence[int]):
        self.forward, self.layers = forward, [i for i in layers if i >= 0]

    def __enter__(self) -> dict[int, torch.Tensor]:
        self.seen: dict[int, torch.Tensor] = {}
        self.handles = []
        modules = list(self.forward.blocks) if self.layers else []
        for i in self.layers:
            if i == 0:
                self.handles.append(
                    modules[0].register_forward_pre_hook(self._keep_input, with_kwargs=True)
                )
            else:
                self.handles.append(modules[i - 1].register_forward_hook(self._keep_output(i)))
        return self.seen

    def _keep_input(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.seen[0] = args[0] if args else kwargs["hidden_states"]

    def _keep_output(self, i: int) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            self.seen[i] = output[0] if isinstance(output, tuple) else output

        return hook

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()


def shares_prefixes(forward: Forward) -> bool:
    """Whether this architecture's states come out right in a prefix tree: the model is asked, once.

    Recurrent and hybrid models, and those without explicit positions or masks, answer no and run
    plainly. So do models with chunked attention, whose chunks are longer than the question.
    """
    if attends_in_chunks(forward.model.config):
        return False
    known = forward.known.get("shares_prefixes")
    if known is None:
        n = forward.n_embeddings
        rows = [
            [j * 7 % n for j in range(1, 9)],
            [*(j * 7 % n for j in range(1, 6)), 3 % n, 2 % n],
            [*(j * 7 % n for j in range(1, 6)), 3 % n, 5 % n, 8 % n],
        ]
        with torch.no_grad():
            plain = plain_states(forward, rows, (-1,)).float()
            try:
                tree = torch.empty_like(plain)
                for pack, states, _ in run_plan(forward, plan_rows(rows, 64, line_tokens=8)):
                    tree[torch.tensor(pack.rows)] = states.float()
                known = relative_difference(tree, plain) <= TOLERANCE.get(forward.dtype_name, 1e-3)
            except torch.OutOfMemoryError:
                raise
            except Exception:  # an architecture without such a cache or mask fails in its own way
                known = False
        forward.known["shares_prefixes"] = known
    return known


def plain_states(
    forward: Forward, rows: Sequence[Sequence[int]], layers: Sequence[int], *, batch: int = 32
) -> torch.Tensor:
    """Whole rows in batches of equal length, without padding, mask or cache.

    This is right for every architecture.
    """
    out: list[torch.Tensor | None] = [None] * len(rows)
    by_length: dict[int, list[int]] = {}
    for i, row in enumerate(rows):
        by_length.setdefault(len(row), []).append(i)
    for members in by_length.values():
        for at in range(0, len(members), batch):
            part = members[at : at + batch]
            with _recorded(forward, layers) as recorded:
                last = forward.body(
                    input_ids=torch.tensor([list(rows[i]) for i in part], device=forward.device),
                    use_cache=False,
                ).last_hidden_state
            ends = [(last if i == -1 else recorded[i])[:, -1].to(forward.device) for i in layers]
            states = torch.stack(ends, dim=1)
            for i, state in zip(part, states):
                out[i] = state
    return torch.stack(out)  # type: ignore[arg-type]


def relative_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest absolute difference relative to the root mean square of b."""
    return float((a - b).abs().max() / b.pow(2).mean().sqrt().clamp(min=1e-12))


def log_probabilities(
    forward: Forward,
    heads: Sequence[tuple[int, ...]],
    replies: Sequence[tuple[int, ...]],
    *,
    allowed: Callable[[torch.Tensor], torch.Tensor] = lambda logits: logits,
) -> list[np.ndarray]:
    """Log probability (float64) of each token of replies[i] after heads[i].

    allowed(logits) gives them with -inf at tokens that are never said. Shared beginnings are
    computed once.
    """
    rows = [(*head, *reply[:-1]) for head, reply in zip(heads, replies, strict=True)]
    out: list[Any] = [None] * len(rows)
    if not shares_prefixes(forward):
        for i, (row, reply) in enumerate(zip(rows, replies)):
            ids = torch.tensor([row], device=forward.device)
            logits = forward.model(input_ids=ids, use_cache=False).logits[0, -len(reply) :]
            log_p = torch.log_softmax(allowed(logits.to(forward.work_dtype)), dim=-1)
            out[i] = log_p[range(len(reply)), list(reply)].double().cpu().numpy()
        return out

    def nodes(pack: Pack) -> list[int]:
        return sorted(
            {node for i, path in zip(pack.rows, pack.paths) for node in path[-len(replies[i]) :]}
        )

    plan = plan_rows(rows, forward.pack_tokens, most=min(map(len, heads)) - 1)
    for pack, logits, _ in run_plan(forward, plan, logits_at=nodes):
        at = {node: j for j, node in enumerate(nodes(pack))}
        log_p = torch.log_softmax(allowed(logits.to(forward.work_dtype)), dim=-1)
        places = [
            at[node] for i, path in zip(pack.rows, pack.paths) for node in path[-len(replies[i]) :]
        ]
        tokens = [token for i in pack.rows for token in replies[i]]
        found = log_p[places, tokens].double().cpu().numpy()
        for i, part in zip(
            pack.rows, np.split(found, np.cumsum([len(replies[i]) for i in pack.rows])[:-1])
        ):
            out[i] = part
    return out
