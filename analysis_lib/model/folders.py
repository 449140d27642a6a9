"""Folders that people have: what a name of this machine leads to, and what a folder must hold."""

from __future__ import annotations

from pathlib import Path

from .advice import adapter_advice, gguf_advice, no_tokenizer
from .checks import refuse_tensors
from .errors import ChatModelError

_VOCABULARIES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tekken.json",
)
_POINTER = b"version https://git-lfs"


def model_folder(name: str) -> Path | None:
    """The absolute path of the folder of that name; None where there is none."""
    try:
        path = Path(name).expanduser()
        return path.resolve() if name and path.is_dir() else None
    except (OSError, RuntimeError, ValueError):  # too long, no such user, a NUL
        return None


def is_file(name: str) -> bool:
    try:
        return Path(name).expanduser().is_file()
    except (OSError, RuntimeError, ValueError):
        return False


def check_folder(name: str, folder: Path) -> None:
    """Refuses a folder that is no model, and says what it is. Raises ChatModelError."""
    weights = [
        path for path in folder.glob("*.safetensors") if not path.name.startswith("adapter_")
    ]
    adapter, gguf = folder / "adapter_config.json", [p.name for p in folder.glob("*.gguf")]
    if adapter.is_file() and not weights:
        raise ChatModelError(adapter_advice(name, adapter))
    if gguf and not weights:
        raise ChatModelError(gguf_advice(name, gguf))
    config = folder / "config.json"
    if not config.is_file():
        raise ChatModelError(f"the folder {name} holds no config.json, {_instead(folder)}")
    if not weights:
        raise ChatModelError(
            f"the folder {name} holds no *.safetensors; pickled weights can run code on load and "
            "are not read: save the model again with save_pretrained(..., safe_serialization=True)"
        )
    tokenizers = [folder / file for file in _VOCABULARIES if (folder / file).exists()]
    for path in (config, *weights, *tokenizers):
        with path.open("rb") as file:
            pointer = file.read(len(_POINTER)) == _POINTER
        if pointer:
            raise ChatModelError(
                f"{path.name} in the folder {name} is a pointer of Git LFS, not the file itself; "
                "fetch the files with `git lfs pull`"
            )
    if not tokenizers:
        raise ChatModelError(no_tokenizer(name))
    whole = ("model.safetensors", "model.safetensors.index.json")
    if not any((folder / file).exists() for file in whole):
        raise ChatModelError(
            f"the folder {name} holds {sorted(p.name for p in weights)[0]} and neither "
            f"{whole[0]} nor {whole[1]}, which are read; save the model with save_pretrained"
        )
    refuse_tensors(name, weights)


def _instead(folder: Path) -> str:
    """What a folder without config.json is, and what to give."""
    models = sorted(folder.glob("*/config.json")) + sorted(folder.glob("snapshots/*/config.json"))
    if models:
        found = ", ".join(str(path.parent.relative_to(folder)) for path in models[:3])
        return f"and folders in it do ({found}); give one of these"
    if (folder / "model_index.json").is_file():
        return "and it holds a pipeline of diffusers, which is no chat model; give a chat model"
    if (folder / "params.json").is_file():
        return (
            "and it holds a model in its maker's own form (params.json); give the same model in "
            "the form of transformers"
        )
    return "so it is no model; give the folder that save_pretrained wrote"
