"""DOC analysis_lib.figures.plane."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from .style import (
    ARROW,
    ASPECT,
    BETWEEN,
    BOTTOM,
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
    class_names,
    finish,
    hover_lines,
    label,
    need,
    prompt_style,
    rounded,
    text,
)

if TYPE_CHECKING:
    from ..analysis.directions import Direction


def points_table(Z: np.ndarray, rows: pd.DataFrame) -> pd.DataFrame:
    """`rows` (n of them, any columns) with the coordinates `Z` (n, k) as pc1..pck, rounded to 4 decimals."""
    Z = np.asarray(Z)
    if Z.ndim != 2 or len(Z) != len(rows):
        raise ValueError(
            f"coordinates of shape {Z.shape} for {len(rows)} rows: pass Z (n, k) and its own n rows"
        )
    kept = rows.drop(columns=[c for c in rows.columns if _is_pc(c)]).reset_index(drop=True)
    return kept.assign(
        **{f"pc{i + 1}": np.round(Z[:, i].astype(float), 4) for i in range(Z.shape[1])}
    )


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
    """The groups (class x prompt) in two principal components, as in the paper's figures 2 and 3.

    points: query_id, prompt, harmful, pc1..pck and perhaps refusal_rate, text. direction: its boundary (logit 0, the other
    components at their mean over the points) and an arrow along the gradient of its logit. color: "prompt", or a numeric
    column such as "refusal_rate". arrows: "mean_shift" from each class's mean under `base` to its mean under every other
    prompt, or None; those of a class are drawn LANE pixels apart, side by side, since they often coincide: length and way
    are true, the hover text has the true ends. prompts: those to show; the others are kept hidden, so that colours and view
    stay. explained: variance ratios per component. Raises ValueError on a missing column, prompt or component.
    """
    where = "plot_groups"
    if arrows not in ("mean_shift", None):
        raise ValueError(f"{where}: arrows={arrows!r} is unknown; pass 'mean_shift' or None")
    if color != "prompt":
        need(points, [color], where)
    xy = _plane(points, components, where)
    names = list(dict.fromkeys(points["prompt"]))
    shown = set(names if prompts is None else prompts)
    if missing := shown - set(names):
        raise ValueError(f"{where}: no points of prompt {sorted(missing)}; there are {names}")
    if arrows and base not in names:
        raise ValueError(
            f"{where}: no points of the arrows' base {base!r}; pass base= one of {names}, or arrows=None"
        )

    fig = go.Figure()
    _add_points(fig, points, xy, names, shown, color)
    if arrows:
        means = _group_means(points, xy)
        classes = [c for c in CLASSES if (base, c) in means]
        for cls in classes:
            heads = [name for name in names if name != base and (name, cls) in means]
            tail = np.array(means[base, cls])
            offsets = _lanes(
                np.reshape([means[name, cls] for name in heads], (-1, 2)) - tail, _view(xy)
            )
            drawn = [
                _arrow(
                    tail + offset,
                    means[name, cls] + offset,
                    color=prompt_style(names, name)[0],
                    dash=DASHES[cls],
                    hover=f"mean of {cls} queries: {base} {_at(tail)} to {name} {_at(means[name, cls])}",
                    visible=name in shown,
                )
                for name, offset in zip(heads, offsets, strict=True)
            ]
            fig.add_traces([_edge(drawn), *drawn])
        for cls in classes if len(names) > 1 else ():
            line = dict(color=GREY, dash=DASHES[cls], width=3)
            fig.add_trace(
                go.Scatter(x=[None], y=[None], mode="lines", line=line, name=f"mean shift, {cls}")
            )
        for name in names:  # where no point's colour names the prompt, so the arrows' legend does
            line = dict(color=prompt_style(names, name)[0], width=3)
            shows = color != "prompt" and name != base and name in shown
            fig.add_trace(
                go.Scatter(
                    x=[None],
                    y=[None],
                    mode="lines",
                    line=line,
                    name=label(f"{base} to {name}"),
                    visible=shows,
                )
            )
    _add_directions(fig, points, xy, components, direction, where)
    return _finish_plane(fig, xy, components, explained, title, note)


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
    """How the class means travel along `path`: no prompt, text prompt (dashed arrow), soft prompt (solid arrow).

    points as in `plot_groups`; path: prompt names in order, by default the prompts in order of appearance.
    Raises ValueError where a prompt of the path has no points.
    """
    where = "plot_dro"
    names = list(dict.fromkeys(points["prompt"])) if path is None else list(path)
    absent = [name for name in names if name not in set(points["prompt"])]
    if absent or len(names) < 2:
        raise ValueError(
            f"{where}: the path {names} needs two or more prompts with points; without points: {absent}"
        )
    points = points[points["prompt"].isin(names)]
    xy = _plane(points, components, where)
    fig = go.Figure()
    _add_points(fig, points, xy, names, set(names), "prompt")
    means = _group_means(points, xy)
    drawn = [
        _arrow(
            means[tail, cls],
            means[head, cls],
            color=prompt_style(names, head)[0],
            dash="dash" if step == 0 else "solid",
            hover=f"mean of {cls} queries: {tail} {_at(means[tail, cls])} to {head} {_at(means[head, cls])}",
            tip=cls if step == len(names) - 2 else "",
        )
        for step, (tail, head) in enumerate(zip(names, names[1:], strict=False))
        for cls in CLASSES
        if (tail, cls) in means and (head, cls) in means
    ]
    fig.add_traces([_edge(drawn), *drawn])
    for step, (tail, head) in enumerate(zip(names, names[1:], strict=False)):
        line = dict(
            color=prompt_style(names, head)[0], dash="dash" if step == 0 else "solid", width=3
        )
        fig.add_trace(
            go.Scatter(x=[None], y=[None], mode="lines", line=line, name=label(f"{tail} to {head}"))
        )
    _add_directions(fig, points, xy, components, direction, where)
    return _finish_plane(fig, xy, components, explained, title, note)


def plot_grid(
    figures: Mapping[str, go.Figure], *, columns: int = 2, title: str = "", note: str | None = None
) -> go.Figure:
    """Several figures of `plot_groups` or `plot_dro`, one per model (or layer), as the panels of one; the first's legend is shared.

    figures: panel title -> figure. Each panel keeps its own axes, view and equal aspect.
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
        for trace in drawn.data:
            new = go.Scatter(trace).update(legendgroup=trace.legendgroup or trace.name)
            fig.add_trace(new.update(showlegend=False) if at else new, **place)
        (x_axis,) = fig.select_xaxes(**place)
        x_axis.update(title=drawn.layout.xaxis.title, range=drawn.layout.xaxis.range)
        (y_axis,) = fig.select_yaxes(**place)
        y_axis.update(title=drawn.layout.yaxis.title, range=drawn.layout.yaxis.range)
        y_axis.update(scaleanchor=x_axis.plotly_name.replace("axis", ""), scaleratio=1)
    fig.update_annotations(yshift=12)  # the panels' titles, above the arrows' labels
    legend = dict(orientation="h", x=0, y=1 + 45 / plots, yanchor="bottom")
    fig.update_layout(coloraxis=first.coloraxis.update(colorbar=dict(len=1)), legend=legend)
    return finish(
        fig, title, note, width=width, height=int(170 + plots + BOTTOM), right=right, top=170
    )


