"""What a run would cost, told before it is started: rows that are not in the store, tokens, time from a short probe, memory."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from .capture import CHUNK_ROWS, _line_tokens, _pack_tokens, hidden_states, last_states, peak_bytes, plan_rows, shares_prefixes
from .chat import ChatModel, ChatModelError, Prompt
from .dro import DROConfig, OnStep, PromptTuningConfig, train_dro, train_prompt_tuning
from .judge import judge_responses
from .sampling import sample_responses
from .space import AnchorSpace, Direction
from .store.store import Store

PROBE_SECONDS = 0.5  # a probe of states grows until it took so long
PROBE_TOKENS = 32  # new tokens of a probe of responses
PROBE_QUERIES = 4  # queries of a probe of responses; twice as many of DRO
MEMINFO = Path("/proc/meminfo")


def estimate(
    model: ChatModel,
    queries: pd.DataFrame,
    prompts: Mapping[str, Prompt],
    *,
    layers: Sequence[int] = (-1,),
    sampling: Mapping[str, Any] | None = None,
    config: DROConfig | None = None,
    tuning: PromptTuningConfig | None = None,
    store: Store | None = None,
    probe: bool = True,
) -> pd.DataFrame:
    """The cost of the states and the responses of queries under prompts, and of a DRO training from the first text prompt.

    sampling: options of `sample_responses`. tuning adds a prompt tuning on the responses under none and that prompt. Returns
    [step, rows, found, tokens, seconds, memory_bytes], one row per step: rows in all (of a training: its steps) and those
    found in the store; tokens still to be computed, common ones once (for responses: sampled, at most; for prompt tuning:
    those of all replies, at most); the time they take, as measured on a few of them; the process's high-water mark of memory
    (a GPU's, where there is one), to which the cache of sampling adds up to 30 % of what is then free.
    Responses are taken to be as long as allowed where the probe did not see their end. A training is left out where it cannot
    run: a quantized model, no text prompt, queries of one class. A finished training in the store is not looked for.
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
        if tuning and shared:
            trained = tuning.epochs * len(labelled)
            add(
                "prompt tuning",
                tuning.epochs * max(1, round(len(labelled) / tuning.batch_size)),
                0,
                trained * 2 * options["n_samples"] * min(tuning.max_response_tokens, options["max_new_tokens"]),
                lambda: trained * _seconds_a_tuned_query(model, labelled, start, options, tuning, count),
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

    def certificates(self, keys: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
        return {}

    def lacking(self, *shape: int) -> NDArray[np.bool_]:
        """Which rows asked for since the last call are not in the real store."""
        answers, self.answers = ~np.array(self.answers), []
        return answers.reshape(shape)


def _check_memory(model: ChatModel) -> None:
    if "model" in model.__dict__:
        return
    free = _free_bytes(model._device)
    if free is not None and model.weight_bytes > free:
        raise ChatModelError(
            f"the weights of {model.name!r} take {model.weight_bytes / 1e9:.1f} GB in {model.quantization or model.dtype_name}, and "
            f"{free / 1e9:.1f} GB are free; in Python, "
            "ChatModel.load(..., dtype=, quantization=, device='auto') opens it smaller or on more GPUs"
        )


def _free_bytes(device: str) -> int | None:
    """Memory that can be had on a model's device ("auto": all GPUs, where there are any); None where the system does not say."""
    if device == "auto" and torch.cuda.is_available():
        return sum(torch.cuda.mem_get_info(i)[0] for i in range(torch.cuda.device_count()))
    if torch.device("cpu" if device == "auto" else device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:  # the pages that the system would give up for it count as well
        if found := re.search(r"^MemAvailable:\s*(\d+) kB$", MEMINFO.read_text(), re.MULTILINE):
            return int(found[1]) * 1024
    except OSError:
        pass
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
    some = _some_of_each(labelled)
    space = AnchorSpace(np.zeros(model.hidden_size), np.eye(model.hidden_size), 2, np.ones(2))
    along = Direction("probe", np.ones(2), 0.0)
    one_batch = replace(config, batch_size=len(some), epochs=3)
    seconds = _seconds_a_step(lambda stop: train_dro(model, some, prompt, space, along, along, one_batch, on_step=stop))
    return seconds / count(model, [row.ids for row in model.render(some["text"].tolist(), prompt)])


def _seconds_a_tuned_query(
    model: ChatModel, labelled: pd.DataFrame, prompt: str, options: Mapping[str, Any], config: PromptTuningConfig, count: Count
) -> float:
    some = _some_of_each(labelled).head(config.batch_size)
    longest = options["max_new_tokens"]
    short = min(longest, PROBE_TOKENS, config.max_response_tokens)
    responses = sample_responses(model, some, {"none": "", "start": prompt}, **{**options, "max_new_tokens": short})
    one_batch, judged = replace(config, batch_size=len(some), epochs=3), judge_responses(responses)
    seconds = _seconds_a_step(lambda stop: train_prompt_tuning(model, some, judged, prompt, one_batch, on_step=stop))
    heads = dict(zip(some["query_id"], (row.ids for row in model.render(some["text"].tolist(), prompt))))
    replies = model.tokenizer(responses["response"].tolist(), add_special_tokens=False)["input_ids"]
    rows = [(*heads[query_id], *reply) for query_id, reply in zip(responses["query_id"], replies)]
    of_heads = count(model, list(heads.values())) / count(model, rows)  # which are not longer where replies are
    grown = [len(ids) * longest / short if end == "length" else len(ids) for ids, end in zip(replies, responses["end"])]
    longer = sum(min(n, config.max_response_tokens) for n in grown) / sum(map(len, replies))
    return seconds / len(some) * (of_heads + (1 - of_heads) * longer)


def _some_of_each(labelled: pd.DataFrame) -> pd.DataFrame:
    return labelled.groupby("harmful", sort=False).head(PROBE_QUERIES)


def _seconds_a_step(train: Callable[[OnStep], object]) -> float:
    """Of the second and the third step: what runs for the first time is slow."""
    ends: list[float] = []

    def stop(losses: dict[str, float], embeddings: NDArray[np.float32]) -> bool:
        ends.append(time.perf_counter())
        return len(ends) == 3

    train(stop)
    return (ends[2] - ends[0]) / 2
