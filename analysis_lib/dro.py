"""Directed Representation Optimization of a safety prompt, and the prompt-tuning baseline.

Both train the embeddings of the system message's tokens and nothing else. In each step the prefix with the soft
tokens runs once, and every distinct token after it once (see `capture`).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from .capture import (
    Pack,
    Progress,
    _backward_tokens,
    _check_queries,
    _line_tokens,
    last_states,
    plan_rows,
    run_plan,
    shares_prefixes,
    usable,
)
from .chat import ChatModel, ChatModelError, _read_template, study_models
from .data import load_safety_prompts
from .space import AnchorSpace, Direction
from .store.batches import StoreError, row_key
from .store.store import Store

CHECKPOINT_SECONDS = 30.0  # the least time between two checkpoints of a training
# Names of the study's published files; "type" is there for DRO and lacks for the prompt-tuning baseline.
_PUBLISHED = re.compile(r"(?:type\.(?P<type>\w+)_)?length\.(?P<length>default|short|mistral)(?P<ablation>_no\w+)?\.safetensors")

OnStep = Callable[[dict[str, float], NDArray[np.float32]], bool | None]


class SoftPromptError(ValueError):
    """A file holds no soft prompt; the message says what to give."""


@dataclass(frozen=True)
class SoftPrompt:
    """A safety prompt as trained embeddings; it goes wherever a safety prompt's text goes.

    embeddings  (length, d) float32, rows of the input embedding space
    start_text  the text prompt whose tokens' place it takes, and where its training began
    model       fingerprint of the model it belongs to;  model_name for people
    config      the training's configuration;  history one row a step: step, epoch, losses, gradient norm
    template    SHA-256 of the chat template it was trained in; "" where it was not recorded
    """

    name: str
    embeddings: NDArray[np.float32]
    start_text: str
    model: str
    model_name: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    history: pd.DataFrame = field(default_factory=pd.DataFrame)
    template: str = ""

    def __post_init__(self) -> None:
        shape = np.shape(self.embeddings)
        if len(shape) != 2 or not shape[0]:
            raise ValueError(f"soft prompt {self.name!r} has embeddings of shape {shape}; (length, d) with length >= 1 is needed")
        if not np.isfinite(self.embeddings).all():
            raise ValueError(f"soft prompt {self.name!r} holds NaN or infinity; train again with a smaller learning rate")

    @classmethod
    def from_text(cls, model: ChatModel, text: str, *, name: str) -> SoftPrompt:
        """The soft prompt equal to a text prompt: the embeddings of its tokens exactly as rendered in context."""
        return cls(name, model.embed_text(text), text, model.fingerprint, model.name, template=model.template_digest)

    def check(self, model: ChatModel) -> None:
        """Raises ChatModelError where it was trained on another model, or in another chat template."""
        if self.model != model.fingerprint:
            raise ChatModelError(
                f"the soft prompt {self.name!r} was trained on {self.model_name!r} ({self.model[:12]}) and cannot be used on "
                f"{model.name!r} ({model.fingerprint[:12]}); load the model it was trained on"
            )
        if self.template and self.template != (found := model.template_digest):
            raise ChatModelError(
                f"the soft prompt {self.name!r} was trained in the chat template {self.template[:12]} and cannot be used in {found[:12]}, "
                f"which {model.name!r} has now; load the model with the chat template it was trained with"
            )

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file: tensor `soft_prompt` (length, d), all else as JSON in the metadata."""
        from safetensors.numpy import save

        meta = {k: getattr(self, k) for k in ("name", "start_text", "model", "model_name", "template")}
        meta |= {"config": json.dumps(dict(self.config)), "history": json.dumps(self.history.to_dict("split", index=False))}
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{os.getpid()}")
        part.write_bytes(save({"soft_prompt": np.ascontiguousarray(self.embeddings, dtype=np.float32)}, metadata=meta))
        part.replace(path)

    @classmethod
    def load(cls, path: str | Path, model: ChatModel | None = None) -> SoftPrompt:
        """Reads what `save` wrote, or a soft prompt published with the study (give its model: see `_published`).

        With a model given, raises ChatModelError when it was trained on another one or in another chat template.
        """
        from safetensors import safe_open

        try:
            with safe_open(path, framework="pt") as file:  # the published ones are bfloat16, which numpy has not
                meta, embeddings = file.metadata() or {}, file.get_tensor("soft_prompt").float().numpy()
            if "start_text" not in meta and (named := _PUBLISHED.fullmatch(Path(path).name)):
                return cls._published(Path(path), embeddings, named, model)
            config, history = json.loads(meta["config"]), pd.DataFrame(**json.loads(meta["history"]))
            names = {k: meta[k] for k in ("name", "start_text", "model", "model_name")}
            soft = cls(embeddings=embeddings, config=config, history=history, template=meta.get("template", ""), **names)
        except (FileNotFoundError, ChatModelError):
            raise
        except Exception as error:
            raise SoftPromptError(
                f"{path} is no soft prompt of this library ({error}); give a file that SoftPrompt.save wrote"
            ) from error
        if model is not None:
            soft.check(model)
        return soft

    @classmethod
    def _published(cls, path: Path, embeddings: NDArray[np.float32], named: re.Match[str], model: ChatModel | None) -> SoftPrompt:
        """One of the study's 48 (github.com/chujiezheng/LLM-Safeguard_data): the folder names the model, the file the start prompt."""
        if model is None:
            raise ChatModelError(f"{path.name} does not say which model it belongs to; load it with SoftPrompt.load(path, model)")
        if embeddings.shape[1:] != (model.hidden_size,):
            raise ChatModelError(
                f"{path} has embeddings of shape {embeddings.shape}, those of {model.name!r} have {model.hidden_size} dimensions; "
                f"load the model it was trained on"
            )
        folder, study = path.parent.name, study_models().set_index("model")
        if folder in study.index:
            hub_id, template = str(study.loc[folder, "hub_id"]), str(study.loc[folder, "template"])
            chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
            theirs = model.tokenizer.apply_chat_template(
                chat, tokenize=False, add_generation_prompt=True, chat_template=_read_template(template)
            )
            if model.source in set(study["hub_id"]) - {hub_id} or model._apply("s", "q") != theirs:
                raise ChatModelError(
                    f"{path} was trained on {folder!r} in the chat template {template!r} and cannot be used on {model.name!r} in "
                    f"{model.template!r}; open the model with ChatModel.load({folder!r}), or its folder with template={template!r}"
                )
        method = "prompt tuning" if named["type"] is None else "DRO"
        config = {"method": method, "published": f"{folder}/{path.name}"}
        name = f"{'tuned' if named['type'] is None else 'dro'}_{named['length']}{named['ablation'] or ''}"
        start = load_safety_prompts()[named["length"]]
        return cls(name, embeddings, start, model.fingerprint, model.name, config, template=model.template_digest)


