"""Plotly figures: a table or an array in, a `go.Figure` out. Nothing is shown, fitted or tested here.

Every string handed in (query, prompt name, title, note) is plain text: it is escaped before plotly, which renders a subset
of HTML, sees it. Coordinates are rounded to 4 decimals, so that stored figures repeat. The theme is transparent and legible
on a light and on a dark page. The class is told by the marker (circle harmless, cross harmful) and the safety prompt by one
of four hues that hold under colour-blindness.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from functools import lru_cache
from html import escape
from pathlib import Path
from typing import Any

import nbformat  # noqa: F401  (imported before plotly, it makes the first FigureWidget several times quicker)
import numpy as np
import pandas as pd
import plotly.graph_objects as go
import plotly.io as pio

WIDTH, HEIGHT = 860, 560  # pixels

GREY = "#808080"

# At least 3:1 against white and near-black, points of OPACITY too, and 30 apart in Lab under each colour-blindness.
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

# Blue to orange through magenta, never darker or lighter than both a white and a black page can bear.
SCALE = ((0.0, "#2F76D2"), (0.5, "#B4568F"), (1.0, "#CC7100"))

UNKNOWN = GREY  # the colour of a point without a value

HALO = dict(
    color="#333333",
    shadow=", ".join(f"{x}px {y}px 2px #FFFFFF" for x in (-1, 0, 1) for y in (-1, 0, 1)),
)  # over points

UNIT_COLUMNS = (
    "refusal_rate",
    "predicted_refusal",
    "harmful",
)  # coloured on [0, 1] whatever their values

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

pio.templates["analysis_lib"] = (
    TEMPLATE  # by name for users' own figures; plotly's default stays as it is
)

# plotly's "Share chart" button sends a figure, with its queries, to a server; a dollar sign in a name is no formula
OFFLINE = dict(showSendToCloud=False, typesetMath=False)

pio.renderers["plotly_mimetype"].config = {
    **(pio.renderers["plotly_mimetype"].config or {}),
    **OFFLINE,
}


def text(value: object) -> str:
    """`value` as plain text for plotly, which knows &lt; &gt; &amp; and would print &quot; as it stands."""
    return escape(str(value), quote=False)


def label(value: object, most: int = 24) -> str:
    """`value` for a legend, tick or arrow: a longer one would take its room from the plot; the hover text has it in full."""
    value = str(value)
    return text(value if len(value) <= most else value[: most - 1] + "\u2026")


def save(fig: go.Figure, path: str | Path) -> Path:
    """Write `fig` as .svg, .png (both by Chromium) or .html (works offline, plotly.js embedded); the suffix decides.

    A path without a suffix stands for both pictures, PATH.svg and PATH.png. Raises ValueError on another suffix and
    RuntimeError where no picture can be made.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in ("", ".svg", ".png", ".html"):
        raise ValueError(
            f"{path}: cannot save a figure as {suffix!r}; use .svg, .png, .html, or no suffix for .svg and .png"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    if suffix == ".html":
        fig.write_html(path, include_plotlyjs=True, div_id="figure", config=OFFLINE)
        return path
    from kaleido.errors import (
        ChromeNotFoundError,
    )  # late: kaleido is slow to import and only pictures need it

    for target in [path] if suffix else [path.with_suffix(".svg"), path.with_suffix(".png")]:
        try:
            target.write_bytes(fig.to_image(format=target.suffix[1:].lower()))
        except (ChromeNotFoundError, RuntimeError, ValueError) as error:
            raise RuntimeError(
                f"{target}: no picture was made ({error}); install Chromium, or save as .html"
            ) from error
    return path


def need(table: pd.DataFrame, columns: Sequence[str], where: str) -> None:
    if missing := [c for c in columns if c not in table]:
        raise ValueError(
            f"{where}: the table lacks column {', '.join(map(repr, missing))}; it has {list(table.columns)}"
        )


def rounded(values: Any, decimals: int = 4) -> np.ndarray:
    return np.round(np.asarray(values, dtype=float), decimals)


def interval(
    table: pd.DataFrame, column: str, name: str | None = None, **style: Any
) -> dict[str, Any] | None:
    """Plotly's error bars of `column`, from the columns "`name` low" and "`name` high"; None where the table lacks them."""
    low, high = (f"{column if name is None else name} {end}".strip() for end in ("low", "high"))
    if not {low, high} <= set(table.columns):
        return None
    up, down = rounded(table[high] - table[column]), rounded(table[column] - table[low])
    return dict(
        type="data", symmetric=False, array=up, arrayminus=down, thickness=1.5, width=3, **style
    )


def class_names(table: pd.DataFrame) -> pd.Series:
    """harmless, harmful or unlabelled (no agreed answer) for each row."""
    harmful = table["harmful"].astype("boolean")
    return (
        harmful.map({True: "harmful", False: "harmless"})
        .astype(object)
        .where(harmful.notna(), "unlabelled")
    )


def prompt_style(names: Sequence[str], name: str) -> tuple[str, dict[str, str]]:
    """The hue of a prompt and its marker per class."""
    at = names.index(name)
    symbols = SYMBOLS[at // len(PROMPT_COLORS) % len(SYMBOLS)]
    return PROMPT_COLORS[at % len(PROMPT_COLORS)], dict(zip(CLASSES, symbols, strict=True))


@lru_cache(maxsize=8192)
def _wrapped(value: str) -> str:
    value = value if len(value) <= 400 else value[:396] + " ..."
    return "<br>".join(text(line) for line in textwrap.wrap(value, 64))


def hover_lines(table: pd.DataFrame) -> list[str]:
    """Id, group, refusal rate and text of each row, as far as the table has them."""
    columns: list[list[str]] = []
    if "query_id" in table:
        columns.append([f"<b>{text(i)}</b>" for i in table["query_id"]])
    if "harmful" in table:
        columns.append([f"{c} query" for c in class_names(table)])
    if "prompt" in table:
        columns.append([f"prompt: {text(p)}" for p in table["prompt"]])
    if "refusal_rate" in table:
        rates = table["refusal_rate"].astype(float)
        columns.append(
            ["refusal rate: not judged" if np.isnan(r) else f"refusal rate: {r:.2f}" for r in rates]
        )
    if "text" in table:
        columns.append(["" if pd.isna(t) else _wrapped(str(t)) for t in table["text"]])
    return ["<br>".join(filter(None, lines)) for lines in zip(*columns, strict=True)]


# Layout --------------------------------------------------------------------------------------------------------------------

ARROW, LANE = 3, 7  # width of an arrow and distance between two that lie side by side, in pixels

LEFT, RIGHT, TOP, BOTTOM = 65, 218, 55, 60  # margins in pixels

ASPECT = (WIDTH - LEFT - RIGHT) / (HEIGHT - TOP - BOTTOM)  # of a plane's plotting area

BETWEEN = 85  # pixels between two rows of panels: ticks, the upper one's axis title and the lower one's title


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
    lines = [text(line) for line in textwrap.wrap(note or "", width // 6)]
    extra = 12 + 15 * len(lines) if lines else 0  # the note takes nothing from the plot
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
