"""Safety prompts: the study's, and a user's own from files."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

from .shipped import ROOT
from .user_files import (
    FILE_NAME,
    DataError,
    JsonPairs,
    check_text,
    fits_file_name,
    read_text,
    shown,
)

PROMPTS = ("default", "short", "mistral")


RESERVED_PROMPTS = ("dro", "tuned")


def load_safety_prompts(path: str | Path | None = None) -> dict[str, str]:
    """Safety prompts by name: "none", "default", "short", "mistral", then the user's.

    "none" has the text "", which means no system message.

    Parameters
    ----------
    path : str or Path, optional
        A .txt file (its stem is the name), a folder of them, or a .json file {name: text}.

    Returns
    -------
    dict
        {name: text}, texts stripped of surrounding space.

    Raises
    ------
    DataError
        For a blank text; a built-in name with another text; a name of RESERVED_PROMPTS; a name that
        cannot be part of a file's name; and a link in the folder that leads out of it.

    References
    ----------
    Zheng et al. 2024, arXiv 2401.18018, whose three prompts are "default" (LLaMA-2's), "short" and
    "mistral".

    Examples
    --------
    >>> from analysis_lib import load_safety_prompts
    >>> prompts = load_safety_prompts()
    >>> list(prompts), prompts["none"]
    (['none', 'default', 'short', 'mistral'], '')
    """
    prompts = {"none": ""} | {
        name: read_text(ROOT / "prompts" / f"{name}.txt").strip() for name in PROMPTS
    }
    if path is None:
        return prompts
    path = Path(os.path.expanduser(path))
    for name, text, where in _user_prompts(path):
        check_text(text, where)
        # Files are saved under this name.
        if not fits_file_name(name):
            raise DataError(
                f"{where}: the name {shown(name)} cannot be part of a file's name; {FILE_NAME}"
            )
        if not text.strip():
            raise DataError(
                f"{where}: the prompt {name!r} has no text; "
                "write one, or use the built-in 'none' for no system message"
            )
        if name in RESERVED_PROMPTS:
            raise DataError(
                f"{where}: {name!r} is the name of a trained prompt in the notebooks; "
                "give this one another name"
            )
        if prompts.setdefault(name, text.strip()) != text.strip():
            kind = "a built-in prompt" if name in ("none", *PROMPTS) else "another prompt of yours"
            raise DataError(
                f"{where}: {name!r} is the name of {kind} with another text; "
                "give this one a name of its own"
            )
    return prompts


def _user_prompts(path: Path) -> Iterable[tuple[str, str, str]]:
    """(name, text, where) of a user's .txt, folder or .json."""
    suffix = path.suffix.lower()
    if path.is_dir():
        files = sorted(path.glob("*.txt"))
        if not files:
            raise DataError(
                f"{path}: no .txt file in this folder; put one file per safety prompt there"
            )
        for file in files:
            if not Path(os.path.realpath(file)).is_relative_to(os.path.realpath(path)):
                raise DataError(
                    f"{file}: a link that leads out of the folder; put the file itself there"
                )
        return [(file.stem, read_text(file), str(file)) for file in files]
    if suffix == ".txt":
        return [(path.stem, read_text(path), str(path))]
    if suffix != ".json":
        raise DataError(
            f"{path}: unknown kind of file; safety prompts come as a .txt file, a folder of .txt "
            f"files, or a .json file {{name: text}}"
        )
    content = read_text(path)
    try:
        pairs = json.loads(content, object_pairs_hook=JsonPairs)
    except (ValueError, RecursionError) as error:
        raise DataError(f'{path}: not valid JSON ({error}); write {{"name": "text"}}') from error
    if (
        not isinstance(pairs, JsonPairs)
        or not pairs
        or not all(name.strip() and isinstance(text, str) for name, text in pairs)
    ):
        raise DataError(f'{path}: not an object of names and texts; write {{"name": "text"}}')
    return [(name.strip(), text, f"{path}, {shown(name)}") for name, text in pairs]
