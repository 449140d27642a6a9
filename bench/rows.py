"""The rows on a CPU: each task in both ways, in alternating runs."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch

from analysis_lib import ChatModel, hidden_states, is_refusal, load_safety_prompts
from analysis_lib.store.store import Store

from .measure import (
    LIMIT,
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
    prompt_of,
    random_llama,
    train_in_turns,
)
from .table import Row

ROOT = Path(__file__).resolve().parents[1]

IMPORT = (
    "import sys, time; t = time.perf_counter(); {}; print(time.perf_counter() - t, "
    "int('torch' in sys.modules or 'plotly' in sys.modules))"
)


@dataclass(frozen=True)
class Size:
    """How much each row measures.

    Parameters
    ----------
    capture, batch, sampling : int
        Queries of these rows.
    sampling_plain : int
        Queries that the plain way samples; its time is scaled to `sampling`.
    samples, tokens : int
        Samples a query, and tokens a sample.
    slope_plain, slope_ours : tuple of int
        Two numbers of queries. The slope of time between them is the cost per further query.
    lengths : tuple of int
        Tokens of the safety prompts under which the slope is measured.
    repeats : mapping of str to int
        Runs by kind of row.
    """

    capture: int
    batch: int
    sampling: int
    sampling_plain: int
    samples: int
    tokens: int
    slope_plain: tuple[int, int]
    slope_ours: tuple[int, int]
    lengths: tuple[int, ...] = (0, 100, 400)
    repeats: Mapping[str, int] = field(
        default_factory=lambda: {"capture": 1, "dro": 2, "sampling": 1, "slope": 1}
    )


FULL = {
    "organism": Size(
        capture=200,
        batch=50,
        sampling=20,
        sampling_plain=20,
        samples=20,
        tokens=64,
        slope_plain=(20, 80),
        slope_ours=(50, 200),
        repeats={"capture": 7, "dro": 7, "sampling": 5, "slope": 5},
    ),
    "110M": Size(
        capture=100,
        batch=50,
        sampling=20,
        sampling_plain=3,
        samples=20,
        tokens=64,
        slope_plain=(2, 8),
        slope_ours=(20, 100),
        repeats={"capture": 3, "dro": 3, "sampling": 2, "slope": 3},
    ),
}
QUICK = {
    "organism": Size(20, 12, 6, 6, 20, 24, (2, 6), (2, 6)),
    "110M": Size(6, 6, 2, 2, 8, 8, (1, 3), (1, 3), lengths=(0, 400)),
}


# Capture


def capture_rows(chat: ChatModel, size: Size) -> Iterator[Row]:
    """Capture with and without certificate rows, and the bytes that are stored."""
    queries, prompts = anchor(size.capture), {"default": load_safety_prompts()["default"]}
    texts = queries["text"].tolist()
    work, work_flops = matrix_work(chat, 2048)
    plain_states(chat, texts[:2], prompts["default"])
    hidden_states(chat, queries.head(2), prompts)
    runs = alternate(
        {
            "plain": lambda: plain_states(chat, texts, prompts["default"]),
            "ours": lambda: hidden_states(chat, queries, prompts).states[:, 0],
            "unchecked": lambda: hidden_states(chat, queries, prompts, n_check=0).states[:, 0],
            "rate": work,
        },
        size.repeats["capture"],
    )
    states, all_bytes = runs["plain"].first
    depths = distinct_depths([plain_ids(chat, t, prompts["default"]) for t in texts])
    rate = work_flops / runs["rate"].median
    for name, detail in (("ours", "2 certificate rows"), ("unchecked", "no certificate")):
        far = relative(runs[name].first, states)
        yield Row(
            "capture",
            chat.name,
            runs["plain"].seconds,
            runs[name].seconds,
            detail=f"{len(texts)} queries, {detail}",
            difference=f"states {far:.1e}",
            equal=far <= LIMIT,
            floor=flops(chat, depths) / rate,
            peak_bytes=(runs["plain"].peak, runs[name].peak),
            extra={"gflops": rate / 1e9, "distinct_tokens": len(depths)},
        )
    yield stored_row(chat, size, all_bytes)


def stored_row(chat: ChatModel, size: Size, all_bytes: int) -> Row:
    """The bytes of a store beside those of all tokens in all layers; is it read back?"""
    queries, prompts = anchor(size.capture), {"default": load_safety_prompts()["default"]}
    with tempfile.TemporaryDirectory() as folder:
        kept = hidden_states(chat, queries, prompts, store=Store(folder)).states
        back = hidden_states(chat, queries, prompts, store=Store(folder))
        size_kept = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    same = np.array_equal(kept, back.states)
    return Row(
        "bytes stored",
        chat.name,
        [float(all_bytes)],
        [float(size_kept)],
        unit="bytes",
        detail=f"{len(queries)} queries against all tokens, all layers",
        difference="read back exactly" if same else "read back changed",
        equal=bool(same and back.certificate["found"] == len(queries)),
    )


# DRO


def dro_row(chat: ChatModel, size: Size) -> Iterator[Row]:
    """A DRO step."""
    prompt = load_safety_prompts()["default"]
    problem = DRO.of(chat, size.batch, prompt, steps=size.repeats["dro"] + 1)
    work, work_flops = matrix_work(chat, 2048)
    training = train_in_turns(problem, plain_dro(problem), work)
    runs, rate = training.runs, work_flops / training.runs["rate"].median
    far = relative(*training.gradients)
    # The second step is the first in which all parts of the loss are above 0.
    ours, plain = (losses[:2] for losses in training.losses)
    steps = float(np.abs(ours / plain - 1).max())
    rendered = chat.render(problem.queries["text"].tolist(), problem.prompt)
    depths = distinct_depths([r.ids for r in rendered])
    yield Row(
        "DRO step",
        chat.name,
        runs["plain"].seconds,
        runs["ours"].seconds,
        detail=f"batch {size.batch}",
        difference=f"gradient {far:.1e}; losses and gradient norms of 2 steps {steps:.1e}",
        equal=far <= LIMIT and steps <= LIMIT,
        floor=flops(chat, depths, backward_from=rendered[0].slot[0]) / rate,
        peak_bytes=(runs["plain"].peak, runs["ours"].peak),
        extra={"gflops": rate / 1e9, "distinct_tokens": len(depths)},
    )


# Sampling


def sampling_row(chat: ChatModel, size: Size) -> Iterator[Row]:
    """Sampling: greedy texts are compared one by one, samples by their distribution."""
    queries, prompt = anchor(size.sampling), load_safety_prompts()["default"]
    some = queries.iloc[np.linspace(0, size.sampling - 1, size.sampling_plain).round().astype(int)]
    texts = some["text"].tolist()
    greedy = (
        our_samples(chat, some, prompt, 1, size.tokens, temperature=0),
        plain_samples(chat, texts, prompt, 1, size.tokens, temperature=0),
    )
    same = sum(a == b for a, b in zip(*greedy, strict=True))
    work, work_flops = matrix_work(chat, 2048)
    ways = {**_sampling_ways(chat, size, texts, prompt), "rate": work}
    runs = alternate(ways, size.repeats["sampling"])
    rate = work_flops / runs["rate"].median
    run, computed = runs["ours"].first
    pairs = zip(run, queries["text"], strict=True)
    mine = [responses for responses, text in pairs if text in set(texts)]
    p = same_distribution(mine, runs["plain"].first)
    refused = " and ".join(f"{_refused(part):.3f}" for part in (runs["plain"].first, mine))
    scale = size.sampling / size.sampling_plain
    prompts = [plain_ids(chat, t, prompt) for t in queries["text"]]
    yield Row(
        "sampling",
        chat.name,
        [s * scale for s in runs["plain"].seconds],
        runs["ours"].seconds,
        detail=f"{size.sampling} queries x {size.samples} samples x {size.tokens} tokens",
        difference=f"greedy equal {same}/{len(texts)}; refused {refused}; "
        f"same distribution p={p:.3f}",
        equal=same == len(texts) and p > RAREST,
        floor=sampling_flops(chat, prompts, computed) / rate,
        peak_bytes=(runs["plain"].peak, runs["ours"].peak),
        extra={"gflops": rate / 1e9, "computed_tokens": computed},
        note=""
        if scale == 1
        else f"plain: {size.sampling_plain} queries timed, scaled by {scale:g}",
    )


def _sampling_ways(
    chat: ChatModel, size: Size, texts: list[str], prompt: str
) -> dict[str, Callable[[], Any]]:
    """Both ways of sampling, each run with a seed of its own; ours gives its tokens, too."""
    seed = count()
    queries = anchor(size.sampling)

    def plain() -> list[list[str]]:
        torch.manual_seed(next(seed))
        return plain_samples(chat, texts, prompt, size.samples, size.tokens)

    def ours() -> tuple[list[list[str]], int]:
        with CountedTokens(chat) as counter:
            said = our_samples(chat, queries, prompt, size.samples, size.tokens, seed=next(seed))
        return said, counter.n

    return {"plain": plain, "ours": ours}


def _refused(responses: list[list[str]]) -> float:
    return float(np.mean([is_refusal(text) for part in responses for text in part]))


# Cost of a further query


def slope_rows(chat: ChatModel, size: Size) -> Iterator[Row]:
    """The cost of a further query, under safety prompts of several lengths."""
    queries = anchor(max(size.slope_plain[1], size.slope_ours[1]))
    texts = queries["text"].tolist()
    without = None
    for asked in size.lengths:
        prompt, length = prompt_of(chat, asked)
        plain_states(chat, texts[:1], prompt)
        ways: dict[str, Callable[[], Any]] = {}
        for which in (0, 1):
            a, b = size.slope_plain[which], size.slope_ours[which]
            ways[f"plain{which}"] = partial(plain_states, chat, texts[:a], prompt)
            ways[f"ours{which}"] = partial(
                hidden_states, chat, queries.head(b), {"p": prompt}, n_check=0
            )
        runs = alternate(ways, size.repeats["slope"])
        plain = _slopes(runs, "plain", size.slope_plain)
        ours = _slopes(runs, "ours", size.slope_ours)
        both = min(size.slope_plain[1], size.slope_ours[1])
        far = relative(runs["ours1"].first.states[:both, 0], runs["plain1"].first[0][:both])
        without = without or float(np.median(ours))
        yield Row(
            "further query",
            chat.name,
            plain,
            ours,
            unit="ms",
            detail=f"safety prompt of {length} tokens",
            difference=f"states {far:.1e}",
            equal=far <= LIMIT,
            extra={"of_no_prompt": float(np.median(ours)) / without},
            note="slope between {} and {} queries; plain between {} and {}".format(
                *size.slope_ours, *size.slope_plain
            ),
        )


def _slopes(runs: Mapping[str, Run], way: str, n: tuple[int, int]) -> list[float]:
    """Milliseconds a further query, one value a round."""
    pairs = zip(runs[f"{way}0"].seconds, runs[f"{way}1"].seconds, strict=True)
    return [1e3 * (b - a) / (n[1] - n[0]) for a, b in pairs]


# Import


def import_row(repeats: int) -> Row:
    """Seconds to import the package in a fresh process.

    "plain" imports every public name, as an eager package would.
    """

    def seconds(statement: str) -> list[list[str]]:
        command = [sys.executable, "-c", IMPORT.format(statement)]
        return [
            subprocess.run(
                command, cwd=ROOT, capture_output=True, text=True, check=True
            ).stdout.split()
            for _ in range(repeats)
        ]

    ours, plain = seconds("import analysis_lib"), seconds("from analysis_lib import *")
    heavy = any(int(loaded) for _, loaded in ours)
    return Row(
        "import",
        "-",
        [float(s) for s, _ in plain],
        [float(s) for s, _ in ours],
        detail="fresh process; plain = every public name",
        difference="torch or plotly loaded" if heavy else "neither torch nor plotly loaded",
        equal=not heavy,
    )


ROWS: dict[str, Callable[[ChatModel, Size], Iterator[Row]]] = {
    "capture": capture_rows,
    "dro": dro_row,
    "sampling": sampling_row,
    "slope": slope_rows,
}


def cpu_rows(
    organism: ChatModel, sizes: Mapping[str, Size], only: str | None, repeats: int
) -> Iterator[Row]:
    """All rows on a CPU.

    Parameters
    ----------
    organism : ChatModel
        The embedded model.
    sizes : mapping of str to Size
        How much to measure, by model: `FULL` or `QUICK`.
    only : str or None
        One kind of row: "import" or a name of `ROWS`.
    repeats : int
        Runs of the import.

    Yields
    ------
    Row
        As soon as it is measured.
    """
    if only in (None, "import"):
        yield import_row(repeats)
    for name, size in sizes.items():
        if only == "import":
            return
        if name == "organism":
            chat = organism
            chat.name = name
        else:
            chat = random_llama(name, organism)
        for row in [ROWS[only]] if only else ROWS.values():
            yield from row(chat, size)
