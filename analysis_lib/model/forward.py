"""A loaded model and how it is run: device and dtype, soft tokens, how much runs at a time."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from numpy.typing import NDArray

from .architecture import (
    blocks,
    decoder,
    embedding_scale,
    forget_lengths,
    growing_positions,
    has_per_layer_embeddings,
    no_soft_tokens,
    text_config,
)
from .errors import ChatModelError

PACK_TOKENS = {"cpu": 1024, "cuda": 2048}
LINE_TOKENS = {"cpu": 96, "cuda": 512}
ACTIVATION_BYTES = 1 << 29  # on a CPU; on a GPU, a quarter of the free memory


class Forward:
    """A loaded transformers model and how it is run: what capture, sampling and training take.

    `known` holds what the model itself was asked once, such as whether it shares prefixes.
    """

    def __init__(
        self, model: Any, *, name: str, dtype: torch.dtype, trains: bool, lock: threading.RLock
    ):
        self.model, self.name, self.dtype, self.trains = model, name, dtype, trains
        self.known: dict[str, bool] = {}
        self.pack_divisor = 1
        self.plainly = False  # whether every row runs plainly: see run_plainly
        embedding = model.get_input_embeddings()
        # accelerate's hook says where offloaded weights are worked with.
        hook = getattr(embedding, "_hf_hook", None)
        # The device of token ids and soft tokens.
        self.device = torch.device(
            getattr(hook, "execution_device", None) or embedding.weight.device
        )
        # Soft tokens, captures and samplings change how the model computes: one thread at a time.
        self._lock = lock

    @property
    def body(self) -> Any:
        """The decoder without its vocabulary head."""
        return decoder(self.model)

    @property
    def blocks(self) -> torch.nn.ModuleList:
        """The decoder's blocks."""
        return blocks(self.model, self.name)

    @cached_property
    def _growing(self) -> list[tuple[Any, str]]:
        return growing_positions(self.model)

    def begin_anew(self) -> None:
        """To be called before a pass: it shall not depend on the length of those before it."""
        forget_lengths(self._growing)

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
        """Precision of losses, soft prompts and probabilities: at least float32."""
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
        """Tokens of a pack that is run backward.

        What is kept of a token meanwhile must fit: some 34 numbers of a state's size a block.
        """
        n_layers = int(text_config(self.model.config).num_hidden_layers)
        kept = 34 * n_layers * self.hidden_size * torch.finfo(self.dtype).bits // 8
        room = (
            torch.cuda.mem_get_info(self.device)[0] // 4
            if self.device.type == "cuda"
            else ACTIVATION_BYTES
        )
        return max(1, min(self.pack_tokens, max(64, room // kept)))

    def with_smaller_packs(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Calls the function; halves the packs and calls again where memory runs out."""
        while True:
            try:
                return function(*arguments)
            except torch.OutOfMemoryError:
                if self.pack_tokens <= 64:
                    raise
            self.pack_divisor *= 2
            torch.cuda.empty_cache()

    def _takes_soft_tokens(self, base: torch.nn.Module) -> bool:
        """Whether tokens and soft tokens with their embeddings have equal states: asked once."""
        n = self.n_embeddings
        weight: Any = base.weight
        if "takes soft tokens" not in self.known and not weight.is_meta:
            ids = [j * 7 % n for j in range(1, 9)]
            made = SoftEmbedding(base, weight[ids[3:5]].to(self.device), n)
            states = []
            try:
                for row in (ids, [*ids[:3], n, n + 1, *ids[5:]]):
                    self.begin_anew()
                    with torch.no_grad():
                        body = self.body(input_ids=torch.tensor([row], device=self.device))
                    states.append(body.last_hidden_state[0, -1].float())
                    self.model.set_input_embeddings(made)
            except IndexError:  # a table of the blocks without such a row
                states = states[:1]
            finally:
                self.model.set_input_embeddings(base)
            near = 1e-3 if torch.finfo(self.dtype).eps < 1e-6 else 5e-2
            self.known["takes soft tokens"] = len(states) == 2 and bool(
                (states[1] - states[0]).norm() <= near * states[0].norm()
            )
        return self.known.get("takes soft tokens", True)

    @contextmanager
    def run_plainly(self) -> Iterator[None]:
        """Within this context no prefix is shared: what certificates compare with."""
        before, self.plainly = self.plainly, True
        try:
            yield
        finally:
            self.plainly = before

    @contextmanager
    def soft_tokens(self, embeddings: torch.Tensor | NDArray[Any] | None) -> Iterator[None]:
        """Within this context, token ids from `n_embeddings` on stand for rows of embeddings.

        The embeddings are (length, d). A tensor that requires grad receives gradients. Model and
        tokenizer are left as found. Another thread that enters this context waits; with None, that
        is all it does.
        """
        with self._lock:
            if embeddings is None:
                yield
                return
            base = self.model.get_input_embeddings()
            rows = torch.as_tensor(embeddings, device=self.device)
            if rows.requires_grad and not self.trains:
                raise ChatModelError(
                    f"{self.name!r} is quantized, for capture and sampling only; "
                    "load it without quantization to train"
                )
            if has_per_layer_embeddings(self.model.config):
                raise ChatModelError(no_soft_tokens(self.name))
            if rows.dim() != 2 or rows.shape[1] != self.hidden_size:
                raise ChatModelError(
                    f"soft tokens of shape {tuple(rows.shape)} do not fit {self.name!r}, whose "
                    f"embeddings have {self.hidden_size} dimensions"
                )
            if not self._takes_soft_tokens(base):
                raise ChatModelError(
                    f"{self.name!r} gives other states for soft tokens made of a text than for the "
                    "text: its blocks use token ids beside their embeddings; use a text prompt"
                )
            self.model.set_input_embeddings(SoftEmbedding(base, rows, self.n_embeddings))
            try:
                yield
            finally:
                self.model.set_input_embeddings(base)


class SoftEmbedding(torch.nn.Module):
    """The input embedding with rows for the ids from n on. Keeps the base module as it is."""

    def __init__(self, base: torch.nn.Module, rows: torch.Tensor, n: int):
        super().__init__()
        self.base, self.rows, self.n = base, rows, n

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
    """Tokens of a pack: they fill the matrix units, and their activations stay near these."""
    return PACK_TOKENS.get(device.type, PACK_TOKENS["cuda"])


def tokens_of_a_line(device: torch.device) -> int:
    """Tokens of a line: attention costs a line's square, a new line another copy of the prefix."""
    return LINE_TOKENS.get(device.type, LINE_TOKENS["cuda"])


def peak_bytes(device: torch.device) -> int:
    """The most memory this process has used: of a GPU, else resident; 0 where it is not known."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:
        return 0
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * (
        1 if sys.platform == "darwin" else 1024
    )
