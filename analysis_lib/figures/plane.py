"""Figures of the anchor space: groups of queries, the way of DRO, several panels in one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from .boundaries import add_directions
from .coordinates import Plane
from .labels import label
from .marks import add_mean_shifts, add_points, edge, legend_line, mean_arrow
from .style import (
    ASPECT,
    BETWEEN,
    BOTTOM,
    CLASSES,
    LEFT,
    finish,
    need_columns,
    prompt_style,
    rounded,
)

if TYPE_CHECKING:
    from ..analysis.directions import Direction


def plot_groups(
    points: pd.DataFrame,
    *,
    direction: Direction | Sequence[Direction] | None = None,
    components: tuple[int, int] = (1, 2),
    color: str = "prompt",
    arrows: str | None = "mean_shift",
    base: str = "none",
    prompts: Iterable[str] | None = None,
    explained: Sequence[float] | None = None,
    title: str = "Queries in the anchor space",
    note: str | None = None,
) -> go.Figure:
    """The groups (class x prompt) in two principal components.

    Parameters
    ----------
    points : DataFrame
        query_id, prompt, harmful, pc1..pck and perhaps refusal_rate, text; see `points_table`.
    direction : Direction, sequence of Direction or None
        Its boundary is drawn (logit 0, the other components at their mean over the points), with an
        arrow along the gradient of its logit.
    components : tuple of int
        The two to show, from 1.
    color : str
        "prompt", or a numeric column such as "refusal_rate".
    arrows : str or None
        "mean_shift" draws an arrow from each class's mean under `base` to its mean under every
        other prompt. Arrows of a class lie side by side, since they often coincide. Their length
        and way are true, and the hover text has the true ends.
    base : str
        The prompt from which the arrows start.
    prompts : iterable of str or None
        Those to show. The others are kept hidden, so that colours and view stay.
    explained : sequence of float or None
        Ratio of variance of each component, for the titles of the axes.
    title, note : str
        Above and below the plot.

    Returns
    -------
    plotly.graph_objects.Figure
        Not shown yet.

    Raises
    ------
    ValueError
        For a missing column, prompt or component.

    References
    ----------
    Figures 2 and 3 of Zheng et al., "On Prompt-Driven Safeguarding for Large Language Models",
    ICML 2024, arXiv 2401.18018.

    Examples
    --------
    >>> from analysis_lib.figures import plot_groups
    >>> queries = {"query_id": ["a", "b"] * 2, "harmful": [True, False] * 2}
    >>> points = pd.DataFrame({**queries, "prompt": ["none"] * 2 + ["short"] * 2})
    >>> fig = plot_groups(points.assign(pc1=[2, 0, 3, 1], pc2=[0, 0, 1, 1]))
    >>> len(fig.data), fig.data[0].name
    (14, 'harmless, none')
    """
    where = "plot_groups"
    if arrows not in ("mean_shift", None):
        raise ValueError(f"{where}: arrows={arrows!r} is unknown; pass 'mean_shift' or None")
    if color != "prompt":
        need_columns(points, [color], where)
    plane = Plane.of(points, components, where)
    names = plane.prompts
    shown = set(names if prompts is None else prompts)
    if missing := shown - set(names):
        raise ValueError(f"{where}: no points of prompt {sorted(missing)}; there are {names}")
    if arrows and base not in names:
        raise ValueError(
            f"{where}: no points of the arrows' base {base!r}; "
            f"pass base= one of {names}, or arrows=None"
        )
    fig = go.Figure()
    add_points(fig, plane, shown, color)
    if arrows:
        add_mean_shifts(fig, plane, base, shown, legend=color != "prompt")
    add_directions(fig, plane, direction, where)
    return _finish_plane(fig, plane, explained, title, note)


def plot_dro(
    points: pd.DataFrame,
    path: Sequence[str] | None = None,
    *,
    direction: Direction | Sequence[Direction] | None = None,
    components: tuple[int, int] = (1, 2),
    explained: Sequence[float] | None = None,
    title: str = "What DRO moves",
    note: str | None = None,
) -> go.Figure:
    """How the class means travel: no prompt, text prompt (dashed arrow), soft prompt (solid arrow).

    Parameters
    ----------
    points, direction, components, explained, title, note
        As in `plot_groups`.
    path : sequence of str or None
        Prompts in order; by default the prompts in order of appearance.

    Returns
    -------
    plotly.graph_objects.Figure
        Not shown yet.

    Raises
    ------
    ValueError
        Where a prompt of the path has no points, or the path has one prompt.

    Examples
    --------
    >>> from analysis_lib.figures import plot_dro
    >>> prompts = ["none", "short", "dro"]
    >>> points = pd.DataFrame({"query_id": "a", "prompt": prompts, "harmful": True})
    >>> fig = plot_dro(points.assign(pc1=[0, 1, 3], pc2=[0, 1, 1]))
    >>> [trace.line.dash for trace in fig.data if trace.marker.symbol == "arrow"]
    ['dash', 'solid']
    """
    where = "plot_dro"
    names = list(dict.fromkeys(points["prompt"])) if path is None else list(path)
    absent = [name for name in names if name not in set(points["prompt"])]
    if absent or len(names) < 2:
        raise ValueError(
            f"{where}: the path {names} needs two or more prompts with points; "
            f"without points: {absent}"
        )
    plane = Plane.of(points[points["prompt"].isin(names)], components, where, names)
    fig = go.Figure()
    add_points(fig, plane, names, "prompt")
    steps = list(zip(names, names[1:], strict=False))
    drawn = [
        mean_arrow(plane, cls, tail, head, dash=_dash(at), tip=cls if at == len(steps) - 1 else "")
        for at, (tail, head) in enumerate(steps)
        for cls in CLASSES
        if (tail, cls) in plane.means and (head, cls) in plane.means
    ]
    fig.add_traces([edge(drawn), *drawn])
    for at, (tail, head) in enumerate(steps):
        hue = prompt_style(names, head)[0]
        fig.add_trace(legend_line(label(f"{tail} to {head}"), hue, _dash(at)))
    add_directions(fig, plane, direction, where)
    return _finish_plane(fig, plane, explained, title, note)


def _dash(step: int) -> str:
    return "dash" if step == 0 else "solid"


def _finish_plane(
    fig: go.Figure, plane: Plane, explained: Sequence[float] | None, title: str, note: str | None
) -> go.Figure:
    low, high = plane.corners
    titles = [f"PC{c}" for c in plane.components]
    if explained is not None:
        shares = [f"{100 * explained[c - 1]:.0f}" for c in plane.components]
        titles = [f"{t} ({s} % of variance)" for t, s in zip(titles, shares, strict=True)]
    fig.update_xaxes(title_text=titles[0], range=rounded([low[0], high[0]]))
    fig.update_yaxes(
        title_text=titles[1], range=rounded([low[1], high[1]]), scaleanchor="x", scaleratio=1
    )
    return finish(fig, title, note)


def plot_grid(
    figures: Mapping[str, go.Figure], *, columns: int = 2, title: str = "", note: str | None = None
) -> go.Figure:
    """Several figures of `plot_groups` or `plot_dro`, one per model or layer, as panels of one.

    Each panel keeps its own axes, view and equal aspect. The first one's legend is shared.

    Parameters
    ----------
    figures : mapping of str to plotly.graph_objects.Figure
        By the panels' titles.
    columns : int
        Panels in a row.
    title, note : str
        Above and below all panels.

    Returns
    -------
    plotly.graph_objects.Figure
        Not shown yet.

    Raises
    ------
    ValueError
        Where there is no figure.

    Examples
    --------
    >>> from analysis_lib.figures import plot_grid, plot_groups
    >>> points = pd.DataFrame({"query_id": ["a"], "prompt": "none", "harmful": True})
    >>> one = plot_groups(points.assign(pc1=1.0, pc2=2.0), arrows=None)
    >>> fig = plot_grid({"small": one, "large": one})
    >>> len(fig.data) == 2 * len(one.data)
    True
    """
    if not figures:
        raise ValueError("plot_grid: no figures; pass {panel title: figure}")
    first = next(iter(figures.values())).layout
    width, right = 900, 30 if first.coloraxis.colorscale is None else 110
    columns = min(columns, len(figures))
    rows = -(-len(figures) // columns)
    across = width - LEFT - right
    panel = (across - (columns - 1) * 75) / columns / ASPECT  # height of one, in pixels
    between = BETWEEN + 15
    plots = rows * panel + (rows - 1) * between
    titles = [label(name, 40) for name in figures]
    spacing = dict(horizontal_spacing=75 / across, vertical_spacing=between / plots)
    fig = make_subplots(rows=rows, cols=columns, subplot_titles=titles, **spacing)
    for at, drawn in enumerate(figures.values()):
        place = dict(row=at // columns + 1, col=at % columns + 1)
        _add_panel(fig, drawn, place, legend=at == 0)
    fig.update_annotations(yshift=12)  # the panels' titles, above the arrows' labels
    legend = dict(orientation="h", x=0, y=1 + 45 / plots, yanchor="bottom")
    fig.update_layout(coloraxis=first.coloraxis.update(colorbar=dict(len=1)), legend=legend)
    return finish(
        fig, title, note, width=width, height=int(170 + plots + BOTTOM), right=right, top=170
    )


def _add_panel(fig: go.Figure, drawn: go.Figure, place: dict[str, Any], *, legend: bool) -> None:
    for trace in drawn.data:
        new = go.Scatter(trace).update(legendgroup=trace.legendgroup or trace.name)
        fig.add_trace(new if legend else new.update(showlegend=False), **place)
    (x_axis,) = fig.select_xaxes(**place)
    x_axis.update(title=drawn.layout.xaxis.title, range=drawn.layout.xaxis.range)
    (y_axis,) = fig.select_yaxes(**place)
    y_axis.update(title=drawn.layout.yaxis.title, range=drawn.layout.yaxis.range)
    y_axis.update(scaleanchor=x_axis.plotly_name.replace("axis", ""), scaleratio=1)
