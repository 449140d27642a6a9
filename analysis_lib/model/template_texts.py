"""The texts that a chat template makes of chats, and what it does by itself."""

from __future__ import annotations

import datetime
import hashlib
import warnings
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from .errors import ChatModelError
from .template_checks import (
    BOM,
    CLOCK,
    Day,
    TemplateLimitError,
    chosen_day,
    limited,
    pinned,
    refuse_size,
    today,
)
from .templates import TEMPLATES

SYSTEM, USER = "Xq7 system slot 7qX", "Xq7 user slot 7qX"
"""Messages that show where a template puts its messages."""

_TWO_DAYS = datetime.date(2019, 2, 3), datetime.date(2024, 11, 28)  # nothing in common


class TemplateTexts:
    """Renders chats as text with a tokenizer's chat template.

    name and template are for messages. day stops the template's clock; by default it stops now.
    """

    def __init__(self, tokenizer: Any, *, name: str, template: str, day: Day = None):
        self.tokenizer, self.name, self.template = tokenizer, name, template
        self._asked_day = chosen_day(day)
        self._day = self._asked_day or today(tokenizer)
        self._frames: dict[str, tuple[str, str]] = {}
        self._said: set[str] = set()
        self.system_role = self._finds_system_role()

    @property
    def chat_template(self) -> str:
        """The Jinja text that chats are rendered with: the tokenizer's, its clock stopped."""
        return pinned(self._own.removeprefix(BOM), self._day)

    @property
    def _own(self) -> str:
        """The tokenizer's Jinja text; "" where it has none, which rendering tells."""
        try:
            return str(self.tokenizer.get_chat_template())
        except ValueError:
            return ""

    def chat(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        first: bool = False,
        day: datetime.date | None = None,
        prompted: bool = True,
    ) -> str:
        """The rendered text of messages, with the generation prompt. Raises ChatModelError.

        prompted: False leaves the generation prompt out. first: the template was not tried on such messages, and gets a limit of time. day: another
        day than the model's.
        """

        def render() -> str:
            used = pinned(self._own.removeprefix(BOM), day or self._day)
            return str(
                self.tokenizer.apply_chat_template(
                    messages,
                    tokenize=False,
                    add_generation_prompt=prompted,
                    **({} if used == self._own else {"chat_template": used}),
                )
            )

        try:
            text = limited(render) if first else render()
            refuse_size(text, messages)
        except Exception as error:  # a template raises what it likes
            raise ChatModelError(
                f"the chat template of {self.name!r} ({self.template}) cannot be rendered: "
                f"{type(error).__name__}: {error}; "
                f"mend it, or pass template=FILE or one of {', '.join(TEMPLATES)}"
            ) from error
        return text

    def apply(
        self, system: str, query: str, *, first: bool = False, day: datetime.date | None = None
    ) -> str:
        """The rendered text of one chat, see `chat`."""
        if self.system_role:
            messages = [{"role": "system", "content": system}] if system else []
            messages.append({"role": "user", "content": query})
        else:
            messages = [{"role": "user", "content": f"{system}\n\n{query}" if system else query}]
        return self.chat(messages, first=first, day=day)

    @cached_property
    def pattern(self) -> str:
        """The rendered text of the messages `SYSTEM` and `USER`."""
        text = self.apply(SYSTEM, USER, first=True)
        if any(text != self.apply(SYSTEM, USER) for _ in range(8)):
            raise ChatModelError(
                f"the chat template of {self.name!r} renders one chat in two ways; "
                "pass template=FILE with one that draws nothing at random"
            )
        return text

    @cached_property
    def date(self) -> str | None:
        """The day that the template writes, as "2026-11-27"; None where it writes none."""
        if CLOCK not in self._own:
            return None
        one, other = (
            [self.apply(system, USER, first=True, day=day) for system in ("", SYSTEM)]
            for day in _TWO_DAYS
        )
        return None if one == other else str(self._day)

    @cached_property
    def default_system(self) -> str:
        """The system message that the template puts in where none is given; "" for most models."""
        if not self.system_role:
            return ""
        before, _, after = self.frame(SYSTEM)[0].partition(SYSTEM)
        head = self.frame("")[0]
        if len(head) < len(before) + len(after) or not (
            head.startswith(before) and head.endswith(after)
        ):
            return ""
        return head[len(before) : len(head) - len(after)].strip()

    @property
    def template_digest(self) -> str:
        """SHA-256 of the chat template, with "@" and the day where it writes that."""
        digest = hashlib.sha256(str(self.tokenizer.chat_template).encode()).hexdigest()
        return digest if self.date is None else f"{digest}@{self.date}"

    def about(self) -> dict[str, Any]:
        """The template's part of `ChatModel.about`."""
        return {
            "template": self.template,
            "template_sha256": self.template_digest.partition("@")[0],
            "template_date": self.date,
            "prompt_goes": "into the system message"
            if self.system_role
            else "in front of the query",
            "default_system": self.default_system,
        }

    def say(self, message: str) -> None:
        """Warns once, at the line that called `ChatModel.render`."""
        if message not in self._said:
            self._said.add(message)
            warnings.warn(message, stacklevel=5)

    def say_of_template(self, system: str) -> None:
        """Says once what the chat template does by itself."""
        name = f"the chat template of {self.name!r}"
        if system and not self.system_role:
            self.say(f"{name} takes no system message; prompts stand in front of the query")
        if not system and self.default_system:
            self.say(
                f"without a system message {name} puts in its own: "
                f"{self.default_system[:60]!r}; pass a template without it to have none"
            )
        if self.date is not None and self._asked_day is None:
            self.say(
                f"{name} writes the date, which stays {self.date} for this model; open it with "
                f"date={self.date!r} to have the same chats on another day"
            )
        if self._own.startswith(BOM):
            self.say(f"{name} begins with a byte-order mark, which is left out")

    def frame(self, system: str) -> tuple[str, str]:
        """The rendered text before and after the query."""
        if system not in self._frames:
            head, found, tail = self.apply(system, USER, first=True).partition(USER)
            if not found:
                raise ChatModelError(
                    f"the chat template of {self.name!r} drops the user message; it cannot be used"
                )
            self._frames[system] = head, tail
        return self._frames[system]

    def _finds_system_role(self) -> bool:
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": USER}]
        try:
            # A template that writes it in capitals takes it, and changes it.
            return SYSTEM.casefold() in self.chat(messages, first=True).casefold()
        except ChatModelError as error:
            if isinstance(error.__cause__, TemplateLimitError):
                raise
            return False  # a template refuses the role by raising what it likes
