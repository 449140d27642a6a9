"""Speed and memory against the plain way, in one process, in alternating runs; how to read it: results/README.md.

    python bench/bench.py [--only ROW] [--organism FOLDER] [--out FILE.json]     about 8 minutes on two cores
    python bench/bench.py --quick                       2 minutes: are the results equal? Times are not judged
    python bench/bench.py --gpu [--gpu-shape 7b|tiny] [--device cuda|cpu]        absolute figures of a 7B shape in bfloat16

The plain way is written here from the definition: whole rows through the causal language model, nothing shared.
Exit status 1 where a result differs from the plain one; a missed speed goal is shown and is no failure.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import transformers
from torch.optim.optimizer import register_optimizer_step_pre_hook

from analysis_lib import (
    AnchorSpace,
    ChatModel,
    Direction,
    DROConfig,
    hidden_states,
    is_refusal,
    load_queries,
    load_safety_prompts,
    sample_responses,
    train_dro,
)
from analysis_lib.model.passes import TOLERANCE
from analysis_lib.model.soft_prompt import embed_text
from analysis_lib.store.store import Store

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 1e-3  # largest accepted difference of float32 results, relative to the root mean square of the plain ones


@dataclass(frozen=True)
class Size:
    """How much each row measures. A pair of counts: the slope of time between them is the cost per further query."""

    capture: int
    batch: int
    sampling: int
    sampling_plain: int  # queries the plain way samples; its time is scaled to `sampling`
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
        200,
        50,
        20,
        20,
        20,
        64,
        (20, 80),
        (50, 200),
        repeats={"capture": 7, "dro": 7, "sampling": 5, "slope": 5},
    ),
    "110M": Size(
        100,
        50,
        20,
        3,
        20,
        64,
        (2, 8),
        (20, 100),
        repeats={"capture": 3, "dro": 3, "sampling": 2, "slope": 3},
    ),
}
QUICK = {
    "organism": Size(20, 12, 6, 6, 20, 24, (2, 6), (2, 6)),
    "110M": Size(6, 6, 2, 2, 8, 8, (1, 3), (1, 3), lengths=(0, 400)),
}
GOALS: dict[tuple[str, str], dict[str, float]] = {
    ("capture", "organism"): {"ratio": 12},
    ("capture", "110M"): {"ratio": 9, "floor": 1.3},
    ("DRO step", "organism"): {"ratio": 6},
    ("DRO step", "110M"): {"ratio": 9},
    ("sampling", "organism"): {"ratio": 12},
    ("sampling", "110M"): {"ratio": 3},
    ("bytes stored", "organism"): {"ratio": 500},
    ("bytes stored", "110M"): {"ratio": 500},
    ("import", "-"): {"seconds": 0.3},
}
RAREST = 0.001  # p-value of the permutation test at or below which two samples count as different
SHAPES = {  # hidden size, layers, heads, feed-forward size, vocabulary, tied embeddings
    "110M": (768, 12, 12, 2048, 32_000, True),
    "7b": (4096, 32, 32, 11_008, 32_000, False),
    "tiny": (64, 2, 4, 128, 2048, False),
}


@dataclass
class Row:
    """One measured line. plain, ours: one value a run, in `unit`; equal: the results agree (None: nothing to compare)."""

    what: str
    model: str
    plain: list[float]
    ours: list[float]
    unit: str = "s"
    detail: str = ""
    difference: str = ""
    equal: bool | None = None
    floor: float | None = (
        None  # seconds: FLOPs of the distinct tokens at the matrix rate of the same rounds
    )
    peak_bytes: tuple[int | None, int | None] = (
        None,
        None,
    )  # plain, ours; above the memory held before the phase
    extra: dict[str, float] = field(default_factory=dict)
    note: str = ""

    @property
    def ratio(self) -> float | None:
        return (
            float(np.median(self.plain) / np.median(self.ours))
            if self.plain and self.ours
            else None
        )

    @property
    def of_floor(self) -> float | None:
        return float(np.median(self.ours) / self.floor) if self.ours and self.floor else None

    def goals(self) -> dict[str, tuple[float, bool]]:
        """Each goal with whether it is met; empty where nothing was measured."""
        found = GOALS.get((self.what, self.model), {}) if self.ours else {}
        reached = {
            "ratio": self.ratio or 0.0,
            "floor": -(self.of_floor or np.inf),
            "seconds": -float(np.median(self.ours or [np.inf])),
        }
        return {
            kind: (goal, reached[kind] >= (goal if kind == "ratio" else -goal))
            for kind, goal in found.items()
        }


# Models and inputs


def random_llama(
    shape: str, like: ChatModel, *, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> ChatModel:
    """A randomly initialised Llama with the tokenizer and template of `like`; every id decodes to a text of its own, none stops."""
    hidden, layers, heads, inner, vocabulary, tied = SHAPES[shape]
    tokenizer = copy.deepcopy(like.tokenizer)
    tokenizer.add_tokens([f"<{i}>" for i in range(len(tokenizer), vocabulary)])
    tokenizer.eos_token = None
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=inner,
        max_position_embeddings=1024,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    return ChatModel.wrap(model, tokenizer, name=shape)


def anchor(n: int, n_harmless: int | None = None) -> pd.DataFrame:
    """n anchor queries, harmful ones first; half of them harmless where no number is given."""
    queries, n_harmless = load_queries("anchor"), n // 2 if n_harmless is None else n_harmless
    parts = (
        queries[queries["harmful"]].head(n - n_harmless),
        queries[~queries["harmful"]].head(n_harmless),
    )
    return pd.concat(parts, ignore_index=True)


def prompt_of(chat: ChatModel, n_tokens: int) -> tuple[str, int]:
    """A safety prompt of at most n_tokens tokens, the default one's words repeated and cut, and its number of tokens."""
    words = (load_safety_prompts()["default"] + " ").split() * 10
    length = 0
    text = ""
    for stop in range(1, len(words) + 1) if n_tokens else ():
        start, end = chat.render(["x"], " ".join(words[:stop]))[0].slot
        if end - start > n_tokens:
            break
        text, length = " ".join(words[:stop]), end - start
    return text, length


