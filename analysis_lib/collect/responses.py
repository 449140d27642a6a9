"""Sampled responses, each fixed by its key.

A sample's text depends on the model, the rendered tokens, the settings, the seed and the sample's
index, and on nothing else. Its random numbers are hashes of these. So samples that have been equal
so far share one computation (see `sampling`).

A batch, an order or a resumed run changes the logits by floating-point rounding alone. In float64
and float32 that changes no text, up to ties of the order of the rounding. In bfloat16 and float16
the distributions themselves differ from batch to batch, so some texts change: a token changes with
at most about twice the probability by which its two distributions differ.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from ..model.architecture import cache_bytes_per_token
from ..model.chat import ChatModel
from ..model.rendering import Prompt, Rendered
from ..model.tree import common_length
from ..store.batches import row_key
from ..store.store import Store
from .inputs import Keep, Progress, check_prompts, check_queries, keeper, usable
from .recheck import loaded_and_usable, longest_witness, row_witness, unchanged
from .sampling import Jobs, SampleTree, Settings, room_for_replies


def _built_in(function: Callable[..., Any]) -> bool:
    """Whether a stop function is one of this library's: its name then says what it does."""
    return str(function.__module__).partition(".")[0] == "analysis_lib"


def sample_responses(
    model: ChatModel,
    queries: pd.DataFrame,
    prompts: Mapping[str, Prompt],
    *,
    n_samples: int = 20,
    max_new_tokens: int = 300,
    temperature: float = 1.0,
    top_p: float = 0.9,
    top_k: int = 50,
    seed: int = 0,
    stop_when: Callable[[str], bool] | None = None,
    store: Store | None = None,
    progress: bool | None = None,
) -> pd.DataFrame:
    """Samples n_samples responses to every query under every prompt.

    The defaults are the study's settings. Of the model's generation configuration are followed:
    the ends of replies, and the tokens that it suppresses (`suppress_tokens`,
    `begin_suppress_tokens`, and `bad_words_ids` of one token). A warning names any other setting
    that would change a reply.

    Parameters
    ----------
    model : ChatModel
        The model to sample from.
    queries : DataFrame
        Has the columns query_id and text.
    prompts : mapping
        {name: text or SoftPrompt}; the text "" means no system message.
    n_samples : int
        Responses to each query under each prompt.
    max_new_tokens : int
        Tokens of a response, at most. A response also ends where the model's context does.
    temperature : float
        0 is greedy.
    top_p : float
        In (0, 1]; 1 switches this cut off.
    top_k : int
        0 switches this cut off.
    seed : int
        Equal seeds give equal responses.
    stop_when : function, optional
        Is called with the answer so far; the response ends where it says True. Thoughts before an
        answer are none of it. An example is
        `verdict_is_final`: nothing to come can change the verdict then. The store serves the stop
        functions of this library. Under another one, nothing is read from it or kept.
    store : Store, optional
        Kept responses are read from it; sampled ones are kept in it, batch by batch.
    progress : bool, optional
        Whether a bar is shown. Default: in a terminal or a notebook, where something is to be
        computed.

    Returns
    -------
    DataFrame
        query_id, prompt, sample (0 .. n_samples - 1), response and end ("eos", "stop_string",
        "length", "stop_when", or "thoughts" where a response ended within its thoughts). Prompts
        outer, queries inner, then samples. A reasoning model's response holds its thoughts, with
        their marks; `judge_responses` judges what follows them.

    Raises
    ------
    ValueError
        For wrong settings, queries or prompts.
    ChatModelError
        Where the model's logits hold NaN or infinity, a text cannot be rendered, or a query fills
        the context.
    StoreError
        Where the store cannot be read. Where it cannot be written, a warning says so.

    References
    ----------
    Zheng et al. 2024, arXiv 2401.18018: 20 samples a query, temperature 1, top-p 0.9, top-k 50.

    Examples
    --------
    >>> from analysis_lib import ChatModel, load_queries, sample_responses
    >>> model, queries = ChatModel.load("organism"), load_queries("anchor").head(2)
    >>> responses = sample_responses(
    ...     model, queries, {"none": "", "kind": "Be kind."}, n_samples=2, max_new_tokens=3
    ... )
    >>> responses.columns.tolist()
    ['query_id', 'prompt', 'sample', 'response', 'end']
    >>> len(responses), responses["end"].unique().tolist()
    (8, ['length'])
    """
    n_samples, settings = _checked(
        queries,
        prompts,
        n_samples=n_samples,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        stop_when=stop_when,
    )
    texts, ids = queries["text"].tolist(), queries["query_id"].tolist()
    table: list[tuple[Any, ...]] = []
    bar = Progress(len(prompts) * len(texts) * n_samples, "responses", progress)
    keep = keeper()
    for name, prompt in prompts.items():
        rows = model.render(texts, prompt)
        embeddings = None if isinstance(prompt, str) else prompt.embeddings
        got = sample_rows(
            model,
            rows,
            n_samples,
            settings,
            name=name,
            embeddings=embeddings,
            store=store,
            keep=keep,
            done=bar.add,
        )
        for query_id, responses in zip(ids, got):
            table.extend(
                (query_id, name, s, r["response"], r["end"]) for s, r in enumerate(responses)
            )
    bar.close()
    return pd.DataFrame(table, columns=["query_id", "prompt", "sample", "response", "end"])


