"""Passes of rows through a model: as a prefix tree, or plainly, and whether both agree.

The common prefix of the rows runs once. What remains is packed into sequences of many rows, in
which every token sees exactly its ancestors (a 4-D mask) at its true position. The last block's
feed-forward part runs on the rows' last tokens alone. Rows that the model would not take in this
way run plainly, and so do long rows that share little: a mask grows with the square of a length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from .architecture import (
    attends_in_chunks,
    attention_mask,
    last_feed_forward_at,
    logits_at,
    turns,
)
from .forward import Forward
from .precision import HALF, accepted_difference, can_widen, in_float32, relative_difference
from .recorded import Recorded
from .tree import LONG, Pack, Plan, plain_plan, plan_rows

Places = Callable[[Pack], Sequence[int]]


def last_states(
    forward: Forward, rows: Sequence[Sequence[int]], layers: Sequence[int] = (-1,)
) -> tuple[torch.Tensor, str]:
    """Last-token states (n, len(layers), d) of token rows, and the ways taken: "tree", "plain".

    They are differentiable.
    """
    states, order, ways = [], [], set()
    plans = plan_ways(forward, rows, forward.pack_tokens, line_tokens=forward.line_tokens)
    for plan in plans:
        for pack, part, _ in run_plan(forward, plan, layers):
            states.append(part)
            order += pack.rows
            ways.add("plain" if pack.sees is None else "tree")
    return torch.cat(states)[np.argsort(order)], ", ".join(sorted(ways, reverse=True))


def plan_ways(
    forward: Forward,
    rows: Sequence[Sequence[int]],
    pack_tokens: int,
    *,
    line_tokens: int | None = None,
    most: int | None = None,
    most_rows: int = 32,
) -> list[Plan]:
    """The plans that together run every row rightly: a tree, plain packs, or both.

    Packs name rows by their positions in `rows`. pack_tokens, line_tokens and most are as in
    `plan_rows`; a plain pack has at most most_rows rows.
    """
    if not shares_prefixes(forward):
        return [plain_plan(rows, pack_tokens, most_rows=most_rows)]
    plan = plan_rows(rows, pack_tokens, most=most, line_tokens=line_tokens)
    reach = tree_tokens(forward, plan.width)
    if plan.width <= reach:
        return [plan]
    plans = []
    if near := [i for i, row in enumerate(rows) if len(row) <= reach]:
        inside = [rows[i] for i in near]
        options: dict[str, Any] = {"most": most, "line_tokens": line_tokens, "reach": reach}
        plans.append(_of(near, plan_rows(inside, pack_tokens, **options)))
    if far := [i for i, row in enumerate(rows) if len(row) > reach]:
        beyond = [rows[i] for i in far]
        plans.append(_of(far, plain_plan(beyond, pack_tokens, most_rows=most_rows)))
    return plans


def _of(members: Sequence[int], plan: Plan) -> Plan:
    """A plan of some of the rows, which now names them by their positions among all."""
    packs = [replace(pack, rows=[members[i] for i in pack.rows]) for pack in plan.packs]
    return replace(plan, packs=packs)


def run_plan(
    forward: Forward,
    plan: Plan,
    layers: Sequence[int] = (-1,),
    *,
    logits_at: Places | None = None,
    backward_by_pack: bool = False,
) -> Iterator[tuple[Pack, torch.Tensor, Any]]:
    """For each pack: its rows' last states (rows, len(layers), d) and its key-value cache.

    The cache holds prefix and pack; of plain packs there is none. All is differentiable. With
    logits_at, the vocabulary logits (m, vocabulary) at those m positions of the pack (of one line)
    come instead of states. With backward_by_pack, the caller runs backward on each pack's own loss
    before asking for the next pack, and the prefix is run backward once at the end. The gradient is
    the same, with one pack's activations in memory.
    """
    masked = any(pack.sees is not None and not pack.alone for pack in plan.packs)
    prefix = _prefix_cache(forward, plan.prefix if masked else ())
    ends = [tensor for layer in prefix.layers for tensor in (layer.keys, layer.values)]
    leaves = [tensor.detach().requires_grad_() for tensor in ends] if backward_by_pack else ends
    for pack in plan.packs:
        if pack.sees is None:
            inputs, before = plain_inputs(forward, pack.tokens), 0
        elif pack.alone:
            inputs, before = _whole(forward, plan.prefix, pack), len(plan.prefix)
        else:
            inputs, before = _inputs(forward, pack, leaves, len(plan.prefix)), 0
        cache = inputs.get("past_key_values")
        if logits_at is not None:
            yield pack, _logits(forward, inputs, [before + i for i in logits_at(pack)]), cache
        else:
            at = torch.tensor([before + path[-1] for path in pack.paths])
            yield pack, _ends_of(forward, inputs, at, layers, trim=pack.sees is not None), cache
    if backward_by_pack:
        reached = [(end, leaf.grad) for end, leaf in zip(ends, leaves) if leaf.grad is not None]
        if reached:
            torch.autograd.backward([end for end, _ in reached], [grad for _, grad in reached])


def plain_inputs(forward: Forward, tokens: Any) -> dict[str, Any]:
    """What the model is called with for whole rows of equal length: no mask, no cache."""
    forward.begin_anew()
    return {"input_ids": torch.as_tensor(tokens).to(forward.device), "use_cache": False}


def _logits(forward: Forward, inputs: dict[str, Any], at: Sequence[int]) -> torch.Tensor:
    places = torch.tensor(list(at), dtype=torch.long, device=forward.device)
    return logits_at(forward.model, places, **inputs)[0]


def _prefix_cache(forward: Forward, prefix: Sequence[int]) -> Any:
    """Keys and values of the common prefix, which runs once."""
    from transformers import DynamicCache

    cache: Any = DynamicCache()
    if prefix:
        forward.begin_anew()
        places = torch.arange(len(prefix), device=forward.device)[None]
        mask: Any = None  # past LONG the model makes its own, and none where it needs none
        if len(prefix) <= LONG:
            see = torch.ones(1, len(prefix), len(prefix), dtype=torch.bool, device=forward.device)
            config, dtype = forward.model.config, forward.dtype
            mask = attention_mask(config, see.tril(), places, places, dtype)
        # Only keys and values are asked for: the last feed-forward part need not run.
        with last_feed_forward_at(forward.blocks[-1], torch.zeros(1, dtype=torch.long)):
            forward.body(
                input_ids=torch.tensor([prefix], device=forward.device),
                position_ids=places,
                attention_mask=mask,
                past_key_values=cache,
                use_cache=True,
            )
    return cache


def _whole(forward: Forward, prefix: Sequence[int], pack: Pack) -> dict[str, Any]:
    """What the model is called with for one long row: prefix and all, its cache kept."""
    from transformers import DynamicCache

    inputs = plain_inputs(forward, [[*prefix, *pack.tokens[0].tolist()]])
    return inputs | {"past_key_values": DynamicCache(), "use_cache": True}


def _inputs(
    forward: Forward, pack: Pack, prefix: Sequence[torch.Tensor], length: int
) -> dict[str, Any]:
    """What the model is called with for a pack behind a prefix of `length` tokens.

    The prefix holds keys, then values, layer by layer.
    """
    from transformers import DynamicCache

    assert pack.sees is not None
    forward.begin_anew()
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
    forward: Forward,
    inputs: dict[str, Any],
    at: torch.Tensor,
    layers: Sequence[int],
    *,
    trim: bool,
) -> torch.Tensor:
    """States (len(at), len(layers), d) at flat positions of a pass.

    With trim the last feed-forward part runs at these alone.
    """
    only_ends = (
        last_feed_forward_at(forward.blocks[-1], at.unique())  # rows may be equal
        if trim
        else nullcontext()
    )
    with Recorded(forward, layers) as recorded, only_ends:
        last = forward.body(**inputs).last_hidden_state
    states = [(last if i == -1 else recorded[i]).flatten(0, 1) for i in layers]
    return torch.stack([s[at.to(s.device)].to(forward.device) for s in states], dim=1)


# Whether the tree is right


def shares_prefixes(forward: Forward) -> bool:
    """Whether this architecture's states come out right in a prefix tree of short rows.

    Recurrent and hybrid models, and those without explicit positions or masks, answer no and run
    plainly. So do models with chunked attention.
    """
    return tree_tokens(forward, 0) > 0


def tree_tokens(forward: Forward, needed: int) -> float:
    """The most tokens of a prefix and a line behind it for which the tree is right; 0 for none.

    The model is asked, once for each length: on short rows, and past every turn of its
    configuration that `needed` tokens pass. Infinity where it passes all of these.
    """
    if forward.plainly or attends_in_chunks(forward.model.config):
        return 0
    return first_wrong_turn(forward, "shares_prefixes", needed, _tree_is_right)


def first_wrong_turn(
    forward: Forward, question: str, needed: int, right: Callable[[Forward, int], bool]
) -> float:
    """The first of 0 and the turns below `needed` past which the answer is no; else infinity.

    It is known of a model with one kind of attention; another kind is asked anew.
    """
    attention = getattr(forward.model.config, "_attn_implementation", "")
    for turn in [0, *turns(forward.model.config)]:
        if turn and turn >= needed:
            break
        name = f"{question} past {turn} by {attention}"
        if name not in forward.known:
            forward.known[name] = right(forward, turn)
        if not forward.known[name]:
            return turn
    return np.inf


@contextmanager
def exactly(forward: Forward) -> Iterator[None]:
    """Within this context a model is asked in float32 where it can be, without gradients."""
    with torch.no_grad():
        if forward.dtype in HALF and can_widen(forward):
            with in_float32(forward):
                yield
        else:
            yield


def rows_past(forward: Forward, turn: int) -> list[list[int]]:
    """Rows that share beginnings, on both sides of a turn."""
    n = forward.n_embeddings
    if not turn:
        return [
            [j * 7 % n for j in range(1, 9)],
            [*(j * 7 % n for j in range(1, 6)), 3 % n, 2 % n],
            [*(j * 7 % n for j in range(1, 6)), 3 % n, 5 % n, 8 % n],
        ]
    row = [(j * 7 + j // 50) % n for j in range(1, turn + 8)]
    if turn <= LONG:  # the last rows stand in the line behind the long ones
        row[5] = 2 % n
        short = [[*row[:5], 3 % n], [*row[:5], 3 % n, 5 % n, 8 % n], [*row[:5], 4 % n, 9 % n]]
        return [row, [*row[: turn + 2], 7 % n, 11 % n], *short]
    shared = row[: turn - 2]
    return [row, [*shared, 3 % n], [*shared, 5 % n, 2 % n, 4 % n, 8 % n, 6 % n]]


def _tree_is_right(forward: Forward, turn: int) -> bool:
    """Whether a tree past this turn gives the plain pass's states."""
    rows = rows_past(forward, turn)
    tokens = sum(map(len, rows))
    plan = plan_rows(rows, tokens, line_tokens=tokens if turn else 8)

    def plain() -> torch.Tensor:
        return plain_states(forward, rows, (-1,))

    try:
        with exactly(forward):
            states, order = [], []
            for pack, part, _ in run_plan(forward, plan):
                states.append(part)
                order += pack.rows
            tree, limit = torch.cat(states)[np.argsort(order)], accepted_difference(forward, plain)
            return relative_difference(tree, plain()) <= limit
    except torch.OutOfMemoryError:
        raise
    except Exception:  # an architecture without such a cache or mask fails in its own way
        return False