# The plain way


def plain_ids(chat: ChatModel, text: str, prompt: str) -> list[int]:
    messages = ([{"role": "system", "content": prompt}] if prompt else []) + [
        {"role": "user", "content": text}
    ]
    return list(
        chat.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=False
        )
    )


@torch.no_grad()
def plain_states(chat: ChatModel, texts: Sequence[str], prompt: str) -> tuple[torch.Tensor, int]:
    """Last-token states (n, d) after the final norm, one row at a time; and the bytes of all tokens in all layers."""
    states, size = [], 0
    for text in texts:
        ids = torch.tensor([plain_ids(chat, text, prompt)], device=chat.device)
        out = chat.model(input_ids=ids, output_hidden_states=True, use_cache=False)
        states.append(out.hidden_states[-1][0, -1].float())
        size += sum(h.numel() * h.element_size() for h in out.hidden_states)
    return torch.stack(states), size


@dataclass
class DRO:
    """One DRO problem for both ways: the whole batch is one step. Its weights let no part of the loss hide behind another."""

    chat: ChatModel
    queries: pd.DataFrame
    prompt: str
    space: AnchorSpace
    directions: tuple[Direction, Direction]
    config: DROConfig

    @classmethod
    def of(
        cls, chat: ChatModel, n: int, prompt: str, steps: int, n_harmless: int | None = None
    ) -> DRO:
        queries = anchor(n, n_harmless)
        states = hidden_states(chat, queries, {"prompt": prompt}, n_check=0).states[:, 0]
        space = AnchorSpace.fit(states)
        scale = 1 / space.transform(states).std(axis=0)
        refusal = Direction("refusal", scale * np.array([1, 0.5, 0, 0]), 0.0)
        harmfulness = Direction("harmfulness", scale * np.array([0.5, -1, 0, 0]), 0.0)
        config = DROConfig(epochs=steps, batch_size=n, weight_harmfulness=1.0, weight_norm=100.0)
        return cls(chat, queries, prompt, space, (refusal, harmfulness), config)


