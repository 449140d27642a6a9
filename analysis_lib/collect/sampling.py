"""Sampling as a tree: the distinct continuations of some rows, one token a step.

Each next token is the one with the largest sum of log probability and Gumbel noise. The noise is a
hash of the row's tokens, the seed, the sample's index, the position and the token itself. So samples
that have been equal so far share one computation. And where two computations of one distribution
differ, as two batches in bfloat16 do, they choose another token with at most about twice the
probability by which they differ.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..data.thoughts import WITHIN_THOUGHTS, answer_of, may_open
from ..model.chat import ChatModel
from ..model.errors import ChatModelError
from ..model.rendering import Rendered
from ..model.steps import PlainStep, next_logits, replayed
from .certificates import certify_numbers

Jobs = dict[int, list[int]]
"""Rows, by their position, and the sample indices to draw for each."""


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


class SampleTree:
    """The distinct continuations of some rows, one token a step.

    A node is one distinct unfinished continuation.
    """

    def __init__(self, model: ChatModel, rows: Sequence[Rendered], jobs: Jobs, settings: Settings):
        self.model, self.forward, self.settings = model, model.forward, settings
        self.stops, self.row_of = model.generation, list(jobs)
        self.ids = [rows[i].ids for i in self.row_of]
        # For each job its row's position in row_of, its sample index and its noise's key.
        owners = [[r] * len(jobs[i]) for r, i in enumerate(self.row_of)]
        self.owner = np.concatenate(owners).astype(int)
        self.sample = np.concatenate([jobs[i] for i in self.row_of]).astype(int)
        keys = [_noise_keys(rows[i], jobs[i], settings.seed) for i in self.row_of]
        self.keys = np.concatenate(keys)
        self.room = room_for_replies(model, [rows[i] for i in self.row_of], settings)
        self.done: dict[tuple[int, int], dict[str, str]] = {}

    def run(self) -> dict[tuple[int, int], dict[str, str]]:
        node = self.owner.copy()  # job -> node
        jobs = np.arange(len(node))
        # What each node has sampled so far, and its row's position in ids.
        texts: list[tuple[int, ...]] = [()] * len(self.ids)
        row = np.arange(len(self.ids))  # node -> row
        step = next_logits(self.forward, self.ids, max(self.room))
        logits = step.first()
        for position in range(max(self.room)):
            # NaN and infinity pass through a maximum.
            if not torch.isfinite(logits.amax(dim=-1)).all():
                raise ChatModelError(
                    f"logits of {self.model.name!r} hold NaN or infinity in "
                    f"{self.model.dtype_name}, and nothing of this batch is kept; load the model "
                    "with dtype='float32' or 'bfloat16', or copy its weights again"
                )
            place = _mix(np.array([position]))
            chosen_from = self.stops.allowed(logits, first=position == 0)
            tokens = _choose(chosen_from, node, _mix(self.keys[jobs] ^ place), self.settings)
            pairs, child = np.unique(np.stack([node, tokens]), axis=1, return_inverse=True)
            parents, new = pairs
            grown = [(*texts[p], int(t)) for p, t in zip(parents, new)]
            owner = row[parents]
            ends = [self._end(text, self.room[r]) for text, r in zip(grown, owner)]
            for job, c in zip(jobs, child):
                if ends[c]:
                    key = self.row_of[self.owner[job]], int(self.sample[job])
                    text = self._reply(grown[c], ends[c])
                    end = ends[c] if self._answer(text) is not None else WITHIN_THOUGHTS
                    self.done[key] = {"response": text, "end": end}
            alive = np.array([not e for e in ends])
            if not alive.any():
                if not isinstance(step, PlainStep):
                    self._certify([(*self.ids[r], *t) for r, t in zip(row, texts)], logits)
                break
            renumber = np.cumsum(alive) - 1
            keep = alive[child]
            node, jobs = renumber[child[keep]], jobs[keep]
            texts, row = [text for text, a in zip(grown, alive) if a], owner[alive]
            logits = step.next(parents[alive], new[alive])
        return self.done

    def _certify(self, rows: Sequence[tuple[int, ...]], logits: torch.Tensor) -> None:
        """Compares the last logits (n, vocabulary) of the longest row with the plain pass's."""
        longest = max(range(len(rows)), key=lambda i: len(rows[i]))
        row = rows[longest]
        certify_numbers(
            self.forward,
            "logits",
            logits[longest],
            lambda: PlainStep(self.forward, [row]).first()[0],
            lambda: replayed(self.forward, row),
        )

    def _end(self, ids: tuple[int, ...], room: int) -> str:
        if ids[-1] in self.stops.stop_ids:
            return "eos"
        if self.settings.stop_when is not None or self.stops.stop_strings:
            text = self._text(ids)
            if any(stop in text for stop in self.stops.stop_strings):
                return "stop_string"
            if self.settings.stop_when is not None and not may_open(text):
                answer = self._answer(text)
                if answer is not None and self.settings.stop_when(answer):
                    return "stop_when"
        return "length" if len(ids) == room else ""

    def _text(self, ids: tuple[int, ...]) -> str:
        """The text of a reply, with the marks of its thoughts."""
        dropped = self.stops.thoughts.dropped
        if dropped is None:
            return str(self.model.tokenizer.decode(ids, skip_special_tokens=True))
        shown = [i for i in ids if i not in dropped]
        return str(self.model.tokenizer.decode(shown, skip_special_tokens=False))

    def _answer(self, text: str) -> str | None:
        return answer_of(self.stops.thoughts.prefix + text)

    def _reply(self, ids: tuple[int, ...], end: str) -> str:
        text = self._text(ids[:-1] if end == "eos" else ids)
        if end == "stop_string":
            text = text[: min(text.index(stop) for stop in self.stops.stop_strings if stop in text)]
        return text.strip()


