"""What is drawn in a plane of two components: points, and arrows between their means."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from .coordinates import Plane
from .labels import class_names, hover_texts, label, text
from .style import (
    ARROW,
    CLASSES,
    DASHES,
    GREY,
    HALO,
    LANE,
    LEFT,
    OPACITY,
    RIGHT,
    SCALE,
    SYMBOLS,
    UNIT_COLUMNS,
    UNKNOWN,
    WIDTH,
    prompt_style,
    rounded,
)

# Points


def add_points(fig: go.Figure, plane: Plane, shown: Iterable[str], color: str) -> None:
    """Add one trace for each prompt and class, and the legend of the classes.

    The number and order of the traces depend on the rows alone, so that a widget can update them in
    place.

    Parameters
    ----------
    fig : plotly.graph_objects.Figure
        Where they go.
    plane : Plane
        The points.
    shown : iterable of str
        Prompts to show; the others are kept hidden.
    color : str
        "prompt", or a numeric column.
    """
    classes, shown = class_names(plane.points), set(shown)
    hover = pd.Series(hover_texts(plane.points), index=plane.points.index, dtype=object)
    for name in plane.prompts:
        for cls in CLASSES:
            keep = (plane.points["prompt"] == name) & (classes == cls)
            if not keep.any():
                continue
            fig.add_trace(
                go.Scatter(
                    x=plane.xy.loc[keep, "x"].to_numpy(),
                    y=plane.xy.loc[keep, "y"].to_numpy(),
                    mode="markers",
                    marker=_marker(plane, keep, name, cls, color),
                    opacity=OPACITY,
                    hovertext=hover[keep].tolist(),
                    hoverinfo="text",
                    name=label(f"{cls}, {name}" if color == "prompt" else cls),
                    legendgroup="" if color == "prompt" else cls,
                    showlegend=color == "prompt",
                    visible=name in shown,
                )
            )
    # The legend entry of a trace of many colours would be black: these stand in for it.
    for cls in (c for c in CLASSES if (classes == c).any()):
        marker = dict(symbol=SYMBOLS[0][CLASSES.index(cls)], color=GREY, size=7)
        entry = go.Scatter(
            x=[None], y=[None], mode="markers", marker=marker, name=cls, legendgroup=cls
        )
        fig.add_trace(entry.update(visible=color != "prompt"))
    if color != "prompt":
        _add_color_bar(fig, plane.points, color)


def _marker(plane: Plane, keep: pd.Series, name: str, cls: str, color: str) -> dict[str, Any]:
    hue, symbols = prompt_style(plane.prompts, name)
    marker: dict[str, Any] = dict(symbol=symbols[cls], size=7)
    if color == "prompt":
        return marker | {"color": hue}
    values = _numbers(plane.points.loc[keep, color])
    colors = [UNKNOWN if np.isnan(v) else round(v, 4) for v in values]
    return marker | {"color": colors, "coloraxis": "coloraxis"}


def _numbers(column: pd.Series) -> np.ndarray:
    return column.astype("Float64").to_numpy(float, na_value=np.nan)


def _add_color_bar(fig: go.Figure, points: pd.DataFrame, color: str) -> None:
    values = _numbers(points[color])
    if color in UNIT_COLUMNS or not np.isfinite(values).any():
        top = 1.0
    else:
        top = float(np.nanmax(values)) or 1.0
    title = text(color).replace("_", " ")
    bar = dict(title=title, len=0.5, y=0, yanchor="bottom", thickness=14, outlinewidth=0)
    fig.update_layout(coloraxis=dict(colorscale=SCALE, cmin=0, cmax=round(top, 4), colorbar=bar))
    fig.update_layout(legend_maxheight=0.48)  # a longer one scrolls above the colour bar


# Arrows


def arrow(
    tail: Sequence[float] | np.ndarray,
    head: Sequence[float] | np.ndarray,
    *,
    color: str,
    dash: str = "solid",
    hover: str,
    tip: str = "",
    visible: bool = True,
) -> go.Scatter:
    """An arrow in data coordinates; a trace, because annotations have no dashes.

    Parameters
    ----------
    tail, head : sequence of float
        Its two ends (2,).
    color, dash : str
        Of its line.
    hover : str
        What it says under the mouse.
    tip : str
        A label at its head.
    visible : bool
        Whether it is shown.

    Returns
    -------
    plotly.graph_objects.Scatter
        The trace.

    Examples
    --------
    >>> arrow((0, 0), (1, 2), color="#808080", hover="up").y.tolist()
    [0.0, 2.0]
    """
    return go.Scatter(
        x=rounded([tail[0], head[0]]),
        y=rounded([tail[1], head[1]]),
        mode="lines+markers+text",
        line=dict(color=color, dash=dash, width=ARROW),
        marker=dict(
            symbol="arrow",
            angleref="previous",
            size=[0, 16],
            color=color,
            opacity=1,
            line=dict(width=[0, 1.5], color="#FFFFFF"),
        ),
        text=["", label(tip)],
        textfont=HALO,
        textposition="top center" if head[1] >= tail[1] else "bottom center",
        hovertext=text(hover),
        hoverinfo="text",
        cliponaxis=False,
        showlegend=False,
        visible=visible,
    )


def mean_arrow(plane: Plane, cls: str, tail: str, head: str, **style: Any) -> go.Scatter:
    """The arrow of a class from its mean under one prompt to its mean under another.

    Parameters
    ----------
    plane : Plane
        The points.
    cls : str
        The class.
    tail, head : str
        The two prompts.
    **style
        As of `arrow`; and offset, (2,), by which the arrow is moved aside. The hover text has the
        true ends.

    Returns
    -------
    plotly.graph_objects.Scatter
        The trace.
    """
    ends = np.array([plane.means[tail, cls], plane.means[head, cls]])
    told = ["({:.2f}, {:.2f})".format(*end) for end in ends]
    hover = f"mean of {cls} queries: {tail} {told[0]} to {head} {told[1]}"
    color = prompt_style(plane.prompts, head)[0]
    drawn = ends + style.pop("offset", 0)
    return arrow(*drawn, color=color, hover=hover, **style)


def edge(arrows: Sequence[go.Scatter]) -> go.Scatter:
    """A white edge under the visible arrows.

    It parts them, in both themes, from points of their own colour.

    Parameters
    ----------
    arrows : sequence of plotly.graph_objects.Scatter
        The traces of the arrows.

    Returns
    -------
    plotly.graph_objects.Scatter
        One trace for all, to be drawn before them.
    """
    x, y = ([v for t in arrows if t.visible for v in (*t[axis], None)] or [None] for axis in "xy")
    line = dict(color="#FFFFFF", width=ARROW + 3)
    return go.Scatter(x=x, y=y, mode="lines", line=line, hoverinfo="skip", showlegend=False)


def legend_line(name: str, color: str, dash: str | None = None, **style: Any) -> go.Scatter:
    """A legend entry with a line and no points.

    Parameters
    ----------
    name : str
        What it says, as plain text for plotly.
    color, dash : str
        Of its line.
    **style
        Further properties of the trace.

    Returns
    -------
    plotly.graph_objects.Scatter
        The trace.
    """
    line = dict(color=color, width=3) if dash is None else dict(color=color, dash=dash, width=3)
    return go.Scatter(x=[None], y=[None], mode="lines", line=line, name=name, **style)


def add_mean_shifts(
    fig: go.Figure, plane: Plane, base: str, shown: Iterable[str], *, legend: bool
) -> None:
    """Add an arrow for each class and prompt, from the class's mean under the base.

    The arrows of a class lie side by side, LANE pixels apart, since they often coincide.

    Parameters
    ----------
    fig : plotly.graph_objects.Figure
        Where they go.
    plane : Plane
        The points.
    base : str
        The prompt from which they start.
    shown : iterable of str
        Prompts whose arrows are visible.
    legend : bool
        Whether the legend names the prompts, because no point's colour does.
    """
    means, shown = plane.means, set(shown)
    classes = [c for c in CLASSES if (base, c) in means]
    for cls in classes:
        heads = [name for name in plane.prompts if name != base and (name, cls) in means]
        ways = np.reshape([means[name, cls] for name in heads], (-1, 2)) - means[base, cls]
        drawn = [
            mean_arrow(
                plane, cls, base, name, offset=offset, dash=DASHES[cls], visible=name in shown
            )
            for name, offset in zip(heads, lanes(ways, plane.corners), strict=True)
        ]
        fig.add_traces([edge(drawn), *drawn])
    for cls in classes if len(plane.prompts) > 1 else ():
        fig.add_trace(legend_line(f"mean shift, {cls}", GREY, DASHES[cls]))
    for name in plane.prompts:
        visible = legend and name != base and name in shown
        color = prompt_style(plane.prompts, name)[0]
        fig.add_trace(legend_line(label(f"{base} to {name}"), color, visible=visible))


def lanes(ways: np.ndarray, corners: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """How far arrows with one tail are moved aside, so that none covers or crosses another.

    Parameters
    ----------
    ways : ndarray
        Shape (m, 2): from the tail to each head.
    corners : tuple of ndarray
        Of the view, which give the size of a pixel.

    Returns
    -------
    ndarray
        Shape (m, 2): LANE pixels apart, across the arrows' common way.

    Examples
    --------
    >>> lanes(np.array([[1.0, 0.0]]), (np.zeros(2), np.ones(2))).tolist()
    [[-0.0, 0.0]]
    """
    pixel = (corners[1] - corners[0])[0] / (WIDTH - LEFT - RIGHT)
    along = ways.sum(axis=0) / (np.linalg.norm(ways.sum(axis=0)) or 1)
    across = np.array([-along[1], along[0]])
    places = np.argsort(np.argsort(np.arctan2(ways @ across, ways @ along), kind="stable"))
    return np.outer(places - (len(ways) - 1) / 2, across) * LANE * pixel
