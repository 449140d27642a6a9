"""What a stored row is keyed by: the content of a model's files, or of its weights in memory."""

from __future__ import annotations

import hashlib
import json
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from .errors import ChatModelError
from .forward import SoftEmbedding


def weight_files(folder: Path) -> dict[str, tuple[int, int, int]]:
    """{name: (bytes, time in ns, inode)} of the files that a folder's fingerprint covers."""
    paths = [
        *sorted(folder.glob("*.safetensors")),
        folder / "model.safetensors.index.json",
        folder / "config.json",
    ]
    stats = {path.name: path.stat() for path in paths if path.is_file()}
    return {name: (stat.st_size, stat.st_mtime_ns, stat.st_ino) for name, stat in stats.items()}


def state_of(model: Any) -> tuple[Any, ...]:
    """What changes when a weight is assigned or changed in place; cheap, for this process alone."""
    tensors = (*model.parameters(), *model.buffers())
    # The types of modules, since a block may have been wrapped.
    kinds = frozenset(map(type, model.modules())) - {SoftEmbedding}
    return (
        kinds,
        *((w.data_ptr(), 0 if w.is_inference() else w._version) for w in tensors if not w.is_meta),
    )


def digest_in_memory(model: Any, name: str, quantization: str | None) -> str:
    """SHA-256 of configuration, weights and buffers. Raises ChatModelError for offloaded ones."""
    digest = hashlib.sha256((quantization or "").encode())
    digest.update(json.dumps(model.config.to_dict(), sort_keys=True, default=str).encode())
    # With the buffers that are not saved.
    tensors = dict(model.named_buffers()) | model.state_dict()
    for key, tensor in sorted(tensors.items()):
        if tensor.is_meta:
            raise ChatModelError(
                f"weights of {name!r} are offloaded, so it has no fingerprint; "
                "open it with ChatModel.load"
            )
        digest.update(
            key.encode()
            + tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()


def digest_of_source(source: str, revision: str | None, quantization: str | None) -> str:
    """SHA-256 of the files of a model folder, or of the id and commit of a hub model."""
    digest = hashlib.sha256((quantization or "").encode())
    if Path(source).is_dir():
        for file in (Path(source) / name for name in weight_files(Path(source))):
            digest.update(f"{file.name}:{file_digest(file)}".encode())
    else:
        digest.update(f"{source}@{revision}".encode())
    return digest.hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file, remembered by path, size and time: a 14 GB model is hashed once."""
    from platformdirs import user_cache_path

    stat = path.stat()
    key = hashlib.sha256(f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}".encode()).hexdigest()
    memo = user_cache_path("analysis_lib") / "digests" / key
    with suppress(OSError, ValueError):
        if re.fullmatch("[0-9a-f]{64}", known := memo.read_text()):
            return known
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    try:
        memo.parent.mkdir(parents=True, exist_ok=True)
        part = memo.with_suffix(f".{os.getpid()}")
        part.write_text(digest)
        part.replace(memo)
    except OSError:
        pass  # a memo only: without it the file is hashed again
    return digest


def hooked_module(model: Any) -> str:
    """The first module with a forward hook of the user's, "" without one.

    Such a hook may change what the model computes.
    """
    for name, module in model.named_modules():
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            owner = str(getattr(hook, "__module__", "")).partition(".")[0]
            if owner not in ("torch", "transformers", "accelerate", "analysis_lib"):
                return name or "the model"
    return ""
