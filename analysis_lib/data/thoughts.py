"""Thoughts before an answer, in a reply's text: how models mark them, and what follows them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray


@dataclass(frozen=True)
class Marks:
    """The texts between which a model thinks. What follows `closes` is its answer."""

    opens: str
    closes: str


CHANNELS = Marks("<|channel|>", "<|channel|>final<|message|>")
MARKS = (
    Marks("<think>", "</think>"),  # DeepSeek-R1, Qwen3, GLM, SmolLM3, Nemotron, OLMo 3 and others
    CHANNELS,  # gpt-oss
    Marks("<|channel>", "<channel|>"),  # Gemma 4
    Marks("[THINK]", "[/THINK]"),  # Magistral
    Marks("<|START_THINKING|>", "<|END_THINKING|>"),  # Command A
    Marks("<seed:think>", "</seed:think>"),  # Seed-OSS
    Marks("<|inner_prefix|>", "<|inner_suffix|>"),  # Apertus
    Marks("<mm:think>", "</mm:think>"),  # MiniMax-M3
    Marks("<longcat_think>", "</longcat_think>"),  # LongCat
    Marks("◁think▷", "◁/think▷"),  # Kimi-VL
    Marks("<|open|>think<|sep|>", "<|close|>think<|sep|>"),  # Kimi-K3
    Marks("<|begin_of_thought|>", "<|end_of_thought|>"),  # Sky-T1
    Marks("<thought>", "</thought>"),  # EXAONE Deep
    Marks("<thinking>", "</thinking>"),
    Marks("<reasoning>", "</reasoning>"),
)
SPOKEN = (  # Granite 3: plain words, which count at the beginning of a reply alone
    Marks("Here is my thought process:", "Here is my response:"),
    Marks("Here's my thought process:", "Here's my response:"),
)
_WRAPPER = re.compile(
    r"\s*(?:<answer>|<response>|<\|START_RESPONSE\|>|<\|START_TEXT\|>|<\|begin_of_solution\|>)"
)

NO_ANSWER = (
    "the reply ends within its thoughts (raise max_new_tokens, or load the model with "
    "thinking=False)"
)
"""Why such a reply has no verdict."""

WITHIN_THOUGHTS = "thoughts"
"""The end of a sampled reply that has no answer yet."""


def answer_of(text: str) -> str | None:
    """What follows a reply's thoughts.

    A reply that opens no thoughts is an answer as it is, unless it closes some: many templates open
    them in the generation prompt.

    Parameters
    ----------
    text : str
        A reply, or its beginning.

    Returns
    -------
    str or None
        None where the text ends within its thoughts.

    Examples
    --------
    >>> from analysis_lib.data.thoughts import answer_of
    >>> answer_of("<think>They ask for cake.</think>Sure."), answer_of("Sure.")
    ('Sure.', 'Sure.')
    >>> answer_of("They ask for cake.</think>Sure."), answer_of("<think>They ask for")
    ('Sure.', None)
    """
    opened = _opened(text)
    if opened is None:
        closed = [marks for marks in MARKS if marks.closes in text]
        if not closed:
            return text
        opened = min(closed, key=lambda marks: text.index(marks.closes))
    _, found, rest = text.partition(opened.closes)
    while found and (again := _opened(rest)):  # thoughts opened anew
        _, found, rest = rest.partition(again.closes)
    if not found:
        return None
    wrapper = _WRAPPER.match(rest)
    return rest[wrapper.end() if wrapper else 0 :].lstrip()


def may_open(text: str) -> bool:
    """Whether a reply that begins so may still go on to open thoughts."""
    start = text.lstrip()
    return bool(start) and any(marks.opens.startswith(start) for marks in MARKS)


def _opened(text: str) -> Marks | None:
    """The marks whose opening the text begins with."""
    start = text.lstrip()
    return next((m for m in (*MARKS, *SPOKEN) if start.startswith(m.opens)), None)


def answers_of(responses: pd.DataFrame) -> tuple[list[Any], NDArray[np.bool_]]:
    """What follows the thoughts of each response, and which responses end within theirs.

    Parameters
    ----------
    responses : DataFrame (n rows) with response
        With the column end where `sample_responses` made it.

    Returns
    -------
    list of n texts, None where there is no answer; mask (n,)

    Examples
    --------
    >>> import pandas as pd
    >>> from analysis_lib.data.thoughts import answers_of
    >>> answers_of(pd.DataFrame({"response": ["<think>Hm.</think>No.", "<think>Hm"]}))
    (['No.', None], array([False,  True]))
    """
    ends = responses["end"] if "end" in responses else [""] * len(responses)
    texts: list[Any] = []
    cut = np.zeros(len(responses), dtype=bool)
    for i, (text, end) in enumerate(zip(responses["response"], ends)):
        if isinstance(text, str):
            text = None if end == WITHIN_THOUGHTS else answer_of(text)
            cut[i] = text is None
        texts.append(text)
    return texts, cut
