"""What is refused of a checkpoint: its configuration, its index, its tensors."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from .advice import load_advice, unmerged_advice, untaken_advice
from .errors import ChatModelError

# What PEFT puts into the names of tensors that were saved before the adapter was merged.
_ADAPTER = re.compile(
    r"(^|\.)(base_model\.model|lora_|hada_|lokr_|oft_|boft_|ia3_|vera_|base_layer|modules_to_save)"
)
# Masks and angles of older checkpoints, which newer models compute themselves.
_COMPUTED = re.compile(r"(inv_freq|masked_bias|attn\.bias|attention\.bias)$")

_IMPLEMENTATION = re.compile(r"(attn|experts)_implementation")
# What transformers computes by itself. For others, such as flash_attention_2 without flash_attn, it
# fetches code of the hub where the package kernels is installed.
_BUILT_IN = {"eager", "sdpa", "flex_attention", "grouped_mm", "batched_mm", "paged|eager"}
_QUANTIZED_BY_KERNELS = {"mxfp4", "fp8", "fbgemm_fp8", "eetq", "nvfp4", "mxfp8", "metal"}


def refuse_configuration(name: str, config: Mapping[str, Any]) -> None:
    """A configuration, or one inside it, may name code of the hub and files of its own choice.

    config: as it stands in the file, before a class of transformers takes it.
    """
    for entry, value in _entries(config):
        if what := _IMPLEMENTATION.search(entry):
            asked = value.values() if isinstance(value, dict) else [value]
            if any(_fetched(str(one)) for one in asked if one is not None):
                raise ChatModelError(
                    f"the configuration of {name!r} asks for compiled code of the hub, which is "
                    f'never run; take the entry "{what[0]}" out of its config.json'
                )
        if entry == "quant_method" and str(value) in _QUANTIZED_BY_KERNELS and _with_kernels():
            raise ChatModelError(
                f"the weights of {name!r} are quantized by {str(value)!r}, for which transformers "
                "fetches compiled code of the hub where the package kernels is installed; such "
                "code is never run: pip uninstall kernels"
            )
        if entry == "transformers_weights" and value:
            raise ChatModelError(
                f"the configuration of {name!r} names its own file of weights, which is not read; "
                'take the entry "transformers_weights" out of its config.json'
            )


def _entries(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every (name, value) of a configuration and of all that lies in it."""
    parts: list[Any] = [config]
    while parts:
        part = parts.pop()
        if isinstance(part, Mapping):
            yield from part.items()
            parts += part.values()
        elif isinstance(part, list):
            parts += part


def _fetched(implementation: str) -> bool:
    """Whether transformers would fetch what computes attention or experts."""
    return "/" in implementation or (implementation not in _BUILT_IN and _with_kernels())


def _with_kernels() -> bool:
    return find_spec("kernels") is not None


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
    folder = Path(source)
    absent = sorted({f for f in files.values() if folder.is_dir() and not (folder / f).is_file()})
    if absent:
        raise ChatModelError(
            f"the folder {name} lacks {len(absent)} of the files that its index names "
            f"({absent[0]}{', ...' * (len(absent) > 1)}); copy or download them"
        )
    return files


def refuse_tensors(name: str, files: Iterable[Path]) -> None:
    """Reads the safetensors files' headers alone: damaged files, adapters that are not merged."""
    from safetensors import safe_open

    names: set[str] = set()
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                names.update(tensors.keys())
        except Exception as error:  # of Rust, and of the system
            raise ChatModelError(load_advice(name, error)) from error
    if adapter := sorted(filter(_ADAPTER.search, names)):
        raise ChatModelError(unmerged_advice(name, adapter))


def refuse_report(name: str, model: Any, report: Mapping[str, Any]) -> None:
    """What transformers found while loading: it draws missing tensors, drops others, and goes on.

    Tensors beside the model's own parts, such as another head, are named in a warning.
    """
    untaken = {str(key) for key in report.get("unexpected_keys") or ()}
    if adapter := sorted(filter(_ADAPTER.search, untaken)):
        raise ChatModelError(unmerged_advice(name, adapter))
    _refuse_random_weights(name, report)
    left = [key for key in sorted(untaken) if not _COMPUTED.search(key)]
    inside = [key for key in left if _in_a_layer(model, key)]
    if inside and not getattr(model.config, "quantization_config", None):
        raise ChatModelError(untaken_advice(name, inside))
    if left:
        warnings.warn(
            f"the files of {name!r} hold tensors that the model does not take and that are left out: "
            f"{', '.join(left[:3])}{', ...' * (len(left) > 3)}",
            stacklevel=2,
        )


def _in_a_layer(model: Any, tensor: str) -> bool:
    """Whether a tensor's name lies in a list of layers, or in a module without parts.

    Layers that predict further tokens, which a configuration may announce, lie in none.
    """
    module, path = model, tensor.split(".")
    for part in path:
        if isinstance(module, torch.nn.ModuleList):
            ahead = getattr(model.config, "num_nextn_predict_layers", None) or 0
            return not (part.isdecimal() and 0 <= int(part) - len(module) < ahead)
        found = getattr(module, part, None)
        if not isinstance(found, torch.nn.Module):
            break
        module = found
    return not list(module.children())


def _refuse_random_weights(name: str, report: Mapping[str, Any]) -> None:
    lacking = sorted(
        {str(key) for kind in ("missing_keys", "mismatched_keys") for key in report.get(kind) or ()}
    )
    if lacking:
        raise ChatModelError(
            f"the files of {name!r} do not hold {len(lacking)} of the model's tensors "
            f"({', '.join(lacking[:3])}{', ...' * (len(lacking) > 3)}), which would be drawn at "
            "random; copy or download the model again, or mend its config.json"
        )