def room_for_replies(model: ChatModel, rows: Sequence[Rendered], settings: Settings) -> list[int]:
    """Tokens that a reply to each row may have: max_new_tokens, or what the context leaves.

    Raises ChatModelError where it leaves none.
    """
    context = model.renderer.context or float("inf")
    longest = max((len(row.ids) for row in rows), default=0)
    if longest >= context:
        raise ChatModelError(
            f"a query fills the context of {model.name!r} with its prompt ({longest} of {context} "
            "tokens), so no reply fits; shorten or drop it"
        )
    return [int(min(settings.max_new_tokens, context - len(row.ids))) for row in rows]


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # Weyl's constant of SplitMix64
_BLOCK = 1 << 20  # numbers of noise that are held at a time


def _mix(numbers: NDArray[Any]) -> NDArray[np.uint64]:
    """The hash of SplitMix64 (Steele et al. 2014), number by number."""
    z = (numbers.astype(np.uint64) + np.uint64(1)) * _GOLDEN
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _noise_keys(row: Rendered, samples: Sequence[int], seed: int) -> NDArray[np.uint64]:
    """One key a sample, fixed by the row, the seed and the sample's index.

    Soft tokens count by their ids, not by their embeddings: soft prompts of one length are compared
    on the same random numbers, and the last bit of a training does not change every text.
    """
    digest = hashlib.sha256(np.array([seed, *row.ids], dtype=np.int64).tobytes()).digest()
    fixed = np.uint64(int.from_bytes(digest[:8], "little"))
    return _mix(fixed ^ _mix(np.array(samples)))


def _gumbel(keys: NDArray[np.uint64], tokens: NDArray[Any]) -> NDArray[np.float64]:
    """Standard Gumbel noise, one number for each key and token of its row of tokens."""
    hashed = _mix(keys[:, None] ^ _mix(tokens))
    uniform = ((hashed >> np.uint64(11)).astype(float) + 0.5) * 2.0**-53
    return -np.log(-np.log(uniform))


def _choose(
    logits: torch.Tensor, node: NDArray[Any], keys: NDArray[np.uint64], settings: Settings
) -> NDArray[np.int64]:
    """One token for each sample: the largest sum of its node's log probability and keyed noise.

    Temperature comes first, then top-k, then top-p.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if settings.temperature == 0:
        return logits.argmax(dim=-1).cpu().numpy()[node]
    n_kept = min(settings.top_k or logits.shape[-1], logits.shape[-1])
    values, tokens = (logits / settings.temperature).topk(n_kept, dim=-1)
    p = torch.softmax(values.double(), dim=-1).cpu().numpy()
    kept = (np.cumsum(p, axis=1) - p < settings.top_p) & (p > 0)
    most = int(kept.sum(axis=1).max())  # the kept tokens are the first of each row
    scores = np.where(kept, values.double().cpu().numpy(), -np.inf)[:, :most]
    ids = tokens[:, :most].cpu().numpy()
    chosen = []
    for at in range(0, len(node), max(1, _BLOCK // most)):
        part = slice(at, at + max(1, _BLOCK // most))
        own = ids[node[part]]
        best = (scores[node[part]] + _gumbel(keys[part], own)).argmax(axis=1)
        chosen.append(own[np.arange(len(own)), best])
    return np.concatenate(chosen)
