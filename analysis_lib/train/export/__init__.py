"""A soft prompt for use elsewhere: a PEFT adapter, vLLM prompt embeddings, or a model folder.

PEFT puts its virtual tokens before everything, and vLLM takes the embeddings of the whole prompt.
So both forms hold the head of the rendered chat (BOS, template, soft prompt) as one block of
embeddings. The user sends what follows it: the token ids of the chat rendered under the start text,
without the first few. The plain form gives the soft tokens ids of their own. Each form is checked
against `ChatModel.render` when it is written.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from ...model.architecture import has_per_layer_embeddings, no_soft_tokens
from ...model.chat import ChatModel
from ...model.errors import ChatModelError
from ...model.soft_prompt import SoftPrompt
from .head import completion_body, prompt_embeds, write_peft, write_vllm
from .page import ABOUT
from .parts import PROBES, ExportError
from .plain import write_plain

__all__ = ["FORMS", "PROBES", "ExportError", "completion_body", "export", "prompt_embeds"]

FORMS: dict[str, Callable[[SoftPrompt, ChatModel, Path], None]] = {
    "peft": write_peft,
    "vllm": write_vllm,
    "plain": write_plain,
}
"""What writes each form."""

MOST_UNASKED = 1_000_000_000
"""Bytes of weights that the plain form copies without being asked for it."""


def export(
    soft: SoftPrompt, model: ChatModel, folder: str | Path, forms: Sequence[str] | None = None
) -> dict[str, Path]:
    """Write a soft prompt in the forms that other software reads.

    Each form has a folder with a README of working code. The folder appears when it is whole, and
    replaces an older export.

    Parameters
    ----------
    soft : SoftPrompt
        What is exported.
    model : ChatModel
        The model it belongs to.
    folder : str or Path
        The forms become its folders peft, vllm and plain.
    forms : sequence of str or None
        Names of `FORMS`. By default peft and vllm, and plain where the weights that it copies are
        below 1 GB.

    Returns
    -------
    dict of str to Path
        The folder of each form.

    Raises
    ------
    ChatModelError
        For a soft prompt of another model or template.
    ExportError
        For a form that cannot be exact, and for a folder that holds something else.

    Examples
    --------
    >>> import tempfile
    >>> from analysis_lib import ChatModel, SoftPrompt
    >>> model = ChatModel.load("organism")
    >>> soft = SoftPrompt.from_text(model, "Be careful.", name="careful")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     written = export(soft, model, folder, ["peft"])
    ...     sorted(path.name for path in written["peft"].iterdir())[:2]
    ['README.md', 'adapter_config.json']
    """
    soft.check(model)
    if has_per_layer_embeddings(model.config):
        raise ChatModelError(no_soft_tokens(model.name))
    if not forms:
        small = model.weight_bytes < MOST_UNASKED
        forms = [form for form in FORMS if form != "plain" or small]
    if unknown := set(forms) - set(FORMS):
        raise ExportError(
            f"unknown form {', '.join(sorted(unknown))}; choose among {', '.join(FORMS)}"
        )
    written = {form: Path(folder) / form for form in forms}
    for place in written.values():
        if place.exists() and not _replaceable(place):
            raise ExportError(
                f"{place} holds something that is no whole export; "
                "remove it, or choose another folder"
            )
    for form, place in written.items():
        part = place.with_name(f".{form}.part")
        shutil.rmtree(part, ignore_errors=True)  # a killed run's
        part.mkdir(parents=True)
        try:
            FORMS[form](soft, model, part)
            _share(part)
            if place.exists():
                shutil.rmtree(place)
            part.rename(place)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return written


def _share(folder: Path) -> None:
    """Give all files the mode of the README.

    safetensors writes for the owner alone, and who serves the export may be another user.
    """
    mode = (folder / "README.md").stat().st_mode
    for file in filter(Path.is_file, folder.iterdir()):
        file.chmod(mode)


def _replaceable(place: Path) -> bool:
    """Whether a folder is empty or an export; its README is written last."""
    if place.is_symlink() or not place.is_dir():
        return False
    readme = place / "README.md"
    return not any(place.iterdir()) or (
        readme.is_file() and ABOUT in readme.read_text(encoding="utf-8", errors="replace")
    )
