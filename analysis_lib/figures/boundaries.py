"""Directions in a plane: the boundary of a logistic model, and the gradient of its logit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go

from .coordinates import Plane
from .labels import label
from .marks import arrow
from .style import GREY, need_columns, rounded

if TYPE_CHECKING:
    from ..analysis.directions import Direction


def add_directions(
    fig: go.Figure, plane: Plane, direction: Direction | Sequence[Direction] | None, where: str
) -> None:
    """Add each direction's boundary (logit 0) and an arrow along the gradient of its logit.

    Parameters
    ----------
    fig : plotly.graph_objects.Figure
        Where they go.
    plane : Plane
        The points; the components that it does not show are taken at their mean.
    direction : Direction, sequence of Direction or None
        What to draw.
    where : str
        The calling function, for messages.

    Raises
    ------
    ValueError
        Where the points lack a component of a direction.
    """
    if direction is None:
        return
    directions = list(direction) if isinstance(direction, Sequence) else [direction]
    low, high = plane.corners
    for at, d in enumerate(directions):
        w, offset = _in_plane(d, plane, where)
        line = clip_line(w, offset, low, high)
        name = f"{d.name}: out of view" if line is None else f"{d.name} boundary"
        fig.add_trace(
            go.Scatter(
                x=[None] if line is None else rounded(line[:, 0]),
                y=[None] if line is None else rounded(line[:, 1]),
                mode="lines",
                line=dict(color=GREY, dash="dash" if at == 0 else "dot", width=2),
                hoverinfo="skip",
                name=label(name),
            )
        )
        fig.add_trace(_gradient(d, w, line, plane, at))


def _in_plane(d: Direction, plane: Plane, where: str) -> tuple[np.ndarray, float]:
    """The direction's weight (2,) on the two components, and its logit where both are 0."""
    weight = np.asarray(d.weight, dtype=float)
    names = [f"pc{i + 1}" for i in range(len(weight))]
    need_columns(plane.points, names, f"{where}: direction {d.name!r}")
    others = [i for i in range(len(weight)) if i + 1 not in plane.components]
    means = plane.points[names].mean().to_numpy()
    offset = float(d.bias) + float(weight[others] @ means[others])
    return weight[[c - 1 for c in plane.components]], offset


def _gradient(
    d: Direction, w: np.ndarray, line: np.ndarray | None, plane: Plane, at: int
) -> go.Scatter:
    """The gradient's arrow, which starts on the boundary where that is in view."""
    low, high = plane.corners
    # Towards an end of the line, where few points lie; the second direction takes the other end.
    share = 0.85 if at % 2 == 0 else 0.15
    tail = (low + high) / 2 if line is None else line[0] + (line[1] - line[0]) * share
    # Without a gradient there is no arrow.
    way = w / np.linalg.norm(w) * 0.16 * (high - low).min() if w.any() else np.nan * w
    margin = 0.08 * (
        high - low
    )  # for the head, which plotly hides outside of the view, and a label
    head = np.clip(tail + way, low + margin, high - margin)
    adjective = "harmful" if d.name == "harmfulness" else d.name
    hover = f"gradient of the {d.name} logit"
    return arrow(head - way, head, color=GREY, hover=hover, tip=f"more {adjective}")


def clip_line(w: np.ndarray, offset: float, low: np.ndarray, high: np.ndarray) -> np.ndarray | None:
    """The part of a line inside a box.

    Parameters
    ----------
    w, offset : ndarray, float
        The line w . p + offset = 0, with w (2,).
    low, high : ndarray
        Corners (2,) of the box.

    Returns
    -------
    ndarray or None
        Shape (2, 2), its ends; None where the line misses the box, or w is 0.

    Examples
    --------
    >>> clip_line(np.array([1.0, 0.0]), -0.5, np.zeros(2), np.ones(2)).tolist()
    [[0.5, 0.0], [0.5, 1.0]]
    """
    norm2 = float(w @ w)
    if norm2 == 0:
        return None
    centre = (low + high) / 2
    foot = centre - w * (w @ centre + offset) / norm2
    along = np.array([-w[1], w[0]]) / np.sqrt(norm2)
    first, last = -np.inf, np.inf
    for i in range(2):
        if abs(along[i]) < 1e-12:
            if not low[i] <= foot[i] <= high[i]:
                return None
            continue
        ends = sorted([(low[i] - foot[i]) / along[i], (high[i] - foot[i]) / along[i]])
        first, last = max(first, ends[0]), min(last, ends[1])
    return np.stack([foot + first * along, foot + last * along]) if first < last else None
