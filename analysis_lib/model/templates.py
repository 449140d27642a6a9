"""The study's models and their chat templates."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from ..data.shipped import ROOT
from .errors import ChatModelError
from .template_checks import BOM, TemplateLimitError, limited

TEMPLATES = tuple(sorted(path.stem for path in (ROOT / "templates").glob("*.jinja")))
"""Names of the study's chat templates."""


def study_models() -> pd.DataFrame:
    """The eight models of the study.

    Returns
    -------
    DataFrame
        model (its name in the study, which `ChatModel.load` takes), hub_id, revision ("" where
        none is known), template (name of the study's chat template), tokenizer ("fast" or "slow":
        which kind of transformers 4.37 the study used) and note.

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
    """The Jinja text of one of the study's templates (`TEMPLATES`) or of a file in UTF-8.

    A byte-order mark is left out. Raises ChatModelError where there is no such text.
    """
    path = (
        ROOT / "templates" / f"{name_or_file}.jinja"
        if str(name_or_file) in TEMPLATES
        else Path(name_or_file).expanduser()
    )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ChatModelError(_not_utf8(path, str(error))) from error
    except OSError as error:
        raise ChatModelError(
            f"no chat template can be read from {str(path)!r} ({error}); give a Jinja file, or one "
            f"of {', '.join(TEMPLATES)}"
        ) from error
    if "\0" in text:  # UTF-16 or UTF-32 of plain letters is valid UTF-8
        raise ChatModelError(_not_utf8(path, "it holds zero bytes"))
    return text


def _not_utf8(path: Path, why: str) -> str:
    return (
        f"no chat template can be read from {str(path)!r}, which is not in UTF-8 ({why}); "
        f"save it in UTF-8, or give one of {', '.join(TEMPLATES)}"
    )


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
        {name: _IN_PARTS + one for name, one in template.items()}
        if named
        else _IN_PARTS + template.removeprefix(BOM)
    )
    with suppress(TemplateLimitError):  # told where the template is used
        return parted if _shown(tokenizer) < _shown(parted) else tokenizer
    return tokenizer


def _shown(tokenizer: Any) -> int:
    """How many messages of two short chats a template shows."""
    user, system = "Xq7 user part 7qX", "Xq7 system part 7qX"
    asked = [{"role": "user", "content": user}]
    count = 0
    for messages in (asked, [{"role": "system", "content": system}, *asked]):
        render = partial(
            tokenizer.apply_chat_template, messages, tokenize=False, add_generation_prompt=True
        )
        try:
            text = str(limited(render))
        except TemplateLimitError:
            raise
        except Exception:  # a template raises what it likes
            continue
        count += (user in text) + (system in text)
    return count