def plain_states(
    forward: Forward, rows: Sequence[Sequence[int]], layers: Sequence[int]
) -> torch.Tensor:
    """Whole rows in batches of equal length, without padding, mask or cache.

    This is right for every architecture.
    """
    plan = plain_plan(rows, forward.pack_tokens)
    states = [part for _, part, _ in run_plan(forward, plan, layers)]
    return torch.cat(states)[np.argsort([i for pack in plan.packs for i in pack.rows])]


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

    def nodes(pack: Pack) -> list[int]:
        return sorted(
            {node for i, path in zip(pack.rows, pack.paths) for node in path[-len(replies[i]) :]}
        )

    most = min(map(len, heads)) - 1
    for plan in plan_ways(forward, rows, forward.pack_tokens, most=most, most_rows=1):
        for pack, logits, _ in run_plan(forward, plan, logits_at=nodes):
            at = {node: j for j, node in enumerate(nodes(pack))}
            log_p = torch.log_softmax(allowed(logits.to(forward.work_dtype)), dim=-1)
            ends = [(i, path[-len(replies[i]) :]) for i, path in zip(pack.rows, pack.paths)]
            places = [at[node] for _, path in ends for node in path]
            tokens = [token for i in pack.rows for token in replies[i]]
            found = log_p[places, tokens].double().cpu().numpy()
            cuts = np.cumsum([len(replies[i]) for i in pack.rows])[:-1]
            for i, part in zip(pack.rows, np.split(found, cuts)):
                out[i] = part
    return out