def plain_dro(problem: DRO) -> Callable[[], tuple[float, float]]:
    """A function that takes one step on the padded batch through the whole model; it returns loss and gradient norm."""
    chat, config, k = problem.chat, problem.config, problem.space.k

    def tensor(values: Any) -> torch.Tensor:
        return torch.tensor(np.asarray(values, dtype=np.float32), device=chat.device)

    rows = chat.render(problem.queries["text"].tolist(), problem.prompt)
    harmful, basis = tensor(problem.queries["harmful"].astype(float)), tensor(problem.space.basis)
    directions = [tensor(d.weight) for d in problem.directions]
    lengths = torch.tensor([len(row.ids) for row in rows], device=chat.device)
    mask = (torch.arange(int(lengths.max()), device=chat.device) < lengths[:, None]).long()
    table = chat.model.get_input_embeddings()
    soft = torch.nn.Parameter(tensor(embed_text(chat, problem.prompt)))
    optimizer = torch.optim.AdamW([soft], lr=config.learning_rate)

    def states() -> torch.Tensor:
        embedded = []
        for row in rows:
            e = table(torch.tensor(row.ids, device=chat.device))
            embedded.append(torch.cat([e[: row.slot[0]], soft.to(e.dtype), e[row.slot[1] :]]))
        padded = torch.nn.utils.rnn.pad_sequence(embedded, batch_first=True)
        out = chat.model(
            inputs_embeds=padded, attention_mask=mask, output_hidden_states=True, use_cache=False
        )
        return out.hidden_states[-1][
            torch.arange(len(rows), device=chat.device), lengths - 1
        ].float()

    with torch.no_grad():
        base = states()

    def step() -> tuple[float, float]:
        optimizer.zero_grad()
        change = (states() - base) @ basis
        loss = config.weight_norm * change[:, k:].pow(2).mean()
        for direction, weight in zip(
            directions, (config.weight_refusal, config.weight_harmfulness), strict=True
        ):
            logit = change[:, :k] @ direction
            loss = loss + weight * (torch.nn.functional.softplus(logit) - harmful * logit).mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_([soft], config.max_grad_norm)
        optimizer.step()
        return loss.item(), float(norm)

    return step


@dataclass
class Training:
    """A run of `train_dro` with the plain steps beside it.

    runs       seconds of "plain", "ours" and "rate"
    gradients  clipped gradients (length, d) of the first step: ours, plain
    losses     loss and gradient norm of each step: ours (steps, 2), plain (steps - 1, 2)
    """

    runs: dict[str, Run]
    gradients: tuple[torch.Tensor, torch.Tensor]
    losses: tuple[np.ndarray, np.ndarray]


