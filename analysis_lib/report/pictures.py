"""Pictures of plotly figures, drawn by Chromium."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nbformat import NotebookNode

from ..figures.pages import write_page
from .html import PLOTLY_MIME


class NotebookError(Exception):
    """A notebook cannot be run or stored as asked; the message says what to do."""


class Pictures:
    """A browser that turns plotly JSON into PNG: one for all notebooks, since it starts slowly."""

    def __enter__(self) -> Pictures:
        import kaleido
        from choreographer.browsers.chromium import Chromium

        if not Chromium.find_browser(skip_local=False):
            raise NotebookError(
                "no Chromium or Chrome found, which draws the stored pictures; install one "
                "(Debian: apt-get install chromium)"
            )
        kaleido.start_sync_server(mathjax=False)  # MathJax would come from the network
        self._draw = kaleido.calc_fig_sync
        self._stop = kaleido.stop_sync_server
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop()

    def draw(self, figure: Mapping[str, Any], format: str) -> bytes:
        size = {
            "width": figure["layout"].get("width", 700),
            "height": figure["layout"].get("height", 450),
        }
        return self._draw(figure, opts={"format": format, **size})

    def add(self, nb: NotebookNode) -> None:
        for cell in nb.cells:
            for output in cell.get("outputs", []):
                if PLOTLY_MIME in output.get("data", {}):
                    figure = {key: output.data[PLOTLY_MIME][key] for key in ("data", "layout")}
                    output.data["image/png"] = base64.b64encode(self.draw(figure, "png")).decode()


def write_figures(notebooks: Mapping[str, NotebookNode], folder: str | Path) -> list[Path]:
    """Writes each plotly figure of executed notebooks {stem: notebook} as NOTEBOOK-N.html.

    The pages share one plotly.js beside them, and open offline. Where Chromium is found, each
    figure is written as .svg too.
    """
    folder = Path(folder)
    figures: dict[str, dict[str, Any]] = {}
    for stem, nb in notebooks.items():
        outputs = [
            output.get("data", {}) for cell in nb.cells for output in cell.get("outputs", [])
        ]
        found = [data[PLOTLY_MIME] for data in outputs if PLOTLY_MIME in data]
        figures |= {
            f"{stem}-{n}": {k: data[k] for k in ("data", "layout")}
            for n, data in enumerate(found, 1)
        }
    if not figures:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        write_page(figure, folder / f"{name}.html")
    written = [folder / f"{name}.html" for name in figures]
    try:
        with Pictures() as pictures:
            for name, figure in figures.items():
                path = folder / f"{name}.svg"
                path.write_bytes(pictures.draw(figure, "svg"))
                written.append(path)
    except NotebookError as error:
        print(f"No .svg figures: {error}")
    return written
