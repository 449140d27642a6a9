"""The study's models and their chat templates."""

from __future__ import annotations

from pathlib import Path

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
