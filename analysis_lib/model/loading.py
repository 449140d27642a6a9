"""Finds, checks and loads models and tokenizers: safetensors only, never a repository's code."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ..data.shipped import ROOT
from .advice import adapter_advice, file_advice, load_advice, near_names, no_model, no_tokenizer
from .checks import refuse_configuration, refuse_report, weight_map
from .classes import auto_class, refuse_architecture, without_weights
from .errors import ChatModelError
from .fingerprint import FileStat, weight_files
from .folders import check_folder, is_file, model_folder
from .llama_tokens import keep_study_ids
from .templates import TEMPLATES, processor_template, read_template, study_models


@dataclass(frozen=True)
class Source:
    """Where a model's files are.

    name      what the user called it
    place     a folder, or an id of the hub
    revision  the commit of a hub model that stands for its files, else None
    files     of a folder, as they were when it was opened (see `weight_files`)
    template  name or file of the chat template; None for the tokenizer's own
    """

    name: str
    place: str
    revision: str | None
    files: Mapping[str, FileStat]
    template: str | Path | None

    @property
    def is_folder(self) -> bool:
        return bool(self.files)


def find_source(name: str, revision: str | None, template: str | Path | None) -> Source:
    """Where a model of this name lies; a folder is checked. Raises ChatModelError."""
    base, _, at = (name, "", "") if model_folder(name) else name.partition("@")
    place = str(ROOT / "organism") if base == "organism" else base
    if at and revision and at != revision:
        raise ChatModelError(
            f"{name!r} names the revision {at!r}, and "
            f"revision={revision!r} another; give one of them"
        )
    folder, revision = model_folder(place), revision or at or None
    if folder is not None:
        if revision:
            raise ChatModelError(
                f"{base!r} is no model of the hub, so it has no "
                f"revision {revision!r}; leave that out"
            )
        files = weight_files(folder)  # before anything is read
        check_folder(name, folder)
        return Source(name, str(folder), None, files, template)
    study = study_models().set_index("model").to_dict("index")
    if place in study:
        known = study[place]
        place, revision = str(known["hub_id"]), revision or known["revision"] or None
        template = template or known["template"]
    _refuse_misspelt(name, place)
    return Source(name, place, revision, {}, template)


def _refuse_misspelt(name: str, place: str) -> None:
    """Refuses what is no folder and cannot be an id of the hub, before the network is asked."""
    if is_file(name):
        raise ChatModelError(file_advice(name))
    similar = near_names(name, ("organism", *study_models()["model"]))
    if place.startswith((".", "/", "~")) or place.count("/") > 1 or "\\" in place:
        raise ChatModelError(
            f"there is no folder {name}; give 'organism', an existing model folder or a hub id "
            f"such as 'org/model'{similar}"
        )
    if "/" not in place:
        raise ChatModelError(
            f"{name!r} is no folder and no model of the study, and an id of the hub has the form "
            "'org/model' ('gpt2' is 'openai-community/gpt2'); check the spelling, or give "
            f"'organism'{similar}"
        )


def read_source(source: Source) -> tuple[Any, Any, str | None]:
    """Configuration, tokenizer with its chat template, and commit. Raises ChatModelError."""
    from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig

    name, place, revision = source.name, source.place, source.revision
    try:
        if not source.is_folder:
            # One commit for all files; it stands for the weights in the fingerprint.
            revision = _check_repository(name, place, revision)
        adapter = _cached(place, "adapter_config.json", revision)
        refuse_configuration(name, PreTrainedConfig.get_config_dict(place, revision=revision)[0])
        config = AutoConfig.from_pretrained(place, revision=revision, trust_remote_code=False)
        refuse_architecture(name, config)
        tokenizer = AutoTokenizer.from_pretrained(place, revision=revision, trust_remote_code=False)
        if not tokenizer.chat_template:
            tokenizer.chat_template = processor_template(
                _cached(place, file, revision)
                for file in ("chat_template.json", "processor_config.json")
            )
    except ChatModelError:
        raise
    except Exception as error:
        study = study_models()
        meant = () if source.is_folder or place in set(study["hub_id"]) else tuple(study["model"])
        raise ChatModelError(load_advice(name, error, meant=meant)) from error
    if adapter:
        raise ChatModelError(
            f"{name!r} holds an adapter beside the model, so it is not clear which one is meant; "
            "merge the adapter (merge_and_unload) and save the model, or remove adapter_config.json"
        )
    _check_tokenizer(name, tokenizer, source.template)
    keep_study_ids(place, tokenizer)
    return config, tokenizer, revision


def _cached(place: str, file: str, revision: str | None) -> str | None:
    """The path of a file of a folder or of the hub; None where there is none of that name."""
    from transformers.utils import cached_file

    found = cached_file(place, file, revision=revision, _raise_exceptions_for_missing_entries=False)
    return None if found is None else str(found)


def _check_repository(name: str, place: str, revision: str | None) -> str | None:
    """The commit of a repository of the hub that holds a model."""
    from transformers.utils import cached_file, extract_commit_hash

    found = cached_file(place, "config.json", revision=revision)
    if found is not None:
        return extract_commit_hash(found, None) or revision
    if adapter := _cached(place, "adapter_config.json", revision):
        raise ChatModelError(adapter_advice(name, adapter))
    raise ChatModelError(no_model(name))


def _check_tokenizer(name: str, tokenizer: Any, template: str | Path | None) -> None:
    if len(tokenizer) <= len(tokenizer.added_tokens_decoder):
        raise ChatModelError(no_tokenizer(name))
    if template is not None:
        tokenizer.chat_template = read_template(template)
    if not tokenizer.chat_template:
        raise ChatModelError(
            f"no chat template in {name!r}; choose an instruction-tuned model, or pass "
            f"template=FILE or one of {', '.join(TEMPLATES)}"
        )
    if not tokenizer.is_fast:
        raise ChatModelError(
            f"{name!r} has no fast tokenizer, which is needed to locate the system message; "
            "install the package `tokenizers` builds for it"
        )


def choose_device(device: str | None, quantization: str | None) -> str:
    """The device asked for, else ANALYSIS_LIB_DEVICE's, else the default. Raises ChatModelError."""
    device = device or os.environ.get("ANALYSIS_LIB_DEVICE") or default_device()
    try:
        torch.empty(0, device="cpu" if device == "auto" else device)
    except (RuntimeError, AssertionError) as error:  # a torch built without CUDA asserts
        raise ChatModelError(
            f"torch has no device {device!r} here; "
            "give 'cpu', 'cuda' on a machine with a GPU, or 'auto' for several"
        ) from error
    if quantization not in (None, "8bit", "4bit"):
        raise ChatModelError(
            f"unknown quantization {quantization!r}; give '8bit' or '4bit', or leave it out"
        )
    for package, wanted in (
        ("accelerate", device == "auto" or quantization),
        ("bitsandbytes", quantization),
    ):
        if wanted and find_spec(package) is None:
            asked = "device='auto'" if device == "auto" else f"quantization={quantization!r}"
            raise ChatModelError(
                f"{asked} needs the package {package}, which is "
                f"not installed; pip install {package}"
            )
    return device


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def choose_dtype(
    dtype: str | torch.dtype | None, name: str, device: str, quantization: str | None
) -> torch.dtype:
    """The dtype asked for, else ANALYSIS_LIB_DTYPE's, else the default. Raises ChatModelError."""
    dtype = dtype or os.environ.get("ANALYSIS_LIB_DTYPE") or None
    if dtype is None:
        return torch.bfloat16 if quantization else default_dtype(name, device)
    named = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(named, torch.dtype) or not named.is_floating_point:
        raise ChatModelError(
            f"unknown dtype {dtype!r}; give 'float64', 'float32', 'bfloat16' or 'float16'"
        )
    return named


