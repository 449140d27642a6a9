"""Sampled responses, each fixed by its key, sampled together as a tree.

A sample's text depends on the model, the rendered tokens, the settings, the seed and the sample's
index, and on nothing else: its random numbers come from a counter-based generator keyed by these.
So samples that have been equal so far share one computation, and a batch, an order or a resumed run
changes no text (up to ties of the order of floating-point rounding, about one token in a million).
"""

from __future__ import annotations

import hashlib
import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from ..model.architecture import cache_bytes_per_token
from ..model.chat import ChatModel
from ..model.errors import ChatModelError
from ..model.rendering import Prompt, Rendered
from ..model.steps import CachedStep, PlainStep, steps_from_cache
from ..model.tree import common_length
from ..store.batches import row_key
from ..store.store import Store
from .inputs import Progress, check_prompts, check_queries, usable


@dataclass(frozen=True)
class Settings:
    """How a response is sampled; part of its key."""

    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    seed: int
    stop_when: Callable[[str], bool] | None

    def parts(self) -> dict[str, Any]:
        settings = {
            k: getattr(self, k) for k in ("max_new_tokens", "temperature", "top_p", "top_k", "seed")
        }
        return {
            **settings,
            "stop_when": "" if self.stop_when is None else self.stop_when.__qualname__,
        }


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

    The defaults are the study's settings. top_p = 1 and top_k = 0 switch the cuts off; temperature
    = 0 is greedy. stop_when: a function of the text so far; sampling of a response ends where it
    says True (for example `verdict_is_final`, once nothing to come can change the verdict). The
    store serves this library's own stop functions; under another one nothing is read from it or
    kept. progress: a bar, by default where a terminal or a notebook shows it and something is to be
    computed. ChatModelError where the model's logits hold NaN or infinity.

    Returns [query_id, prompt, sample, response, end]; end is "eos", "stop_string", "length" or
    "stop_when". Prompts outer, queries inner, then samples 0 .. n_samples - 1.
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
    done: Callable[..., None] = lambda **new: None,
) -> list[list[dict[str, str]]]:
    """n_samples {"response", "end"} for each rendered row: found in the store, or computed and kept
    batch by batch.

    name: what the store's listing calls the rows' prompt. embeddings: what their soft tokens stand
    for. done(found=n) or done(computed=n) is called as they come.
    """
    store = _usable(store, model, settings)
    keys = _keys(model, rows, n_samples, settings) if store is not None else []
    got: list[list[Any]] = [[None] * n_samples for _ in rows]
    if store is not None:
        got = _found(store, keys)
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
                        **settings.parts(),
                    }
                    kept = {
                        keys[i][s]: response for (i, s), response in new.items()
                    }  # queries may render alike
                    store.write_responses(list(kept), list(kept.values()), about=about)
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
    """Which responses `sample_responses` would have to sample: (prompts, queries, samples). Loads
    no weights.

    options: those of `sample_responses`.
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
            f"stop_when {settings.stop_when.__qualname__!r} is a function of your own, whose code "
            "no "
            "key in the store knows of: these responses are neither read from the store nor kept; "
            "stop with analysis_lib.verdict_is_final for that",
            stacklevel=4,
        )
        return None
    return store


def _keys(
    model: ChatModel, rows: Sequence[Rendered], n_samples: int, settings: Settings
) -> list[list[str]]:
    """The keys of each row's samples."""
    fixed = {"kind": "response", **model.key_parts(), **settings.parts()}
    fixed |= {
        "stop_ids": sorted(model.stop_ids),
        "stop_strings": list(model.stop_strings),
        "tokenizer": model.renderer.tokenizer_digest,
    }
    of_rows = [row_key(ids=row.ids, soft=row.soft, **fixed) for row in rows]
    return [[row_key(row=key, sample=i) for i in range(n_samples)] for key in of_rows]


def _found(store: Store, keys: Sequence[Sequence[str]]) -> list[list[Any]]:
    """The kept {"response", "end"} of each key; None where there is none."""
    kept = store.read_responses([key for row in keys for key in row])
    kept = {key: row for key, row in kept.items() if {"response", "end"} <= row.keys()}
    return [[kept.get(key) for key in row] for row in keys]


Jobs = dict[int, list[int]]  # row -> sample indices


def _batches(
    model: ChatModel, rows: Sequence[Rendered], todo: Jobs, n_samples: int, max_new_tokens: int
) -> list[Jobs]:
    """Splits the jobs so that even with all samples distinct the key-value cache fits the memory at
    hand.
    """
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
        return _Tree(model, rows, jobs, settings).run()
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


