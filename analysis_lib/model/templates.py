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