def _checked(
    queries: pd.DataFrame,
    prompts: Mapping[str, Prompt],
    *,
    n_samples: int = 20,
    max_new_tokens: int = 300,
    temperature: float = 1.0,
    top_p: float = 0.9,
    top_k: int = 50,
    seed: int = 0,
    stop_when: Callable[[str], bool] | None = None,
) -> tuple[int, Settings]:
    check_queries(queries)
    check_prompts(prompts)
    if n_samples < 1 or max_new_tokens < 1:
        raise ValueError("n_samples and max_new_tokens must be at least 1")
    if not 0 <= temperature < float("inf") or not 0 < top_p <= 1 or top_k < 0:
        raise ValueError(
            f"temperature {temperature} must be >= 0, top_p {top_p} in (0, 1], top_k {top_k} >= 0"
        )
    if stop_when is not None and not inspect.isfunction(stop_when):
        raise ValueError(
            "stop_when must be a function of the text so far, such as verdict_is_final"
        )
    settings = Settings(
        int(max_new_tokens), float(temperature), float(top_p), int(top_k), int(seed), stop_when
    )
    return n_samples, settings


def sample_rows(
    model: ChatModel,
    rows: Sequence[Rendered],
    n_samples: int,
    settings: Settings,
    *,
    name: str,
    embeddings: NDArray[np.float32] | None = None,
    store: Store | None = None,
    keep: Keep | None = None,
    done: Callable[..., None] = lambda **new: None,
) -> list[list[dict[str, str]]]:
    """n_samples {"response", "end"} for each rendered row: found in the store, or sampled.

    What is sampled is kept batch by batch. name: what the store's listing calls the rows' prompt.
    embeddings: what their soft tokens stand for. done(found=n) or done(computed=n) is called as
    they come.
    """
    if not rows:
        return []
    keep = keep or keeper()
    store = _usable(store, model, settings)
    room_for_replies(model, rows, settings)  # refuses a row that leaves none
    keys = _keys(model, rows, n_samples, settings) if store is not None else []
    got: list[list[Any]] = [[None] * n_samples for _ in rows]
    if store is not None:
        got = _found(store, keys)
        if any(response is None for row in got for response in row):
            store = loaded_and_usable(store, model)
        known = longest_witness(store, model, [k for row in keys for k in row], rows[0].soft)
        store = unchanged(store, model, known, embeddings)
        if store is None:
            got = [[None] * n_samples for _ in rows]
    todo = {i: [s for s in range(n_samples) if got[i][s] is None] for i in range(len(rows))}
    todo = {i: samples for i, samples in todo.items() if samples}
    done(found=len(rows) * n_samples - sum(map(len, todo.values())))
    if todo:
        with torch.no_grad(), model.forward.soft_tokens(embeddings):
            for batch in _batches(model, rows, todo, n_samples, settings.max_new_tokens):
                new = _sample_batch(model, rows, batch, settings)
                for (i, s), response in new.items():
                    got[i][s] = response
                if store is not None:
                    about = {
                        "model": model.fingerprint,
                        "model_name": model.name,
                        "prompts": [name],
                        "witness": row_witness(model, [rows[i] for i in batch]),
                        **settings.parts(),
                    }
                    # Queries may render alike: one row for each key.
                    kept = {keys[i][s]: response for (i, s), response in new.items()}
                    keep(store.write_responses, list(kept), list(kept.values()), about=about)
                done(computed=len(new))
    return got