def train_in_turns(
    problem: DRO, plain: Callable[[], tuple[float, float]], work: Callable[[], None]
) -> Training:
    """Trains as `train_dro` does; after each of its steps but the last a plain step and the matrix products run. Its first step, with
    all that comes before it, is not timed."""
    runs = {name: Run(problem.chat.device) for name in ("plain", "ours", "rate")}
    gradients: list[torch.Tensor] = []
    ours: list[tuple[float, float]] = []
    theirs: list[tuple[float, float]] = []

    def keep_gradient(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if len(gradients) < 2:
            gradients.append(optimizer.param_groups[0]["params"][0].grad.detach().clone())

    def on_step(losses: Mapping[str, float], embeddings: np.ndarray) -> None:
        if ours:
            runs["ours"].stop()
        ours.append((losses["loss"], losses["gradient_norm"]))
        if len(ours) == problem.config.epochs:
            return
        theirs.append(runs["plain"].time(plain))
        runs["rate"].time(work)
        runs["ours"].start()

    hook = register_optimizer_step_pre_hook(keep_gradient)
    try:
        train_dro(
            problem.chat,
            problem.queries,
            problem.prompt,
            problem.space,
            *problem.directions,
            problem.config,
            on_step=on_step,
        )
    finally:
        hook.remove()
    return Training(runs, (gradients[0], gradients[1]), (np.array(ours), np.array(theirs)))


@torch.no_grad()
def plain_samples(
    chat: ChatModel,
    texts: Sequence[str],
    prompt: str,
    n: int,
    max_new: int,
    *,
    temperature: float = 1.0,
) -> list[list[str]]:
    """n responses to each query by `generate`, one query at a time; temperature 0 is greedy."""
    how = (
        {"do_sample": True, "temperature": temperature, "top_k": 50, "top_p": 0.9}
        if temperature
        else {"do_sample": False}
    )
    out = []
    for text in texts:
        ids = torch.tensor([plain_ids(chat, text, prompt)], device=chat.device)
        new = chat.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            num_return_sequences=n,
            max_new_tokens=max_new,
            pad_token_id=chat.tokenizer.pad_token_id,
            **how,
        )
        out.append(
            [
                t.strip()
                for t in chat.tokenizer.batch_decode(
                    new[:, ids.shape[1] :], skip_special_tokens=True
                )
            ]
        )
    return out


def our_samples(
    chat: ChatModel,
    queries: pd.DataFrame,
    prompt: str,
    n: int,
    max_new: int,
    *,
    temperature: float = 1.0,
    seed: int = 0,
) -> list[list[str]]:
    table = sample_responses(
        chat,
        queries,
        {"p": prompt},
        n_samples=n,
        max_new_tokens=max_new,
        temperature=temperature,
        seed=seed,
    )
    return [group["response"].tolist() for _, group in table.groupby("query_id", sort=False)]


# Measuring


@dataclass
class Run:
    """Times of one way. Peak memory is that of the first run, above what was held before it."""

    device: torch.device | str = "cpu"
    seconds: list[float] = field(default_factory=list)
    peak: int | None = None
    first: Any = None  # what the first run returned

    @property
    def cuda(self) -> bool:
        return torch.device(self.device).type == "cuda"

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))

    def start(self) -> None:
        gc.collect()
        self._held = None if self.seconds else _reset_peak(self.cuda)
        self._begin = time.perf_counter()

    def stop(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self._begin)
        if self._held is not None and (peak := _peak(self.cuda)) is not None:
            self.peak = max(0, peak - self._held)

    def time(self, way: Callable[[], Any]) -> Any:
        self.start()
        result = way()
        self.stop()
        return result


def alternate(
    ways: Mapping[str, Callable[[], Any]], repeats: int, device: torch.device | str = "cpu"
) -> dict[str, Run]:
    """Runs the ways in turn, `repeats` rounds."""
    runs = {name: Run(device) for name in ways}
    for number in range(repeats):
        for name, way in ways.items():
            result = runs[name].time(way)
            if number == 0:
                runs[name].first = result
            del result
    return runs


def _reset_peak(cuda: bool) -> int | None:
    """Starts a new high-water mark; the bytes held now, or None where the system keeps no such mark."""
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


def matrix_work(chat: ChatModel, m: int) -> tuple[Callable[[], None], float]:
    """The matrix products of one block on m tokens, and their FLOPs: what the matrix rate is measured with."""
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
    """Depth of each distinct token of the rows' prefix tree: a token is distinct when what is before it, or itself, is."""
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
    """FLOPs of the blocks for tokens at these depths; with backward_from, of the gradient to the inputs from that depth on too."""
    linear = sum(
        2 * x.weight.numel()
        for x in chat.forward.blocks.modules()
        if isinstance(x, torch.nn.Linear)
    )
    attention = 4 * chat.n_layers * chat.forward.blocks[0].self_attn.q_proj.out_features
    total = linear * len(depths) + attention * float((depths + 1).sum())
    if backward_from is not None:
        late = depths[depths >= backward_from]
        total += linear * len(late) + 2 * attention * float((late + 1).sum())
    return total