class _Tree:
    """The distinct continuations of some rows, one token a step; a node is one distinct unfinished
    continuation.
    """

    def __init__(self, model: ChatModel, rows: Sequence[Rendered], jobs: Jobs, settings: Settings):
        self.model, self.forward, self.settings = model, model.forward, settings
        self.row_of = list(jobs)
        self.ids = [rows[i].ids for i in self.row_of]
        self.owner = np.concatenate([[r] * len(jobs[i]) for r, i in enumerate(self.row_of)]).astype(
            int
        )  # job -> position in row_of
        self.sample = np.concatenate([jobs[i] for i in self.row_of]).astype(int)
        self.uniform = np.concatenate([_uniforms(rows[i], jobs[i], settings) for i in self.row_of])
        self.done: dict[tuple[int, int], dict[str, str]] = {}

    def run(self) -> dict[tuple[int, int], dict[str, str]]:
        node = self.owner.copy()  # job -> node
        jobs = np.arange(len(node))
        texts: list[tuple[int, ...]] = [()] * len(self.ids)
        step = (CachedStep if steps_from_cache(self.forward) else PlainStep)(self.forward, self.ids)
        logits = step.first()
        for position in range(self.settings.max_new_tokens):
            if not torch.isfinite(
                logits.amax(dim=-1)
            ).all():  # NaN and infinity pass through a maximum
                raise ChatModelError(
                    f"logits of {self.model.name!r} hold NaN or infinity in "
                    f"{self.model.dtype_name}, and nothing of this batch is kept; load "
                    "the model with dtype='float32' or 'bfloat16', or copy its weights again"
                )
            tokens = _choose(logits, node, self.uniform[jobs, position], self.settings)
            pairs, child = np.unique(np.stack([node, tokens]), axis=1, return_inverse=True)
            parents, new = pairs
            grown = [(*texts[p], int(t)) for p, t in zip(parents, new)]
            ends = [self._end(text, position) for text in grown]
            for job, c in zip(jobs, child):
                if ends[c]:
                    key = self.row_of[self.owner[job]], int(self.sample[job])
                    self.done[key] = {"response": self._reply(grown[c], ends[c]), "end": ends[c]}
            alive = np.array([not e for e in ends])
            if not alive.any():
                break
            renumber = np.cumsum(alive) - 1
            keep = alive[child]
            node, jobs = renumber[child[keep]], jobs[keep]
            texts = [text for text, a in zip(grown, alive) if a]
            logits = step.next(parents[alive], new[alive])
        return self.done

    def _end(self, ids: tuple[int, ...], position: int) -> str:
        if ids[-1] in self.model.stop_ids:
            return "eos"
        if self.settings.stop_when is not None or self.model.stop_strings:
            text = self._text(ids)
            if any(stop in text for stop in self.model.stop_strings):
                return "stop_string"
            if self.settings.stop_when is not None and self.settings.stop_when(text):
                return "stop_when"
        return "length" if position + 1 == self.settings.max_new_tokens else ""

    def _text(self, ids: tuple[int, ...]) -> str:
        return str(self.model.tokenizer.decode(ids, skip_special_tokens=True))

    def _reply(self, ids: tuple[int, ...], end: str) -> str:
        text = self._text(ids[:-1] if end == "eos" else ids)
        if end == "stop_string":
            text = text[: min(text.index(stop) for stop in self.model.stop_strings if stop in text)]
        return text.strip()


def _uniforms(row: Rendered, samples: Sequence[int], settings: Settings) -> NDArray[np.float64]:
    """Uniform numbers (len(samples), max_new_tokens) in [0, 1) fixed by the row's tokens, the seed
    and the sample.

    Soft tokens count by their ids, not by their embeddings: soft prompts of one length are compared
    on the same random numbers, and the last bit of a training does not change every text.
    """
    digest = hashlib.sha256(np.array([settings.seed, *row.ids], dtype=np.int64).tobytes()).digest()
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
    return generator.random((max(samples) + 1, settings.max_new_tokens))[list(samples)]


def _choose(
    logits: torch.Tensor, node: NDArray[Any], uniform: NDArray[Any], settings: Settings
) -> NDArray[np.int64]:
    """One token for each sample by inversion of its node's distribution: temperature, then top-k,
    then top-p.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if settings.temperature == 0:
        return logits.argmax(dim=-1).cpu().numpy()[node]
    n_kept = min(settings.top_k or logits.shape[-1], logits.shape[-1])
    values, tokens = (logits / settings.temperature).topk(n_kept, dim=-1)
    p = torch.softmax(values.double(), dim=-1).cpu().numpy()
    before = np.cumsum(p, axis=1) - p
    p = np.where(before < settings.top_p, p, 0.0)
    cumulative = np.cumsum(p, axis=1)
    cumulative /= cumulative[:, -1:]
    kept = (p > 0).sum(axis=1)
    rank = np.minimum((cumulative[node] <= uniform[:, None]).sum(axis=1), kept[node] - 1)
    return tokens.cpu().numpy()[node, rank]
