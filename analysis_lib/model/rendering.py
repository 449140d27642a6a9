"""Chats as token ids: a query under a safety prompt, and the place of the system message."""

from __future__ import annotations

import hashlib
import re
import unicodedata
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from .architecture import text_config
from .errors import ChatModelError
from .templates import TEMPLATES, takes_text

_SYSTEM, _USER = "Xq7 system slot 7qX", "Xq7 user slot 7qX"
Encoded = tuple[tuple[int, ...], list[tuple[int, int]]]  # token ids and their offsets in the text


@runtime_checkable
class SoftTokens(Protocol):
    """Soft tokens for the system slot: embeddings (length, d) and the text they replace."""

    @property
    def name(self) -> str: ...

    @property
    def embeddings(self) -> NDArray[np.float32]: ...

    @property
    def start_text(self) -> str: ...


Prompt = str | SoftTokens


def soft_digest(embeddings: NDArray[Any]) -> str:
    """SHA-256 of soft embeddings: what a cached row of theirs is keyed by."""
    return hashlib.sha256(np.ascontiguousarray(embeddings, dtype=np.float32).tobytes()).hexdigest()


@dataclass(frozen=True)
class Rendered:
    """One rendered chat, ready for the forward pass.

    ids   token ids; ids >= the model's embedding rows are soft tokens (row = id - embedding rows)
    slot  (start, stop) positions of the system message's tokens; (0, 0) without one
    soft  SHA-256 of the soft embeddings, "" for text
    """

    ids: tuple[int, ...]
    slot: tuple[int, int]
    soft: str = ""


