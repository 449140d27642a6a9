"""The study's models and their chat templates."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd

from ..data.shipped import ROOT
from .errors import ChatModelError

TEMPLATES = tuple(sorted(path.stem for path in (ROOT / "templates").glob("*.jinja")))
"""Names of the study's chat templates."""


def study_models() -> pd.DataFrame:
    """The eight models of the study.

    Returns
    -------
    DataFrame
        model (its name in the study, which `ChatModel.load` takes), hub_id, revision ("" where
        none is known), template (name of the study's chat template) and note.

    References
    ----------
    Zheng et al. 2024, "On Prompt-Driven Safeguarding for Large Language Models", arXiv 2401.18018.

    Examples
    --------
    >>> from analysis_lib import study_models
    >>> study = study_models()
    >>> len(study), study["model"].iloc[0], study["template"].iloc[0]
    (8, 'Llama-2-7b-chat-hf', 'llama-2')
    """
    return pd.read_csv(ROOT / "models.csv", keep_default_na=False)


def read_template(name_or_file: str | Path) -> str:
    """The Jinja text of one of the study's templates (`TEMPLATES`) or of a file.

    Raises ChatModelError where there is none.
    """
    path = (
        ROOT / "templates" / f"{name_or_file}.jinja"
        if str(name_or_file) in TEMPLATES
        else Path(name_or_file).expanduser()
    )
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ChatModelError(
            f"no chat template can be read from {str(path)!r} ({error}); give a Jinja file, or one "
            f"of {', '.join(TEMPLATES)}"
        ) from error


def processor_template(files: Iterable[str | None]) -> str | None:
    """The chat template of a processor's files, where the tokenizer has none of its own."""
    for file in filter(None, files):
        with suppress(OSError, ValueError):
            found = json.loads(Path(file).read_text(encoding="utf-8-sig"))
            template = found.get("chat_template") if isinstance(found, dict) else None
            if template and isinstance(template, str):
                return template
    return None


# Goes in front of a template that takes a message's content in parts.
_IN_PARTS = (
    "{%- set whole = namespace(messages=[]) -%}{%- for message in messages -%}"
    "{%- if message['content'] is string -%}"
    "{%- set parts = [{'type': 'text', 'text': message['content']}] -%}"
    "{%- set whole.messages = whole.messages + [dict(message, content=parts)] -%}"
    "{%- else -%}{%- set whole.messages = whole.messages + [message] -%}{%- endif -%}"
    "{%- endfor -%}{%- set messages = whole.messages -%}"
)


def takes_text(tokenizer: Any) -> Any:
    """The tokenizer, or a copy of it where its template takes content in parts alone.

    Such a template drops a content that is text, and takes [{"type": "text", "text": ...}]. The
    copy's template takes both.
    """
    template = tokenizer.chat_template
    if not template:
        return tokenizer
    named = isinstance(template, dict)
    parted = copy.copy(tokenizer)
    parted.chat_template = (
        {name: _IN_PARTS + one for name, one in template.items()} if named else _IN_PARTS + template
    )
    return parted if _shown(parted) > _shown(tokenizer) else tokenizer


def _shown(tokenizer: Any) -> int:
    """How many messages of two short chats a template shows."""
    user, system = "Xq7 user part 7qX", "Xq7 system part 7qX"
    asked = [{"role": "user", "content": user}]
    count = 0
    for messages in (asked, [{"role": "system", "content": system}, *asked]):
        with suppress(Exception):  # a template raises what it likes
            text = str(
                tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            )
            count += (user in text) + (system in text)
    return count