def missing_responses(
    model: ChatModel,
    queries: pd.DataFrame,
    prompts: Mapping[str, Prompt],
    *,
    store: Store | None,
    **options: Any,
) -> NDArray[np.bool_]:
    """Which responses `sample_responses` would have to sample: (prompts, queries, samples).

    options: those of `sample_responses`. Loads no weights.
    """
    n_samples, settings = _checked(queries, prompts, **options)
    store = _usable(store, model, settings)
    missing = np.ones((len(prompts), len(queries), n_samples), dtype=bool)
    for mask, prompt in zip(missing, prompts.values()):
        if store is not None:
            rows = model.render(queries["text"].tolist(), prompt)
            found = _found(store, _keys(model, rows, n_samples, settings))
            mask[:] = [[response is None for response in row] for row in found]
    return missing


def _usable(store: Store | None, model: ChatModel, settings: Settings) -> Store | None:
    """The store, or None with a warning where no key knows all that a response depends on."""
    store = usable(store, model)
    if store is not None and settings.stop_when is not None and not _built_in(settings.stop_when):
        warnings.warn(
            f"stop_when {settings.stop_when.__qualname__!r} is a function of your own, and no key "
            "covers its code: these responses are neither read from the store nor kept; "
            "give analysis_lib.verdict_is_final to use the store",
            stacklevel=4,
        )
        return None
    return store


def _keys(
    model: ChatModel, rows: Sequence[Rendered], n_samples: int, settings: Settings
) -> list[list[str]]:
    """The keys of each row's samples."""
    fixed = {"kind": "response", "draw": "gumbel", **model.key_parts(), **settings.parts()}
    fixed |= model.generation.key_parts() | {"tokenizer": model.renderer.tokenizer_digest}
    of_rows = [
        row_key(ids=row.ids, soft=row.soft, **(fixed | {"max_new_tokens": room}))
        for row, room in zip(rows, room_for_replies(model, rows, settings))
    ]
    return [[row_key(row=key, sample=i) for i in range(n_samples)] for key in of_rows]


def _found(store: Store, keys: Sequence[Sequence[str]]) -> list[list[Any]]:
    """The kept {"response", "end"} of each key; None where there is none."""
    kept = store.read_responses([key for row in keys for key in row])
    kept = {key: row for key, row in kept.items() if {"response", "end"} <= row.keys()}
    return [[kept.get(key) for key in row] for row in keys]


def _batches(
    model: ChatModel, rows: Sequence[Rendered], todo: Jobs, n_samples: int, max_new_tokens: int
) -> list[Jobs]:
    """Splits the jobs so that the key-value cache fits the memory, even if all samples differ."""
    per_token = cache_bytes_per_token(model.config, model.dtype)
    order = sorted(todo, key=lambda i: rows[i].ids)
    own = max(len(rows[i].ids) for i in todo) - common_length(
        rows[order[0]].ids, rows[order[-1]].ids
    )
    free = torch.cuda.mem_get_info(model.device)[0] if model.device.type == "cuda" else 4 << 30
    size = max(1, int(0.3 * free) // (per_token * (own + min(max_new_tokens, 64)) * n_samples))
    return [{i: todo[i] for i in order[at : at + size]} for at in range(0, len(order), size)]


def _sample_batch(
    model: ChatModel, rows: Sequence[Rendered], jobs: Jobs, settings: Settings
) -> dict[tuple[int, int], dict[str, str]]:
    """All samples of some rows; halves the batch when the device runs out of memory."""
    try:
        return SampleTree(model, rows, jobs, settings).run()
    except torch.OutOfMemoryError:
        if len(jobs) == 1:
            raise
    torch.cuda.empty_cache()
    members = list(jobs.items())
    half = len(members) // 2
    return {
        **_sample_batch(model, rows, dict(members[:half]), settings),
        **_sample_batch(model, rows, dict(members[half:]), settings),
    }