class Renderer:
    """Renders chats with one tokenizer and its chat template.

    config is the model's configuration; name and template are for messages. Soft tokens take the
    ids from n_embeddings on, the rows of the input embedding matrix.
    """

    def __init__(self, tokenizer: Any, config: Any, *, name: str, template: str):
        self.tokenizer, self.config = takes_text(tokenizer), config
        self.name, self.template = name, template
        self.n_embeddings = int(text_config(config).vocab_size)
        self._frames: dict[str, tuple[str, str]] = {}
        self._said: set[str] = set()
        self.system_role = self._finds_system_role()

    @property
    def context(self) -> int | None:
        """The most tokens that a row may have; None where the configuration says nothing."""
        return getattr(text_config(self.config), "max_position_embeddings", None)

    def render(self, queries: Sequence[str], prompt: Prompt = "") -> list[Rendered]:
        """See `ChatModel.render`."""
        if not queries:
            return []
        text = prompt if isinstance(prompt, str) else prompt.start_text
        system = self.escape(text.strip(), "a prompt")
        head, _ = self.frame(system)
        texts = [self.apply(system, self.escape(q.strip(), "a query")) for q in queries]
        if system and not self.system_role:
            self._say(
                f"the chat template of {self.name!r} takes no system message; "
                "prompts stand in front of the query"
            )
        if not system and self.default_system:
            self._say(
                f"without a system message the chat template of {self.name!r} puts in its own: "
                f"{self.default_system[:60]!r}; pass a template without it to have none"
            )
        if system:
            out = self._with_slot(texts, len(system), len(head), prompt)
        else:
            out = [Rendered(ids, (0, 0)) for ids, _ in self._encode(texts, 0, len(head))]
        self.check_tokens(out, queries)
        self._check_length(out, queries)
        return out

    def _with_slot(
        self, texts: list[str], length: int, head: int, prompt: Prompt
    ) -> list[Rendered]:
        """Rows whose system message has `length` characters; soft tokens take its place."""
        begin = self.apply(_SYSTEM, _USER).index(_SYSTEM)
        end = begin + length
        soft: tuple[int, ...] | None = None
        digest = ""
        if not isinstance(prompt, str):
            soft = tuple(range(self.n_embeddings, self.n_embeddings + len(prompt.embeddings)))
            digest = soft_digest(prompt.embeddings)
        out = []
        for ids, offsets in self._encode(texts, end, head):
            inside = [i for i, (a, b) in enumerate(offsets) if a < end and b > begin]
            start, stop = inside[0], inside[-1] + 1
            if soft is None:
                out.append(Rendered(ids, (start, stop)))
            else:
                out.append(
                    Rendered((*ids[:start], *soft, *ids[stop:]), (start, start + len(soft)), digest)
                )
        return out

    def _encode(self, texts: list[str], slot_end: int, head: int) -> list[Encoded]:
        """Token ids of each text and, at least up to character `slot_end`, their offsets.

        Text on both sides of a special token is tokenized apart. So what precedes the last special
        token between the characters `slot_end` and `head` is tokenized once, where the first and
        the last text show that this changes nothing.
        """

        def whole(part: list[str]) -> list[Encoded]:
            encoded = self.tokenizer(part, add_special_tokens=False, return_offsets_mapping=True)
            return [
                (tuple(ids), offsets)
                for ids, offsets in zip(encoded["input_ids"], encoded["offset_mapping"])
            ]

        ids, offsets = whole(texts[:1])[0]
        found = [
            (i + 1, start, stop)
            for i, (token, (start, stop)) in enumerate(zip(ids, offsets))
            if token in self._special_ids
        ]
        cuts = [n for n, start, stop in found if slot_end <= start and stop <= head]
        if not cuts or len({text[: offsets[cuts[-1] - 1][1]] for text in texts}) > 1:
            return whole(texts)
        n, cut = cuts[-1], offsets[cuts[-1] - 1][1]
        tails = self.tokenizer([text[cut:] for text in texts], add_special_tokens=False)[
            "input_ids"
        ]
        out = [((*ids[:n], *tail), offsets[:n]) for tail in tails]
        if out[0][0] != ids or out[-1][0] != whole(texts[-1:])[0][0]:
            return whole(texts)
        return out

    def check_tokens(self, rows: Sequence[Rendered], queries: Sequence[str]) -> None:
        """Raises ChatModelError where a row has a token that the model has no embedding for."""
        for row, query in zip(rows, queries):
            ids = (*row.ids[: row.slot[0]], *row.ids[row.slot[1] :]) if row.soft else row.ids
            if max(ids) >= self.n_embeddings:
                raise ChatModelError(
                    f"the query {query[:60]!r} has a token that {self.name!r} has no embedding for "
                    f"(its tokenizer knows more than {self.n_embeddings} tokens); "
                    "give the model its own tokenizer, or drop the query"
                )

    def _check_length(self, rows: Sequence[Rendered], queries: Sequence[str]) -> None:
        longest = max(range(len(rows)), key=lambda i: len(rows[i].ids))
        if self.context and len(rows[longest].ids) > self.context:
            raise ChatModelError(
                f"the query {queries[longest][:60]!r} has {len(rows[longest].ids)} tokens with its "
                f"prompt, and the context of {self.name!r} holds {self.context}; "
                "shorten or drop it"
            )

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        return frozenset(
            i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special
        )

    def apply(self, system: str, query: str) -> str:
        """The rendered text of one chat, with the generation prompt. Raises ChatModelError."""
        if self.system_role:
            messages = ([{"role": "system", "content": system}] if system else []) + [
                {"role": "user", "content": query}
            ]
        else:
            messages = [{"role": "user", "content": f"{system}\n\n{query}" if system else query}]
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=True
                )
            )
        except Exception as error:  # a template raises what it likes
            raise ChatModelError(
                f"the chat template of {self.name!r} ({self.template}) cannot be rendered: "
                f"{type(error).__name__}: {error}; "
                f"mend it, or pass template=FILE or one of {', '.join(TEMPLATES)}"
            ) from error

    @cached_property
    def default_system(self) -> str:
        """The system message that the template puts in where none is given; "" for most models."""
        if not self.system_role:
            return ""
        before, _, after = self.frame(_SYSTEM)[0].partition(_SYSTEM)
        head = self.frame("")[0]
        if len(head) < len(before) + len(after) or not (
            head.startswith(before) and head.endswith(after)
        ):
            return ""
        return head[len(before) : len(head) - len(after)].strip()

    @property
    def template_digest(self) -> str:
        """SHA-256 of the chat template."""
        return hashlib.sha256(str(self.tokenizer.chat_template).encode()).hexdigest()

    @cached_property
    def tokenizer_digest(self) -> str:
        """SHA-256 of what turns token ids into text."""
        backend = self.tokenizer.backend_tokenizer
        backend.no_padding()  # left from the last call, and set anew by the next
        backend.no_truncation()
        return hashlib.sha256(backend.to_str().encode()).hexdigest()

    def _say(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            warnings.warn(message, stacklevel=4)

    def frame(self, system: str) -> tuple[str, str]:
        """The rendered text before and after the query."""
        if system not in self._frames:
            head, found, tail = self.apply(system, _USER).partition(_USER)
            if not found:
                raise ChatModelError(
                    f"the chat template of {self.name!r} drops the user message; it cannot be used"
                )
            self._frames[system] = head, tail
        return self._frames[system]

    def _finds_system_role(self) -> bool:
        messages = [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": _USER}]
        try:
            return _SYSTEM in self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        except Exception:  # a template refuses the role by raising what it likes
            return False

    @cached_property
    def _markers(self) -> re.Pattern[str]:
        """Special tokens and the template's role markers: bracketed ones, or labels ("USER:")."""
        special = set(self.tokenizer.all_special_tokens) | {
            t.content for t in self.tokenizer.added_tokens_decoder.values() if t.special
        }
        framed = self.apply(_SYSTEM, _USER)
        for before in framed.replace(_SYSTEM, _USER).split(_USER):
            special.update(
                re.findall(r"[<\[][^\s<>\[\]]{1,40}[>\]]+|<<[^<>]+>>|\w+:(?=\s*$)", before)
            )
        return re.compile(
            "|".join(re.escape(s) for s in sorted(special, key=len, reverse=True) if len(s) > 1)
            or r"(?!)"
        )

    def escape(self, text: str, what: str) -> str:
        """The text with special tokens and role markers broken by a space; warns where it did.

        So it opens no new role. Raises ChatModelError for half of a Unicode pair.
        """
        if re.search("[\ud800-\udfff]", text):
            raise ChatModelError(
                f"{what} holds half of a Unicode pair, which is no character: "
                f"{text[:60]!r}; mend the text"
            )

        def broken(text: str) -> str:
            return self._markers.sub(lambda m: m[0][0] + " " + m[0][1:], text)

        escaped = broken(text)
        # Many tokenizers normalize first.
        if self._markers.search(folded := unicodedata.normalize("NFKC", escaped)):
            escaped = broken(folded)
        if escaped != text:
            warnings.warn(
                f"{what} holds a special token or role marker of {self.name!r}; "
                f"it was broken by a space: {text[:60]!r}",
                stacklevel=5,
            )
        return escaped
