"""What a run would cost, told before it is started: rows that are not in the store, tokens, time from a short probe, memory."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from .capture import CHUNK_ROWS, _line_tokens, _pack_tokens, hidden_states, last_states, peak_bytes, plan_rows, shares_prefixes
from .chat import ChatModel, ChatModelError, Prompt
from .dro import DROConfig, train_dro
from .sampling import sample_responses
from .space import AnchorSpace, Direction
from .store import Store

PROBE_SECONDS = 0.5  # a probe of states grows until it took so long
PROBE_TOKENS = 32  # new tokens of a probe of responses
PROBE_QUERIES = 4  # queries of a probe of responses; twice as many of DRO


def estimate(
    model: ChatModel,
    queries: pd.DataFrame,
    prompts: Mapping[str, Prompt],
    *,
    layers: Sequence[int] = (-1,),
    sampling: Mapping[str, Any] | None = None,
    config: DROConfig | None = None,
    store: Store | None = None,
    probe: bool = True,
) -> pd.DataFrame:
    """The cost of the states and the responses of queries under prompts, and of a DRO training from the first text prompt.

    sampling: options of `sample_responses`. Returns [step, rows, found, tokens, seconds, memory_bytes], one row per step:
    rows in all (for DRO: training steps) and those found in the store; tokens still to be computed, common ones once (for
    responses: sampled, at most); the time they take, as measured on a few of them; the process's high-water mark of memory
    (a GPU's, where there is one), to which the cache of sampling adds up to 30 % of what is then free.
    Responses are taken to be as long as allowed where the probe did not see their end. DRO is left out where it cannot run: a
    quantized model, no text prompt, queries of one class. A finished training in the store is not looked for.
    probe = False loads no weights: no seconds, and memory_bytes are the weights alone; tokens as if prefixes can be shared.
    Raises ChatModelError where the weights do not fit the free memory.
    """
    options = {"n_samples": 20, "max_new_tokens": 300, **(sampling or {})}
    asked = _Asked(store, model.hidden_size)
    hidden_states(model, queries, prompts, layers=layers, store=asked)  # type: ignore[arg-type]
    lacks_state = np.asarray(asked.lacking(len(prompts), len(queries), len(layers)).any(axis=2))
    sample_responses(model, queries, prompts, store=asked, **options)  # type: ignore[arg-type]
    lacks_response = asked.lacking(len(prompts), len(queries), options["n_samples"])
    config = config or DROConfig()
    start = next((p for p in prompts.values() if isinstance(p, str) and p.strip()), None)
    classes = queries["harmful"].nunique() if "harmful" in queries else 0
    trains = start is not None and classes == 2 and not model.quantization
    probe_this = probe and bool(lacks_state.any() or lacks_response.any() or trains)
    if probe_this:
        _check_memory(model)
    shared = shares_prefixes(model) if probe_this else True
    count = _tokens if shared else lambda model, rows: sum(map(len, rows))

    lacking = [
        (prompt, [row.ids for row, lacks in zip(model.render(queries["text"].tolist(), prompt), mask) if lacks])
        for prompt, mask in zip(prompts.values(), lacks_state)
    ]
    tokens = sum(count(model, ids) for _, ids in lacking)
    table: list[tuple] = []

    def add(step: str, rows: int, found: int, tokens: int, seconds: Callable[[], float]) -> None:
        took = 0.0 if not tokens else seconds() if probe else np.nan
        table.append((step, rows, found, tokens, took, peak_bytes(model) if probe_this else model.weight_bytes))

    add(
        "states",
        lacks_state.size,
        int((~lacks_state).sum()),
        tokens,
        lambda: tokens * _seconds_a_token(model, *max(lacking, key=lambda part: len(part[1])), layers, count),
    )
    n_lacking = int(lacks_response.sum())
    add(
        "responses",
        lacks_response.size,
        lacks_response.size - n_lacking,
        n_lacking * options["max_new_tokens"],
        lambda: n_lacking * _seconds_a_response(model, queries, prompts, lacks_response, options),
    )
    if trains:
        assert start is not None
        labelled = queries[queries["harmful"].notna()]
        ids = [row.ids for row in model.render(labelled["text"].tolist(), start)]
        batches = max(1, round(len(labelled) / config.batch_size))
        a_batch = count(model, ids[:: -(-len(ids) // (len(ids) // batches))])
        steps = config.epochs * batches
        add(
            "DRO",
            steps,
            0,
            steps * a_batch,
            lambda: steps * a_batch * _seconds_a_trained_token(model, labelled, start, config, count),
        )
    return pd.DataFrame(table, columns=["step", "rows", "found", "tokens", "seconds", "memory_bytes"])


class _Asked:
    """A store that has everything: a run that reads it computes nothing, and tells by its keys what it would look for."""

    def __init__(self, store: Store | None, hidden_size: int):
        self.store, self.state = store, np.zeros(hidden_size, np.float32)
        self.answers: list[bool] = []

    def read_states(self, keys: Sequence[str]) -> dict[str, NDArray[np.float32]]:
        kept = self.store.read_states(keys) if self.store is not None else {}
        self.answers += [key in kept for key in keys]
        return dict.fromkeys(keys, self.state)

    def read_responses(self, keys: Sequence[str]) -> dict[str, dict[str, str]]:
        kept = self.store.read_responses(keys) if self.store is not None else {}
        self.answers += [key in kept for key in keys]
        return dict.fromkeys(keys, {"response": "", "end": ""})

    def lacking(self, *shape: int) -> NDArray[np.bool_]:
        """Which rows asked for since the last call are not in the real store."""
        answers, self.answers = ~np.array(self.answers), []
        return answers.reshape(shape)


def _check_memory(model: ChatModel) -> None:
    if "model" in model.__dict__:
        return
    free = _free_bytes()
    if free is not None and model.weight_bytes > free:
        raise ChatModelError(
            f"the weights of {model.name!r} take {model.weight_bytes / 1e9:.1f} GB in {model.quantization or model.dtype_name}, and "
            f"{free / 1e9:.1f} GB are free; in Python, "
            "ChatModel.load(..., dtype=, quantization=, device='auto') opens it smaller or on more GPUs"
        )


def _free_bytes() -> int | None:
    """Free memory of all GPUs, else of the machine; None where the system does not say."""
    if torch.cuda.is_available():
        return sum(torch.cuda.mem_get_info(i)[0] for i in range(torch.cuda.device_count()))
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


Count = Callable[[ChatModel, Sequence[Sequence[int]]], int]


def _tokens(model: ChatModel, rows: Sequence[Sequence[int]]) -> int:
    """Distinct tokens computed for some rows."""
    parts = [rows[at : at + CHUNK_ROWS] for at in range(0, len(rows), CHUNK_ROWS)]
    return sum(plan_rows(part, _pack_tokens(model), line_tokens=_line_tokens(model)).n_tokens for part in parts)


def _seconds_a_token(
    model: ChatModel, prompt: Prompt, rows: Sequence[Sequence[int]], layers: Sequence[int], count: Count
) -> float:
    embeddings = None if isinstance(prompt, str) else prompt.embeddings
    n = 2
    with torch.no_grad(), model.soft_tokens(embeddings):
        last_states(model, rows[:n], layers)  # what runs for the first time is slow
        while True:
            part = rows[:n]
            start = time.perf_counter()
            last_states(model, part, layers)[0].cpu()
            took = time.perf_counter() - start
            if took >= PROBE_SECONDS or n >= len(rows):
                return took / count(model, part)
            n *= 4


def _seconds_a_response(
    model: ChatModel,
    queries: pd.DataFrame,
    prompts: Mapping[str, Prompt],
    lacks: NDArray[np.bool_],
    options: Mapping[str, Any],
) -> float:
    name = list(prompts)[int(lacks.sum(axis=(1, 2)).argmax())]
    wanted = np.flatnonzero(lacks[list(prompts).index(name)].any(axis=1))
    some = queries.iloc[wanted[:: -(-len(wanted) // PROBE_QUERIES)]]
    longest = options["max_new_tokens"]
    options = {**options, "max_new_tokens": min(longest, PROBE_TOKENS)}
    sample_responses(model, some.head(1), {name: prompts[name]}, **{**options, "n_samples": 1, "max_new_tokens": 2})
    start = time.perf_counter()
    responses = sample_responses(model, some, {name: prompts[name]}, **options)
    took = time.perf_counter() - start
    unfinished = float((responses["end"] == "length").mean())
    return took / len(responses) * (1 + unfinished * (longest / options["max_new_tokens"] - 1))


def _seconds_a_trained_token(model: ChatModel, labelled: pd.DataFrame, prompt: str, config: DROConfig, count: Count) -> float:
    """Of a step's distinct tokens, forward and backward; the directions it trains along do not matter for the time."""
    some = labelled.groupby("harmful", sort=False).head(PROBE_QUERIES)
    space = AnchorSpace(np.zeros(model.hidden_size), np.eye(model.hidden_size), 2, np.ones(2))
    along = Direction("probe", np.ones(2), 0.0)
    ends: list[float] = []

    def stop(losses: dict[str, float], embeddings: NDArray[np.float32]) -> bool:
        ends.append(time.perf_counter())
        return len(ends) == 3

    one_batch = replace(config, batch_size=len(some), epochs=3)
    train_dro(model, some, prompt, space, along, along, one_batch, on_step=stop)
    return (ends[2] - ends[0]) / 2 / count(model, [row.ids for row in model.render(some["text"].tolist(), prompt)])
