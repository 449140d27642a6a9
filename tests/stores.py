"""What the tests of the store share: rows, and ways to look at and harm its files."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from analysis_lib.store.batches import row_key
from analysis_lib.store.store import Store

ABOUT = {
    "model": "a" * 64,
    "model_name": "A",
    "prompts": ["none"],
    "layer": -1,
    "certificate": {"max_difference": 0.001},
}
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")


def keys(n, **parts):
    return [row_key(row=i, **parts) for i in range(n)]


def states(n, d=8, seed=0):
    bits = np.random.default_rng(seed).standard_normal((n, d)).astype(np.float32).view(np.uint32)
    return (bits & np.uint32(0xFFFF0000)).view(np.float32)


def files(store, kind="states"):
    return sorted((store.folder / "v1" / kind).iterdir())


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def filled_store(folder):
    """Five batches of four rows each, under prompts of their own."""
    store = Store(folder)
    for part in range(5):
        about = ABOUT | {"prompts": ["none", f"prompt {part}"]}
        store.write_states(keys(4, part=part), states(4, seed=part), dtype="bfloat16", about=about)
    return store
