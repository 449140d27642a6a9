"""What is refused of a checkpoint, and what to do where loading fails."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import ChatModelError


def refuse_configuration(name: str, config: Any) -> None:
    """A configuration may name code of the hub and files of its own choice."""
    asked = [
        str(getattr(config, f"_{what}_implementation_internal", "")) for what in ("attn", "experts")
    ]
    if "/" in " ".join(asked):
        raise ChatModelError(
            f"the configuration of {name!r} asks for compiled code of the hub, which is never run; "
            "take the entry "
            '"attn_implementation" (or "experts_implementation") out of its config.json'
        )
    if getattr(config, "transformers_weights", None):
        raise ChatModelError(
            f"the configuration of {name!r} names its own file of weights, which is not read; take "
            "the entry "
            '"transformers_weights" out of its config.json'
        )


def weight_map(name: str, source: str, revision: str | None) -> dict[str, str] | None:
    """{tensor: file} of a checkpoint in several files; None of one in a single file.

    Raises ChatModelError: see `ChatModel.load`.
    """
    from transformers.utils import cached_file

    found: dict[str, Any] = {"revision": revision, "_raise_exceptions_for_missing_entries": False}
    try:
        if cached_file(source, "model.safetensors", **found):
            return None
        index = cached_file(source, "model.safetensors.index.json", **found)
    except OSError as error:  # the network, say
        raise ChatModelError(load_advice(name, error)) from error
    if index is None:
        return None
    try:
        files = dict(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"])
    except (OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ChatModelError(
            f"model.safetensors.index.json of {name!r} names no files ({type(error).__name__}); "
            "copy or download the model again"
        ) from error
    for file in files.values():
        if (
            not isinstance(file, str)
            or Path(file).name != file
            or not file.endswith(".safetensors")
        ):
            raise ChatModelError(
                f"model.safetensors.index.json of {name!r} names {str(file)[:80]!r}, which is no "
                "*.safetensors beside it; only such files are read: "
                "copy or download the model again"
            )
    return files


def refuse_random_weights(name: str, report: Mapping[str, Any]) -> None:
    """transformers draws at random what a checkpoint does not hold, and goes on."""
    lacking = sorted(
        {str(key) for kind in ("missing_keys", "mismatched_keys") for key in report.get(kind) or ()}
    )
    if lacking:
        raise ChatModelError(
            f"the files of {name!r} do not hold {len(lacking)} of the model's tensors "
            f"({', '.join(lacking[:3])}{', ...' * (len(lacking) > 3)}), which would be drawn at "
            "random; copy or download the model again, or mend its config.json"
        )


def load_advice(name: str, error: Exception, *, meant: Sequence[str] = ()) -> str:
    """One line that says what to do, from an error of the libraries below.

    meant: names of models in the study that the user may have meant.
    """
    text = f"{type(error).__name__}: {error}"
    names = {one.lower(): one for one in meant}
    near = difflib.get_close_matches(name.partition("@")[0].rpartition("/")[2].lower(), names)
    similar = (
        f"; models of the study with a similar name: {', '.join(names[one] for one in near)}"
        if near
        else ""
    )
    said = text.replace(name, "")  # a folder called "401" says nothing about the network
    if "SafetensorError" in said:
        return (
            f"the weights of {name!r} are damaged or incomplete ({error}); "
            "copy or download the model again"
        )
    if "UnicodeDecodeError" in said:
        return (
            f"a text file of {name!r}, such as its chat_template.jinja, is not in UTF-8 ({error}); "
            "save it in UTF-8"
        )
    if "trust_remote_code" in said:
        return (
            f"{name!r} needs its own Python code, which is never run; choose a model that "
            "transformers supports itself"
        )
    if re.search(r"sentencepiece|protobuf|tiktoken", said):
        return (
            f"the tokenizer of {name!r} is a SentencePiece file, which has to be converted; pip "
            "install sentencepiece protobuf"
        )
    if "safetensors" in said:
        return (
            f"{name!r} offers no safetensors weights; pickled weights can run code on load and are "
            "not read: choose another revision or convert it"
        )
    if re.search(r"gated repo|gatedrepo|\b40[13]\b", said, re.IGNORECASE):
        return (
            f"{name!r} is gated or private; "
            f"accept its terms on its page and log in with `hf auth login`{similar}"
        )
    if re.search(r"offline|connect|resolve|network", said, re.IGNORECASE):
        return (
            f"{name!r} is not in the local cache and the hub cannot be reached; check the network, "
            f"or give a local folder{similar}"
        )
    if re.search(r"not a valid model identifier|\b404\b|Repository ?Not ?Found", said):
        return (
            f"{name!r} is no model of the hub and no folder; "
            f"check the spelling, or give 'organism'{similar}"
        )
    return f"{name!r} cannot be loaded: {text.splitlines()[0][:300]}"
