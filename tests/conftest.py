"""What every test runs under: an empty store of its own, no network, one thread a process, none of the user's settings.

At the end it says how many tests were skipped, and why.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest

# Before torch is imported by a test module
for name in ("ANALYSIS_LIB_DEVICE", "ANALYSIS_LIB_DTYPE", "ANALYSIS_LIB_DATE"):
    os.environ.pop(name, None)
os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")


@pytest.fixture(scope="session", autouse=True)
def empty_store(tmp_path_factory):
    """The store's folder for the whole session, never the user's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ANALYSIS_LIB_STORE", str(tmp_path_factory.mktemp("store")))
        yield


# Files whose tests start kernels and browsers. They go first, so that no worker is left with one at the end.
LONGEST = (
    "test_notebook_tools.py",
    "test_browser.py",
    "test_cli.py",
    "test_docs.py",
    "test_bench.py",
)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in LONGEST)


def pytest_addoption(parser):
    parser.addoption("--skipped-to", type=Path, help="a file for the lines on skipped tests")


def pytest_terminal_summary(terminalreporter, config):
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = Counter(report.longrepr[2].removeprefix("Skipped: ") for report in skipped)
    lines = []
    for reason, count in sorted(reasons.items()):
        lines.append(f"{count} {'test' if count == 1 else 'tests'} skipped: {reason}")
        terminalreporter.write_line(lines[-1], yellow=True)
    if file := config.getoption("--skipped-to"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
