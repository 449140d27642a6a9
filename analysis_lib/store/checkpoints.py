"""The checkpoint of a training: one safetensors file that the next checkpoint replaces.

The SHA-256 in its header covers the whole file, with zeros in the place of the digest itself.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from .about import check_about
from .batches import KEY, TAG, Damaged, Kept, comes_back, digest, opened, safetensors_head, stat_of

FOLDER, SUFFIX = "checkpoints", ".safetensors"
_DTYPES = {"float32": "F32", "float64": "F64"}
_NONE = b"0" * 64
_BEFORE = b'{"__metadata__":{"%s":"{\\"sha256\\":\\"' % TAG.encode()
_AT = 8 + len(_BEFORE)  # of the digest


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint(Kept):
    tensors: Mapping[str, np.ndarray]


def path_of(root: Path, key: str) -> Path:
    return root / FOLDER / (key + SUFFIX)


def is_checkpoint(name: str) -> bool:
    return name.endswith(SUFFIX) and KEY.fullmatch(name.removesuffix(SUFFIX)) is not None


def encode(key: str, tensors: Mapping[str, np.ndarray], about: Mapping[str, Any]) -> bytes:
    """The file. Raises ValueError where reading would not give everything back as it was."""
    plain = check_about(about)
    if not comes_back(plain):
        raise ValueError(f"`about` changes in JSON: {about!r:.200}; use lists and str keys")
    for name, tensor in tensors.items():
        _check_tensor(name, tensor)
    entries: dict[str, Any] = {}
    data: list[bytes] = []
    at = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: -item[1].itemsize):  # aligned
        data.append(tensor.tobytes())
        end = at + len(data[-1])
        dtype = _DTYPES[tensor.dtype.name]
        entries[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    meta = {"sha256": _NONE.decode(), "key": key, "about": plain}
    blank = safetensors_head(meta, entries) + b"".join(data)
    return blank[:_AT] + digest(blank).encode() + blank[_AT + 64 :]


def _check_tensor(name: object, tensor: object) -> None:
    if not isinstance(name, str) or not comes_back(name) or name == "__metadata__":
        raise ValueError(f"{name!r} cannot name a tensor; use a plain word")
    if not isinstance(tensor, np.ndarray) or tensor.dtype not in (np.float32, np.float64):
        what = tensor.dtype if isinstance(tensor, np.ndarray) else type(tensor).__name__
        raise ValueError(f"tensor {name!r} is {what}; give float32 or float64 arrays")


def read(path: Path) -> Checkpoint:
    """Raises Damaged, FileNotFoundError."""
    with opened(path) as file:
        found = stat_of(os.fstat(file.fileno()))
        content = file.read()
    told = content[_AT : _AT + 64]
    blank = content[:_AT] + _NONE + content[_AT + 64 :]
    if content[8:_AT] != _BEFORE or digest(blank).encode() != told:
        raise Damaged("content does not match its checksum")
    try:
        tensors = safetensors.numpy.load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        meta = json.loads(header["__metadata__"][TAG])
        about, key = meta["about"], path.name.removesuffix(SUFFIX)
        if type(about) is not dict or meta["key"] != key:
            raise ValueError("`about` is no dict, or the file has another training's name")
    except (KeyError, TypeError, ValueError, RecursionError, SafetensorError) as error:
        raise Damaged(f"not a checkpoint of this store ({error!r:.120})") from error
    dtype = ", ".join(sorted({tensor.dtype.name for tensor in tensors.values()}))
    return Checkpoint(FOLDER, path, [key], about, dtype, found, tensors)