@dataclass(frozen=True)
class DROConfig:
    """The study's settings. A loss of weight 0 is left out: the ablations are rows of weights."""

    learning_rate: float = 1e-3
    epochs: int = 40
    batch_size: int = 50
    weight_refusal: float = 1.0
    weight_harmfulness: float = 0.01
    weight_norm: float = 0.001
    max_grad_norm: float = 1.0
    seed: int = 42

    def __post_init__(self) -> None:
        _check_config(self)
        if not self.weight_refusal + self.weight_harmfulness + self.weight_norm > 0:
            raise ValueError("all three losses have weight 0, so there is nothing to train; give one a weight")


@dataclass(frozen=True)
class PromptTuningConfig:
    """Vanilla prompt tuning: likelihood of good responses, unlikelihood of bad ones.

    batch_size counts queries: all responses of a query fall into one step, where their common tokens are shared.
    """

    learning_rate: float = 1e-3
    epochs: int = 5
    batch_size: int = 10
    weight_unlikelihood: float = 1.0
    max_response_tokens: int = 100
    max_grad_norm: float = 1.0
    seed: int = 42

    def __post_init__(self) -> None:
        _check_config(self)


def dro_loss(
    states: torch.Tensor, base: torch.Tensor, harmful: torch.Tensor, geometry: Geometry, config: DROConfig
) -> tuple[torch.Tensor, dict[str, float]]:
    """The DRO loss of states (n, d) under the soft prompt against base (n, d) under the text prompt.

    BCE of the change of the refusal logit (target 1 for harmful, 0 for harmless), the same for harmfulness, and the
    mean square change in the d - k other directions, with the configuration's weights. harmful: (n,) of 0.0 and 1.0.
    """
    new, old = (states - geometry.mean) @ geometry.basis, (base - geometry.mean) @ geometry.basis
    k = len(geometry.refusal)
    change = new - old
    parts = {
        "refusal": F.binary_cross_entropy_with_logits(change[:, :k] @ geometry.refusal, harmful),
        "harmfulness": F.binary_cross_entropy_with_logits(change[:, :k] @ geometry.harmfulness, harmful),
        "norm": change[:, k:].pow(2).mean(),
    }
    loss = sum(getattr(config, f"weight_{name}") * value for name, value in parts.items())
    assert isinstance(loss, torch.Tensor)
    return loss, {"loss": loss.item(), **{name: value.item() for name, value in parts.items()}}


