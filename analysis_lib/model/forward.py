"""Forward passes of one loaded model: plain ones, and those of rows laid out as a prefix tree.

The common prefix of the rows runs once. What remains is packed into sequences of many rows, in which every token sees exactly
its ancestors (a 4-D mask) at its true position. The last block's feed-forward part runs on the rows' last tokens alone.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .architecture import (
    attends_in_chunks,
    attention_mask,
    blocks,
    decoder,
    embedding_scale,
    last_feed_forward_at,
    text_config,
)
from .errors import ChatModelError
from .tree import Pack, Plan, plan_rows

# Largest accepted difference from the plain forward pass, relative to the states' own root mean square.
TOLERANCE = {"float64": 1e-6, "float32": 1e-3, "float16": 5e-2, "bfloat16": 2.5e-1}
PACK_TOKENS = {"cpu": 1024, "cuda": 2048}
LINE_TOKENS = {"cpu": 96, "cuda": 512}
ACTIVATION_BYTES = 1 << 29  # on a CPU; on a GPU, a quarter of the free memory


class Forward:
    """A loaded transformers model and how it is run: what capture, sampling and training take.

    known holds the answers to what was asked of the model itself, once: whether it shares prefixes, say.
    """

    def __init__(
        self, model: Any, *, name: str, dtype: torch.dtype, trains: bool, lock: threading.RLock
    ):
        self.model, self.name, self.dtype, self.trains = model, name, dtype, trains
        self.known: dict[str, bool] = {}
        self.pack_divisor = 1
        embedding = model.get_input_embeddings()
        hook = getattr(
            embedding, "_hf_hook", None
        )  # accelerate's: with offloaded weights, where they are worked with
        self.device = torch.device(
            getattr(hook, "execution_device", None) or embedding.weight.device
        )  # of ids and soft tokens
        self._lock = lock  # soft tokens, captures and samplings change how the model computes: one thread at a time

    @property
    def body(self) -> Any:
        """The decoder without its vocabulary head."""
        return decoder(self.model)

    @property
    def blocks(self) -> torch.nn.ModuleList:
        """The decoder's blocks."""
        return blocks(self.model, self.name)

    @cached_property
    def n_embeddings(self) -> int:
        """Rows of the input embedding matrix; soft tokens take the ids from here on."""
        return int(text_config(self.model.config).vocab_size)

    @cached_property
    def hidden_size(self) -> int:
        return int(text_config(self.model.config).hidden_size)

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def work_dtype(self) -> torch.dtype:
        """Precision of what is computed around the model (losses, soft prompts, probabilities): at least float32."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def pack_tokens(self) -> int:
        """Tokens of a pack; fewer once the device ran out of memory."""
        return max(1, tokens_of_a_pack(self.device) // self.pack_divisor)

    @property
    def line_tokens(self) -> int:
        return tokens_of_a_line(self.device)

    @property
    def backward_tokens(self) -> int:
        """Tokens of a pack that is run backward: what is kept of them meanwhile, some 34 numbers of a state's size a block, must fit."""
        n_layers = int(text_config(self.model.config).num_hidden_layers)
        kept = 34 * n_layers * self.hidden_size * torch.finfo(self.dtype).bits // 8
        room = (
            torch.cuda.mem_get_info(self.device)[0] // 4
            if self.device.type == "cuda"
            else ACTIVATION_BYTES
        )
        return max(1, min(self.pack_tokens, max(64, room // kept)))

    def with_smaller_packs(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Calls the function; where the device runs out of memory, halves the packs and calls it again."""
        while True:
            try:
                return function(*arguments)
            except torch.OutOfMemoryError:
                if self.pack_tokens <= 64:
                    raise
            self.pack_divisor *= 2
            torch.cuda.empty_cache()

    @contextmanager
    def soft_tokens(self, embeddings: torch.Tensor | NDArray | None) -> Iterator[None]:
        """Within this context, token ids from `n_embeddings` on stand for the rows of embeddings (length, d).

        A tensor that requires grad receives gradients. Model and tokenizer are left as found. Another thread that enters
        this context waits; with None, that is all it does.
        """
        with self._lock:
            if embeddings is None:
                yield
                return
            base = self.model.get_input_embeddings()
            rows = torch.as_tensor(embeddings, device=self.device)
            if rows.requires_grad and not self.trains:
                raise ChatModelError(
                    f"{self.name!r} is quantized, for capture and sampling only; load it without quantization to train"
                )
            if rows.dim() != 2 or rows.shape[1] != self.hidden_size:
                raise ChatModelError(
                    f"soft tokens of shape {tuple(rows.shape)} do not fit {self.name!r}, whose embeddings have {self.hidden_size} dimensions"
                )
            self.model.set_input_embeddings(SoftEmbedding(base, rows))
            try:
                yield
            finally:
                self.model.set_input_embeddings(base)


class SoftEmbedding(torch.nn.Module):
    """The input embedding with extra rows. Keeps the base module as it is."""

    def __init__(self, base: torch.nn.Module, rows: torch.Tensor):
        super().__init__()
        self.base, self.rows = base, rows
        self.n = int(base.weight.shape[0])  # type: ignore[arg-type, index]

    @property
    def weight(self) -> torch.Tensor:
        return self.base.weight  # type: ignore[return-value]

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        soft = ids >= self.n
        plain = self.base(ids.masked_fill(soft, 0))
        if not soft.any():
            return plain
        rows = self.rows.to(plain.dtype) * embedding_scale(self.base)
        return torch.where(soft.unsqueeze(-1), rows[(ids - self.n).clamp(min=0)], plain)


def tokens_of_a_pack(device: torch.device) -> int:
    """Tokens of a pack: enough to fill the device's matrix units, few enough that its activations stay near them."""
    return PACK_TOKENS.get(device.type, PACK_TOKENS["cuda"])


def tokens_of_a_line(device: torch.device) -> int:
    """Tokens of a line: attention costs a line's square, a new line another copy of the prefix."""
    return LINE_TOKENS.get(device.type, LINE_TOKENS["cuda"])


def peak_bytes(device: torch.device) -> int:
    """High-water mark of this process: allocated memory of a GPU, else resident memory; 0 where the system keeps none."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:
        return 0
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * (
        1 if sys.platform == "darwin" else 1024
    )


def last_states(
    forward: Forward, rows: Sequence[Sequence[int]], layers: Sequence[int] = (-1,)
) -> tuple[torch.Tensor, str]:
    """Last-token states (n, len(layers), d) of token rows, differentiable, and the way taken: "tree" or "plain"."""
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
    """For each pack: its rows' last states (rows, len(layers), d) and its key-value cache (prefix and pack). Differentiable.

    With logits_at, the vocabulary logits (m, vocabulary) at those m positions of the pack (of one line) instead of states.
    With backward_by_pack, the caller runs backward on each pack's own loss before asking for the next pack, and the
    prefix is run backward once at the end: the same gradient, with one pack's activations in memory.
    """
    from transformers import DynamicCache

    device, length = forward.device, len(plan.prefix)
    before = torch.arange(length, device=device)
    prefix: Any = DynamicCache()
    if length:
        see = torch.ones(length, length, dtype=torch.bool, device=device).tril()
        with last_feed_forward_at(
            forward.blocks[-1], torch.zeros(1, dtype=torch.long)
        ):  # only keys and values are asked for
            forward.body(
                input_ids=torch.tensor([plan.prefix], device=device),
                position_ids=before[None],
                attention_mask=attention_mask(
                    forward.model.config, see[None], before[None], before[None], forward.dtype
                ),
                past_key_values=prefix,
                use_cache=True,
            )
    ends = [tensor for layer in prefix.layers for tensor in (layer.keys, layer.values)]
    leaves = [tensor.detach().requires_grad_() for tensor in ends] if backward_by_pack else ends
    for pack in plan.packs:
        b, t = pack.tokens.shape
        cache = DynamicCache()
        for i in range(len(prefix.layers)):
            cache.update(
                leaves[2 * i].expand(b, -1, -1, -1), leaves[2 * i + 1].expand(b, -1, -1, -1), i
            )
        depths = torch.from_numpy(pack.depths).to(device)
        see = torch.cat(
            [torch.ones(b, t, length, dtype=torch.bool), torch.from_numpy(pack.sees)], dim=2
        ).to(device)
        columns = torch.cat([before.expand(b, -1), depths], dim=1)
        inputs = {
            "input_ids": torch.from_numpy(pack.tokens).to(device),
            "position_ids": depths,
            "attention_mask": attention_mask(
                forward.model.config, see, depths, columns, forward.dtype
            ),
            "past_key_values": cache,
            "use_cache": True,
        }
        if logits_at is not None:
            at = torch.tensor(list(logits_at(pack)), dtype=torch.long, device=device)
            yield pack, forward.model(**inputs, logits_to_keep=at).logits[0], cache
            continue
        at = torch.tensor([path[-1] for path in pack.paths])
        with (
            _recorded(forward, layers) as recorded,
            last_feed_forward_at(forward.blocks[-1], at.unique()),
        ):  # rows may be equal
            last = forward.body(**inputs).last_hidden_state
        states = [(last if i == -1 else recorded[i]).flatten(0, 1) for i in layers]
        yield (
            pack,
            torch.stack([state[at.to(state.device)].to(device) for state in states], dim=1),
            cache,
        )
    if backward_by_pack:
        reached = [(end, leaf.grad) for end, leaf in zip(ends, leaves) if leaf.grad is not None]
        torch.autograd.backward([end for end, _ in reached], [grad for _, grad in reached])


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

    def _keep_input(self, module: Any, args: tuple, kwargs: dict) -> None:
        self.seen[0] = args[0] if args else kwargs["hidden_states"]

    def _keep_output(self, i: int) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            self.seen[i] = output[0] if isinstance(output, tuple) else output

        return hook

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()


def shares_prefixes(forward: Forward) -> bool:
    """Whether this architecture's states come out right in a prefix tree: asked of the model itself, once.

    Recurrent and hybrid models, and those without explicit positions or masks, answer no and run plainly; so do models with
    chunked attention, whose chunks are longer than the question.
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
    """Whole rows in batches of equal length, without padding, mask or cache: right for every architecture."""
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
    forward: Forward, heads: Sequence[tuple[int, ...]], replies: Sequence[tuple[int, ...]]
) -> list[np.ndarray]:
    """Log probability of each token of replies[i] after heads[i], float64; shared beginnings are computed once."""
    rows = [(*head, *reply[:-1]) for head, reply in zip(heads, replies, strict=True)]
    out: list[Any] = [None] * len(rows)
    if not shares_prefixes(forward):
        for i, (row, reply) in enumerate(zip(rows, replies)):
            ids = torch.tensor([row], device=forward.device)
            logits = forward.model(input_ids=ids, use_cache=False).logits[0, -len(reply) :]
            log_p = torch.log_softmax(logits.to(forward.work_dtype), dim=-1)
            out[i] = log_p[range(len(reply)), list(reply)].double().cpu().numpy()
        return out

    def nodes(pack: Pack) -> list[int]:
        return sorted(
            {node for i, path in zip(pack.rows, pack.paths) for node in path[-len(replies[i]) :]}
        )

    plan = plan_rows(rows, forward.pack_tokens, most=min(map(len, heads)) - 1)
    for pack, logits, _ in run_plan(forward, plan, logits_at=nodes):
        at = {node: j for j, node in enumerate(nodes(pack))}
        log_p = torch.log_softmax(logits.to(forward.work_dtype), dim=-1)
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
