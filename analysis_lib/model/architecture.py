"""All that is special to a model family: a family with an odd part gets its line here alone.

Each function asks a transformers model or its configuration. What no function knows is found out by
asking the model itself: `passes.tree_tokens` and `steps.step_tokens` compare rows with the plain
forward pass, short ones and ones past each of the configuration's `turns`.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .errors import ChatModelError


def text_config(config: Any) -> Any:
    """The language part's configuration; of a text model, its own.

    Raises ChatModelError for an encoder-decoder.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise ChatModelError(
            f"a model of the kind {config.model_type!r} is an encoder-decoder: it reads the query "
            "in one part and writes the reply in another; choose a decoder, such as Llama or Qwen"
        )
    return config.get_text_config(decoder=True)


def decoder(model: Any) -> Any:
    """The decoder without its vocabulary head; its language part where it also takes images."""
    found = model.get_decoder()
    return found if found is not model else model.model


def blocks(model: Any, name: str) -> torch.nn.ModuleList:
    """The decoder's blocks, in order. Raises ChatModelError where there is no list of them."""
    n = text_config(model.config).num_hidden_layers
    lists = [
        m for m in decoder(model).modules() if isinstance(m, torch.nn.ModuleList) and len(m) == n
    ]
    if not lists:
        raise ChatModelError(
            f"{name!r} has no list of {n} blocks; layers other than -1 cannot be read"
        )
    return lists[0]


def embedding_scale(embedding: torch.nn.Module) -> float | torch.Tensor:
    """The factor by which an input embedding multiplies its rows; Gemma's does, most have 1."""
    return getattr(embedding, "embed_scale", 1.0)


def attends_in_chunks(config: Any) -> bool:
    """Whether attention is cut into chunks (Llama 4).

    The chunks are longer than the rows by which a model is asked whether it shares prefixes.
    """
    return "chunked_attention" in (getattr(text_config(config), "layer_types", None) or [])


def turns(config: Any) -> list[int]:
    """Lengths past which attention or positions may follow another rule, in rising order.

    Every whole number that the configuration gives under the name of a window, chunk, block, index
    or original context; the whole context where its rotary factors grow with the pass.
    """
    named = re.compile(r"window|chunk|local|block|index\w*_(topk|budget)|original_max_position")
    settings = text_config(config).to_dict()
    found: set[int] = set()

    def look(values: Any, name: str = "") -> None:
        if isinstance(values, dict):
            if "dynamic" in str(values.get("rope_type")):
                found.add(int(settings.get("max_position_embeddings") or 0))
            for key, value in values.items():
                look(value, str(key))
        elif isinstance(values, list | tuple):
            for value in values:
                look(value, name)
        elif type(values) is int and named.search(name) and "expert" not in name:
            found.add(values)

    look(settings)
    return sorted(n for n in found if n > 1)


def has_per_layer_embeddings(config: Any) -> bool:
    """Whether blocks look the token ids up in tables of their own (Gemma 3n and 4)."""
    return bool(getattr(text_config(config), "hidden_size_per_layer_input", None))


def no_soft_tokens(name: str) -> str:
    """Why such a model takes no soft prompt."""
    return (
        f"{name!r} has per-layer embeddings: its blocks look the token ids up again, and soft tokens "
        "have none; use a text prompt, or a model without hidden_size_per_layer_input"
    )


def growing_positions(model: Any) -> list[tuple[Any, str]]:
    """Modules whose rotary factors grow with the longest pass so far (dynamic NTK).

    Each comes with the beginning of its buffers' names.
    """
    found = []
    for module in model.modules():
        kind = getattr(module, "rope_type", None)
        kinds = kind if isinstance(kind, dict) else {"": kind}
        for layer_type, name in kinds.items():
            if "dynamic" in str(name):
                found.append((module, f"{layer_type}_" if layer_type else ""))
    return found


def forget_lengths(growing: list[tuple[Any, str]]) -> None:
    """Growing positions begin anew; without it, a pass depends on the passes before it."""
    for module, prefix in growing:
        factors = getattr(module, f"{prefix}inv_freq")
        start = getattr(module, f"{prefix}original_inv_freq").to(factors.device)
        module.register_buffer(f"{prefix}inv_freq", start, persistent=False)
        setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)


def logits_at(model: Any, at: torch.Tensor, **inputs: Any) -> torch.Tensor:
    """Vocabulary logits (b, len(at), vocabulary) at the positions `at` of each row."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if "logits_to_keep" in inspect.signature(base.forward).parameters:
        return model(**inputs, logits_to_keep=at).logits
    return model(**inputs).logits[:, at]


def attention_mask(
    config: Any, see: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor | dict[str, torch.Tensor]:
    """The additive 4-D mask (batch, 1, q, k) of see (batch, q, k).

    rows (batch, q) and columns (batch, k) are the tokens' positions. Layers with a sliding window
    are also cut by these. A model that mixes both kinds gets one mask of each.
    """

    def additive(allowed: torch.Tensor) -> torch.Tensor:
        mask = torch.zeros(allowed.shape, dtype=dtype, device=see.device)
        return mask.masked_fill(~allowed, torch.finfo(dtype).min)[:, None]

    config = text_config(config)
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or [])
    if window is None or (kinds and "sliding_attention" not in kinds):
        return additive(see)
    near = additive(see & (rows[:, :, None] - columns[:, None, :] < window))
    return (
        {"full_attention": additive(see), "sliding_attention": near}
        if "full_attention" in kinds
        else near
    )


def cache_bytes_per_token(config: Any, dtype: torch.dtype) -> int:
    """Bytes of keys and values that one token adds to the cache, over all layers."""
    config = text_config(config)
    n_heads = getattr(config, "num_attention_heads", None) or 1  # a recurrent model has none
    heads = _largest(config, "num_key_value_heads") or n_heads
    head_dim = _largest(config, "head_dim") or config.hidden_size // n_heads
    return 2 * int(config.num_hidden_layers) * heads * head_dim * torch.finfo(dtype).bits // 8


def _largest(config: Any, name: str) -> int:
    """A whole number of a configuration, which may differ from block to block; 0 without one."""
    values = [value for key, value in config.to_dict().items() if key.endswith(name)]
    whole = [n for value in values for n in (value if isinstance(value, list) else [value])]
    own = [] if values else [getattr(config, name, None)]
    return max((n for n in (*whole, *own) if type(n) is int), default=0)


@contextmanager
def last_feed_forward_at(last_block: torch.nn.Module, at: torch.Tensor) -> Iterator[None]:
    """Within this context the last block's feed-forward part runs at the positions `at` alone.

    These are distinct flat positions. The part gives 0 elsewhere.
    """
    part: Any = getattr(last_block, "mlp", None)
    if part is None:
        yield
        return
    shape: list[torch.Size] = []

    def gather(module: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        shape.append(args[0].shape)
        return args[0].flatten(0, -2)[at.to(args[0].device)][None], *args[1:]

    def scatter(module: Any, args: Any, output: Any) -> Any:
        out = output[0] if isinstance(output, tuple) else output
        whole = out.new_zeros(shape[-1][:-1].numel(), out.shape[-1]).index_copy(
            0, at.to(out.device), out.flatten(0, -2)
        )
        whole = whole.view(*shape[-1][:-1], out.shape[-1])
        return (whole, *output[1:]) if isinstance(output, tuple) else whole

    handles = [part.register_forward_pre_hook(gather), part.register_forward_hook(scatter)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
