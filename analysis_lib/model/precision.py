"""How far rounding alone moves a model's numbers, and how to ask a model without it.

In half precision two right ways to the same state differ by much, and by how much depends on the
model. So no constant tells a right way from a wrong one: the model is asked in float32, and a
difference is measured against the model's own rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from .errors import ChatModelError
from .forward import Forward

# Largest accepted difference from the plain pass, relative to the numbers' own root mean square.
# Norms and rotary factors work in float32 even in a model of float64.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3}
# In half precision: this many times the move of a plain pass whose blocks round once more.
TIMES_ROUNDING = 4.0
HALF = (torch.float16, torch.bfloat16)


def relative_difference(a: torch.Tensor, b: torch.Tensor, *, least: float = 1e-12) -> float:
    """Largest absolute difference relative to the root mean square of b, or to `least`."""
    a, b = a.float(), b.float()
    return float((a - b).abs().max() / b.pow(2).mean().sqrt().clamp(min=least))


def accepted_difference(
    forward: Forward, plain: Callable[[], torch.Tensor], *, least: float = 1e-12
) -> float:
    """The relative difference that rounding explains, of numbers which `plain` computes plainly.

    A constant in float32 and float64. In half precision `plain` runs twice, the second time with
    one more rounding error at each block's output.
    """
    if forward.dtype not in HALF:
        return TOLERANCE.get(forward.dtype, 1e-3)
    before = plain()
    with rounding_once_more(forward):
        moved = relative_difference(plain(), before, least=least)
    return TIMES_ROUNDING * max(moved, torch.finfo(forward.dtype).eps)


@contextmanager
def rounding_once_more(forward: Forward) -> Iterator[None]:
    """Within this context, the embedding and every block give numbers off by one rounding error.

    The errors' signs are fixed: equal calls give equal numbers.
    """
    eps = torch.finfo(forward.dtype).eps

    def shake(module: Any, args: Any, output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        generator = torch.Generator().manual_seed(first.shape[-1])
        signs = torch.randint(0, 2, first.shape, generator=generator).to(first.device) * 2 - 1
        shaken = (first.float() * (1 + eps * signs)).to(first.dtype)
        return (shaken, *output[1:]) if isinstance(output, tuple) else shaken

    with ExitStack() as stack:
        for module in (forward.model.get_input_embeddings(), *_blocks(forward)):
            stack.callback(module.register_forward_hook(shake).remove)
        yield


def _blocks(forward: Forward) -> list[torch.nn.Module]:
    """The decoder's blocks; none where it has no list of them."""
    try:
        return list(forward.blocks)
    except ChatModelError:
        return []


def can_widen(forward: Forward) -> bool:
    """Whether `in_float32` works: not for quantized weights, nor for those that lie elsewhere."""
    return forward.trains and not any(p.is_meta for p in forward.model.parameters())


@contextmanager
def in_float32(forward: Forward) -> Iterator[None]:
    """Within this context a model of half precision computes in float32.

    Blocks and vocabulary head are widened while they run, so that one of them at a time takes
    twice its memory. The weights come back as they were: no bit of them changes.
    """
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []

    def widen(tensors: Iterator[torch.Tensor]) -> None:
        for tensor in tensors:
            if tensor.dtype in HALF:
                kept.append((tensor, tensor.data))
                tensor.data = tensor.data.float()

    def narrow(down_to: int = 0) -> None:
        while len(kept) > down_to:
            tensor, data = kept.pop()
            tensor.data = data

    def widened(module: torch.nn.Module) -> None:
        marks: list[int] = []

        def before(module: Any, args: Any) -> None:
            marks.append(len(kept))
            widen(tensors_of(module))

        def after(module: Any, args: Any, output: Any) -> None:
            narrow(marks.pop())

        stack.callback(module.register_forward_pre_hook(before).remove)
        stack.callback(module.register_forward_hook(after).remove)

    def wide_output(module: Any, args: Any, output: Any) -> Any:
        return output.float() if output.dtype in HALF else output

    dtype = forward.dtype
    apart = [*_blocks(forward), forward.model.get_output_embeddings()]
    with ExitStack() as stack:
        stack.callback(setattr, forward, "dtype", dtype)
        stack.callback(narrow)
        inside = {id(part) for block in apart if block is not None for part in block.modules()}
        for module in forward.model.modules():
            if isinstance(module, torch.nn.Embedding):
                stack.callback(module.register_forward_hook(wide_output).remove)
            elif id(module) not in inside:
                widen(own_tensors_of(module))
        for block in apart:
            if block is not None:
                widened(block)
        forward.dtype = torch.float32
        yield


def tensors_of(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    """Parameters and buffers of a module and of what it holds."""
    yield from module.parameters()
    yield from module.buffers()


def own_tensors_of(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    """Parameters and buffers of a module itself."""
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)
