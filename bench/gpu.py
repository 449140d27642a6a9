"""The rows on a GPU: absolute figures of a random shape in bfloat16."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from analysis_lib import ChatModel, hidden_states, load_safety_prompts
from analysis_lib.model.precision import accepted_difference

from .measure import (
    RAREST,
    CountedTokens,
    Run,
    alternate,
    distinct_depths,
    flops,
    matrix_work,
    relative,
    same_distribution,
    sampling_flops,
)
from .plain import (
    DRO,
    anchor,
    our_samples,
    plain_dro,
    plain_ids,
    plain_samples,
    plain_states,
    random_llama,
    train_in_turns,
)
from .table import Row

LIMIT = 0.25  # of a gradient of few rows; the norms of two right ones in bfloat16 differ by less


@dataclass(frozen=True)
class GpuSize:
    """How much the rows of a shape measure; `matrix` is the tokens of the matrix products."""

    queries: int
    samples: int
    tokens: int
    rounds: int
    matrix: int

    def details(self) -> dict[str, str]:
        """What each row measures, in words."""
        return {
            "GPU capture": f"{self.queries} queries x 4 prompts, 2 certificate rows",
            "GPU DRO step": f"batch {self.queries // 2}",
            "GPU sampling": f"{self.queries} queries x {self.samples} samples "
            f"x {self.tokens} tokens",
        }


GPU_SIZES = {"7b": GpuSize(100, 20, 64, 3, 8192), "tiny": GpuSize(12, 4, 8, 2, 256)}


@dataclass(frozen=True)
class Setting:
    """What all rows share: model, size, queries, and the matrix products with their operations."""

    chat: ChatModel
    size: GpuSize
    device: str
    queries: pd.DataFrame
    work: Callable[[], None]
    work_flops: float

    @property
    def texts(self) -> list[str]:
        return self.queries["text"].tolist()

    def row(
        self,
        what: str,
        runs: Mapping[str, Run],
        tokens: int,
        total: float,
        difference: str,
        equal: bool,
    ) -> Row:
        """A row of `tokens` tokens and `total` operations a run."""
        ours, rate = runs["ours"], self.work_flops / runs["rate"].median
        extra = {
            "tokens_per_s": tokens / ours.median,
            "matrix_share": total / rate / ours.median,
            "tflops": rate / 1e12,
        }
        return Row(
            what,
            self.chat.name,
            [],
            ours.seconds,
            detail=self.size.details()[what],
            difference=difference,
            equal=equal,
            floor=total / rate,
            peak_bytes=(None, ours.peak),
            extra=extra,
        )


def gpu_rows(like: ChatModel, shape: str, device: str) -> Iterator[Row]:
    """Absolute figures of a shape in bfloat16.

    Parameters
    ----------
    like : ChatModel
        Whose tokenizer and template the random model gets.
    shape : str
        "7b" or "tiny".
    device : str
        Where it runs, such as "cuda".

    Yields
    ------
    Row
        One a task; empty where the device is missing.
    """
    size, name = GPU_SIZES[shape], f"{shape} bfloat16"
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        for what, detail in size.details().items():
            yield Row(what, name, [], [], detail=detail, note="no GPU at hand")
        return
    chat = random_llama(shape, like, device=device, dtype=torch.bfloat16)
    chat.name = name
    setting = Setting(chat, size, device, anchor(size.queries), *matrix_work(chat, size.matrix))
    yield capture_row(setting)
    yield dro_row(setting)
    yield sampling_row(setting)


def capture_row(on: Setting) -> Row:
    """Capture under the four safety prompts; four rows are compared with the plain way."""
    chat, prompts = on.chat, load_safety_prompts()
    hidden_states(chat, on.queries.head(2), prompts)
    ways = {"ours": lambda: hidden_states(chat, on.queries, prompts), "rate": on.work}
    runs = alternate(ways, on.size.rounds, on.device)
    rows = [r.ids for p in prompts.values() for r in chat.render(on.texts, p)]

    def plain() -> torch.Tensor:
        return plain_states(chat, on.texts[:4], prompts["default"])[0]

    far = relative(runs["ours"].first.at(prompt="default")[0][:4], plain())
    limit = accepted_difference(chat.forward, plain)
    total = flops(chat, distinct_depths(rows))
    tokens = sum(map(len, rows))
    told = f"states of 4 rows {far:.1e} (limit {limit:.1e})"
    return on.row("GPU capture", runs, tokens, total, told, far <= limit)


def dro_row(on: Setting) -> Row:
    """DRO steps; the first gradient of six queries is compared with the plain way."""
    chat, prompt = on.chat, load_safety_prompts()["default"]
    # One harmless query: at the start the two classes' gradients nearly cancel, and bfloat16 would
    # leave their rounding.
    few = DRO.of(chat, 6, prompt, steps=2, n_harmless=1)
    ours, plain = train_in_turns(few, plain_dro(few), on.work).gradients
    far = float((ours - plain).norm() / plain.norm())
    problem = DRO.of(chat, on.size.queries // 2, prompt, steps=2 * on.size.rounds + 1)
    runs = train_in_turns(problem, lambda: (np.nan, np.nan), on.work).runs
    rendered = chat.render(problem.queries["text"].tolist(), problem.prompt)
    depths = distinct_depths([r.ids for r in rendered])
    total = flops(chat, depths, backward_from=rendered[0].slot[0])
    tokens = sum(len(r.ids) for r in rendered)
    told = f"gradient of 6 rows {far:.1e} (norm)"
    return on.row("GPU DRO step", runs, tokens, total, told, far <= LIMIT)


def sampling_row(on: Setting) -> Row:
    """Sampling; the samples of four queries are compared with the plain way."""
    chat, size, prompt = on.chat, on.size, load_safety_prompts()["default"]
    our_samples(chat, on.queries.head(2), prompt, 2, 4)

    def ours() -> tuple[list[list[str]], int]:
        with CountedTokens(chat) as counter:
            said = our_samples(chat, on.queries, prompt, size.samples, size.tokens)
        return said, counter.n

    runs = alternate({"ours": ours, "rate": on.work}, 2, on.device)
    responses, computed = runs["ours"].first
    torch.manual_seed(0)
    plain = plain_samples(chat, on.texts[:4], prompt, size.samples, size.tokens)
    p = same_distribution(responses[:4], plain)
    total = sampling_flops(chat, [plain_ids(chat, t, prompt) for t in on.texts], computed)
    tokens = size.queries * size.samples * size.tokens
    told = f"same distribution p={p:.3f} (4 queries)"
    return on.row("GPU sampling", runs, tokens, total, told, p > RAREST)