class counted_tokens:
    """Within this context, `.n` counts the tokens that go through the decoder."""

    def __init__(self, chat: ChatModel):
        self.body, self.n = chat.forward.body, 0

    def __enter__(self) -> counted_tokens:
        self.handle = self.body.register_forward_pre_hook(self._count, with_kwargs=True)
        return self

    def _count(self, module: Any, args: tuple, kwargs: dict) -> None:
        ids = kwargs.get("input_ids")
        self.n += (args[0] if ids is None else ids).numel()

    def __exit__(self, *error: object) -> None:
        self.handle.remove()


def sampling_flops(chat: ChatModel, prompts: Sequence[Sequence[int]], computed: int) -> float:
    """FLOPs of a sampling run in blocks and head (attention left out) when `computed` tokens went through the decoder."""
    linear = sum(
        2 * x.weight.numel()
        for x in chat.forward.blocks.modules()
        if isinstance(x, torch.nn.Linear)
    )
    return float(
        linear * computed
        + 2
        * chat.hidden_size
        * chat.n_embeddings
        * (computed - len(distinct_depths(prompts)) + len(prompts))
    )


def relative(a: Any, b: Any) -> float:
    """Largest absolute difference, relative to the root mean square of b."""
    a, b = (
        torch.tensor(x) if isinstance(x, np.ndarray) else x.detach().float().cpu() for x in (a, b)
    )
    return float((a - b).abs().max() / b.pow(2).mean().sqrt().clamp(min=1e-12))


