"""The plain way beside ours: models, queries, and both ways of each task.

The plain way is written here from the definition: whole rows through the causal language model,
nothing shared.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
    load_queries,
    load_safety_prompts,
    sample_responses,
    train_dro,
)
from analysis_lib.model.soft_prompt import embed_text

from .measure import Run

SHAPES = {  # hidden size, layers, heads, feed-forward size, vocabulary, tied embeddings
    "110M": (768, 12, 12, 2048, 32_000, True),
    "7b": (4096, 32, 32, 11_008, 32_000, False),
    "tiny": (64, 2, 4, 128, 2048, False),
}

# Models and inputs


def random_llama(
    shape: str, like: ChatModel, *, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> ChatModel:
    """A randomly initialised Llama with the tokenizer and template of another model.

    Every id decodes to a text of its own, and none stops a reply.

    Parameters
    ----------
    shape : str
        One of `SHAPES`.
    like : ChatModel
        Whose tokenizer and template it gets.
    device : str
        Where the weights are made.
    dtype : torch.dtype
        Their dtype.

    Returns
    -------
    ChatModel
        Equal weights at each call.
    """
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
    """n anchor queries, harmful ones first; half of them harmless where no number is given.

    Examples
    --------
    >>> anchor(6, 2)["harmful"].tolist()
    [True, True, True, True, False, False]
    """
    queries, n_harmless = load_queries("anchor"), n // 2 if n_harmless is None else n_harmless
    parts = (
        queries[queries["harmful"]].head(n - n_harmless),
        queries[~queries["harmful"]].head(n_harmless),
    )
    return pd.concat(parts, ignore_index=True)


def prompt_of(chat: ChatModel, n_tokens: int) -> tuple[str, int]:
    """The default safety prompt's words, repeated and cut to at most n_tokens tokens.

    Returns
    -------
    text : str
        The prompt.
    length : int
        Its tokens.
    """
    words = (load_safety_prompts()["default"] + " ").split() * 10
    length = 0
    text = ""
    for stop in range(1, len(words) + 1) if n_tokens else ():
        start, end = chat.render(["x"], " ".join(words[:stop]))[0].slot
        if end - start > n_tokens:
            break
        text, length = " ".join(words[:stop]), end - start
    return text, length


# Capture


def plain_ids(chat: ChatModel, text: str, prompt: str) -> list[int]:
    """Token ids of a chat by the tokenizer's own template; an empty prompt is no message."""
    system = [{"role": "system", "content": prompt}] if prompt else []
    messages = [*system, {"role": "user", "content": text}]
    return list(
        chat.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=False
        )
    )


@torch.no_grad()
def plain_states(chat: ChatModel, texts: Sequence[str], prompt: str) -> tuple[torch.Tensor, int]:
    """Last-token states after the final norm, one row at a time.

    Returns
    -------
    states : torch.Tensor
        Shape (n, d), float32.
    size : int
        Bytes of all tokens in all layers.
    """
    states, size = [], 0
    for text in texts:
        ids = torch.tensor([plain_ids(chat, text, prompt)], device=chat.device)
        out = chat.model(input_ids=ids, output_hidden_states=True, use_cache=False)
        states.append(out.hidden_states[-1][0, -1].float())
        size += sum(h.numel() * h.element_size() for h in out.hidden_states)
    return torch.stack(states), size


# DRO


@dataclass(frozen=True)
class DRO:
    """One DRO problem for both ways, in which the whole batch is one step.

    Its weights let no part of the loss hide behind another.
    """

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
        """A problem of n anchor queries and so many steps, with two made-up directions."""
        queries = anchor(n, n_harmless)
        states = hidden_states(chat, queries, {"prompt": prompt}, n_check=0).states[:, 0]
        space = AnchorSpace.fit(states)
        scale = 1 / space.transform(states).std(axis=0)
        refusal = Direction("refusal", scale * np.array([1, 0.5, 0, 0]), 0.0)
        harmfulness = Direction("harmfulness", scale * np.array([0.5, -1, 0, 0]), 0.0)
        config = DROConfig(epochs=steps, batch_size=n, weight_harmfulness=1.0, weight_norm=100.0)
        return cls(chat, queries, prompt, space, (refusal, harmfulness), config)


