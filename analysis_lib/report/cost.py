"""What a run would cost, told before it starts: missing rows, tokens, time and memory."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from ..analysis.directions import Direction
from ..analysis.space import AnchorSpace
from ..collect.responses import missing_responses, sample_responses
from ..collect.states import CHUNK_ROWS, missing_states
from ..judge.verdicts import judge_responses
from ..model.chat import ChatModel
from ..model.errors import ChatModelError
from ..model.forward import peak_bytes, tokens_of_a_line, tokens_of_a_pack
from ..model.passes import last_states, shares_prefixes
from ..model.rendering import Prompt
from ..model.tree import plan_rows
from ..store.store import Store
from ..train.dro import DROConfig, train_dro
from ..train.loop import OnStep
from ..train.tuning import PromptTuningConfig, train_prompt_tuning

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
    """The cost of states, responses and a DRO training from the first text prompt.

    sampling: options of `sample_responses`. tuning adds a prompt tuning on the responses under none
    and that prompt. probe = False loads no weights: there are no seconds, memory_bytes are the
    weights alone, and tokens are counted as if prefixes can be shared.

    Returns one row a step: step, rows, found, tokens, seconds, memory_bytes. rows are all rows (of
    a training its steps), found those in the store. tokens are still to be computed, common ones
    once: for responses those sampled, at most; for prompt tuning those of all replies, at most.
    seconds are measured on a few of them. memory_bytes is the process's high-water mark (a GPU's,
    where there is one); the cache of sampling adds up to 30 % of what is then free.

    Responses are taken to be as long as allowed where the probe did not see their end. A training
    that cannot run is left out: a quantized model, no text prompt, queries of one class. A finished
    training in the store is not looked for. Raises ChatModelError where the weights do not fit the
    free memory.
    """
    options = {"n_samples": 20, "max_new_tokens": 300, **(sampling or {})}
    config = config or DROConfig()
    missing = missing_states(model, queries, prompts, layers=layers, store=store)
    lacks_state = np.asarray(missing.any(axis=2))
    lacks_response = missing_responses(model, queries, prompts, store=store, **options)
    start = next((p for p in prompts.values() if isinstance(p, str) and p.strip()), None)
    classes = queries["harmful"].nunique() if "harmful" in queries else 0
    trains = start is not None and classes == 2 and not model.quantization
    probe_this = probe and bool(lacks_state.any() or lacks_response.any() or trains)
    if probe_this:
        _check_memory(model)
    shared = shares_prefixes(model.forward) if probe_this else True
    count = _tokens if shared else lambda model, rows: sum(map(len, rows))
    steps = [
        _states_step(model, queries, prompts, layers, lacks_state, count),
        _responses_step(model, queries, prompts, lacks_response, options),
    ]
    if trains:
        assert start is not None
        labelled = queries[queries["harmful"].notna()]
        steps.append(_dro_step(model, labelled, start, config, count))
        if tuning and shared:
            steps.append(_tuning_step(model, labelled, start, options, tuning, count))
    table = []
    for step in steps:
        seconds = 0.0 if not step.tokens else step.seconds() if probe else np.nan
        memory = peak_bytes(model.device) if probe_this else model.weight_bytes
        table.append((step.name, step.rows, step.found, step.tokens, seconds, memory))
    return pd.DataFrame(
        table, columns=["step", "rows", "found", "tokens", "seconds", "memory_bytes"]
    )


Count = Callable[[ChatModel, Sequence[Sequence[int]]], int]


@dataclass(frozen=True)
class _Step:
    """One row of the estimate; seconds() measures on a few of its tokens."""

    name: str
    rows: int
    found: int
    tokens: int
    seconds: Callable[[], float]


def _states_step(
    model: ChatModel,
    queries: pd.DataFrame,
    prompts: Mapping[str, Prompt],
    layers: Sequence[int],
    lacks: NDArray[np.bool_],
    count: Count,
) -> _Step:
    texts = queries["text"].tolist()
    lacking = [
        (prompt, [row.ids for row, wanted in zip(model.render(texts, prompt), mask) if wanted])
        for prompt, mask in zip(prompts.values(), lacks)
    ]
    tokens = sum(count(model, ids) for _, ids in lacking)

    def seconds() -> float:
        largest = max(lacking, key=lambda part: len(part[1]))
        return tokens * _seconds_a_token(model, *largest, layers, count)

    return _Step("states", lacks.size, int((~lacks).sum()), tokens, seconds)


def _responses_step(
    model: ChatModel,
    queries: pd.DataFrame,
    prompts: Mapping[str, Prompt],
    lacks: NDArray[np.bool_],
    options: Mapping[str, Any],
) -> _Step:
    n = int(lacks.sum())
    tokens = n * options["max_new_tokens"]
    each = partial(_seconds_a_response, model, queries, prompts, lacks, options)
    return _Step("responses", lacks.size, lacks.size - n, tokens, lambda: n * each())


def _dro_step(
    model: ChatModel, labelled: pd.DataFrame, start: str, config: DROConfig, count: Count
) -> _Step:
    ids = [row.ids for row in model.render(labelled["text"].tolist(), start)]
    batches = max(1, round(len(labelled) / config.batch_size))
    a_batch = count(model, ids[:: -(-len(ids) // (len(ids) // batches))])
    steps = config.epochs * batches
    each = partial(_seconds_a_trained_token, model, labelled, start, config, count)
    return _Step("DRO", steps, 0, steps * a_batch, lambda: steps * a_batch * each())


def _tuning_step(
    model: ChatModel,
    labelled: pd.DataFrame,
    start: str,
    options: Mapping[str, Any],
    tuning: PromptTuningConfig,
    count: Count,
) -> _Step:
    trained = tuning.epochs * len(labelled)
    longest = min(tuning.max_response_tokens, options["max_new_tokens"])
    steps = tuning.epochs * max(1, round(len(labelled) / tuning.batch_size))
    each = partial(_seconds_a_tuned_query, model, labelled, start, options, tuning, count)
    tokens = trained * 2 * options["n_samples"] * longest
    return _Step("prompt tuning", steps, 0, tokens, lambda: trained * each())


def _check_memory(model: ChatModel) -> None:
    if model.loaded:
        return
    free = _free_bytes(model.asked_device)
    if free is not None and model.weight_bytes > free:
        raise ChatModelError(
            f"the weights of {model.name!r} take {model.weight_bytes / 1e9:.1f} GB in "
            f"{model.quantization or model.dtype_name}, and {free / 1e9:.1f} GB are free; "
            "in Python, ChatModel.load(..., dtype=, quantization=, device='auto') opens it "
            "smaller or on more GPUs"
        )


def _free_bytes(device: str) -> int | None:
    """Free memory of a device ("auto": all GPUs, if any); None where the system does not say."""
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


def _tokens(model: ChatModel, rows: Sequence[Sequence[int]]) -> int:
    """Distinct tokens computed for some rows."""
    parts = [rows[at : at + CHUNK_ROWS] for at in range(0, len(rows), CHUNK_ROWS)]
    return sum(
        plan_rows(
            part, tokens_of_a_pack(model.device), line_tokens=tokens_of_a_line(model.device)
        ).n_tokens
        for part in parts
    )


def _seconds_a_token(
    model: ChatModel,
    prompt: Prompt,
    rows: Sequence[Sequence[int]],
    layers: Sequence[int],
    count: Count,
) -> float:
    embeddings = None if isinstance(prompt, str) else prompt.embeddings
    n = 2
    with torch.no_grad(), model.forward.soft_tokens(embeddings):
        last_states(model.forward, rows[:n], layers)  # what runs for the first time is slow
        while True:
            part = rows[:n]
            start = time.perf_counter()
            last_states(model.forward, part, layers)[0].cpu()
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
    sample_responses(
        model,
        some.head(1),
        {name: prompts[name]},
        **{**options, "n_samples": 1, "max_new_tokens": 2},
    )
    start = time.perf_counter()
    responses = sample_responses(model, some, {name: prompts[name]}, **options)
    took = time.perf_counter() - start
    unfinished = float((responses["end"] == "length").mean())
    return took / len(responses) * (1 + unfinished * (longest / options["max_new_tokens"] - 1))


def _seconds_a_trained_token(
    model: ChatModel, labelled: pd.DataFrame, prompt: str, config: DROConfig, count: Count
) -> float:
    """Of a step's distinct tokens, forward and backward.

    The directions it trains along do not matter for the time.
    """
    some = _some_of_each(labelled)
    space = AnchorSpace(np.zeros(model.hidden_size), np.eye(model.hidden_size), 2, np.ones(2))
    along = Direction("probe", np.ones(2), 0.0)
    one_batch = replace(config, batch_size=len(some), epochs=3)
    seconds = _seconds_a_step(
        lambda stop: train_dro(model, some, prompt, space, along, along, one_batch, on_step=stop)
    )
    return seconds / count(model, [row.ids for row in model.render(some["text"].tolist(), prompt)])


def _seconds_a_tuned_query(
    model: ChatModel,
    labelled: pd.DataFrame,
    prompt: str,
    options: Mapping[str, Any],
    config: PromptTuningConfig,
    count: Count,
) -> float:
    some = _some_of_each(labelled).head(config.batch_size)
    longest = options["max_new_tokens"]
    short = min(longest, PROBE_TOKENS, config.max_response_tokens)
    responses = sample_responses(
        model, some, {"none": "", "start": prompt}, **{**options, "max_new_tokens": short}
    )
    one_batch, judged = replace(config, batch_size=len(some), epochs=3), judge_responses(responses)
    seconds = _seconds_a_step(
        lambda stop: train_prompt_tuning(model, some, judged, prompt, one_batch, on_step=stop)
    )
    heads = dict(
        zip(some["query_id"], (row.ids for row in model.render(some["text"].tolist(), prompt)))
    )
    replies = model.tokenizer(responses["response"].tolist(), add_special_tokens=False)["input_ids"]
    rows = [(*heads[query_id], *reply) for query_id, reply in zip(responses["query_id"], replies)]
    # The heads' share of the tokens: they are not longer where replies are.
    of_heads = count(model, list(heads.values())) / count(model, rows)
    grown = [
        len(ids) * longest / short if end == "length" else len(ids)
        for ids, end in zip(replies, responses["end"])
    ]
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
