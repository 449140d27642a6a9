"""Reasoning models: how one marks its thoughts, and its template's switch that turns them off."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from ..data.thoughts import MARKS, SPOKEN, Marks
from .errors import ChatModelError

# A template's variable that turns thoughts on and off, with its values for off and for on.
SWITCHES: dict[str, tuple[Any, Any]] = {
    "enable_thinking": (False, True),
    "thinking": (False, True),
    "reasoning": (False, True),
    "thinking_budget": (0, -1),
}


@dataclass(frozen=True)
class Thoughts:
    """How a model marks its thoughts.

    marks    the texts around them; None where the model has no such marks
    prefix   what the generation prompt opens them with, "" where the reply does so itself
    dropped  special tokens that a reply's text leaves out; None stands for all of them
    """

    marks: Marks | None = None
    prefix: str = ""
    dropped: Collection[int] | None = None


def thoughts_of(tokenizer: Any, tail: str) -> Thoughts:
    """How a model marks its thoughts, found in its chat template and its added tokens.

    tail: what its template renders behind a query. Where that closes thoughts, they are off.
    """
    added = {i: token.content for i, token in tokenizer.added_tokens_decoder.items()}
    template = str(tokenizer.chat_template)
    for marks in (*MARKS, *SPOKEN):
        known = marks.opens in tail or marks.closes in template
        if not known and marks.closes not in added.values():
            continue
        if marks.closes in tail:
            return Thoughts()
        _, opened, rest = tail.rpartition(marks.opens)
        special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        kept = {i for i in special if added[i] in marks.opens + marks.closes}
        return Thoughts(marks, opened + rest if opened else "", special - kept if kept else None)
    return Thoughts()


def switch_thinking(name: str, tokenizer: Any, thinking: bool) -> None:
    """Turns a model's thoughts on or off by its template's own switch.

    The switch is set at the beginning of the tokenizer's chat template, so all that renders with it
    follows. Raises ChatModelError where the template has no switch.
    """
    template = tokenizer.get_chat_template()
    said = [{"role": "user", "content": "Hello?"}]

    def rendered(**values: Any) -> str:
        return str(
            tokenizer.apply_chat_template(
                said, tokenize=False, add_generation_prompt=True, **values
            )
        )

    for switch, values in SWITCHES.items():
        if not re.search(rf"\b{switch}\b", template):
            continue
        off, on = (rendered(**{switch: value}) for value in values)
        if off == on:
            continue
        value = str(values[thinking]).lower()
        tokenizer.chat_template = f"{{% set {switch} = {value} +%}}{template}"
        if rendered() == (off, on)[thinking]:
            return
        tokenizer.chat_template = template
    raise ChatModelError(
        f"the chat template of {name!r} has no switch that turns thoughts on or off (known are "
        f"{', '.join(SWITCHES)}); leave thinking out, or pass template=FILE with a template that "
        "does it"
    )
