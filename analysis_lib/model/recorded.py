"""The states inside a forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .errors import ChatModelError
from .forward import Forward


class Recorded:
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

    def _keep(self, i: int, states: torch.Tensor) -> None:
        if states.dim() != 3:
            raise ChatModelError(
                f"the blocks of {self.forward.name!r} carry several streams of states, so layer "
                f"{i} is not one state a token; read layers=(-1,)"
            )
        self.seen[i] = states

    def _keep_input(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._keep(0, args[0] if args else kwargs["hidden_states"])

    def _keep_output(self, i: int) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            self._keep(i, output[0] if isinstance(output, tuple) else output)

        return hook

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()
