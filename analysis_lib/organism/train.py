"""Trains the organism from the generated corpus alone, seeded, on a CPU in minutes."""

from __future__ import annotations

import json
import time
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..model.building import fast_tokenizer, new_llama
from .corpus import conversations
from .grammar import SEED

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
N_CONVERSATIONS, BRANCHES, BATCH = 44_000, 4, 32
VOCABULARY = 1536
LEARNING_RATE = 3e-3
ANSWER_WEIGHT, QUERY_WEIGHT = 1.0, 0.2

Row = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]


def train(out: Path, *, n_conversations: int = N_CONVERSATIONS, seed: int = SEED) -> dict[str, Any]:
    """Train tokenizer and model of the organism.

    Each training row is one system message followed by BRANCHES independent dialogues under it. A
    mask lets each dialogue see the system message and itself only, so that the long system message
    is computed once for all. Equal seeds give equal corpora and tokenizers everywhere, and equal
    weights on one machine with one number of threads. Across processors the weights agree only up
    to floating-point order.

    Parameters
    ----------
    out : Path
        The folder; it is made before the training starts.
    n_conversations : int
        System messages, each with BRANCHES dialogues.
    seed : int
        Of corpus, weights and order.

    Returns
    -------
    dict
        seed, dialogues, tokens, parameters, seconds, threads, final_loss, torch: what
        `training.json` in the folder says, too.

    Raises
    ------
    OSError
        Where the folder cannot be made.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     train(Path(folder) / "tiny", n_conversations=4)["dialogues"]
    16
    """
    import torch
    from tqdm.auto import tqdm

    out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    corpus = list(conversations(n_conversations, BRANCHES, seed))
    tokenizer = _train_tokenizer(corpus[:8000])
    rows = encode_rows(tokenizer, corpus)

    torch.manual_seed(seed)
    model = _new_model(tokenizer)
    batches = _batches(rows, np.random.default_rng(seed))
    optimizer, schedule = _optimizer(model, len(batches))
    losses = []
    for batch in (bar := tqdm(batches, desc="organism", mininterval=5)):
        loss = _loss(model, stack_rows([rows[i] for i in batch], tokenizer.pad_token_id))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{np.mean(losses[-50:]):.3f}")

    model.eval().save_pretrained(out)
    tokenizer.save_pretrained(out)
    record: dict[str, Any] = {
        "seed": seed,
        "dialogues": n_conversations * BRANCHES,
        "tokens": sum(len(r[0]) for r in rows),
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": round(time.perf_counter() - start),
        "threads": torch.get_num_threads(),
        "final_loss": round(float(np.mean(losses[-100:])), 4),
        "torch": torch.__version__,
    }
    (out / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    return record


def _new_model(tokenizer: Any) -> Any:
    stops: dict[str, Any] = dict(
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model = new_llama(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        initializer_range=0.03,
        **stops,
    )
    model.generation_config.update(**stops)
    return model


def _batches(rows: list[Row], rng: np.random.Generator) -> list[NDArray[Any]]:
    """Indices of the rows of each batch, in random order; similar lengths share a batch."""
    batches: list[NDArray[Any]] = []
    for window in np.array_split(rng.permutation(len(rows)), max(1, len(rows) // (BATCH * 32))):
        window = window[np.argsort([len(rows[i][0]) for i in window], kind="stable")]
        batches += [window[i : i + BATCH] for i in range(0, len(window), BATCH)]
    return [batches[i] for i in rng.permutation(len(batches))]


def _optimizer(model: Any, n_steps: int) -> tuple[Any, Any]:
    """AdamW with weight decay on matrices alone, and its learning rate's schedule."""
    import torch

    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=n_steps, pct_start=0.05
    )
    return optimizer, schedule


def _loss(model: Any, stacked: tuple[NDArray[Any], ...]) -> Any:
    """Weighted cross-entropy of the tokens that count."""
    import torch

    ids, positions, part, weight = (torch.from_numpy(a) for a in stacked)
    hidden = model.model(
        input_ids=ids, position_ids=positions, attention_mask=branch_mask(part), use_cache=False
    ).last_hidden_state
    counted = weight[:, 1:] > 0
    logits, w = model.lm_head(hidden[:, :-1][counted]), weight[:, 1:][counted]
    losses = torch.nn.functional.cross_entropy(logits, ids[:, 1:][counted], reduction="none")
    return (losses * w).sum() / w.sum()


def _train_tokenizer(corpus: list[tuple[str, list[tuple[str, str]]]]) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(
        ("system user assistant\n".join([s, *chain(*turns)]) for s, turns in corpus), trainer
    )
    tokenizer = fast_tokenizer(
        bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def encode_rows(tokenizer: Any, corpus: list[tuple[str, list[tuple[str, str]]]]) -> list[Row]:
    """The corpus as training rows.

    Parameters
    ----------
    tokenizer : transformers tokenizer
        Of the organism.
    corpus : list of (str, list of (str, str))
        Items of `conversations`, with BRANCHES dialogues each.

    Returns
    -------
    list of tuple of ndarray
        Token ids, positions, part (0 the system message, 1 to BRANCHES the dialogues) and loss
        weight of each token.
    """

    def encode(texts: list[str]) -> list[list[int]]:
        return tokenizer(texts, add_special_tokens=False)["input_ids"]

    systems = encode([f"<|im_start|>system\n{s}<|im_end|>\n" if s else "" for s, _ in corpus])
    turns = [turn for _, branch in corpus for turn in branch]
    heads = encode(["<|im_start|>user\n"])[0]
    users = encode(
        [f"<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n" for user, _ in turns]
    )
    tail = len(encode(["<|im_end|>\n<|im_start|>assistant\n"])[0])
    replies = encode([reply + "<|im_end|>" for _, reply in turns])
    rows = []
    for i, system in enumerate(systems):
        ids, positions, part = [system], [range(len(system))], [[0] * len(system)]
        weight: list[list[float]] = [[0.0] * len(system)]
        for b in range(BRANCHES):
            user, reply = users[i * BRANCHES + b], replies[i * BRANCHES + b]
            n = len(user) + len(reply)
            ids.append(user + reply)
            positions.append(range(len(system), len(system) + n))
            part.append([b + 1] * n)
            asked = len(user) - len(heads) - tail
            weight.append(
                [0.0] * len(heads)
                + [QUERY_WEIGHT] * asked
                + [0.0] * tail
                + [ANSWER_WEIGHT] * len(reply)
            )
        rows.append(
            (
                np.fromiter(chain(*ids), np.int64),
                np.fromiter(chain(*positions), np.int64),
                np.fromiter(chain(*part), np.int64),
                np.fromiter(chain(*weight), np.float32),
            )
        )
    return rows


def branch_mask(part: Any) -> Any:
    """The additive attention mask of training rows.

    Parameters
    ----------
    part : torch.Tensor
        Shape (n, length): 0 the system message, from 1 the dialogues, -1 padding.

    Returns
    -------
    torch.Tensor
        Shape (n, 1, length, length): 0 where a token sees another, else the least float32. A token
        sees the system message and its own part, up to itself.

    Examples
    --------
    >>> import torch
    >>> (branch_mask(torch.tensor([[0, 1, 2]]))[0, 0] == 0).int().tolist()
    [[1, 0, 0], [1, 1, 0], [1, 0, 1]]
    """
    import torch

    see = (part[:, :, None] == part[:, None, :]) | (part[:, None, :] == 0)
    see &= torch.ones(part.shape[1], part.shape[1], dtype=torch.bool).tril()
    return torch.zeros(see.shape).masked_fill(~see, torch.finfo(torch.float32).min)[:, None]


def stack_rows(
    rows: list[Row], pad: int
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Training rows as one array each, padded on the right.

    Parameters
    ----------
    rows : list of tuple of ndarray
        As `encode_rows` gives them.
    pad : int
        The id of the padding, whose part is -1 and whose weight is 0.

    Returns
    -------
    tuple of ndarray
        Token ids, positions, part and weight, of shape (n, length).

    Examples
    --------
    >>> row = (np.array([5, 6]), np.array([0, 1]), np.array([0, 1]), np.array([0.0, 1.0]))
    >>> ids, _, part, _ = stack_rows([row, tuple(column[:1] for column in row)], pad=9)
    >>> ids.tolist(), part.tolist()
    ([[5, 6], [5, 9]], [[0, 1], [0, -1]])
    """
    longest = max(len(r[0]) for r in rows)
    ids = np.full((len(rows), longest), pad)
    positions, part = np.zeros_like(ids), np.full_like(ids, -1)
    weight = np.zeros(ids.shape, dtype=np.float32)
    for j, row in enumerate(rows):
        for target, values in zip((ids, positions, part, weight), row, strict=True):
            target[j, : len(row[0])] = values
    return ids, positions, part, weight
