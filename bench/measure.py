"""Measuring: times and peak memory of alternating runs, operations, equality of results."""

from __future__ import annotations

import ctypes
import gc
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from analysis_lib import ChatModel

LIMIT = 1e-3
"""Largest accepted difference of float32 results, relative to the root mean square of the plain."""

RAREST = 0.001
"""p-value of the permutation test at or below which two samples count as different."""


# Time and memory


@dataclass
class Run:
    """The runs of one way: a stopwatch that also reads the peak memory of the first run.

    Parameters
    ----------
    device : torch.device or str
        Where the way computes. On a GPU the clock waits for it, and the memory is the GPU's.

    Attributes
    ----------
    seconds : list of float
        One value for each run.
    peak : int or None
        Bytes at the high-water mark of the first run, above what was held before it. None where the
        system keeps no such mark.
    first : object
        What the first run returned.
    """

    device: torch.device | str = "cpu"
    seconds: list[float] = field(default_factory=list)
    peak: int | None = None
    first: Any = None
    _held: int | None = field(default=None, init=False, repr=False)
    _begin: float = field(default=0.0, init=False, repr=False)

    @property
    def cuda(self) -> bool:
        return torch.device(self.device).type == "cuda"

    @property
    def median(self) -> float:
        """Median of the seconds."""
        return float(np.median(self.seconds))

    def start(self) -> None:
        """Start the clock, and before the first run a new high-water mark of memory."""
        gc.collect()
        self._held = None if self.seconds else _reset_peak(self.cuda)
        self._begin = time.perf_counter()

    def stop(self) -> None:
        """Stop the clock and keep what it shows."""
        if self.cuda:
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self._begin)
        if self._held is not None and (peak := _peak(self.cuda)) is not None:
            self.peak = max(0, peak - self._held)

    def time(self, way: Callable[[], Any]) -> Any:
        """Run `way` under the clock and return its result."""
        self.start()
        result = way()
        self.stop()
        return result


def alternate(
    ways: Mapping[str, Callable[[], Any]], repeats: int, device: torch.device | str = "cpu"
) -> dict[str, Run]:
    """Run the ways in turn, so that a busy moment of the machine hits each of them.

    Parameters
    ----------
    ways : mapping of str to callable
        The functions to time, by name.
    repeats : int
        Rounds; each round runs every way once.
    device : torch.device or str
        Where they compute.

    Returns
    -------
    dict of str to Run
        By the names of `ways`.

    Examples
    --------
    >>> runs = alternate({"one": lambda: 1, "two": lambda: 2}, 3)
    >>> runs["two"].first, len(runs["two"].seconds)
    (2, 3)
    """
    runs = {name: Run(device) for name in ways}
    for number in range(repeats):
        for name, way in ways.items():
            result = runs[name].time(way)
            if number == 0:
                runs[name].first = result
            del result
    return runs


def _reset_peak(cuda: bool) -> int | None:
    """Start a new high-water mark; the bytes held now, or None where the system keeps no mark."""
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return None
    return _status("VmRSS")


def _peak(cuda: bool) -> int | None:
    return torch.cuda.max_memory_allocated() if cuda else _status("VmHWM")