def default_dtype(name: str, device: str) -> torch.dtype:
    """bfloat16, on a CPU float32; the embedded model takes float64 there."""
    on_cpu = (
        not torch.cuda.is_available() if device == "auto" else torch.device(device).type == "cpu"
    )
    if not on_cpu:
        return torch.bfloat16
    return torch.float64 if name == "organism" else torch.float32


def load_weights(
    name: str,
    place: str,
    revision: str | None,
    *,
    device: str,
    dtype: torch.dtype,
    quantization: str | None,
) -> Any:
    """The transformers model, in eval mode, frozen, on its device. Raises ChatModelError."""
    from transformers import AutoConfig, BitsAndBytesConfig
    from transformers.utils import logging

    options: dict[str, Any] = {
        "revision": revision,
        "dtype": dtype,
        "use_safetensors": True,
        "trust_remote_code": False,
    }
    if quantization:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_8bit=quantization == "8bit",
            load_in_4bit=quantization == "4bit",
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_quant_type="nf4",
        )
    if quantization or device == "auto":
        options["device_map"] = "auto" if device == "auto" else {"": device}
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(place, revision=revision, trust_remote_code=False)
        loaded: Any = auto_class(config).from_pretrained(place, output_loading_info=True, **options)
    except Exception as error:
        raise ChatModelError(load_advice(name, error)) from error
    finally:
        if bars:
            logging.enable_progress_bar()
    model, report = loaded
    refuse_report(name, model, report)
    return (model if "device_map" in options else model.to(device)).eval().requires_grad_(False)


