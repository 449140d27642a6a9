"""What every test runs under: an empty store of its own, no network, one thread a process, none of the user's settings."""

from __future__ import annotations

import os

import pytest

# Before torch is imported by a test module
for name in ("ANALYSIS_LIB_DEVICE", "ANALYSIS_LIB_DTYPE"):
    os.environ.pop(name, None)
os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")


@pytest.fixture(scope="session", autouse=True)
def empty_store(tmp_path_factory):
    """The store's folder for the whole session, never the user's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ANALYSIS_LIB_STORE", str(tmp_path_factory.mktemp("store")))
        yield
