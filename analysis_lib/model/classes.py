"""Which transformers class opens a model, and which models are no chat models of one decoder."""

from __future__ import annotations

from typing import Any

import torch

from .architecture import decoder, text_config
from .errors import ChatModelError


def auto_class(config: Any) -> Any:
    """The transformers class that opens a decoder, perhaps one that also takes images or sound.

    Raises ChatModelError where there is none.
    """
    import transformers

    text_config(config)
    reads_both_ways = getattr(config, "is_decoder", None) is False
    if reads_both_ways and type(config) in transformers.MODEL_FOR_MASKED_LM_MAPPING:
        raise ChatModelError(
            f"a model of the kind {config.model_type!r} is an encoder, which writes no replies; "
            "choose a chat model"
        )
    classes = {
        "CAUSAL_LM": "AutoModelForCausalLM",
        "IMAGE_TEXT_TO_TEXT": "AutoModelForImageTextToText",
        "MULTIMODAL_LM": "AutoModelForMultimodalLM",
    }
    for kind, name in classes.items():
        if type(config) in getattr(transformers, f"MODEL_FOR_{kind}_MAPPING", ()):
            return getattr(transformers, name)
    raise ChatModelError(
        f"a model of the kind {config.model_type!r} is no decoder that transformers opens; choose "
        "a chat model"
    )


def without_weights(config: Any, dtype: torch.dtype) -> Any:
    """The model's modules and the shapes of their weights alone."""
    with torch.device("meta"):
        return auto_class(config).from_config(config, dtype=dtype)


def refuse_architecture(name: str, config: Any) -> None:
    """Refuses what has no decoder of text that can be read by itself. Raises ChatModelError."""
    if auto_class(config).__name__ == "AutoModelForCausalLM":
        return
    try:
        readable = _reads_text(config)
    except ImportError as error:
        raise ChatModelError(
            f"{name!r} needs a package that is not installed: {str(error).strip().splitlines()[0]}"
        ) from error
    except Exception:  # a class of transformers fails in its own way
        readable = False
    if not readable:
        raise ChatModelError(
            f"{name!r} takes more than text ({config.model_type!r}), and its language part cannot "
            "be read by itself; choose a decoder of text"
        )


def _reads_text(config: Any) -> bool:
    """Whether the language part gives states for token ids alone, by a pass without weights."""
    text, model = text_config(config), without_weights(config, torch.float32)
    lists = [m for m in decoder(model).modules() if isinstance(m, torch.nn.ModuleList)]
    if model.get_output_embeddings() is None or text.num_hidden_layers not in map(len, lists):
        return False
    ids = torch.zeros((1, 4), dtype=torch.long, device="meta")
    try:
        with torch.no_grad():
            states = decoder(model)(input_ids=ids).last_hidden_state
    except RuntimeError:  # some layers ask for values, which there are none of
        return True
    return bool(states.shape[-1] == text.hidden_size)
