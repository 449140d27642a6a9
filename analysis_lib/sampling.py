"""Sampled responses, each fixed by its key, sampled together as a tree.

A sample's text depends on the model, the rendered tokens, the settings, the seed and the sample's index, and on
nothing else: its random numbers come from a counter-based generator keyed by these. So samples that have been
equal so far share one computation, and a batch, an order or a resumed run changes no text (up to ties of the
order of floating-point rounding, about one token in a million).
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch.nn.functional import pad

from .capture import (
    TOLERANCE,
    Progress,
    _check_prompts,
    _check_queries,
    _pack_tokens,
    _relative,
    attention_mask,
    common_length,
    plan_rows,
    run_plan,
    shares_prefixes,
    usable,
)
from .chat import ChatModel, ChatModelError, Prompt, Rendered
from .store.batches import row_key
from .store.store import Store

ROOM = 16  # tokens


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
        settings = {k: getattr(self, k) for k in ("max_new_tokens", "temperature", "top_p", "top_k", "seed")}
        return {**settings, "stop_when": "" if self.stop_when is None else _identity(self.stop_when)}


def _identity(function: Callable) -> str:
    """A function's name and the SHA-256 of its code, comments and docstring left out: what a key knows of it."""
    name = f"{function.__module__}.{function.__qualname__}"
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError) as error:
        raise ValueError(
            f"the source of stop_when {name!r} cannot be read ({error}), and is part of the stored responses' key; put it into a module"
        ) from error
    body = tree.body[0].body if isinstance(tree.body[0], ast.FunctionDef) else []
    if len(body) > 1 and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
        del body[0]
    return f"{name}:{hashlib.sha256(ast.unparse(tree).encode()).hexdigest()}"


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

    The defaults are the study's settings. top_p = 1 and top_k = 0 switch the cuts off; temperature = 0 is greedy.
    stop_when: a named function of the text so far; sampling of a response ends where it says True (for example
    `judge.verdict_is_final`, once nothing to come can change the verdict). Its source is part of what a stored response is
    found by, but not the source of what it calls.
    progress: a bar, by default where a terminal or a notebook shows it and something is to be computed.
    ChatModelError where the model's logits hold NaN or infinity.

    Returns [query_id, prompt, sample, response, end]; end is "eos", "stop_string", "length" or "stop_when". Prompts outer,
    queries inner, then samples 0 .. n_samples - 1.
    """
    _check_queries(queries)
    _check_prompts(prompts)
    if n_samples < 1 or max_new_tokens < 1:
        raise ValueError("n_samples and max_new_tokens must be at least 1")
    if not 0 <= temperature < float("inf") or not 0 < top_p <= 1 or top_k < 0:
        raise ValueError(f"temperature {temperature} must be >= 0, top_p {top_p} in (0, 1], top_k {top_k} >= 0")
    if stop_when is not None and (not inspect.isfunction(stop_when) or "<" in stop_when.__qualname__):
        raise ValueError("stop_when must be a named function of a module: its name is part of the stored responses' key")
    settings = Settings(int(max_new_tokens), float(temperature), float(top_p), int(top_k), int(seed), stop_when)
    texts, ids = queries["text"].tolist(), queries["query_id"].tolist()
    table: list[tuple] = []
    bar = Progress(len(prompts) * len(texts) * n_samples, "responses", progress)
    for name, prompt in prompts.items():
        rows = model.render(texts, prompt)
        embeddings = None if isinstance(prompt, str) else prompt.embeddings
        got = sample_rows(model, rows, n_samples, settings, name=name, embeddings=embeddings, store=store, done=bar.add)
        for query_id, responses in zip(ids, got):
            table.extend((query_id, name, s, r["response"], r["end"]) for s, r in enumerate(responses))
    bar.close()
    return pd.DataFrame(table, columns=["query_id", "prompt", "sample", "response", "end"])


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
    """n_samples {"response", "end"} for each rendered row: found in the store, or computed and kept batch by batch.

    name: what the store's listing calls the rows' prompt. embeddings: what their soft tokens stand for. done(found=n) or
    done(computed=n) is called as they come.
    """
    store = usable(store, model)
    got: list[list[Any]] = [[None] * n_samples for _ in rows]
    keys: list[list[str]] = []
    if store is not None:
        fixed = {"kind": "response", **model.key_parts(), **settings.parts()}
        fixed |= {
            "stop_ids": sorted(model.stop_ids),
            "stop_strings": list(model.stop_strings),
            "tokenizer": model.tokenizer_digest,
        }
        keys = [
            [row_key(row=key, sample=i) for i in range(n_samples)]
            for key in (row_key(ids=r.ids, soft=r.soft, **fixed) for r in rows)
        ]
        found = store.read_responses([k for row in keys for k in row])
        found = {key: row for key, row in found.items() if {"response", "end"} <= row.keys()}
        got = [[found.get(k) for k in row] for row in keys]
    todo = {i: [s for s in range(n_samples) if got[i][s] is None] for i in range(len(rows))}
    todo = {i: samples for i, samples in todo.items() if samples}
    done(found=len(rows) * n_samples - sum(map(len, todo.values())))
    if todo:
        with torch.no_grad(), model.soft_tokens(embeddings):
            for batch in _batches(model, rows, todo, n_samples, settings.max_new_tokens):
                new = _sample_batch(model, rows, batch, settings)
                for (i, s), response in new.items():
                    got[i][s] = response
                if store is not None:
                    about = {"model": model.fingerprint, "model_name": model.name, "prompts": [name], **settings.parts()}
                    kept = {keys[i][s]: response for (i, s), response in new.items()}  # queries may render alike
                    store.write_responses(list(kept), list(kept.values()), about=about)
                done(computed=len(new))
    return got


Jobs = dict[int, list[int]]  # row -> sample indices


def _batches(model: ChatModel, rows: Sequence[Rendered], todo: Jobs, n_samples: int, max_new_tokens: int) -> list[Jobs]:
    """Splits the jobs so that even with all samples distinct the key-value cache fits the memory at hand."""
    config = model.text_config
    n_heads = getattr(config, "num_attention_heads", None) or 1  # a recurrent model has none
    heads = getattr(config, "num_key_value_heads", None) or n_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // n_heads
    per_token = 2 * model.n_layers * heads * head_dim * torch.finfo(model.dtype).bits // 8
    order = sorted(todo, key=lambda i: rows[i].ids)
    own = max(len(rows[i].ids) for i in todo) - common_length(rows[order[0]].ids, rows[order[-1]].ids)
    free = torch.cuda.mem_get_info(model.device)[0] if model.device.type == "cuda" else 4 << 30
    size = max(1, int(0.3 * free) // (per_token * (own + min(max_new_tokens, 64)) * n_samples))
    return [{i: todo[i] for i in order[at : at + size]} for at in range(0, len(order), size)]


def _sample_batch(model: ChatModel, rows: Sequence[Rendered], jobs: Jobs, settings: Settings) -> dict[tuple[int, int], dict]:
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
    """The distinct continuations of some rows, one token a step; a node is one distinct unfinished continuation."""

    def __init__(self, model: ChatModel, rows: Sequence[Rendered], jobs: Jobs, settings: Settings):
        self.model, self.settings = model, settings
        self.row_of = list(jobs)
        self.ids = [rows[i].ids for i in self.row_of]
        self.owner = np.concatenate([[r] * len(jobs[i]) for r, i in enumerate(self.row_of)]).astype(
            int
        )  # job -> position in row_of
        self.sample = np.concatenate([jobs[i] for i in self.row_of]).astype(int)
        self.uniform = np.concatenate([_uniforms(rows[i], jobs[i], settings) for i in self.row_of])
        self.done: dict[tuple[int, int], dict] = {}

    def run(self) -> dict[tuple[int, int], dict]:
        node = self.owner.copy()  # job -> node
        jobs = np.arange(len(node))
        texts: list[tuple[int, ...]] = [()] * len(self.ids)
        step = (_CachedStep if steps_from_cache(self.model) else _PlainStep)(self.model, self.ids)
        logits = step.first()
        for position in range(self.settings.max_new_tokens):
            if not torch.isfinite(logits.amax(dim=-1)).all():  # NaN and infinity pass through a maximum
                raise ChatModelError(
                    f"logits of {self.model.name!r} hold NaN or infinity in {self.model.dtype_name}, and nothing of this batch is kept; load "
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


class _CachedStep:
    """Next-token logits with one row of keys and values per node for its own tokens; the common prefix is kept once for all.

    A row holds the tokens after the prefix, padded on the left, the sampled ones, and room for up to ROOM more.
    """

    def __init__(self, model: ChatModel, ids: Sequence[tuple[int, ...]]):
        self.model, self.ids = model, ids

    def first(self) -> torch.Tensor:
        plan = plan_rows(self.ids, _pack_tokens(self.model))
        length = len(plan.prefix)
        width = max(len(path) for pack in plan.packs for path in pack.paths)
        n, device = len(self.ids), self.model.device
        logits: list[torch.Tensor | None] = [None] * n
        own: list[list[torch.Tensor | None]] = []  # keys, then values, layer by layer -> row -> (heads, width, d)
        self.prefix: list[torch.Tensor] = []  # keys, then values, layer by layer: (heads, length, d)
        self.see = torch.zeros(n, width, dtype=torch.bool, device=device)
        self.positions = torch.zeros(n, width, dtype=torch.long, device=device)
        for pack, ends, cache in run_plan(self.model, plan, logits_at=lambda pack: [p[-1] for p in pack.paths]):
            both = [kv[0] for layer in cache.layers for kv in (layer.keys, layer.values)]
            self.prefix = self.prefix or [kv[:, :length] for kv in both]
            own = own or [[None] * n for _ in both]
            for member, (i, path) in enumerate(zip(pack.rows, pack.paths)):
                logits[i] = ends[member]
                at = torch.tensor([0] * (width - len(path)) + [length + p for p in path], device=device)
                for j, kv in enumerate(both):
                    own[j][i] = kv[:, at.to(kv.device)]
                self.see[i, width - len(path) :] = True
                self.positions[i, width - len(path) :] = torch.arange(length, length + len(path), device=device)
        self.own = [torch.stack(rows) for rows in own]  # type: ignore[arg-type]
        self.length = width
        return torch.stack(logits)  # type: ignore[arg-type]

    def next(self, parents: NDArray, tokens: NDArray) -> torch.Tensor:
        from transformers import DynamicCache

        device = self.model.device
        chosen = torch.from_numpy(parents).to(device)
        if len(chosen) != len(self.see) or (parents != np.arange(len(parents))).any():
            self.see, self.positions = self.see[chosen], self.positions[chosen]
            for j, kv in enumerate(self.own):
                self.own[j] = kv.index_select(0, chosen.to(kv.device))
        if self.length == self.see.shape[1]:
            self.see, self.positions = pad(self.see, (0, ROOM)), pad(self.positions, (0, ROOM))
            for j, kv in enumerate(self.own):
                self.own[j] = pad(kv, (0, 0, 0, ROOM))
        here = self.positions[:, self.length - 1, None] + 1
        self.see[:, self.length], self.positions[:, self.length] = True, here[:, 0]
        with _attending(self.model, self.prefix, self.own, self.length, here):
            out = self.model.model(
                input_ids=torch.from_numpy(tokens).to(device)[:, None],
                position_ids=here,
                attention_mask=attention_mask(self.model, self.see[:, None], here, self.positions),
                past_key_values=DynamicCache(),
                use_cache=True,
                logits_to_keep=1,
            )
        self.length += 1
        return out.logits[:, -1]


def steps_from_cache(model: ChatModel) -> bool:
    """Whether a cached step gives this architecture's own logits: asked of the model itself, once. Others sample plainly, and slowly.

    No, for example, where attention does not go through the interface of transformers, or has sinks.
    """
    known = model.__dict__.get("_steps_from_cache")
    if known is None:
        known = shares_prefixes(model)
        n = model.n_embeddings
        rows = [tuple(j * 7 % n for j in range(1, 8)), (*(j * 7 % n for j in range(1, 6)), 3 % n)]
        steps = [(np.array([0, 1, 1]), np.array([5, 2, 9]) % n), (np.array([0, 2]), np.array([4, 11]) % n)]
        try:
            with torch.no_grad():
                ways = [kind(model, rows) for kind in (_CachedStep, _PlainStep)] if known else []
                pairs = [[way.first() for way in ways], *([way.next(*step) for way in ways] for step in steps)] if known else []
            limit = TOLERANCE.get(model.dtype_name, 1e-3)
            known = known and all(_relative(cached.float(), plain.float()) <= limit for cached, plain in pairs)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # an architecture that attends in its own way fails in its own way
            known = False
        model.__dict__["_steps_from_cache"] = known
    return bool(known)


@contextmanager
def _attending(
    model: ChatModel, prefix: list[torch.Tensor], own: list[torch.Tensor], length: int, here: torch.Tensor
) -> Iterator[None]:
    """Within this context, one new token per row is put behind the row's `length` own tokens, and sees these and the prefix.

    prefix, own: keys, then values, layer by layer: (heads, tokens, d) and (rows, heads, tokens and room, d); here: the new
    tokens' positions (rows, 1).
    """
    from transformers import AttentionInterface

    def attend(
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor,
        scaling: float,
        **options: Any,
    ) -> tuple[torch.Tensor, None]:
        """query (rows, heads, 1, d); key, value (rows, kv heads, 1, d); mask (rows, 1, 1, own). Exact softmax over both parts."""
        rows, heads, _, d = query.shape
        layer = slice(2 * module.layer_idx, 2 * module.layer_idx + 2)
        shared_key, shared_value = prefix[layer]
        own_key, own_value = own[layer]
        own_key[:, :, length], own_value[:, :, length] = key[:, :, 0], value[:, :, 0]
        kv_heads, n_shared = shared_key.shape[:2]
        query = query.reshape(rows, kv_heads, heads // kv_heads, d)
        stacked = query.transpose(0, 1).reshape(kv_heads, -1, d)  # all rows against the prefix in one product a head
        shared = (stacked @ shared_key.transpose(1, 2)).view(kv_heads, rows, -1, n_shared).transpose(0, 1)
        scores = torch.cat([shared, query @ own_key.transpose(2, 3)], dim=-1) * scaling
        if options.get("softcap"):
            scores = torch.tanh(scores / options["softcap"]) * options["softcap"]
        scores[..., n_shared:] += mask
        if options.get("sliding_window"):
            far = here - torch.arange(n_shared, device=here.device) >= options["sliding_window"]
            scores[..., :n_shared].masked_fill_(far[:, None, None].to(scores.device), torch.finfo(scores.dtype).min)
        weight = torch.softmax(scores, dim=-1, dtype=model.work_dtype).to(value.dtype)
        stacked = weight[..., :n_shared].transpose(0, 1).reshape(kv_heads, -1, n_shared)
        out = (stacked @ shared_value).view(kv_heads, rows, -1, d).transpose(0, 1) + weight[..., n_shared:] @ own_value
        return out.reshape(rows, 1, heads, d), None

    AttentionInterface.register("analysis_lib_shared_prefix", attend)
    config = model.model.config
    configs = {id(c): c for c in (config, config.get_text_config(decoder=True))}.values()
    before = [c._attn_implementation for c in configs]
    for config in configs:
        config._attn_implementation = "analysis_lib_shared_prefix"
    try:
        yield
    finally:
        for config, name in zip(configs, before):
            config._attn_implementation = name


class _PlainStep:
    """Next-token logits without a cache, whole rows in batches of equal length: right for every architecture, and slow."""

    def __init__(self, model: ChatModel, ids: Sequence[tuple[int, ...]]):
        self.model, self.rows = model, [tuple(r) for r in ids]

    def first(self) -> torch.Tensor:
        out: list[torch.Tensor | None] = [None] * len(self.rows)
        for length in sorted(set(map(len, self.rows))):
            members = [i for i, r in enumerate(self.rows) if len(r) == length]
            for at in range(0, len(members), 32):
                part = members[at : at + 32]
                ids = torch.tensor([self.rows[i] for i in part], device=self.model.device)
                for i, row in zip(part, self.model.model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1]):
                    out[i] = row
        return torch.stack(out)  # type: ignore[arg-type]

    def next(self, parents: NDArray, tokens: NDArray) -> torch.Tensor:
        self.rows = [(*self.rows[p], int(t)) for p, t in zip(parents, tokens)]
        return self.first()


def _uniforms(row: Rendered, samples: Sequence[int], settings: Settings) -> NDArray[np.float64]:
    """Uniform numbers (len(samples), max_new_tokens) in [0, 1) fixed by the row's tokens, the seed and the sample.

    Soft tokens count by their ids, not by their embeddings: soft prompts of one length are compared on the same random
    numbers, and the last bit of a training does not change every text.
    """
    digest = hashlib.sha256(np.array([settings.seed, *row.ids], dtype=np.int64).tobytes()).digest()
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
    return generator.random((max(samples) + 1, settings.max_new_tokens))[list(samples)]


def _choose(logits: torch.Tensor, node: NDArray, uniform: NDArray, settings: Settings) -> NDArray[np.int64]:
    """One token for each sample by inversion of its node's distribution: temperature, then top-k, then top-p."""
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
