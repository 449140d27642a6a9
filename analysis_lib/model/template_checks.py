"""What a chat template may do besides writing its messages: write the date, loop, make a huge text."""

from __future__ import annotations

import datetime
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from types import FrameType
from typing import Any

from .errors import ChatModelError

CLOCK = "strftime_now"
"""The only clock that transformers gives to a template."""

BOM = "\ufeff"

SECONDS = 5.0
"""The most time for one chat of two short messages. It takes well below a millisecond."""

Day = str | datetime.date | None

# Python's codes and those of the C library, and the C library's flags.
_CODES, _FLAGS = "aAbBcCdDeFgGhHIjklmMnpPrRsStTuUVwWxXyYzZ", ("", "-", "_", "0", "^", "#")


class TemplateLimitError(Exception):
    """A template ran too long."""


def chosen_day(day: Day) -> datetime.date | None:
    """The day asked for, else ANALYSIS_LIB_DATE's, else None. Raises ChatModelError."""
    day = day or os.environ.get("ANALYSIS_LIB_DATE") or None
    if day is None:
        return None
    try:
        return datetime.date.fromisoformat(str(day))
    except ValueError as error:
        raise ChatModelError(
            f"unknown date {str(day)!r}; give a day as '2026-11-27' or as a datetime.date"
        ) from error


def today(tokenizer: Any) -> datetime.date:
    """The day that a template would write now."""
    written = tokenizer.apply_chat_template(
        [{"role": "user", "content": ""}],
        tokenize=False,
        chat_template=f"{{{{ {CLOCK}('%Y-%m-%d') }}}}",
    )
    return datetime.date.fromisoformat(written)


@lru_cache(maxsize=64)
def pinned(template: str, day: datetime.date) -> str:
    """The Jinja text with its clock stopped at the beginning of a day.

    A macro of the clock's name stands before the template, so no global is changed. It ends with
    its line, which leaves white space and blocks at the template's beginning as they are.
    """
    if CLOCK not in template:
        return template
    moment, codes = datetime.datetime.combine(day, datetime.time()), {}
    for code in (flag + letter for flag in _FLAGS for letter in _CODES):
        with suppress(ValueError):  # not every system knows every code
            codes[code] = moment.strftime(f"%{code}")
    # "%%" is a percent sign. Each later part begins with a code.
    return (
        f"{{% macro {CLOCK}(format) %}}"
        f"{{% set codes = {json.dumps(codes, ensure_ascii=False)} %}}"
        "{% for half in format.split('%%') %}{{ '' if loop.first else '%' }}"
        "{% for part in half.split('%') %}{% if loop.first %}{{ part }}{% else %}"
        f"{{% set n = 2 if part[:1] in {list(_FLAGS[1:])} else 1 %}}"
        "{{ codes.get(part[:n], '%' ~ part[:n]) ~ part[n:] }}"
        "{% endif %}{% endfor %}{% endfor %}{% endmacro %}\n"
        f"{template}"
    )


def limited(render: Callable[[], str]) -> str:
    """The rendered text. Raises TemplateLimitError after `SECONDS`.

    The interpreter looks at the clock between the lines of the compiled template, in this thread
    alone. A single operation in C is not stopped.
    """
    end = time.monotonic() + SECONDS

    def look(frame: FrameType, event: str, arg: object) -> Any:
        if time.monotonic() > end:
            raise TemplateLimitError(f"it ran for more than {SECONDS:g} seconds")
        return look if frame.f_code.co_filename == "<template>" else None

    former = sys.gettrace()
    sys.settrace(look)
    try:
        return render()
    finally:
        sys.settrace(former)


def refuse_size(text: str, messages: Sequence[Mapping[str, str]]) -> None:
    """Raises TemplateLimitError where a template makes far more text than its messages hold."""
    most = 1_000_000 + 10 * sum(len(message["content"]) for message in messages)
    if len(text) > most:
        raise TemplateLimitError(f"it makes {len(text):,} characters, and {most:,} are allowed")


def refuse_template(soft: str, trained: str, model: str, now: str) -> None:
    """Raises ChatModelError where a soft prompt's template digest is not that of the model."""
    if trained == now:
        return
    (digest, _, then), (found, _, day) = trained.partition("@"), now.partition("@")
    if digest != found:
        raise ChatModelError(
            f"the soft prompt {soft!r} was trained in the chat template {digest[:12]} and cannot "
            f"be used in {found[:12]}, which {model!r} has now; "
            "load the model with the chat template it was trained with"
        )
    raise ChatModelError(
        f"the chat template of {model!r} writes the date, which is {day or 'not known'} now, and "
        f"the soft prompt {soft!r} was trained on {then or 'a day that was not recorded'}; "
        + (f"open the model with date={then!r}" if then else "train it again")
    )