def _status(name: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next(
        (int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None
    )


# Operations


def matrix_work(chat: ChatModel, m: int) -> tuple[Callable[[], None], float]:
    """The matrix products of one block on m tokens: what the matrix rate is measured with.

    Parameters
    ----------
    chat : ChatModel
        The model whose first block is taken.
    m : int
        Tokens.

    Returns
    -------
    work : callable
        Computes the products once.
    flops : float
        The floating-point operations of one call.
    """
    layers = [x for x in chat.forward.blocks[0].modules() if isinstance(x, torch.nn.Linear)]
    inputs = {
        x.in_features: torch.randn(m, x.in_features, device=chat.device).to(chat.dtype)
        for x in layers
    }

    @torch.no_grad()
    def work() -> None:
        for x in layers:
            torch.nn.functional.linear(inputs[x.in_features], x.weight)

    work()
    return work, 2.0 * m * sum(x.weight.numel() for x in layers)


def distinct_depths(rows: Sequence[Sequence[int]]) -> np.ndarray:
    """Depth of each distinct token of the rows' prefix tree.

    A token is distinct when it differs from the other row's, or anything before it does.

    Parameters
    ----------
    rows : sequence of sequences of int
        Token ids.

    Returns
    -------
    ndarray of int
        One depth, from 0, for each distinct token.

    Examples
    --------
    >>> distinct_depths([[5, 6, 7], [5, 6, 8]]).tolist()
    [0, 1, 2, 2]
    """
    depths: list[int] = []
    before: Sequence[int] = ()
    for row in sorted(map(tuple, rows)):
        same = next(
            (i for i, (a, b) in enumerate(zip(before, row, strict=False)) if a != b),
            min(len(before), len(row)),
        )
        depths.extend(range(same, len(row)))
        before = row
    return np.array(depths)


def flops(chat: ChatModel, depths: np.ndarray, *, backward_from: int | None = None) -> float:
    """Floating-point operations of the blocks.

    Parameters
    ----------
    chat : ChatModel
        The model.
    depths : ndarray of int
        Depth of each token that is computed.
    backward_from : int or None
        Count the gradient to the inputs from this depth on, too. The weights are frozen.

    Returns
    -------
    float
        Operations; a multiplication with its addition counts as two.
    """
    linear = _linear_flops(chat)
    attention = 4 * chat.n_layers * chat.forward.blocks[0].self_attn.q_proj.out_features
    total = linear * len(depths) + attention * float((depths + 1).sum())
    if backward_from is not None:
        late = depths[depths >= backward_from]
        total += linear * len(late) + 2 * attention * float((late + 1).sum())
    return total


def sampling_flops(chat: ChatModel, prompts: Sequence[Sequence[int]], computed: int) -> float:
    """Floating-point operations of a sampling run in blocks and head, attention left out.

    Parameters
    ----------
    chat : ChatModel
        The model.
    prompts : sequence of sequences of int
        The rendered chats; only their last tokens need the head.
    computed : int
        Tokens that went through the decoder.

    Returns
    -------
    float
        Operations.
    """
    headed = computed - len(distinct_depths(prompts)) + len(prompts)
    head = 2 * chat.hidden_size * chat.n_embeddings
    return float(_linear_flops(chat) * computed + head * headed)


def _linear_flops(chat: ChatModel) -> int:
    """Operations of all matrix products of the blocks for one token."""
    return sum(
        2 * x.weight.numel()
        for x in chat.forward.blocks.modules()
        if isinstance(x, torch.nn.Linear)
    )


class CountedTokens:
    """Within this context, `.n` counts the tokens that go through the decoder.

    Parameters
    ----------
    chat : ChatModel
        The model to watch.
    """

    def __init__(self, chat: ChatModel):
        self.body, self.n = chat.forward.body, 0

    def __enter__(self) -> CountedTokens:
        self.handle = self.body.register_forward_pre_hook(self._count, with_kwargs=True)
        return self

    def _count(self, module: Any, args: tuple, kwargs: dict) -> None:
        ids = kwargs.get("input_ids")
        self.n += (args[0] if ids is None else ids).numel()

    def __exit__(self, *error: object) -> None:
        self.handle.remove()


# Equality


def relative(a: Any, b: Any) -> float:
    """Largest absolute difference, relative to the root mean square of b.

    Parameters
    ----------
    a, b : ndarray or torch.Tensor
        Results of one shape.

    Returns
    -------
    float
        0 where they are equal.

    Examples
    --------
    >>> relative(np.array([1.0, 2.0]), np.array([1.0, 1.0]))
    1.0
    """
    a, b = (
        torch.tensor(x) if isinstance(x, np.ndarray) else x.detach().float().cpu() for x in (a, b)
    )
    return float((a - b).abs().max() / b.pow(2).mean().sqrt().clamp(min=1e-12))


def same_distribution(
    a: Sequence[Sequence[str]], b: Sequence[Sequence[str]], *, permutations: int = 999
) -> float:
    """Test whether a[q] and b[q] come from one distribution for each query q.

    The statistic is a kernel two-sample one. It compares what share of their leading characters two
    responses have in common, within a and within b against across. Labels are permuted within a
    query. 20 queries of 20 samples tell top-p 0.6 from 0.9, not 0.8.

    Parameters
    ----------
    a, b : sequence of sequences of str
        Responses by query.
    permutations : int
        Random relabellings.

    Returns
    -------
    float
        The p-value, at least 1 / (permutations + 1).

    References
    ----------
    Gretton et al., "A Kernel Two-Sample Test", JMLR 13 (2012), 723-773.

    Examples
    --------
    >>> same_distribution([["x", "x"]], [["x", "x"]])
    1.0
    """

    def alike(x: str, y: str) -> float:
        return len(os.path.commonprefix([x, y])) / max(1, len(x), len(y))

    rng = np.random.default_rng(0)
    total = np.zeros(permutations + 1)
    for left, right in zip(a, b, strict=True):
        texts = [*left, *right]
        kernel = np.array([[alike(x, y) for y in texts] for x in texts])
        np.fill_diagonal(kernel, 0)
        sign = np.array([1 / len(left)] * len(left) + [-1 / len(right)] * len(right))
        signs = np.stack([sign, *(rng.permutation(sign) for _ in range(permutations))])
        total += ((signs @ kernel) * signs).sum(axis=1)
    return float((total >= total[0] - 1e-9).mean())
