"""nbval's comparison as `analysis_lib.notebooks` stores outputs: pictures and live widgets are left out, all else must agree.

Loaded by `-p tests.nbval_plugin`. Figures are tested as figures; a notebook pairs each with a small table, compared here.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from nbval.plugin import IPyNbCell

from analysis_lib.report.html import PLOTLY_MIME
from analysis_lib.report.run_notebooks import clean_outputs


def pytest_itemcollected(item):
    if isinstance(item, IPyNbCell):
        compare = item.compare_outputs
        skipped = (*item.parent.skip_compare, PLOTLY_MIME)
        item.compare_outputs = lambda new, stored: compare(clean_outputs(new), clean_outputs(stored), skipped)


def pytest_configure(config):
    """A notebook outside the root folder gets no path in its cells' ids, and xdist runs only one of equal ids."""
    for argument in config.args:
        if not Path(argument.partition("::")[0]).resolve().is_relative_to(config.rootpath):
            raise pytest.UsageError(f"{argument} is outside {config.rootpath}: add --rootdir=FOLDER, a folder above it")
