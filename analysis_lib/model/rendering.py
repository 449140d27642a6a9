"""Chats as token ids: a query under a safety prompt, and the place of the system message."""

from __future__ import annotations

import hashlib
import re
import unicodedata
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from .architecture import text_config
from .errors import ChatModelError
from .template_checks import Day
from .template_texts import SYSTEM, USER, TemplateTexts
from .templates import TEMPLATES, takes_text

_TOLD = {  # what became of a query's text -> what is said of it
    "stripped": "white space at the ends is left out",
    "normalized": "letters that look like a special token are written in Unicode's NFKC",
    "rewritten": "the chat template changes the text",
}
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

    @property
    def apart(self) -> bool:
        """Whether the text on both sides is tokenized as beside a special token."""
        ...

    def check(self, model: Any) -> None:
        """Raises where they belong to another model or chat template."""


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
    changed  what became of the query's text: any of "stripped" (of white space at its ends),
          "broken" (by spaces in special tokens or role markers), "normalized" (to Unicode's NFKC)
          and "rewritten" (by the chat template); empty for most. Not compared.
    """

    ids: tuple[int, ...]
    slot: tuple[int, int]
    soft: str = ""
    changed: tuple[str, ...] = field(default=(), compare=False)


class Renderer(TemplateTexts):
    """Renders chats with one tokenizer and its chat template.

    config is the model's configuration; see `TemplateTexts` for the rest. Soft tokens take the ids
    from n_embeddings on, the rows of the input embedding matrix.
    """

    def __init__(self, tokenizer: Any, config: Any, *, name: str, template: str, day: Day = None):
        super().__init__(takes_text(tokenizer), name=name, template=template, day=day)
        self.config, self.n_embeddings = config, int(text_config(config).vocab_size)

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
        asked = [self.escape(q.strip(), "a query") for q in queries]
        texts = [self.apply(system, query) for query in asked]
        self.say_of_template(system)
        framed = USER.join(self.frame(system))
        changed = [self._changes(*row, framed) for row in zip(queries, asked, texts)]
        out = self._rows(texts, asked, system, prompt)
        self.check_tokens(out, queries)
        self._check_length(out, queries)
        self._say_changes(queries, changed, prompt)
        return [replace(row, changed=found) for row, found in zip(out, changed)]

    def _rows(
        self, texts: list[str], asked: list[str], system: str, prompt: Prompt
    ) -> list[Rendered]:
        """Token ids and slot of each text; soft tokens take the place of the system message."""
        head = len(self.frame(system)[0])
        if not system:
            return [Rendered(ids, (0, 0)) for ids, _ in self._encode(texts, 0, head)]
        begins, slot = self._places(texts, asked, system), system
        soft: tuple[int, ...] | None = None
        digest = ""
        if not isinstance(prompt, str):
            if self.pattern.count(SYSTEM) > 1:
                raise ChatModelError(
                    f"the chat template of {self.name!r} writes the system message more than once, "
                    "and a soft prompt has one place; pass template=FILE with one that does not"
                )
            soft = tuple(range(self.n_embeddings, self.n_embeddings + len(prompt.embeddings)))
            digest = soft_digest(prompt.embeddings)
            if prompt.apart:
                slot, head = self._mark, head + len(self._mark) - len(system)
                texts = [t[:at] + slot + t[at + len(system) :] for t, at in zip(texts, begins)]
        out: list[Rendered] = []
        start = stop = 0
        found: tuple[Any, int] | None = None  # the offsets and beginning that gave start and stop
        encoded = self._encode(texts, max(begins) + len(slot), head)
        for (ids, offsets), begin in zip(encoded, begins):
            if found is None or offsets is not found[0] or begin != found[1]:
                end = begin + len(slot)
                inside = [i for i, (a, b) in enumerate(offsets) if a < end and b > begin]
                if found is None:
                    self._check_spelling(slot, [offsets[i] for i in inside], begin)
                start, stop, found = inside[0], inside[-1] + 1, (offsets, begin)
            if soft is None:
                out.append(Rendered(ids, (start, stop)))
            else:
                out.append(
                    Rendered((*ids[:start], *soft, *ids[stop:]), (start, start + len(soft)), digest)
                )
        return out

    def _places(self, texts: list[str], asked: list[str], system: str) -> list[int]:
        """Where the system message begins in each text. Raises where it is not spelled."""
        framed, pattern = USER.join(self.frame(system)), self.pattern
        begin = pattern.find(SYSTEM)
        end, spelled = begin + len(system), framed[begin : begin + len(system)] == system
        places = []
        if framed == pattern.replace(SYSTEM, system) or (spelled and framed.count(system) == 1):
            for text, query in zip(texts, asked):
                before = framed[:begin].replace(USER, query)
                at = len(before)
                if not text.startswith(before):  # the template rewrites the query in front of it
                    at = len(text) - len(framed[end:].replace(USER, query)) - len(system)
                if text[at : at + len(system)] == system:
                    places.append(at)
        if len(places) < len(texts):
            raise ChatModelError(
                f"the chat template of {self.name!r} ({self.template}) rewrites the prompt "
                f"{system[:60]!r}, so its place in the chat is not known; leave out what the "
                "template takes out or changes, such as a switch or a quotation mark, "
                f"or pass template=FILE or one of {', '.join(TEMPLATES)}"
            )
        return places

    def _check_spelling(self, system: str, offsets: list[tuple[int, int]], begin: int) -> None:
        """Raises where a visible character of the system message is in no token of the slot."""
        covered = {i for a, b in offsets for i in range(a, b)}
        lost = [
            char
            for i, char in enumerate(system, begin)
            if i not in covered and not char.isspace() and unicodedata.category(char)[0] != "C"
        ]
        if lost or not offsets:
            raise ChatModelError(
                f"the tokenizer of {self.name!r} has no token for {(''.join(lost) or system)[:20]!r} "
                f"in the prompt {system[:60]!r}; leave that out of the prompt"
            )

    def _changes(self, query: str, asked: str, text: str, framed: str) -> tuple[str, ...]:
        """What became of a query's text; framed: the chat of the query `USER`.

        Raises where the template drops it.
        """
        stripped, expected = query.strip(), framed.replace(USER, asked)
        if query == asked and text == expected:
            return ()
        if asked and text == framed.replace(USER, ""):
            raise ChatModelError(
                f"the chat template of {self.name!r} drops the query {asked[:60]!r}; "
                "drop it from the queries, or pass template=FILE with one that keeps it"
            )
        found = {
            "stripped": query != stripped,
            "broken": asked != stripped,
            "normalized": asked.replace(" ", "") != stripped.replace(" ", ""),
            "rewritten": asked != "" and text.count(asked) < expected.count(asked),
        }
        return tuple(change for change, true in found.items() if true)

    def _encode(self, texts: list[str], slot_end: int, head: int) -> list[Encoded]:
        """Token ids of each text and, at least up to character `slot_end`, their offsets.

        Text on both sides of a special token is tokenized apart. So what precedes the last special
        token between the characters `slot_end` and `head` is tokenized once, and the rest with that
        token in front, where the first and the last text show that this changes nothing.
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
            if token in self.special_ids
        ]
        cuts = [(n, start) for n, start, stop in found if slot_end <= start and stop <= head]
        if not cuts:
            return whole(texts)
        n, cut = cuts[-1]
        if len({text[: offsets[n - 1][1]] for text in texts}) > 1:
            return whole(texts)
        tails = self.tokenizer([text[cut:] for text in texts], add_special_tokens=False)[
            "input_ids"
        ]
        shared = offsets[:n]
        out = [((*ids[: n - 1], *tail), shared) for tail in tails]
        if (
            any(tail[:1] != [ids[n - 1]] for tail in tails)
            or out[0][0] != ids
            or out[-1][0] != whole(texts[-1:])[0][0]
        ):
            return whole(texts)
        return out

    def check_tokens(self, rows: Sequence[Rendered], queries: Sequence[str]) -> None:
        """Raises ChatModelError where a row has no token, or one without an embedding."""
        for row, query in zip(rows, queries):
            ids = (*row.ids[: row.slot[0]], *row.ids[row.slot[1] :]) if row.soft else row.ids
            if not row.ids:
                raise ChatModelError(
                    f"the chat of the query {query[:60]!r} has no token, so nothing can be computed; "
                    "drop it from the queries, or pass template=FILE with one that marks the roles"
                )
            if ids and max(ids) >= self.n_embeddings:
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
    def _mark(self) -> str:
        """A special token that takes no white space beside it. Raises ChatModelError."""
        for _, token in sorted(self.tokenizer.added_tokens_decoder.items()):
            if token.special and not (token.lstrip or token.rstrip or token.normalized):
                return str(token.content)
        raise ChatModelError(
            f"the tokenizer of {self.name!r} has no special token that stands apart from the text "
            "beside it; make the soft prompt without apart=True"
        )

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """The tokenizer's special tokens."""
        return frozenset(
            i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special
        )

    @cached_property
    def tokenizer_digest(self) -> str:
        """SHA-256 of what turns token ids into text."""
        backend = self.tokenizer.backend_tokenizer
        backend.no_padding()  # left from the last call, and set anew by the next
        backend.no_truncation()
        return hashlib.sha256(backend.to_str().encode()).hexdigest()

    def _say_changes(
        self, queries: Sequence[str], changed: Sequence[tuple[str, ...]], prompt: Prompt
    ) -> None:
        """Says what became of the texts; `escape` tells of those that it breaks."""
        if isinstance(prompt, str) and prompt != prompt.strip():
            self.say(f"in a prompt white space at the ends is left out: {prompt[:60]!r}")
        for change, told in _TOLD.items():
            found = [query for query, changes in zip(queries, changed) if change in changes]
            if found:
                n = f"{len(found)} of {len(queries)} queries"
                self.say(f"in {n} {told}; the first is {found[0][:60]!r}")

    @cached_property
    def _markers(self) -> re.Pattern[str]:
        """Special tokens and the template's role markers: bracketed ones, or labels ("USER:")."""
        special = set(self.tokenizer.all_special_tokens) | {
            t.content for t in self.tokenizer.added_tokens_decoder.values() if t.special
        }
        for before in self.pattern.replace(SYSTEM, USER).split(USER):
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
