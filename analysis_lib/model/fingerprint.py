"""What a stored row is keyed by: the content of a model's files, or of its modules in memory."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from .errors import ChatModelError
from .forward import SoftEmbedding

FileStat = tuple[int, int, int, int]
"""Bytes, modification time in ns, inode, and the time in ns that the system itself keeps.

The last one changes with the content, and no program can set it.
"""

# What a user may set, or a forward pass or saving sets, without any change in what is computed.
_WITHOUT_EFFECT = re.compile(
    "training|gradient_checkpointing|use_cache|output_.*|return_dict|.*_token_id|name_or_path|"
    "transformers_version|dtype|torch_dtype|_.*"
)


def weight_files(folder: Path) -> dict[str, FileStat]:
    """{name: stat} of the files that a folder's fingerprint covers."""
    paths = [
        *sorted(folder.glob("*.safetensors")),
        folder / "model.safetensors.index.json",
        folder / "config.json",
    ]
    return {path.name: _stat_of(path) for path in paths if path.is_file()}


def refuse_change(name: str, source: str, files: Mapping[str, FileStat]) -> None:
    """Raises ChatModelError where a folder's files are not those that `weight_files` saw."""
    if files and weight_files(Path(source)) != files:
        raise ChatModelError(
            f"the files of {name!r} changed after the model was opened; "
            "open it again with ChatModel.load to use the new ones"
        )


def _stat_of(path: Path) -> FileStat:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ino, stat.st_ctime_ns


def state_of(model: Any) -> tuple[Any, ...]:
    """What changes when the model is changed outside `.data`; cheap, for this process alone.

    It covers the tensors, the modules' classes, and the numbers that modules and configuration
    hold, such as the scaling of attention.
    """
    tensors = (*(w for _, w in model.named_parameters()), *(b for _, b in _buffers(model)))
    return (
        tuple(_modules(model)),
        _settings(model.config),
        *((w.data_ptr(), 0 if w.is_inference() else w._version) for w in tensors if not w.is_meta),
    )


def _modules(model: Any) -> Iterator[tuple[Any, ...]]:
    """Class and settings of each module; soft tokens leave no trace here."""
    for module in model.modules():
        if not isinstance(module, SoftEmbedding):
            kind = type(module)
            yield f"{kind.__module__}.{kind.__qualname__}", _settings(module)


def _settings(owner: Any) -> tuple[Any, ...]:
    """The plain numbers and texts among an object's attributes: what steering may rescale."""
    moves = _moves(owner)
    return tuple(
        (name, value)
        for name, value in sorted(vars(owner).items())
        if type(value) in (bool, int, float, str)
        and not _WITHOUT_EFFECT.fullmatch(name)
        and not (moves and name.endswith(("max_seq_len_cached", "attention_scaling")))
    )


def _buffers(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    for name, module in model.named_modules():
        if not _moves(module):
            yield from module.named_buffers(name, recurse=False)


def _moves(module: Any) -> bool:
    """Whether a forward pass itself rewrites a module's frequencies: they follow the length."""
    kinds = str(vars(module).get("rope_type", ""))
    return "dynamic" in kinds or "longrope" in kinds


def digest_in_memory(model: Any, name: str, quantization: str | None) -> str:
    """SHA-256 of configuration, modules, weights and buffers.

    Raises ChatModelError for offloaded ones.
    """
    digest = hashlib.sha256((quantization or "").encode())
    config = model.config.to_dict()
    for set_by_saving in ("architectures", "dtype", "torch_dtype", "transformers_version"):
        config.pop(set_by_saving, None)
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    digest.update(json.dumps(list(_modules(model)), default=str).encode())
    # With the buffers that are not saved, without those that the passes rewrite.
    kept = dict(_buffers(model))
    moving = dict(model.named_buffers()).keys() - kept.keys()
    tensors = {key: t for key, t in model.state_dict().items() if key not in moving} | kept
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


def file_digest(path: Path, *, anew: bool = False) -> str:
    """SHA-256 of a file, remembered by path and `FileStat`: a 14 GB model is hashed once.

    anew: whatever is remembered, the file is hashed again.
    """
    memo, stat = _memo(path), _stat_of(path)
    if not anew and (known := _remembered(memo)):
        return known
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if _stat_of(path) == stat:  # else it was written meanwhile
        with suppress(OSError):  # a memo only: without it the file is hashed again
            memo.parent.mkdir(parents=True, exist_ok=True)
            part = memo.with_suffix(f".{os.getpid()}")
            part.write_text(digest)
            part.replace(memo)
    return digest


def _memo(path: Path) -> Path:
    """Where the digest of a file's content, as it is now, is remembered."""
    from platformdirs import user_cache_path

    stat = ":".join(map(str, _stat_of(path)))
    key = hashlib.sha256(f"{path.resolve()}:{stat}".encode()).hexdigest()
    return user_cache_path("analysis_lib") / "digests" / key


def _remembered(memo: Path) -> str:
    with suppress(OSError, ValueError):
        if re.fullmatch("[0-9a-f]{64}", known := memo.read_text()):
            return known
    return ""


def hash_anew(folder: Path) -> dict[str, str]:
    """{file: status} of a model folder's weights, hashed whatever is remembered of them.

    status is "ok", or says that the remembered digest was of another content. The new digest takes
    its place.
    """
    found = {}
    for path in (folder / name for name in weight_files(folder)):
        before = _remembered(_memo(path))
        new = file_digest(path, anew=True)
        changed = before not in ("", new)
        found[path.name] = "content changed, size and times did not" if changed else "ok"
    return found