def bytes_of_weights(config: Any, dtype: torch.dtype, quantization: str | None) -> int:
    """Memory of the weights in a dtype and quantization, known without loading them."""
    model = without_weights(config, dtype)
    bits = {None: torch.finfo(dtype).bits, "8bit": 8, "4bit": 4}[quantization]
    head = model.get_output_embeddings()
    # Linear layers are quantized, except the vocabulary head.
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    packed = sum(m.weight.numel() for m in linear)
    return int(
        sum(p.nbytes for p in model.parameters()) - packed * (torch.finfo(dtype).bits - bits) / 8
    )


def embeddings_of_file(
    place: str,
    revision: str | None,
    config: Any,
    dtype: torch.dtype,
    files: Mapping[str, str] | None,
) -> torch.Tensor | None:
    """The input embeddings (rows, d) alone, in their file's dtype. files: see `weight_map`.

    None where the files do not hold them under the model's own name and shape.
    """
    from safetensors import SafetensorError, safe_open
    from transformers.utils import cached_file

    if getattr(config, "quantization_config", None):
        return None
    model = without_weights(config, dtype)
    weight = model.get_input_embeddings().weight
    name = next(name for name, parameter in model.named_parameters() if parameter is weight)
    try:
        file = cached_file(
            place, "model.safetensors" if files is None else files[name], revision=revision
        )
        with safe_open(file, framework="pt") as tensors:
            table = tensors.get_tensor(name)
    except (OSError, KeyError, SafetensorError):  # loading the whole model tells what is wrong
        return None
    return table if table.shape == weight.shape else None


def load_classifier(
    name: str | Path, *, revision: str | None = None, device: str | None = None
) -> tuple[Any, Any]:
    """A frozen text-classification model of a folder or hub id, and its tokenizer.

    Reads safetensors only and runs no remote code. Raises ChatModelError as `ChatModel.load` does.
    """
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        PreTrainedConfig,
    )

    name = str(name)
    safe: dict[str, Any] = {"revision": revision, "trust_remote_code": False}
    try:
        refuse_configuration(name, PreTrainedConfig.get_config_dict(name, revision=revision)[0])
        weight_map(name, name, revision)
        tokenizer = AutoTokenizer.from_pretrained(name, **safe)
        loaded: Any = AutoModelForSequenceClassification.from_pretrained(
            name, use_safetensors=True, output_loading_info=True, **safe
        )
    except ChatModelError:
        raise
    except Exception as error:
        raise ChatModelError(load_advice(name, error)) from error
    model, report = loaded
    refuse_report(name, model, report)
    return model.to(
        device or ("cuda" if torch.cuda.is_available() else "cpu")
    ).eval().requires_grad_(False), tokenizer
