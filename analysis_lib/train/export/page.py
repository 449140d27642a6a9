"""The README of an export: names in it are shown, and never become text, code or a command."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

from ...model.chat import ChatModel
from ...model.soft_prompt import SoftPrompt

ABOUT = "The soft prompt `"
"""How the second paragraph of every README begins."""


def write_readme(
    soft: SoftPrompt,
    model: ChatModel,
    folder: Path,
    title: str,
    text: str,
    code: str,
    beware: str = "",
) -> None:
    """Write the README of a form.

    Parameters
    ----------
    soft : SoftPrompt
        What is exported.
    model : ChatModel
        The model it belongs to.
    folder : Path
        Of the form.
    title, text : str
        Its head, and how to use it.
    code : str
        Python that runs in the folder.
    beware : str
        What else to know of queries from outside.
    """
    trained = code_span(soft.config.get("method", "start text, untrained"))
    size = f"{len(soft.embeddings)} tokens"
    page = f"""# {title}

The soft prompt {code_span(soft.name)} ({trained}, {size}) of {code_span(model.name)},
model {soft.model[:12]}, in {model.dtype_name}.

{text}

```python
{code}
```

Strip the query. Break up special tokens in it if it comes from outside. The template here does
neither.{beware}
"""
    (folder / "README.md").write_text(page, encoding="utf-8")


def code_span(name: object) -> str:
    """A name as a code span of Markdown, in one line.

    Parameters
    ----------
    name : object
        Anything that has a text.

    Returns
    -------
    str
        Its text between more backticks than it has in a row, with escapes for what cannot be seen.

    Examples
    --------
    >>> print(code_span("dro_default"), code_span("a`b"), code_span("two\\nlines"))
    `dro_default` ``a`b`` `two\\nlines`
    """
    shown = _visible(str(name))
    fence = "`" * (max(map(len, re.findall("`+", shown)), default=0) + 1)
    room = " " if not shown.strip() or "`" in (shown[0], shown[-1]) else ""
    return f"{fence}{room}{shown}{room}{fence}"


def python_literal(name: str) -> str:
    """A name as a literal of Python, in one line and without a backtick.

    Parameters
    ----------
    name : str
        Any text.

    Returns
    -------
    str
        What evaluates to it.

    Examples
    --------
    >>> print(python_literal('it is "mine"'))
    "it is \\"mine\\""
    """
    return _visible(json.dumps(name, ensure_ascii=False)).replace("`", "\\u0060")


def shell_word(name: str) -> str:
    """A name as one word of a shell, in one line.

    Parameters
    ----------
    name : str
        Any text.

    Returns
    -------
    str
        Quoted as POSIX says; where it has a character that cannot be seen, as bash and zsh do.

    Examples
    --------
    >>> print(shell_word("a folder"), shell_word("two\\nlines"))
    'a folder' $'two\\x0alines'
    """
    if name.isprintable():
        return shlex.quote(name)
    escaped = name.replace("\\", "\\\\").replace("'", "\\'")
    return "$'" + "".join(c if c.isprintable() else _bytes(c) for c in escaped) + "'"


def _visible(text: str) -> str:
    """With escapes for line breaks, control characters and marks that change the direction."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _bytes(character: str) -> str:
    return "".join(f"\\x{byte:02x}" for byte in character.encode("utf-8", "surrogateescape"))


def base_name(model: ChatModel) -> str:
    """The base model's name for code that runs in another folder: an absolute one, or the hub's."""
    if model.source and Path(model.source).is_dir():
        return str(Path(model.source).resolve())
    return model.source or model.name


def loading_code(model: ChatModel) -> str:
    """The Python expression that opens the base model as this one was opened."""
    revision = f", revision={python_literal(model.revision)}" if model.revision else ""
    return (
        f"AutoModelForCausalLM.from_pretrained({python_literal(base_name(model))}{revision}, "
        f'dtype="{model.dtype_name}")'
    )
