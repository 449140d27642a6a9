"""Figures as web pages that open offline."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import plotly.io as pio
from plotly.offline import get_plotlyjs


def plotly_script() -> str:
    """The source of plotly.js, about 5 MB, to stand once in a page."""
    return get_plotlyjs()


def write_page(figure: Mapping[str, Any], path: Path) -> None:
    """Writes a figure's plotly JSON (data, layout) as a page; pages of a folder share one plotly.js."""
    pio.write_html(figure, path, include_plotlyjs="directory", validate=False, div_id="figure")