def same_distribution(
    a: Sequence[Sequence[str]], b: Sequence[Sequence[str]], *, permutations: int = 999
) -> float:
    """p-value of "a[q] and b[q] come from one distribution for each query q", by permutation within queries.

    The statistic is a kernel two-sample one: what share of their leading characters two responses have in common,
    within a and within b against across. 20 queries of 20 samples tell top_p 0.6 from 0.9, not 0.8.
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


# Rows


def capture_rows(chat: ChatModel, size: Size) -> Iterator[Row]:
    queries, prompt = anchor(size.capture), load_safety_prompts()["default"]
    texts = queries["text"].tolist()
    work, work_flops = matrix_work(chat, 2048)
    plain_states(chat, texts[:2], prompt)
    hidden_states(chat, queries.head(2), {"default": prompt})
    runs = alternate(
        {
            "plain": lambda: plain_states(chat, texts, prompt),
            "ours": lambda: hidden_states(chat, queries, {"default": prompt}).states[:, 0],
            "unchecked": lambda: hidden_states(
                chat, queries, {"default": prompt}, n_check=0
            ).states[:, 0],
            "rate": work,
        },
        size.repeats["capture"],
    )
    states, all_bytes = runs["plain"].first
    depths = distinct_depths([plain_ids(chat, t, prompt) for t in texts])
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
    with tempfile.TemporaryDirectory() as folder:
        kept = hidden_states(chat, queries, {"default": prompt}, store=Store(folder)).states
        back = hidden_states(chat, queries, {"default": prompt}, store=Store(folder))
        size_kept = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
        yield Row(
            "bytes stored",
            chat.name,
            [float(all_bytes)],
            [float(size_kept)],
            unit="bytes",
            detail=f"{len(texts)} queries against all tokens, all layers",
            difference="read back exactly"
            if (same := np.array_equal(kept, back.states))
            else "read back changed",
            equal=bool(same and back.certificate["found"] == len(texts)),
        )


def dro_row(chat: ChatModel, size: Size) -> Iterator[Row]:
    problem = DRO.of(
        chat, size.batch, load_safety_prompts()["default"], steps=size.repeats["dro"] + 1
    )
    work, work_flops = matrix_work(chat, 2048)
    training = train_in_turns(problem, plain_dro(problem), work)
    runs, rate = training.runs, work_flops / training.runs["rate"].median
    far = relative(*training.gradients)
    ours, plain = (
        losses[:2] for losses in training.losses
    )  # the second step is the first in which all parts are above 0
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


def sampling_row(chat: ChatModel, size: Size) -> Iterator[Row]:
    queries, prompt = anchor(size.sampling), load_safety_prompts()["default"]
    some = queries.iloc[np.linspace(0, size.sampling - 1, size.sampling_plain).round().astype(int)]
    texts = some["text"].tolist()
    greedy = (
        our_samples(chat, some, prompt, 1, size.tokens, temperature=0),
        plain_samples(chat, texts, prompt, 1, size.tokens, temperature=0),
    )
    same = sum(a == b for a, b in zip(*greedy, strict=True))
    seed = count()

    def plain() -> list[list[str]]:
        torch.manual_seed(next(seed))
        return plain_samples(chat, texts, prompt, size.samples, size.tokens)

    def ours() -> tuple[list[list[str]], int]:
        with counted_tokens(chat) as counter:
            return our_samples(
                chat, queries, prompt, size.samples, size.tokens, seed=next(seed)
            ), counter.n

    work, work_flops = matrix_work(chat, 2048)
    runs = alternate({"plain": plain, "ours": ours, "rate": work}, size.repeats["sampling"])
    rate = work_flops / runs["rate"].median
    run, computed = runs["ours"].first
    mine = [
        responses
        for responses, text in zip(run, queries["text"], strict=True)
        if text in set(texts)
    ]
    p = same_distribution(mine, runs["plain"].first)
    rates = [
        float(np.mean([is_refusal(t) for responses in run for t in responses]))
        for run in (runs["plain"].first, mine)
    ]
    scale = size.sampling / size.sampling_plain
    yield Row(
        "sampling",
        chat.name,
        [s * scale for s in runs["plain"].seconds],
        runs["ours"].seconds,
        detail=f"{size.sampling} queries x {size.samples} samples x {size.tokens} tokens",
        difference=f"greedy equal {same}/{len(texts)}; refused {rates[0]:.3f} and {rates[1]:.3f}; same distribution p={p:.3f}",
        equal=same == len(texts) and p > RAREST,
        floor=sampling_flops(chat, [plain_ids(chat, t, prompt) for t in queries["text"]], computed)
        / rate,
        peak_bytes=(runs["plain"].peak, runs["ours"].peak),
        extra={"gflops": rate / 1e9, "computed_tokens": computed},
        note=f"plain: {size.sampling_plain} queries timed, scaled by {scale:g}"
        if scale != 1
        else "",
    )


def slope_rows(chat: ChatModel, size: Size) -> Iterator[Row]:
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
        plain, ours = (
            [
                1e3 * (b - a) / (n[1] - n[0])
                for a, b in zip(runs[f"{way}0"].seconds, runs[f"{way}1"].seconds, strict=True)
            ]
            for way, n in (("plain", size.slope_plain), ("ours", size.slope_ours))
        )
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


def import_row(repeats: int) -> Row:
    """Seconds to import the package in a fresh process; "plain" imports every public name, as an eager package would."""
    script = "import sys, time; t = time.perf_counter(); {}; print(time.perf_counter() - t, int('torch' in sys.modules or 'plotly' in sys.modules))"

    def seconds(statement: str) -> list[list[str]]:
        return [
            subprocess.run(
                [sys.executable, "-c", script.format(statement)],
                cwd=ROOT,
                capture_output=True,
                text=True,
                check=True,
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


# GPU


def gpu_rows(like: ChatModel, shape: str, device: str) -> Iterator[Row]:
    """Absolute figures of a shape in bfloat16: a row stays empty where the device is missing."""
    big = shape == "7b"
    n, samples, tokens, rounds, m = (100, 20, 64, 3, 8192) if big else (12, 4, 8, 2, 256)
    name = f"{shape} bfloat16"
    details = {
        "GPU capture": f"{n} queries x 4 prompts, 2 certificate rows",
        "GPU DRO step": f"batch {n // 2}",
        "GPU sampling": f"{n} queries x {samples} samples x {tokens} tokens",
    }
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        for what, detail in details.items():
            yield Row(what, name, [], [], detail=detail, note="no GPU at hand")
        return
    chat = random_llama(shape, like, device=device, dtype=torch.bfloat16)
    chat.name = name
    queries, prompts = anchor(n), load_safety_prompts()
    texts = queries["text"].tolist()
    limit = TOLERANCE["bfloat16"]
    work, work_flops = matrix_work(chat, m)

    def finished(
        what: str,
        runs: Mapping[str, Run],
        row_tokens: int,
        total: float,
        difference: str,
        equal: bool,
    ) -> Row:
        ours, rate = runs["ours"], work_flops / runs["rate"].median
        extra = {
            "tokens_per_s": row_tokens / ours.median,
            "matrix_share": total / rate / ours.median,
            "tflops": rate / 1e12,
        }
        return Row(
            what,
            name,
            [],
            ours.seconds,
            "s",
            details[what],
            difference,
            equal,
            total / rate,
            (None, ours.peak),
            extra,
        )

    hidden_states(chat, queries.head(2), prompts)
    runs = alternate(
        {"ours": lambda: hidden_states(chat, queries, prompts), "rate": work}, rounds, device
    )
    rows = [r.ids for p in prompts.values() for r in chat.render(texts, p)]
    far = relative(
        runs["ours"].first.at(prompt="default")[0][:4],
        plain_states(chat, texts[:4], prompts["default"])[0],
    )
    total = flops(chat, distinct_depths(rows))
    yield finished(
        "GPU capture", runs, sum(map(len, rows)), total, f"states of 4 rows {far:.1e}", far <= limit
    )

    # One harmless query: at the start the two classes' gradients nearly cancel, and bfloat16 would leave their rounding.
    few = DRO.of(chat, 6, prompts["default"], steps=2, n_harmless=1)
    gradients = train_in_turns(few, plain_dro(few), work).gradients
    far = float((gradients[0] - gradients[1]).norm() / gradients[1].norm())
    problem = DRO.of(chat, n // 2, prompts["default"], steps=2 * rounds + 1)
    runs = train_in_turns(problem, lambda: (np.nan, np.nan), work).runs
    rendered = chat.render(problem.queries["text"].tolist(), problem.prompt)
    total = flops(
        chat, distinct_depths([r.ids for r in rendered]), backward_from=rendered[0].slot[0]
    )
    row_tokens = sum(len(r.ids) for r in rendered)
    yield finished(
        "GPU DRO step",
        runs,
        row_tokens,
        total,
        f"gradient of 6 rows {far:.1e} (norm)",
        far <= limit,
    )

    our_samples(chat, queries.head(2), prompts["default"], 2, 4)

    def ours() -> tuple[list[list[str]], int]:
        with counted_tokens(chat) as counter:
            return our_samples(chat, queries, prompts["default"], samples, tokens), counter.n

    runs = alternate({"ours": ours, "rate": work}, 2, device)
    responses, computed = runs["ours"].first
    torch.manual_seed(0)
    p = same_distribution(
        responses[:4], plain_samples(chat, texts[:4], prompts["default"], samples, tokens)
    )
    total = sampling_flops(chat, [plain_ids(chat, t, prompts["default"]) for t in texts], computed)
    row_tokens = n * samples * tokens
    yield finished(
        "GPU sampling",
        runs,
        row_tokens,
        total,
        f"same distribution p={p:.3f} (4 queries)",
        p > RAREST,
    )


# Output


def machine(device: str) -> dict[str, Any]:
    try:
        cpu = next(
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        )
    except (OSError, StopIteration):
        cpu = platform.processor()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": platform.machine(),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": list(os.getloadavg()),
        "gpu": torch.cuda.get_device_name()
        if device.startswith("cuda") and torch.cuda.is_available()
        else None,
        "versions": {
            "python": platform.python_version(),
            **{p: version(p) for p in ("torch", "transformers", "numpy", "pandas")},
        },
    }


def _number(values: Sequence[float], unit: str) -> str:
    """Median (range) in the unit."""
    if not values:
        return "-"
    if unit == "bytes":
        return f"{values[0]:,.0f} bytes"
    digits = max(0, 2 - int(np.floor(np.log10(max(1e-6, abs(np.median(values)))))))
    low, middle, high = (
        f"{x:.{digits}f}" for x in (min(values), float(np.median(values)), max(values))
    )
    return f"{middle} ({low}-{high}) {unit}"


def line(row: Row, *, timed: bool) -> str:
    """One line of the table; without `timed` only what the results say."""
    cells = [row.what, row.model, row.detail]
    if timed:
        goals = {"ratio": "{:g}x", "floor": "{:g} of floor", "seconds": "{:g} s"}
        memory = "/".join("-" if b is None else f"{b / 1e6:.0f}" for b in row.peak_bytes)
        cells += [
            _number(row.plain, row.unit),
            _number(row.ours, row.unit),
            f"{row.ratio:.1f}x" if row.ratio else "-",
            f"{row.of_floor:.2f}" if row.of_floor else "-",
            ", ".join(
                goals[kind].format(goal) + (" met" if met else " missed")
                for kind, (goal, met) in row.goals().items()
            )
            or "-",
            memory,
            str(len(row.ours)),
        ]
    cells += [row.difference or "-", {True: "equal", False: "DIFFERENT", None: "-"}[row.equal]]
    cells.append(
        "; ".join([*(f"{k} {v:,.4g}" for k, v in row.extra.items() if timed), row.note]).strip("; ")
        or "-"
    )
    return "| " + " | ".join(cells) + " |"


def head(*, timed: bool) -> str:
    names = [
        "row",
        "model",
        "what",
        "plain",
        "ours",
        "ratio",
        "of floor",
        "goal",
        "peak MB plain/ours",
        "runs",
        "difference",
        "results",
        "note",
    ]
    names = names if timed else [*names[:3], *names[-3:]]
    return "| " + " | ".join(names) + " |\n" + "|---" * len(names) + "|"


def as_json(rows: Sequence[Row], about: Mapping[str, Any], seconds: float) -> str:
    table = [
        asdict(row) | {"ratio": row.ratio, "of_floor": row.of_floor, "goals": row.goals()}
        for row in rows
    ]
    return json.dumps({**about, "seconds": round(seconds, 1), "rows": table}, indent=1) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="few queries: are the results equal?")
    parser.add_argument("--only", choices=["import", *ROWS], help="one kind of row")
    parser.add_argument(
        "--organism", default="organism", metavar="FOLDER", help="another folder of the small model"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="write the results as JSON too, for example bench/results/NAME.json",
    )
    parser.add_argument("--gpu", action="store_true", help="absolute figures on a GPU instead")
    parser.add_argument("--gpu-shape", choices=["7b", "tiny"], default="7b")
    parser.add_argument("--device", default="cuda", help="where --gpu runs")
    args = parser.parse_args(arguments)
    transformers.logging.set_verbosity_error()
    begin = time.perf_counter()
    organism = ChatModel.load(args.organism, device="cpu", dtype="float32")
    about = machine(args.device if args.gpu else "cpu") | {
        "organism": organism.fingerprint,
        "quick": args.quick,
    }
    print(json.dumps(about))
    print(head(timed=not args.quick), flush=True)
    rows = []
    made = gpu_rows(organism, args.gpu_shape, args.device) if args.gpu else None
    for row in made or cpu_rows(
        organism, QUICK if args.quick else FULL, args.only, 1 if args.quick else 5
    ):
        print(line(row, timed=not args.quick), flush=True)
        rows.append(row)
    different = [row for row in rows if row.equal is False]
    missed = [row for row in rows if not all(met for _, met in row.goals().values())]
    seconds = time.perf_counter() - begin
    print(
        f"{len(rows)} rows in {seconds:.0f} s; {len(different)} differ"
        + ("" if args.quick else f"; {len(missed)} miss a goal")
    )
    if args.out:
        args.out.write_text(as_json(rows, about, seconds), encoding="utf-8")
    return int(bool(different))


if __name__ == "__main__":
    sys.exit(main())