@dataclass(frozen=True)
class Geometry:
    """Anchor space and directions as tensors: mean (d,), basis (d, d), refusal (k,), harmfulness (k,)."""

    mean: torch.Tensor
    basis: torch.Tensor
    refusal: torch.Tensor
    harmfulness: torch.Tensor

    @classmethod
    def of(
        cls,
        space: AnchorSpace,
        refusal: Direction,
        harmfulness: Direction,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> Geometry:
        arrays = (space.mean, space.basis, refusal.weight, harmfulness.weight)
        return cls(*(torch.tensor(a, dtype=dtype, device=device) for a in arrays))


def train_dro(
    model: ChatModel,
    queries: pd.DataFrame,
    prompt: str,
    space: AnchorSpace,
    refusal: Direction,
    harmfulness: Direction,
    config: DROConfig | None = None,
    *,
    name: str = "dro",
    store: Store | None = None,
    on_step: OnStep | None = None,
    progress: bool | None = None,
) -> SoftPrompt:
    """Trains a soft prompt that starts at the text `prompt`, on queries with a harmful label.

    Soft prompt and optimizer are float32 whatever the model's dtype (float64 in a float64 model). on_step(losses, embeddings) is called after
    each step; when it returns True, training ends and what was learned is returned. Equal inputs give equal results
    on one machine; with a store, a finished training of equal inputs is read instead of repeated (no weights are loaded and
    no step is taken), and one that was killed or stopped goes on from the last epoch that ended CHECKPOINT_SECONDS or more after
    the one kept before it.
    """
    config = config or DROConfig()
    _check_queries(queries, "harmful")
    if len(space.mean) != model.hidden_size:
        raise ValueError(
            f"the space has {len(space.mean)} dimensions, the states of {model.name!r} have {model.hidden_size}; fit it to this model's states"
        )
    labelled = queries[queries["harmful"].notna()]
    labels = labelled["harmful"].astype(float).tolist()
    if len(set(labels)) < 2:
        raise ValueError("DRO needs queries of both classes in the column harmful; 'anchor' has 100 of each")
    if not len(refusal.weight) == len(harmfulness.weight) == space.k:
        raise ValueError(
            f"the space has {space.k} components, the directions {len(refusal.weight)} and {len(harmfulness.weight)}; fit them in it"
        )
    texts = labelled["text"].tolist()
    inputs = [space.mean, space.basis, refusal.weight, harmfulness.weight]
    kept = _Kept(store, "DRO", model, prompt, config, texts, labels, [_digest(a) for a in inputs])
    if (known := kept.read(name)) is not None:
        return known
    geometry = Geometry.of(space, refusal, harmfulness, model.device, model.work_dtype)
    harmful = torch.tensor(labels, dtype=model.work_dtype, device=model.device)
    start = SoftPrompt.from_text(model, prompt, name=name)
    with torch.no_grad(), model.soft_tokens(None):
        base = last_states(model, [r.ids for r in model.render(texts, prompt)])[0][:, 0].to(model.work_dtype)
    rows = [r.ids for r in model.render(texts, start)]

    def step(batch: NDArray) -> dict[str, float]:
        """Gradients of the batch's mean loss, part by part; returns its losses."""
        total: dict[str, float] = {}
        for members, states in _parts(model, [rows[i] for i in batch]):
            chosen = torch.from_numpy(batch[members]).to(model.device)
            loss, losses = dro_loss(states.to(model.work_dtype), base[chosen], harmful[chosen], geometry, config)
            share = len(members) / len(batch)
            (share * loss).backward()
            total = {key: total.get(key, 0.0) + share * value for key, value in losses.items()}
        return total

    return _train(model, start, config, len(texts), step, kept, on_step, progress, "DRO")


def _parts(model: ChatModel, rows: Sequence[tuple[int, ...]]) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Positions of some rows and their last-token states (m, d); backward runs on each part before the next is asked for."""
    if not shares_prefixes(model):
        yield list(range(len(rows))), last_states(model, rows)[0][:, 0]
        return
    plan = plan_rows(rows, _backward_tokens(model), line_tokens=_line_tokens(model))
    for pack, states, _ in run_plan(model, plan, backward_by_pack=True):
        yield pack.rows, states[:, 0]


def train_prompt_tuning(
    model: ChatModel,
    queries: pd.DataFrame,
    judged: pd.DataFrame,
    prompt: str,
    config: PromptTuningConfig | None = None,
    *,
    name: str = "prompt_tuning",
    store: Store | None = None,
    on_step: OnStep | None = None,
    progress: bool | None = None,
) -> SoftPrompt:
    """The baseline: trains a soft prompt that starts at the text `prompt` on judged responses to the same queries.

    judged: [query_id, response, refused] and optionally end. A refused harmful query and an answered harmless one
    are good responses (likelihood), the others bad ones (unlikelihood); unscored responses are left out.
    """
    config = config or PromptTuningConfig()
    _check_queries(queries, "harmful")
    if lacking := {"query_id", "response", "refused"} - set(judged.columns):
        raise ValueError(f"the judged responses lack the column {', '.join(sorted(lacking))}; make them with judge_responses")
    table = judged.merge(queries[["query_id", "text", "harmful"]], on="query_id", suffixes=("", "_query"))
    table = table[table["refused"].notna() & table["harmful"].notna()]
    if table.empty:
        raise ValueError("no judged response belongs to a labelled query; judge responses to the same queries first")
    columns = [
        table[c].astype(str).tolist() for c in ("text", "harmful", "response", "refused", *(["end"] if "end" in table else []))
    ]
    kept = _Kept(store, "prompt tuning", model, prompt, config, *columns)
    if (known := kept.read(name)) is not None:
        return known
    if not shares_prefixes(model):
        raise ChatModelError(f"prompt tuning needs a model whose tokens can share a prefix; {model.name!r} cannot")
    start = SoftPrompt.from_text(model, prompt, name=name)
    good = (table["refused"] == 1) == table["harmful"].astype(bool)
    names = table["query_id"].drop_duplicates().tolist()
    heads = dict(zip(names, (r.ids for r in model.render(table.drop_duplicates("query_id")["text"].tolist(), start))))
    replies = model.tokenizer(table["response"].tolist(), add_special_tokens=False)["input_ids"]
    ends = table["end"].tolist() if "end" in table else ["eos"] * len(table)
    stop = [] if model.tokenizer.eos_token_id is None else [model.tokenizer.eos_token_id]
    members: dict[str, dict[tuple[tuple[int, ...], bool], int]] = {n: {} for n in names}  # distinct reply, good -> count
    for query_id, reply, end, is_good in zip(table["query_id"], replies, ends, good):
        ids = tuple((list(reply) + (stop if end == "eos" else []))[: config.max_response_tokens])
        if ids:
            members[query_id][ids, bool(is_good)] = members[query_id].get((ids, bool(is_good)), 0) + 1
    names = [n for n in names if members[n]]
    if not names:
        raise ValueError("every judged response is empty; sample responses to train on first")

    def step(batch: NDArray) -> dict[str, float]:
        rows, targets = [], []
        for i in batch:
            for (reply, is_good), count in members[names[i]].items():
                rows.append((*heads[names[i]], *reply[:-1]))
                targets.append((reply, is_good, count))
        return _tuning_loss(model, rows, targets, config)

    return _train(model, start, config, len(names), step, kept, on_step, progress, "prompt tuning")


def _tuning_loss(
    model: ChatModel,
    rows: Sequence[tuple[int, ...]],
    targets: Sequence[tuple[tuple[int, ...], bool, int]],
    config: PromptTuningConfig,
) -> dict[str, float]:
    """Gradients of the mean token losses of good and of bad replies; returns the losses. targets: (reply, good, count) a row."""
    most = min(len(row) - len(reply) for row, (reply, _, _) in zip(rows, targets, strict=True))  # the heads but their last token
    plan = plan_rows(rows, _backward_tokens(model), most=most)
    n_tokens = {kind: max(1, sum(count * len(reply) for reply, good, count in targets if good is kind)) for kind in (True, False)}
    weights = {True: 1.0, False: config.weight_unlikelihood}
    sums = {True: 0.0, False: 0.0}

    def reply_nodes(pack: Pack) -> list[int]:
        return sorted({node for i, path in zip(pack.rows, pack.paths) for node in path[-len(targets[i][0]) :]})

    for pack, logits, _ in run_plan(model, plan, logits_at=reply_nodes, backward_by_pack=True):
        place = {node: j for j, node in enumerate(reply_nodes(pack))}
        log_p = torch.log_softmax(logits.to(model.work_dtype), dim=-1)
        losses = []
        for kind in (True, False):
            chosen = [(path, *targets[i]) for i, path in zip(pack.rows, pack.paths) if targets[i][1] is kind]
            if not chosen:
                continue
            at = [place[node] for path, reply, _, _ in chosen for node in path[-len(reply) :]]
            tokens = [token for _, reply, _, _ in chosen for token in reply]
            counts = torch.tensor(
                [float(count) for _, reply, _, count in chosen for _ in reply], dtype=log_p.dtype, device=log_p.device
            )
            likely = log_p[at, tokens]
            loss = -likely if kind else -torch.log((1 - likely.exp()).clamp(min=1e-5))
            mean = (loss * counts).sum() / n_tokens[kind]
            sums[kind] += mean.item()
            losses.append(weights[kind] * mean)
        torch.stack(losses).sum().backward()
    return {"loss": sums[True] + weights[False] * sums[False], "likelihood": sums[True], "unlikelihood": sums[False]}


def _train(
    model: ChatModel,
    start: SoftPrompt,
    config: DROConfig | PromptTuningConfig,
    n: int,
    step_of: Callable[[NDArray], dict[str, float]],
    kept: _Kept,
    on_step: OnStep | None,
    progress: bool | None,
    label: str,
) -> SoftPrompt:
    """AdamW on the soft embeddings over shuffled batches of 0 .. n - 1; gradients clipped after backward. A whole run is kept."""
    soft = torch.nn.Parameter(torch.tensor(start.embeddings, dtype=model.work_dtype, device=model.device))
    optimizer = torch.optim.AdamW([soft], lr=config.learning_rate)
    history: list[dict[str, float]] = []
    batches = list(_shuffled(n, config.batch_size, config.epochs, config.seed))
    bar = Progress(len(batches), label, progress)
    history.extend(kept.resume(config.epochs, soft, optimizer))
    bar.add(found=len(history))
    last = time.monotonic()
    for step, (epoch, batch) in enumerate(batches[len(history) :], len(history) + 1):
        optimizer.zero_grad()
        with model.soft_tokens(soft):
            losses = step_of(batch)
        norm = torch.nn.utils.clip_grad_norm_([soft], config.max_grad_norm)
        if not torch.isfinite(norm):
            raise FloatingPointError(
                f"the gradient became NaN or infinite at step {step}; lower learning_rate ({config.learning_rate:g})"
            )
        optimizer.step()
        history.append({"step": step, "epoch": epoch, **losses, "gradient_norm": float(norm)})
        bar.add(computed=1)
        if on_step is not None and on_step(history[-1], soft.detach().float().cpu().numpy().copy()):
            break
        ended = step < len(batches) and batches[step][0] > epoch
        if ended and time.monotonic() - last >= CHECKPOINT_SECONDS:
            try:
                kept.keep(epoch, soft, optimizer, history, start.name)
            except StoreError as error:
                warnings.warn(f"no checkpoint of the training of {start.name!r} is kept: {error}", stacklevel=3)
            last = time.monotonic()
    bar.close()
    learned = soft.detach().float().cpu().numpy()
    trained = replace(start, embeddings=learned, config={"method": label, **asdict(config)}, history=pd.DataFrame(history))
    if len(history) == len(batches):
        try:
            kept.write(trained)
        except StoreError as error:  # the training is done: it must not be lost with the place to keep it
            warnings.warn(f"the training of {trained.name!r} is returned but not kept: {error}", stacklevel=3)
    return trained


class _Kept:
    """A trained soft prompt in the store, under the key of all that its training depends on: its embeddings, then all else.

    While it trains, a checkpoint: soft tokens and the optimizer's two moments, bit for bit, after a row with the history.
    """

    def __init__(self, store: Store | None, method: str, model: ChatModel, prompt: str, config: Any, *inputs: Any):
        store = usable(store, model)
        self.store, self.model = store, model
        self.checkpoint: list[str] = []  # keys of the last one
        if store is not None:
            parts = {"kind": "soft_prompt", "method": method, **model.key_parts()}
            ids = model.render(["x"], prompt)[0].ids
            self.key = row_key(
                ids=ids, prompt=prompt, config=json.dumps(asdict(config), sort_keys=True), inputs=json.dumps(inputs), **parts
            )

    def _tokens(self, length: int) -> list[str]:
        return [row_key(training=self.key, token=i) for i in range(length)]

    def read(self, name: str) -> SoftPrompt | None:
        row = None if self.store is None else self.store.read_responses([self.key]).get(self.key)
        if self.store is None or row is None:
            return None
        keys = self._tokens(row.pop("length"))
        found = self.store.read_states(keys)
        if len(found) < len(keys):
            return None
        row["history"] = pd.DataFrame(**row["history"])
        return SoftPrompt(name, np.stack([found[key] for key in keys]), model=self.model.fingerprint, **row)

    def _checkpoint_key(self, epoch: int) -> str:
        return row_key(training=self.key, checkpoint=epoch)

    def _checkpoint_keys(self, epoch: int, shape: Sequence[int]) -> list[str]:
        return [row_key(checkpoint=self._checkpoint_key(epoch), row=i) for i in range(3 * shape[0])]

    def resume(self, epochs: int, soft: torch.Tensor, optimizer: torch.optim.Optimizer) -> list[dict[str, float]]:
        """Puts the last checkpoint into soft and optimizer; returns the history until there, empty without one."""
        if self.store is None:
            return []
        epoch_of = {self._checkpoint_key(epoch): epoch for epoch in range(epochs, 0, -1)}
        for key, row in self.store.read_responses(list(epoch_of)).items():
            keys = self._checkpoint_keys(epoch_of[key], soft.shape)
            found = self.store.read_states(keys)
            if len(found) == len(keys):
                bits = np.stack([found[k] for k in keys]).view(np.float64 if soft.dtype == torch.float64 else np.float32)
                values, mean, square = torch.from_numpy(bits).to(soft.device).reshape(3, *soft.shape)
                soft.data.copy_(values)
                history = pd.DataFrame(**row["history"]).to_dict("records")
                self.checkpoint = [key, *keys]
                optimizer.state[soft] = {"step": torch.tensor(float(len(history))), "exp_avg": mean, "exp_avg_sq": square}
                return history  # type: ignore[return-value]
        return []

    def keep(
        self, epoch: int, soft: torch.Tensor, optimizer: torch.optim.Optimizer, history: list[dict[str, float]], name: str
    ) -> None:
        """Keeps a checkpoint in place of the last one."""
        if self.store is None:
            return
        key, keys = self._checkpoint_key(epoch), self._checkpoint_keys(epoch, soft.shape)
        parts = [soft.detach(), *(optimizer.state[soft][part] for part in ("exp_avg", "exp_avg_sq"))]
        bits = torch.cat(parts).cpu().numpy().view(np.float32)
        about = {"model": self.model.fingerprint, "model_name": self.model.name, "prompts": [name], "layer": "checkpoint"}
        row = {"history": pd.DataFrame(history).to_dict("split", index=False)}
        self.store.write_responses([key], [row], about=about)
        self.store.write_states(keys, bits, dtype="float32", about=about)
        self.store.discard(self.checkpoint)
        self.checkpoint = [key, *keys]

    def write(self, soft: SoftPrompt) -> None:
        if self.store is None:
            return
        about = {"model": soft.model, "model_name": soft.model_name, "prompts": [soft.name], "layer": "soft tokens"}
        self.store.write_states(self._tokens(len(soft.embeddings)), soft.embeddings, dtype="float32", about=about)
        row = {k: getattr(soft, k) for k in ("start_text", "model_name", "template")}
        row |= {
            "config": dict(soft.config),
            "history": soft.history.to_dict("split", index=False),
            "length": len(soft.embeddings),
        }
        self.store.write_responses([self.key], [row], about=about)
        self.store.discard(self.checkpoint)


def _digest(array: NDArray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array, dtype=np.float64).tobytes()).hexdigest()


def _shuffled(n: int, batch_size: int, epochs: int, seed: int) -> Iterator[tuple[int, NDArray]]:
    """(epoch, indices) of each step; an epoch is split evenly into about n / batch_size batches."""
    rng = np.random.default_rng(seed)
    for epoch in range(1, epochs + 1):
        for batch in np.array_split(rng.permutation(n), max(1, round(n / batch_size))):
            yield epoch, batch


def _check_config(config: DROConfig | PromptTuningConfig) -> None:
    for key, value in asdict(config).items():
        if not np.isfinite(value) or value < 0:
            raise ValueError(f"{key} = {value} must be a finite number >= 0")
    if config.epochs < 1 or config.batch_size < 1 or not config.learning_rate:
        raise ValueError("epochs, batch_size and learning_rate must be above 0")
