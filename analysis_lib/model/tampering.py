"""Whether a model computes what transformers defines, as far as its modules show it.

A key covers configuration, classes, numbers and weights. It covers no function: a hook, a replaced
`forward` or an adapter can be switched at any time. Such a model is kept out of the store.
"""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Iterator
from typing import Any

import torch

from .errors import ChatModelError

# Packages whose functions a clean model runs, or its files name; a third of them are kernels and
# quantizers.
LIBRARIES = frozenset(
    "torch transformers accelerate analysis_lib safetensors tokenizers huggingface_hub numpy einops "
    "scipy packaging regex tqdm PIL timm torchvision torchaudio sentencepiece "
    "flash_attn flash_attn_interface xformers triton causal_conv1d mamba_ssm fla kernels "
    "bitsandbytes torchao compressed_tensors optimum awq gptqmodel auto_gptq hqq aqlm fbgemm_gpu "
    "fp_quant eetq spqr_quant vptq auto_round".split()
)
_FUNCTIONS = (types.FunctionType, types.MethodType, functools.partial)


def altered(model: Any, name: str) -> str:
    """A clause that says why no key covers what the model computes; "" for a clean model."""
    return altered_everywhere(name) or _hooked(model, name) or _replaced(model, name)


def altered_everywhere(name: str) -> str:
    """The same for what alters every model of this process, loaded or not."""
    for device in ("cpu", "cuda"):
        if torch.is_autocast_enabled(device):
            return f"{name!r} runs under autocast on {device}"
    everywhere = torch.nn.modules.module
    for hooks in (everywhere._global_forward_hooks, everywhere._global_forward_pre_hooks):
        if not all(map(_of_library, hooks.values())):
            return f"{name!r} runs under a global forward hook"
    return ""


def _hooked(model: Any, name: str) -> str:
    for place, module in model.named_modules():
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            if not _of_library(hook):
                return f"{place or 'the top'} of {name!r} has a forward hook"
    return ""


def _replaced(model: Any, name: str) -> str:
    """The first module whose class or instance is computed by functions of another package."""
    judged: dict[type, bool] = {}
    for place, module in model.named_modules():
        kind, where = type(module), f"{place or 'the top'} of {name!r}"
        if kind.__module__.partition(".")[0] == "peft":
            return f"{where} is an adapter layer of PEFT, which can be switched or rescaled"
        if kind not in judged:
            judged[kind] = _of_library(kind.forward) and _of_library(kind.__call__)
        if not judged[kind]:
            return f"{where} is a {kind.__name__} whose forward is not one of transformers or torch"
        for key, value in vars(module).items():
            if (key == "forward" or isinstance(value, _FUNCTIONS)) and not _of_library(value):
                return f"{where} has a replaced {key}"
    for function in _helpers({kind.__module__ for kind in judged}, model):
        if not _of_library(function):
            return f"{name!r} calls {function.__name__!r}, a function put in another's place"
    return ""


def _helpers(modules: set[str], model: Any) -> Iterator[Any]:
    """The functions that modules of these files and of torch call by name."""
    from transformers import AttentionInterface

    for file in (*modules, "torch.nn.functional"):
        for value in vars(sys.modules[file]).values() if file in sys.modules else ():
            if hasattr(value, "__code__"):
                yield value
    chosen = getattr(model.config, "_attn_implementation", None)
    yield from (f for name, f in AttentionInterface().items() if name == chosen)


def _of_library(function: Any) -> bool:
    """Whether a function, and each that it wraps, is code of a library that a clean model uses.

    A decorator copies the name of what it wraps. So the file of the code itself is asked.
    """
    while isinstance(function, functools.partial) or hasattr(function, "__wrapped__"):
        if isinstance(function, functools.partial):
            inner = function.func
            wrapped = getattr(function, "__wrapped__", None)
            if wrapped is not None and not _of_library(wrapped):
                return False
        else:
            if not _is_known(_home(function)):
                return False
            inner = function.__wrapped__
        function = inner
    return _is_known(_home(function))


def _home(function: Any) -> str:
    """The module that a function's code belongs to."""
    function = getattr(function, "__func__", function)
    code_of = getattr(function, "__globals__", None)
    if code_of is not None:
        return str(code_of.get("__name__", ""))
    return str(getattr(function, "__module__", None) or type(function).__module__)


def _is_known(module: str) -> bool:
    root = module.partition(".")[0]
    return root in LIBRARIES or root in sys.stdlib_module_names


def refuse_prompt_learning(model: Any, name: str) -> None:
    """Raises ChatModelError for a PEFT model that puts learned tokens or keys before the chat.

    They lie outside its modules, so capture and sampling would read the base model.
    """
    for config in dict(getattr(model, "peft_config", None) or {}).values():
        if getattr(config, "is_prompt_learning", False):
            kind = str(getattr(config, "peft_type", "")).rpartition(".")[2].lower() or "prompt"
            raise ChatModelError(
                f"{name!r} is a PEFT model of the kind {kind}, which puts learned tokens before "
                "the chat; wrap its base model, model.get_base_model(), and give the tokens as a "
                "SoftPrompt in the system message; learned keys and values (prefix tuning) have no "
                "such form: use an adapter that merge_and_unload can merge"
            )
