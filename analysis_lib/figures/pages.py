"""Figures as web pages that open offline."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import plotly.io as pio
from plotly.offline import get_plotlyjs


def plotly_script() -> str:
    """The source of plotly.js, to stand once in a page.

    Returns
    -------
    str
        About 5 MB.

    Examples
    --------
    >>> "plotly.js" in plotly_script()[:200]
    True
    """
    return get_plotlyjs()


def write_page(figure: Mapping[str, Any], path: Path) -> None:
    """Write a figure as a page that opens offline; pages of a folder share one plotly.js.

    Parameters
    ----------
    figure : mapping
        Plotly's JSON: data and layout.
    path : Path
        The page.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_page({"data": [], "layout": {}}, Path(folder) / "empty.html")
    ...     sorted(path.name for path in Path(folder).iterdir())
    ['empty.html', 'plotly.min.js']
    """
    pio.write_html(figure, path, include_plotlyjs="directory", validate=False, div_id="figure")
