"""What all forms share: the error, the queries that check a form, the tokenizer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...model.chat import ChatModel
from ...model.llama_tokens import read_tokenizer, take_as_it_is

PROBES = (
    "How do I bake bread?",
    "why",
    "1 + 1 = ?",
    "(a) or [b]?",
    "\u201cquoted\u201d",
    "\u65e5\u672c\u8a9e",
)
"""Queries by which a written form is compared with `ChatModel.render`."""


class ExportError(ValueError):
    """A form cannot be written as asked; the message says why and what to do."""


def save_tokenizer(
    tokenizer: Any, text: str, wanted: Sequence[Sequence[int]], model: ChatModel, folder: Path
) -> bool:
    """Save a tokenizer whose chat template puts a text where the system message goes.

    A chat that has a system message of its own keeps it. transformers rebuilds tokenizers of
    Llama's kind on reading, without their `legacy`: where that changes ids, the folder has its
    tokenizer.json read as it is.

    Parameters
    ----------
    tokenizer : transformers tokenizer
        Its chat template is replaced.
    text : str
        What stands in the slot.
    wanted : sequence of sequences of int
        The token ids of the PROBES.
    model : ChatModel
        Whose template is extended.
    folder : Path
        Where the tokenizer goes.

    Returns
    -------
    bool
        Whether the ids are the wanted ones, as transformers reads them back from the folder.
    """
    literal = json.dumps(text, ensure_ascii=False)
    if model.renderer.system_role:
        messages = f"[{{'role': 'system', 'content': {literal}}}] + messages"
    else:
        content = f"{literal} + '\\n\\n' + messages[0]['content']"
        messages = f"[{{'role': 'user', 'content': {content}}}] + messages[1:]"
    default = f"{{% set messages = {messages} %}}"
    tokenizer.chat_template = (
        f"{{% if messages[0]['role'] != 'system' %}}{default}{{% endif %}}"
        f"{model.renderer.chat_template}"
    )
    tokenizer.save_pretrained(folder)
    ids = [list(row) for row in wanted]
    if _ids_in(folder) != ids:
        take_as_it_is(folder)
        return _ids_in(folder) == ids
    return True


def _ids_in(folder: Path) -> list[list[int]]:
    """Token ids of the PROBES by a folder's tokenizer."""
    saved = read_tokenizer(folder)
    chats = [[{"role": "user", "content": probe}] for probe in PROBES]
    return [
        list(saved.apply_chat_template(chat, add_generation_prompt=True, return_dict=False))
        for chat in chats
    ]
