"""What all figures share: theme, colours, markers, error bars, layout, saving.

Coordinates are rounded to 4 decimals, so that stored figures repeat. The theme is transparent and
legible on a light and on a dark page. The marker tells the class (circle harmless, cross harmful).
One of four hues that hold under colour-blindness tells the safety prompt.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nbformat  # noqa: F401  (before plotly: the first FigureWidget is several times quicker)
import numpy as np
import pandas as pd
import plotly.graph_objects as go
import plotly.io as pio

from .labels import text

WIDTH, HEIGHT = 860, 560  # pixels

GREY = "#808080"

# At least 3:1 against white and near-black, with OPACITY too; 30 apart in Lab under each
# colour-blindness.
PROMPT_COLORS = ("#CC7100", "#0089FC", "#517444", "#ED23A0")

OPACITY = 0.9

CLASSES = ("harmless", "harmful", "unlabelled")

# One row per round through the colours: the fifth prompt has the first one's hue and other shapes.
SYMBOLS = (
    ("circle-open", "cross", "triangle-up-open"),
    ("square-open", "x", "triangle-down-open"),
    ("diamond-open", "star", "triangle-left-open"),
)

DASHES = {"harmless": "dot", "harmful": "solid", "unlabelled": "dashdot"}

# Blue to orange through magenta: legible on a white and on a black page all the way.
SCALE = ((0.0, "#2F76D2"), (0.5, "#B4568F"), (1.0, "#CC7100"))

UNKNOWN = GREY  # the colour of a point without a value

HALO = dict(  # of a label that lies over points
    color="#333333",
    shadow=", ".join(f"{x}px {y}px 2px #FFFFFF" for x in (-1, 0, 1) for y in (-1, 0, 1)),
)

# Coloured on [0, 1] whatever their values.
UNIT_COLUMNS = ("refusal_rate", "predicted_refusal", "harmful")

_AXIS = dict(
    gridcolor="rgba(128,128,128,.25)",
    zerolinecolor="rgba(128,128,128,.4)",
    linecolor=GREY,
    ticks="outside",
)

TEMPLATE = go.layout.Template(
    layout=dict(
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font=dict(color=GREY, size=12),
        colorway=PROMPT_COLORS,
        xaxis=_AXIS,
        yaxis=_AXIS,
        legend=dict(bgcolor="rgba(0,0,0,0)", itemsizing="constant", tracegroupgap=0),
        hoverlabel=dict(bgcolor="#333333", font=dict(color="#FFFFFF"), align="left"),
        modebar=dict(bgcolor="rgba(0,0,0,0)", color=GREY, activecolor=PROMPT_COLORS[0]),
    )
)

# By name, for users' own figures; plotly's default stays as it is.
pio.templates["analysis_lib"] = TEMPLATE

# Plotly's "Share chart" button sends a figure, with its queries, to a server. A dollar sign in a
# name is no formula.
OFFLINE = dict(showSendToCloud=False, typesetMath=False)

pio.renderers["plotly_mimetype"].config = {
    **(pio.renderers["plotly_mimetype"].config or {}),
    **OFFLINE,
}


def save(fig: go.Figure, path: str | Path) -> Path:
    """Write a figure as a picture or as a page that works offline.

    Parameters
    ----------
    fig : plotly.graph_objects.Figure
        Any figure.
    path : str or Path
        The suffix decides: .svg and .png are made by Chromium, and .html holds plotly.js. A path
        without a suffix stands for both pictures, PATH.svg and PATH.png.

    Returns
    -------
    Path
        `path`.

    Raises
    ------
    ValueError
        For another suffix.
    RuntimeError
        Where no picture can be made, for example without Chromium.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(go.Figure(), f"{folder}/empty.html").name
    'empty.html'
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in ("", ".svg", ".png", ".html"):
        raise ValueError(
            f"{path}: cannot save a figure as {suffix!r}; use .svg, .png, .html, "
            "or no suffix for .svg and .png"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    if suffix == ".html":
        fig.write_html(path, include_plotlyjs=True, div_id="figure", config=OFFLINE)
        return path
    # Late: kaleido is slow to import, and only pictures need it.
    from kaleido.errors import ChromeNotFoundError

    for target in [path] if suffix else [path.with_suffix(".svg"), path.with_suffix(".png")]:
        try:
            target.write_bytes(fig.to_image(format=target.suffix[1:].lower()))
        except (ChromeNotFoundError, RuntimeError, ValueError) as error:
            raise RuntimeError(
                f"{target}: no picture was made ({error}); install Chromium, or save as .html"
            ) from error
    return path


def need_columns(table: pd.DataFrame, columns: Sequence[str], where: str) -> None:
    """Refuse a table that lacks a column.

    Parameters
    ----------
    table : DataFrame
        What the caller passed.
    columns : sequence of str
        What the figure reads.
    where : str
        The function's name, for the message.

    Raises
    ------
    ValueError
        With the missing columns and those that are there.

    Examples
    --------
    >>> need_columns(pd.DataFrame({"step": [1]}), ["step"], "plot_losses")
    """
    if missing := [c for c in columns if c not in table]:
        raise ValueError(
            f"{where}: the table lacks column {', '.join(map(repr, missing))}; "
            f"it has {list(table.columns)}"
        )


def rounded(values: Any, decimals: int = 4) -> np.ndarray:
    """Values as floats with few decimals, so that a stored figure repeats.

    Parameters
    ----------
    values : array_like
        Numbers.
    decimals : int
        Digits after the point.

    Returns
    -------
    ndarray of float
        Of the same shape.

    Examples
    --------
    >>> rounded([1 / 3, 2]).tolist()
    [0.3333, 2.0]
    """
    return np.round(np.asarray(values, dtype=float), decimals)


def error_bars(
    table: pd.DataFrame, column: str, name: str | None = None, **style: Any
) -> dict[str, Any] | None:
    """Plotly's error bars of a column.

    Parameters
    ----------
    table : DataFrame
        With the columns "`name` low" and "`name` high", ends of an interval around `column`.
    column : str
        The value.
    name : str or None
        What the ends are called; by default as `column`, and "" for "low" and "high" alone.
    **style
        Further properties, such as color.

    Returns
    -------
    dict or None
        For error_x or error_y; None where the table lacks an end.

    Examples
    --------
    >>> table = pd.DataFrame({"value": [0.5], "low": [0.4], "high": [0.75]})
    >>> error_bars(table, "value", "")["array"].tolist()
    [0.25]
    """
    low, high = (f"{column if name is None else name} {end}".strip() for end in ("low", "high"))
    if not {low, high} <= set(table.columns):
        return None
    up, down = rounded(table[high] - table[column]), rounded(table[column] - table[low])
    return dict(
        type="data", symmetric=False, array=up, arrayminus=down, thickness=1.5, width=3, **style
    )


def prompt_style(names: Sequence[str], name: str) -> tuple[str, dict[str, str]]:
    """How a prompt is drawn, by its place among the prompts.

    Parameters
    ----------
    names : sequence of str
        All prompts in the order of their colours.
    name : str
        One of them.

    Returns
    -------
    hue : str
        Its colour.
    symbols : dict of str to str
        Its marker for each class.

    Examples
    --------
    >>> hue, symbols = prompt_style(["none", "default"], "default")
    >>> hue, symbols["harmful"]
    ('#0089FC', 'cross')
    """
    at = names.index(name)
    symbols = SYMBOLS[at // len(PROMPT_COLORS) % len(SYMBOLS)]
    return PROMPT_COLORS[at % len(PROMPT_COLORS)], dict(zip(CLASSES, symbols, strict=True))


# Layout

ARROW, LANE = 3, 7  # width of an arrow, distance between two that lie side by side, in pixels

LEFT, RIGHT, TOP, BOTTOM = 65, 218, 55, 60  # margins in pixels

ASPECT = (WIDTH - LEFT - RIGHT) / (HEIGHT - TOP - BOTTOM)  # of a plane's plotting area

BETWEEN = 85  # pixels between two rows of panels: ticks, an axis title and a panel's title


def finish(
    fig: go.Figure,
    title: str,
    note: str | None,
    *,
    width: int = WIDTH,
    height: int = HEIGHT,
    left: int = LEFT,
    right: int = RIGHT,
    top: int = TOP,
) -> go.Figure:
    """Give a figure the theme, its size, its title and its note.

    Parameters
    ----------
    fig : plotly.graph_objects.Figure
        It is changed in place.
    title : str
        Above the plot.
    note : str or None
        Below the plot. The figure grows by its lines, so that it takes nothing from the plot.
    width, height : int
        Pixels, without the note.
    left, right, top : int
        Margins in pixels.

    Returns
    -------
    plotly.graph_objects.Figure
        `fig`.

    Examples
    --------
    >>> finish(go.Figure(), "A title", None, height=300).layout.height
    300
    """
    lines = [text(line) for line in textwrap.wrap(note or "", width // 6)]
    extra = 12 + 15 * len(lines) if lines else 0
    bottom = BOTTOM + extra
    fig.update_layout(
        template=TEMPLATE,
        width=width,
        height=height + extra,
        margin=dict(l=left, r=right, t=top, b=bottom),
        title=dict(text=text(title), x=0.01, xanchor="left", y=1 - 22 / height, font=dict(size=16)),
    )
    if lines:
        fig.add_annotation(
            text="<br>".join(lines),
            name="note",
            xref="paper",
            yref="paper",
            x=0,
            y=0,
            xanchor="left",
            yanchor="bottom",
            xshift=10 - left,
            yshift=6 - bottom,
            align="left",
            showarrow=False,
            font=dict(size=11),
        )
    return fig
