"""The soft prompts that the study published: their names, and the model that each belongs to."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..data.prompts import load_safety_prompts
from .chat import ChatModel
from .errors import ChatModelError
from .templates import read_template, study_models

PUBLISHED = re.compile(
    r"(?:type\.(?P<type>\w+)_)?length\.(?P<length>default|short|mistral)"
    r"(?P<ablation>_no\w+)?\.safetensors"
)
"""Names of the 48 files. DRO's have a "type", those of prompt tuning do not."""


def published_fields(
    path: Path, embeddings: NDArray[np.float32], named: re.Match[str], model: ChatModel | None
) -> dict[str, Any]:
    """The fields of `SoftPrompt` for one of the 48: the folder names the model.

    The study's placeholders are special tokens, so each is `apart`. Raises ChatModelError where the
    model is another one, or not given.
    """
    if model is None:
        raise ChatModelError(
            f"{path.name} does not say which model it belongs to; load it with "
            "SoftPrompt.load(path, model)"
        )
    if embeddings.shape[1:] != (model.hidden_size,):
        raise ChatModelError(
            f"{path} has embeddings of shape {embeddings.shape}, those of {model.name!r} have "
            f"{model.hidden_size} dimensions; load the model it was trained on"
        )
    folder, study = path.parent.name, study_models().set_index("model")
    if folder in study.index:
        hub_id, template = str(study.loc[folder, "hub_id"]), str(study.loc[folder, "template"])
        chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
        theirs = model.tokenizer.apply_chat_template(
            chat,
            tokenize=False,
            add_generation_prompt=True,
            chat_template=read_template(template),
        )
        if (
            model.source in set(study["hub_id"]) - {hub_id}
            or model.renderer.apply("s", "q") != theirs
        ):
            raise ChatModelError(
                f"{path} was trained on {folder!r} in the chat template {template!r} and "
                f"cannot be used on {model.name!r} in {model.template!r}; "
                f"open the model with ChatModel.load({folder!r}), or "
                f"its folder with template={template!r}"
            )
    return {
        "name": f"{'tuned' if named['type'] is None else 'dro'}"
        f"_{named['length']}{named['ablation'] or ''}",
        "embeddings": embeddings,
        "start_text": load_safety_prompts()[named["length"]],
        "model": model.fingerprint,
        "model_name": model.name,
        "config": {
            "method": "prompt tuning" if named["type"] is None else "DRO",
            "published": f"{folder}/{path.name}",
        },
        "template": model.renderer.template_digest,
        "apart": True,
    }