# One point cloud in a plane ------------------------------------------------------------------------------------------------


def _is_pc(column: object) -> bool:
    return isinstance(column, str) and column[:2] == "pc" and column[2:].isdigit()


def _plane(points: pd.DataFrame, components: tuple[int, int], where: str) -> pd.DataFrame:
    """The two coordinates as columns x, y, on the index of `points`."""
    need(points, ["query_id", "prompt", "harmful", *(f"pc{c}" for c in components)], where)
    if points.empty:
        raise ValueError(f"{where}: the points table is empty; check what it was filtered by")
    return pd.DataFrame(
        {"x": rounded(points[f"pc{components[0]}"]), "y": rounded(points[f"pc{components[1]}"])},
        points.index,
    )


def _group_means(
    points: pd.DataFrame, xy: pd.DataFrame
) -> dict[tuple[str, str], tuple[float, float]]:
    means = xy.groupby([points["prompt"], class_names(points)]).mean()
    return {
        (str(p), str(c)): (x, y)
        for (p, c), x, y in zip(means.index, means["x"], means["y"], strict=True)
    }


def _add_points(
    fig: go.Figure,
    points: pd.DataFrame,
    xy: pd.DataFrame,
    names: Sequence[str],
    shown: set[str],
    color: str,
) -> None:
    """One trace per prompt and class, in the order of `names`; hidden where the prompt is not `shown`.

    The number and order of the traces depend on the rows alone, so that a widget can update them in place.
    """
    classes = class_names(points)
    hover = pd.Series(hover_lines(points), index=points.index, dtype=object)
    for name in names:
        hue, symbols = prompt_style(names, name)
        for cls in CLASSES:
            keep = (points["prompt"] == name) & (classes == cls)
            if not keep.any():
                continue
            marker: dict[str, Any] = dict(symbol=symbols[cls], size=7)
            if color == "prompt":
                marker["color"] = hue
            else:
                values = points.loc[keep, color].astype("Float64").to_numpy(float, na_value=np.nan)
                marker.update(
                    color=[UNKNOWN if np.isnan(v) else round(v, 4) for v in values],
                    coloraxis="coloraxis",
                )
            fig.add_trace(
                go.Scatter(
                    x=xy.loc[keep, "x"].to_numpy(),
                    y=xy.loc[keep, "y"].to_numpy(),
                    mode="markers",
                    marker=marker,
                    opacity=OPACITY,
                    hovertext=hover[keep].tolist(),
                    hoverinfo="text",
                    name=label(f"{cls}, {name}" if color == "prompt" else cls),
                    legendgroup="" if color == "prompt" else cls,
                    showlegend=color == "prompt",
                    visible=name in shown,
                )
            )
    for cls in (
        CLASSES
    ):  # the legend entry of a trace of many colours would be black: these stand in for it
        if (classes == cls).any():
            marker = dict(symbol=SYMBOLS[0][CLASSES.index(cls)], color=GREY, size=7)
            entry = go.Scatter(
                x=[None], y=[None], mode="markers", marker=marker, name=cls, legendgroup=cls
            )
            fig.add_trace(entry.update(visible=color != "prompt"))
    if color != "prompt":
        values = points[color].astype("Float64").to_numpy(float, na_value=np.nan)
        top = (
            1.0
            if color in UNIT_COLUMNS or not np.isfinite(values).any()
            else float(np.nanmax(values)) or 1.0
        )
        bar = dict(
            title=text(color).replace("_", " "),
            len=0.5,
            y=0,
            yanchor="bottom",
            thickness=14,
            outlinewidth=0,
        )
        fig.update_layout(
            coloraxis=dict(colorscale=SCALE, cmin=0, cmax=round(top, 4), colorbar=bar)
        )
        fig.update_layout(legend_maxheight=0.48)  # a longer one scrolls above the colour bar