def plain_dro(problem: DRO) -> Callable[[], tuple[float, float]]:
    """The plain way of a DRO step: the padded batch through the whole model.

    Returns
    -------
    callable
        Takes one step; returns loss and gradient norm.
    """
    chat, config, k = problem.chat, problem.config, problem.space.k

    def tensor(values: Any) -> torch.Tensor:
        return torch.tensor(np.asarray(values, dtype=np.float32), device=chat.device)

    harmful, basis = tensor(problem.queries["harmful"].astype(float)), tensor(problem.space.basis)
    directions = [tensor(d.weight) for d in problem.directions]
    soft = torch.nn.Parameter(tensor(embed_text(chat, problem.prompt)))
    optimizer = torch.optim.AdamW([soft], lr=config.learning_rate)
    states = _padded_states(problem, soft)
    with torch.no_grad():
        base = states()

    def step() -> tuple[float, float]:
        optimizer.zero_grad()
        change = (states() - base) @ basis
        loss = config.weight_norm * change[:, k:].pow(2).mean()
        weights = config.weight_refusal, config.weight_harmfulness
        for direction, weight in zip(directions, weights, strict=True):
            logit = change[:, :k] @ direction
            loss = loss + weight * (torch.nn.functional.softplus(logit) - harmful * logit).mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_([soft], config.max_grad_norm)
        optimizer.step()
        return loss.item(), float(norm)

    return step


def _padded_states(problem: DRO, soft: torch.Tensor) -> Callable[[], torch.Tensor]:
    """A function that gives the last states (n, d) under the soft prompt as it is by then."""
    chat = problem.chat
    rows = chat.render(problem.queries["text"].tolist(), problem.prompt)
    lengths = torch.tensor([len(row.ids) for row in rows], device=chat.device)
    mask = (torch.arange(int(lengths.max()), device=chat.device) < lengths[:, None]).long()
    table = chat.model.get_input_embeddings()

    def states() -> torch.Tensor:
        embedded = []
        for row in rows:
            e = table(torch.tensor(row.ids, device=chat.device))
            embedded.append(torch.cat([e[: row.slot[0]], soft.to(e.dtype), e[row.slot[1] :]]))
        padded = torch.nn.utils.rnn.pad_sequence(embedded, batch_first=True)
        out = chat.model(
            inputs_embeds=padded, attention_mask=mask, output_hidden_states=True, use_cache=False
        )
        last = torch.arange(len(rows), device=chat.device), lengths - 1
        return out.hidden_states[-1][last].float()

    return states


@dataclass(frozen=True)
class Training:
    """A run of `train_dro` with the plain steps beside it.

    Parameters
    ----------
    runs : dict of str to Run
        Seconds of "plain", "ours" and "rate".
    gradients : tuple of torch.Tensor
        Clipped gradients (length, d) of the first step: ours, plain.
    losses : tuple of ndarray
        Loss and gradient norm of each step: ours (steps, 2), plain (steps - 1, 2).
    """

    runs: dict[str, Run]
    gradients: tuple[torch.Tensor, torch.Tensor]
    losses: tuple[np.ndarray, np.ndarray]


def train_in_turns(
    problem: DRO, plain: Callable[[], tuple[float, float]], work: Callable[[], None]
) -> Training:
    """Train as `train_dro` does, with a plain step and the matrix products after each of its steps.

    Nothing follows the last step. The first one, with all that comes before it, is not timed.

    Parameters
    ----------
    problem : DRO
        What to train.
    plain : callable
        A step of the plain way, as `plain_dro` gives it.
    work : callable
        The matrix products, as `matrix_work` gives them.

    Returns
    -------
    Training
        Times and results of both.
    """
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
    inputs = (problem.chat, problem.queries, problem.prompt, problem.space, *problem.directions)
    try:
        train_dro(*inputs, problem.config, on_step=on_step)
    finally:
        hook.remove()
    return Training(runs, (gradients[0], gradients[1]), (np.array(ours), np.array(theirs)))


# Sampling


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
    """n responses to each query by `generate`, one query at a time.

    Parameters
    ----------
    chat : ChatModel
        The model.
    texts : sequence of str
        The queries.
    prompt : str
        The safety prompt; "" for none.
    n : int
        Responses a query.
    max_new : int
        Tokens a response has at most.
    temperature : float
        0 is greedy.

    Returns
    -------
    list of list of str
        By query.
    """
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
        said = chat.tokenizer.batch_decode(new[:, ids.shape[1] :], skip_special_tokens=True)
        out.append([reply.strip() for reply in said])
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
    """The same by `sample_responses`."""
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