def _at(point: Sequence[float] | np.ndarray) -> str:
    return "({:.2f}, {:.2f})".format(*point)


def _lanes(ways: np.ndarray, view: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Offsets (m, 2) of arrows with one tail and `ways` (m, 2), across their common way: LANE pixels apart, and none crosses."""
    pixel = (view[1] - view[0])[0] / (WIDTH - LEFT - RIGHT)
    along = ways.sum(axis=0) / (np.linalg.norm(ways.sum(axis=0)) or 1)
    across = np.array([-along[1], along[0]])
    places = np.argsort(np.argsort(np.arctan2(ways @ across, ways @ along), kind="stable"))
    return np.outer(places - (len(ways) - 1) / 2, across) * LANE * pixel


def _edge(arrows: Sequence[go.Scatter]) -> go.Scatter:
    """A white edge under the visible arrows: it parts them, in both themes, from points of their own colour."""
    x, y = ([v for t in arrows if t.visible for v in (*t[axis], None)] or [None] for axis in "xy")
    line = dict(color="#FFFFFF", width=ARROW + 3)
    return go.Scatter(x=x, y=y, mode="lines", line=line, hoverinfo="skip", showlegend=False)


def _arrow(
    tail: Sequence[float] | np.ndarray,
    head: Sequence[float] | np.ndarray,
    *,
    color: str,
    dash: str = "solid",
    hover: str,
    tip: str = "",
    visible: bool = True,
) -> go.Scatter:
    """An arrow in data coordinates; a trace, because annotations have no dashes."""
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


def _view(xy: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper corner (2,) of the view: the points and a margin, in the proportions of the plotting area."""
    low, high = xy.min().to_numpy(), xy.max().to_numpy()
    size = (high - low) * 1.16
    height = max(size[1], size[0] / ASPECT) or 1.0
    half = np.array([height * ASPECT, height]) / 2
    return (low + high) / 2 - half, (low + high) / 2 + half


def _add_directions(
    fig: go.Figure,
    points: pd.DataFrame,
    xy: pd.DataFrame,
    components: tuple[int, int],
    direction: Direction | Sequence[Direction] | None,
    where: str,
) -> None:
    directions = (
        []
        if direction is None
        else list(direction)
        if isinstance(direction, Sequence)
        else [direction]
    )
    low, high = _view(xy)
    for at, d in enumerate(directions):
        weight = np.asarray(d.weight, dtype=float)
        names = [f"pc{i + 1}" for i in range(len(weight))]
        need(points, names, f"{where}: direction {d.name!r}")
        w = weight[[c - 1 for c in components]]
        others = [i for i in range(len(weight)) if i + 1 not in components]
        offset = float(d.bias) + float(weight[others] @ points[names].mean().to_numpy()[others])
        line = _clip(w, offset, low, high)
        dash = "dash" if at == 0 else "dot"
        name = f"{d.name} boundary" if line is not None else f"{d.name}: out of view"
        fig.add_trace(
            go.Scatter(
                x=[None] if line is None else rounded(line[:, 0]),
                y=[None] if line is None else rounded(line[:, 1]),
                mode="lines",
                line=dict(color=GREY, dash=dash, width=2),
                hoverinfo="skip",
                name=label(name),
            )
        )
        # Towards an end of the line, where few points lie; the second direction takes the other end.
        tail = (
            (low + high) / 2
            if line is None
            else line[0] + (line[1] - line[0]) * (0.85 if at % 2 == 0 else 0.15)
        )
        way = (
            w / np.linalg.norm(w) * 0.16 * (high - low).min() if w.any() else np.nan * w
        )  # no gradient, no arrow
        margin = 0.08 * (
            high - low
        )  # for the head, which plotly hides outside of the view, and its label
        head = np.clip(tail + way, low + margin, high - margin)
        tail = head - way
        adjective = {"refusal": "refusal", "harmfulness": "harmful"}.get(d.name, d.name)
        hover = f"gradient of the {d.name} logit"
        fig.add_trace(
            _arrow(tuple(tail), tuple(head), color=GREY, hover=hover, tip=f"more {adjective}")
        )


def _clip(w: np.ndarray, offset: float, low: np.ndarray, high: np.ndarray) -> np.ndarray | None:
    """The part (2, 2) of the line w . p + offset = 0 inside the box, or None."""
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


def _finish_plane(
    fig: go.Figure,
    xy: pd.DataFrame,
    components: tuple[int, int],
    explained: Sequence[float] | None,
    title: str,
    note: str | None,
) -> go.Figure:
    low, high = _view(xy)
    titles = [
        f"PC{c}"
        + (f" ({100 * explained[c - 1]:.0f} % of variance)" if explained is not None else "")
        for c in components
    ]
    fig.update_xaxes(title_text=titles[0], range=rounded([low[0], high[0]]))
    fig.update_yaxes(
        title_text=titles[1], range=rounded([low[1], high[1]]), scaleanchor="x", scaleratio=1
    )
    return finish(fig, title, note)
