"""Plotly figures: a table or an array in, a `go.Figure` out. Nothing is shown, fitted or tested here.

Every string handed in (query, prompt name, title, note) is plain text: it is escaped before plotly, which renders a subset
of HTML, sees it. Coordinates are rounded to 4 decimals, so that stored figures repeat. The theme is transparent and legible
on a light and on a dark page. The class is told by the marker (circle harmless, cross harmful) and the safety prompt by one
of four hues that hold under colour-blindness.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nbformat  # noqa: F401  (imported before plotly, it makes the first FigureWidget several times quicker)
import numpy as np
import pandas as pd
import plotly.graph_objects as go
import plotly.io as pio
from plotly.subplots import make_subplots

if TYPE_CHECKING:
    from .space import Direction

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
HALO = dict(color="#333333", shadow=", ".join(f"{x}px {y}px 2px #FFFFFF" for x in (-1, 0, 1) for y in (-1, 0, 1)))  # over points
UNIT_COLUMNS = ("refusal_rate", "predicted_refusal", "harmful")  # coloured on [0, 1] whatever their values

_AXIS = dict(gridcolor="rgba(128,128,128,.25)", zerolinecolor="rgba(128,128,128,.4)", linecolor=GREY, ticks="outside")
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
pio.templates["analysis_lib"] = TEMPLATE  # by name for users' own figures; plotly's default stays as it is
# plotly's "Share chart" button sends a figure, with its queries, to a server; a dollar sign in a name is no formula
OFFLINE = dict(showSendToCloud=False, typesetMath=False)
pio.renderers["plotly_mimetype"].config = {**(pio.renderers["plotly_mimetype"].config or {}), **OFFLINE}


def text(value: object) -> str:
    """`value` as plain text for plotly, which knows &lt; &gt; &amp; and would print &quot; as it stands."""
    return escape(str(value), quote=False)


def label(value: object, most: int = 24) -> str:
    """`value` for a legend, tick or arrow: a longer one would take its room from the plot; the hover text has it in full."""
    value = str(value)
    return text(value if len(value) <= most else value[: most - 1] + "\u2026")


def points_table(Z: np.ndarray, rows: pd.DataFrame) -> pd.DataFrame:
    """`rows` (n of them, any columns) with the coordinates `Z` (n, k) as pc1..pck, rounded to 4 decimals."""
    Z = np.asarray(Z)
    if Z.ndim != 2 or len(Z) != len(rows):
        raise ValueError(f"coordinates of shape {Z.shape} for {len(rows)} rows: pass Z (n, k) and its own n rows")
    kept = rows.drop(columns=[c for c in rows.columns if _is_pc(c)]).reset_index(drop=True)
    return kept.assign(**{f"pc{i + 1}": np.round(Z[:, i].astype(float), 4) for i in range(Z.shape[1])})


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
        _need(points, [color], where)
    xy = _plane(points, components, where)
    names = list(dict.fromkeys(points["prompt"]))
    shown = set(names if prompts is None else prompts)
    if missing := shown - set(names):
        raise ValueError(f"{where}: no points of prompt {sorted(missing)}; there are {names}")
    if arrows and base not in names:
        raise ValueError(f"{where}: no points of the arrows' base {base!r}; pass base= one of {names}, or arrows=None")

    fig = go.Figure()
    _add_points(fig, points, xy, names, shown, color)
    if arrows:
        means = _group_means(points, xy)
        classes = [c for c in CLASSES if (base, c) in means]
        for cls in classes:
            heads = [name for name in names if name != base and (name, cls) in means]
            tail = np.array(means[base, cls])
            offsets = _lanes(np.reshape([means[name, cls] for name in heads], (-1, 2)) - tail, _view(xy))
            drawn = [
                _arrow(
                    tail + offset,
                    means[name, cls] + offset,
                    color=_style(names, name)[0],
                    dash=DASHES[cls],
                    hover=f"mean of {cls} queries: {base} {_at(tail)} to {name} {_at(means[name, cls])}",
                    visible=name in shown,
                )
                for name, offset in zip(heads, offsets, strict=True)
            ]
            fig.add_traces([_edge(drawn), *drawn])
        for cls in classes if len(names) > 1 else ():
            line = dict(color=GREY, dash=DASHES[cls], width=3)
            fig.add_trace(go.Scatter(x=[None], y=[None], mode="lines", line=line, name=f"mean shift, {cls}"))
        for name in names:  # where no point's colour names the prompt, so the arrows' legend does
            line = dict(color=_style(names, name)[0], width=3)
            shows = color != "prompt" and name != base and name in shown
            fig.add_trace(go.Scatter(x=[None], y=[None], mode="lines", line=line, name=label(f"{base} to {name}"), visible=shows))
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
        raise ValueError(f"{where}: the path {names} needs two or more prompts with points; without points: {absent}")
    points = points[points["prompt"].isin(names)]
    xy = _plane(points, components, where)
    fig = go.Figure()
    _add_points(fig, points, xy, names, set(names), "prompt")
    means = _group_means(points, xy)
    drawn = [
        _arrow(
            means[tail, cls],
            means[head, cls],
            color=_style(names, head)[0],
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
        line = dict(color=_style(names, head)[0], dash="dash" if step == 0 else "solid", width=3)
        fig.add_trace(go.Scatter(x=[None], y=[None], mode="lines", line=line, name=label(f"{tail} to {head}")))
    _add_directions(fig, points, xy, components, direction, where)
    return _finish_plane(fig, xy, components, explained, title, note)


def plot_calibration(
    table: pd.DataFrame,
    *,
    x: str = "predicted",
    bins: int = 10,
    title: str = "Predicted and observed refusal",
    note: str | None = None,
) -> go.Figure:
    """Observed refusal rate against the predicted probability, or against what predicts it, with the curve of the prediction.

    Every row is a point; the line joins the means of `bins` equal bins of the predicted probability.
    table: predicted, observed (both in [0, 1]), perhaps query_id, prompt, text. x: "predicted", or a column that the
    prediction is a function of, such as "projection" (on the refusal direction, in units of the hidden space).
    """
    _need(table, ["predicted", "observed", x], "plot_calibration")
    table = table.dropna(subset=["predicted", "observed", x]).sort_values(x, kind="stable")
    which = np.clip((table["predicted"].to_numpy(float) * bins).astype(int), 0, bins - 1)
    binned = table[list(dict.fromkeys([x, "observed"]))].groupby(which).agg(["mean", "size"])
    n = binned["observed", "size"].to_numpy()
    fig = go.Figure()
    if x == "predicted":
        fig.add_trace(_diagonal(0, 1, "perfectly calibrated"))
    else:
        some = table.iloc[np.unique(np.linspace(0, len(table) - 1, 200).astype(int))] if len(table) else table
        line = dict(color=GREY, dash="dash")
        curve = go.Scatter(x=_round(some[x]), y=_round(some["predicted"]), mode="lines", line=line, hoverinfo="skip")
        fig.add_trace(curve.update(name="predicted probability"))
    fig.add_trace(
        go.Scatter(
            x=_round(table[x]),
            y=_round(table["observed"]),
            mode="markers",
            marker=dict(color=PROMPT_COLORS[1], size=5, symbol="circle-open", opacity=OPACITY),
            hovertext=_hover(table),
            hoverinfo="text+x+y",
            name="query under a prompt",
        )
    )
    fig.add_trace(
        go.Scatter(
            x=_round(binned[x, "mean"]),
            y=_round(binned["observed", "mean"]),
            mode="lines+markers",
            marker=dict(color=PROMPT_COLORS[3], size=10),
            line=dict(color=PROMPT_COLORS[3], width=2),
            hovertext=[f"mean of {m} points" for m in n],
            hoverinfo="text+x+y",
            name=f"mean of a bin (of {bins})",
        )
    )
    titles = {
        "predicted": "predicted probability of refusal",
        "projection": "projection on the refusal direction (units of the hidden space)",
    }
    fig.update_xaxes(title_text=titles.get(x, text(x).replace("_", " ")), range=[-0.03, 1.03] if x == "predicted" else None)
    fig.update_yaxes(title_text="observed refusal rate", range=[-0.03, 1.03])
    return _finish(fig, title, note, width=720)


def plot_truth(table: pd.DataFrame, *, title: str = "Predicted and true refusal logit", note: str | None = None) -> go.Figure:
    """Predicted logit against the true one, known for the embedded model only.

    table: predicted_logit, true_logit, and perhaps query_id, prompt, harmful, text.
    """
    _need(table, ["predicted_logit", "true_logit"], "plot_truth")
    fig = go.Figure()
    both = table[["predicted_logit", "true_logit"]].to_numpy(float)
    both = both[np.isfinite(both).all(axis=1)]
    if len(both):
        fig.add_trace(_diagonal(float(both.min()), float(both.max()), "equal"))
    classes = class_names(table) if "harmful" in table else pd.Series("query", index=table.index)
    prompts = table["prompt"] if "prompt" in table else pd.Series("", index=table.index)
    names = list(dict.fromkeys(prompts))
    for name in names:
        for cls in dict.fromkeys(classes):
            part = table[(prompts == name) & (classes == cls)]
            if len(part):
                hue, symbols = _style(names, name)
                fig.add_trace(
                    go.Scatter(
                        x=_round(part["true_logit"]),
                        y=_round(part["predicted_logit"]),
                        mode="markers",
                        marker=dict(color=hue, symbol=symbols.get(cls, "circle"), size=7, opacity=OPACITY),
                        hovertext=_hover(part),
                        hoverinfo="text+x+y",
                        name=label(", ".join(filter(None, [cls, str(name)]))),
                    )
                )
    fig.update_xaxes(title_text="true logit of refusal")
    fig.update_yaxes(title_text="predicted logit of refusal")
    return _finish(fig, title, note, width=720)


def plot_losses(history: pd.DataFrame, *, title: str = "Losses by step", note: str | None = None) -> go.Figure:
    """One panel per numeric column of a training history (step, loss, refusal, harmfulness, norm ...) against its step."""
    _need(history, ["step"], "plot_losses")
    columns = [c for c in history.columns if c not in ("step", "epoch") and pd.api.types.is_numeric_dtype(history[c])]
    if not columns or history.empty:
        raise ValueError("plot_losses: no losses to draw; pass a SoftPrompt's .history with one row per step")
    ncols = min(2, len(columns))
    nrows = -(-len(columns) // ncols)
    titles = [text(c) for c in columns]
    fig = make_subplots(rows=nrows, cols=ncols, shared_xaxes=True, subplot_titles=titles, vertical_spacing=0.14)
    for at, column in enumerate(columns):
        row, col = at // ncols + 1, at % ncols + 1
        line = dict(color=PROMPT_COLORS[at % 4], width=2)
        trace = go.Scatter(x=_round(history["step"]), y=_round(history[column], 6), mode="lines", line=line, name=titles[at])
        fig.add_trace(trace, row=row, col=col)
        if at + ncols >= len(columns):
            fig.update_xaxes(title_text="step", showticklabels=True, row=row, col=col)
    fig.update_layout(showlegend=False)
    return _finish(fig, title, note, height=180 + 170 * nrows, right=30, top=85)


def plot_benchmark(
    table: pd.DataFrame, *, title: str = "Benchmark, with 95 % intervals over queries", note: str | None = None
) -> go.Figure:
    """Dots with intervals: one panel per metric and query set, one line per method and prompt, one hue per model.

    Panels of one metric have one scale. table: model, method, prompt, query_set, metric, value, low, high (95 % intervals over
    queries, as the default title says) and perhaps n_queries, n_samples, judge; where a panel has more than one judge, the line
    names it. Raises ValueError where two rows would lie on the same dot.
    """
    where = "plot_benchmark"
    _need(table, ["model", "method", "prompt", "query_set", "metric", "value", "low", "high"], where)
    if table.empty:
        raise ValueError(f"{where}: the table is empty")
    several = "judge" in table and (table.groupby(["metric", "query_set"])["judge"].nunique() > 1).any()
    parts = ["method", "prompt"] + (["judge"] if several else [])
    labels = table[parts].astype(str).agg(" / ".join, axis=1)
    cell = [labels, table["model"], table["query_set"], table["metric"]]
    twice = pd.concat(cell, axis=1).duplicated()
    if twice.any():
        bad = table[twice].iloc[0]
        raise ValueError(
            f"{where}: two rows for {labels[twice].iloc[0]!r}, model {bad['model']!r}, {bad['metric']!r} on "
            f"{bad['query_set']!r}; keep one row of each"
        )
    lines, models = list(dict.fromkeys(labels)), list(dict.fromkeys(table["model"]))
    facets = list(dict.fromkeys(zip(table["metric"], table["query_set"], strict=True)))
    ncols = min(3, len(facets))
    nrows = -(-len(facets) // ncols)
    panel = 60 + 26 * len(lines) * max(1, len(models) / 2)
    plots = nrows * panel + (nrows - 1) * BETWEEN
    fig = make_subplots(
        rows=nrows,
        cols=ncols,
        shared_yaxes=True,
        horizontal_spacing=0.03,
        vertical_spacing=BETWEEN / plots,
        subplot_titles=[f"{text(metric).replace('_', ' ')}<br>{text(query_set)}" for metric, query_set in facets],
    )
    fig.update_annotations(font_size=12)
    drawn = table[["value", "low", "high"]]
    least, most = drawn.min(axis=1).groupby(table["metric"]).min(), drawn.max(axis=1).groupby(table["metric"]).max()
    for at, (metric, query_set) in enumerate(facets):
        row, col = at // ncols + 1, at % ncols + 1
        for m, model in enumerate(models):
            keep = (table["metric"] == metric) & (table["query_set"] == query_set) & (table["model"] == model)
            part = table[keep]
            offset = (m - (len(models) - 1) / 2) * 0.6 / len(models)
            trace = go.Scatter(
                x=_round(part["value"]),
                y=[lines.index(line) + offset for line in labels[keep]],
                error_x=_interval(part, "value", ""),
                mode="markers",
                marker=dict(color=PROMPT_COLORS[m % 4], size=8, symbol=("circle", "square", "diamond")[m // 4 % 3]),
                hovertext=_benchmark_hover(part, labels[keep]),
                hoverinfo="text",
                name=label(model, 40),
                legendgroup=text(model),
                cliponaxis=False,
                showlegend=at == 0 and len(models) > 1,
            )
            fig.add_trace(trace, row=row, col=col)
        low, high = min(0.0, least[metric]), max(0.0, most[metric])
        room = 0.04 * (high - low) or 0.04  # a dot at an end is drawn in full
        fig.update_xaxes(range=_round([low - room, high + room]), row=row, col=col)
    ticks = dict(tickvals=list(range(len(lines))), ticktext=[label(line, 40) for line in lines])
    fig.update_yaxes(range=[len(lines) - 0.5, -0.5], **ticks)
    # Set by hand: a margin that plotly grows by itself would push the note out of the picture.
    left = 30 + int(6.5 * min(40, max(map(len, lines))))
    legend = dict(orientation="h", x=1, xanchor="right", y=1 + 38 / plots, yanchor="bottom")
    fig.update_layout(legend=legend)
    return _finish(fig, title, note, height=int(95 + plots + BOTTOM), left=left, right=30, top=95)


def plot_by_model(
    table: pd.DataFrame,
    *,
    start: str | None = None,
    axis: str = "",
    title: str = "Models and their average, with 95 % intervals",
    note: str | None = None,
) -> go.Figure:
    """Dots with intervals: one panel per query set, one line per model, one hue per method and prompt; a slider over metrics.

    table: model, method, prompt, query_set, metric, value, low, high, one row of each. The slider is there where metrics are
    several, begins at `start` (the first) and needs no kernel. axis: what the values are. Raises ValueError on a repeated or
    missing row, an unknown metric, and more conditions than hues.
    """
    where = "plot_by_model"
    keys = ["query_set", "method", "prompt", "model", "metric"]
    _need(table, [*keys, "value", "low", "high"], where)
    metrics, models = list(dict.fromkeys(table["metric"])), list(dict.fromkeys(table["model"]))
    panels = list(dict.fromkeys(table["query_set"]))
    conditions = list(dict.fromkeys(zip(table["method"], table["prompt"], strict=True)))
    start = metrics[0] if start is None else start
    if start not in metrics or len(conditions) > len(PROMPT_COLORS):
        raise ValueError(
            f"{where}: start {start!r} must be one of {metrics}, and conditions at most {len(PROMPT_COLORS)}: {conditions}"
        )
    cells = [(p, c) for p in panels for c in conditions]
    lines = pd.MultiIndex.from_tuples([(p, *c, m, metric) for p, c in cells for m in models for metric in metrics], names=keys)
    if table.duplicated(keys).any() or len(table) != len(lines):
        raise ValueError(
            f"{where}: {len(table)} rows for {len(lines)} dots; give one row for each model, condition, set and metric"
        )
    rows = table.set_index(keys)[["value", "low", "high"]].reindex(lines).to_numpy()
    value, low, high = _round(rows).reshape(len(cells), len(models), len(metrics), 3).transpose(3, 2, 0, 1)
    more, less = np.round(high - value, 4), np.round(value - low, 4)  # (metrics, traces, models)
    at = metrics.index(start)
    fig = make_subplots(cols=len(panels), shared_yaxes=True, horizontal_spacing=0.03, subplot_titles=[text(p) for p in panels])
    for i, (panel, condition) in enumerate(cells):
        place = conditions.index(condition)
        name = " / ".join(dict.fromkeys(map(str, condition)))
        trace = go.Scatter(
            x=value[at, i],
            y=np.round(np.arange(len(models)) + (place - (len(conditions) - 1) / 2) * 0.7 / len(conditions), 4),
            error_x=dict(type="data", symmetric=False, array=more[at, i], arrayminus=less[at, i], thickness=1.5, width=2),
            mode="markers",
            marker=dict(color=PROMPT_COLORS[place], size=7, symbol=("circle", "square", "diamond", "cross")[place]),
            text=[text(f"{model}, {name}") for model in models],
            hovertemplate="%{text}: %{x:.3f}<extra></extra>",
            name=label(name, 40),
            legendgroup=str(place),
            showlegend=panel == panels[0],
        )
        fig.add_trace(trace, row=1, col=panels.index(panel) + 1)
    for col in range(len(panels)):
        part = slice(col * len(conditions), (col + 1) * len(conditions))
        ends = _round([min(0, low[:, part].min()), max(0, high[:, part].max())])
        fig.update_xaxes(range=[1.04 * ends[0] - 0.02 * ends[1], 1.04 * ends[1] - 0.02 * ends[0]], row=1, col=col + 1)
    fig.update_yaxes(range=[len(models) - 0.5, -0.5], tickvals=list(range(len(models))), ticktext=[label(m, 40) for m in models])
    fig.update_xaxes(title_text=text(axis), row=1, col=1 + len(panels) // 2)
    fig.update_layout(legend=dict(orientation="h", x=1, xanchor="right", y=1.07, yanchor="bottom"))
    fig = _finish(fig, title, note, height=170 + 52 * len(models), left=30 + int(6.5 * max(map(len, models))), right=30, top=110)
    if len(metrics) > 1:
        steps = [
            dict(
                method="restyle",
                label=label(metric),
                args=[{"x": value[m].tolist(), "error_x.array": more[m].tolist(), "error_x.arrayminus": less[m].tolist()}],
            )
            for m, metric in enumerate(metrics)
        ]
        room = 100  # pixels below the axes
        fig.update_layout(
            height=fig.layout.height + room,
            margin_b=fig.layout.margin.b + room,
            sliders=[
                dict(active=at, steps=steps, bgcolor=GREY, pad=dict(t=50), currentvalue=dict(prefix="metric: "), len=0.95, x=0)
            ],
        )
        for note_line in fig.select_annotations(dict(name="note")):
            note_line.yshift -= room
    return fig


def plot_rates(rates: pd.DataFrame, queries: pd.DataFrame, *, title: str = "Refusal rates", note: str | None = None) -> go.Figure:
    """Refusal rates by prompt and class: every query as a point (spread sideways to be seen) and the mean as a bar.

    rates: query_id, prompt, refusal_rate; queries: query_id, harmful and perhaps text.
    """
    where = "plot_rates"
    _need(rates, ["query_id", "prompt", "refusal_rate"], where)
    _need(queries, ["query_id", "harmful"], where)
    if unknown := sorted(set(rates["query_id"].astype(str)) - set(queries["query_id"].astype(str))):
        raise ValueError(f"{where}: {len(unknown)} rated queries are not among the queries, such as {unknown[0]!r}")
    about = queries[[c for c in ("query_id", "harmful", "text") if c in queries]]
    known = [c for c in about.columns if c != "query_id"]
    table = rates.drop(columns=known, errors="ignore").merge(about, on="query_id", how="left", validate="m:1")
    table = table.dropna(subset=["refusal_rate"])
    fig = go.Figure()
    _add_strips(fig, table, "refusal_rate", list(dict.fromkeys(rates["prompt"])))
    fig.update_yaxes(title_text="refusal rate", range=[-0.04, 1.04])
    return _finish(fig, title, note)


def plot_shifts(
    shifts: pd.DataFrame,
    *,
    axis: str = "shift of the refusal logit",
    prompts: Sequence[str] | None = None,
    title: str = "How far each query moves",
    note: str | None = None,
) -> go.Figure:
    """The distribution of per-query shifts by prompt and class: every query as a point, the mean as a bar, and no shift as a line.

    shifts: query_id, prompt, harmful, shift (in the unit that `axis` names), perhaps text. prompts: names in the order of
    their colours, where other figures show prompts that this one does not; by default those of `shifts`.
    """
    _need(shifts, ["query_id", "prompt", "harmful", "shift"], "plot_shifts")
    fig = go.Figure()
    _add_strips(fig, shifts.dropna(subset=["shift"]), "shift", list(dict.fromkeys(shifts["prompt"])), prompts)
    fig.add_hline(y=0, line=dict(color=GREY, width=1, dash="dash"))
    fig.update_yaxes(title_text=text(axis))
    return _finish(fig, title, note)


def plot_separation(
    table: pd.DataFrame, *, title: str = "Separation of harmful and harmless queries", note: str | None = None
) -> go.Figure:
    """Accuracy of telling harmful from harmless, by layer where the table has that column (a line per prompt), else by prompt.

    table: accuracy, layer and/or prompt, perhaps low, high. Layer -1, the state after the final norm, stands last.
    """
    where = "plot_separation"
    _need(table, ["accuracy"], where)
    by_layer = "layer" in table
    if not by_layer:
        _need(table, ["prompt"], where)
    names = list(dict.fromkeys(table["prompt"])) if "prompt" in table else [""]
    keys: list[Any] = sorted(set(table["layer"]), key=lambda i: (i < 0, i)) if by_layer else names
    fig = go.Figure()
    for at, name in enumerate(names if by_layer else [None]):
        part = table[table["prompt"] == name] if by_layer and "prompt" in table else table
        x = pd.Series([keys.index(k) for k in part["layer" if by_layer else "prompt"]], index=part.index).sort_values()
        part = part.loc[x.index]
        hue = PROMPT_COLORS[at % len(PROMPT_COLORS)]
        fig.add_trace(
            go.Scatter(
                x=x.to_numpy(),
                y=_round(part["accuracy"]),
                error_y=_interval(part, "accuracy", ""),
                mode="lines+markers" if by_layer else "markers",
                line=dict(color=hue, width=2),
                marker=dict(color=hue, size=8, symbol=("circle", "square", "diamond")[at // 4 % 3]),
                name=label(name if by_layer else "accuracy"),
                showlegend=by_layer and len(names) > 1,
            )
        )
    labels = ["-1<br>(final norm)" if by_layer and k == -1 else label(k) for k in keys]
    fig.update_xaxes(tickvals=list(range(len(keys))), ticktext=labels, title_text="layer" if by_layer else "safety prompt")
    fig.update_yaxes(title_text="accuracy")
    return _finish(fig, title, note)


def plot_nearest_tokens(
    table: pd.DataFrame, *, title: str = "The vocabulary tokens nearest to the soft prompt", note: str | None = None
) -> go.Figure:
    """The cosine of each soft embedding with its nearest vocabulary token, by position; the token is written where it changed.

    table: one row per position in order: start (the text prompt's token), nearest, cosine.
    """
    _need(table, ["start", "nearest", "cosine"], "plot_nearest_tokens")
    fig = go.Figure()
    position = np.arange(1, len(table) + 1)
    changed = (table["start"] != table["nearest"]).to_numpy()
    for name, keep, hue, symbol in (
        ("its own token", ~changed, PROMPT_COLORS[1], "circle-open"),
        ("another token", changed, PROMPT_COLORS[3], "x"),
    ):
        part = table[keep]
        fig.add_trace(
            go.Scatter(
                x=position[keep],
                y=_round(part["cosine"]),
                mode="markers+text" if name == "another token" else "markers",
                marker=dict(color=hue, symbol=symbol, size=9),
                text=[label(repr(t)) for t in part["nearest"]],
                textposition="bottom center",
                hovertext=[
                    f"position {at}<br>start: {text(repr(start))}<br>nearest: {text(repr(near))}<br>cosine: {cosine:.3f}"
                    for at, start, near, cosine in zip(
                        position[keep], part["start"], part["nearest"], part["cosine"], strict=True
                    )
                ],
                hoverinfo="text",
                name=f"{name} ({len(part)})",
            )
        )
    fig.update_layout(showlegend=True)  # with one kind alone, too: it says which
    fig.update_xaxes(title_text="position in the safety prompt")
    fig.update_yaxes(title_text="cosine with the nearest token's embedding")
    return _finish(fig, title, note, height=420)


def plot_tradeoff(
    table: pd.DataFrame,
    *,
    x: str = "harmless refused",
    y: str = "harmful answered",
    color: str = "facts right",
    unit: str = "%",
    title: str = "Safety, over-refusal and ability",
    note: str | None = None,
) -> go.Figure:
    """Every prompt by what it stops (`y`, lower is safer), what it costs in false refusals (`x`) and in ability (`color`).

    table: prompt, perhaps method, and the three columns, all in `unit`; where it has columns such as "`x` low" and
    "`x` high", they are drawn as intervals.
    """
    where = "plot_tradeoff"
    _need(table, ["prompt", x, y, color], where)
    if table.empty:
        raise ValueError(f"{where}: the table is empty")
    parts = [c for c in ("method", "prompt") if c in table]
    names = table[parts].astype(str).agg(" / ".join, axis=1)
    ability = _round(table[color], 2)
    marker: dict[str, Any] = dict(size=14, symbol="diamond", color=[UNKNOWN if np.isnan(v) else v for v in ability])
    bar = dict(title=f"{text(color)} ({text(unit)})", thickness=14, outlinewidth=0, len=0.8)
    if np.isfinite(ability).any():
        marker |= dict(colorscale=SCALE, colorbar=bar, cmin=np.nanmin(ability), cmax=np.nanmax(ability))
    fig = go.Figure(
        go.Scatter(
            x=_round(table[x], 2),
            y=_round(table[y], 2),
            error_x=_interval(table, x, color=GREY),  # without it black, as the markers have many colours
            error_y=_interval(table, y, color=GREY),
            mode="markers+text",
            marker=marker,
            text=[label(name) for name in names],
            textfont=HALO,
            textposition=["top left" if v > np.nanmax(table[x]) / 2 else "top right" for v in table[x]],
            hovertext=[
                "<br>".join([text(name), *(f"{text(c)}: {row[c]:.1f} {text(unit)}" for c in (x, y, color))])
                for name, (_, row) in zip(names, table.iterrows(), strict=True)
            ],
            hoverinfo="text",
            cliponaxis=False,
            showlegend=False,
        )
    )
    fig.update_xaxes(title_text=f"{text(x)} ({text(unit)})", rangemode="tozero")
    fig.update_yaxes(title_text=f"{text(y)} ({text(unit)})", rangemode="tozero")
    return _finish(fig, title, note, right=130)


def plot_grid(figures: Mapping[str, go.Figure], *, columns: int = 2, title: str = "", note: str | None = None) -> go.Figure:
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
    return _finish(fig, title, note, width=width, height=int(170 + plots + BOTTOM), right=right, top=170)


def save(fig: go.Figure, path: str | Path) -> Path:
    """Write `fig` as .svg, .png (both by Chromium) or .html (works offline, plotly.js embedded); the suffix decides.

    A path without a suffix stands for both pictures, PATH.svg and PATH.png. Raises ValueError on another suffix and
    RuntimeError where no picture can be made.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in ("", ".svg", ".png", ".html"):
        raise ValueError(f"{path}: cannot save a figure as {suffix!r}; use .svg, .png, .html, or no suffix for .svg and .png")
    path.parent.mkdir(parents=True, exist_ok=True)
    if suffix == ".html":
        fig.write_html(path, include_plotlyjs=True, div_id="figure", config=OFFLINE)
        return path
    from kaleido.errors import ChromeNotFoundError  # late: kaleido is slow to import and only pictures need it

    for target in [path] if suffix else [path.with_suffix(".svg"), path.with_suffix(".png")]:
        try:
            target.write_bytes(fig.to_image(format=target.suffix[1:].lower()))
        except (ChromeNotFoundError, RuntimeError, ValueError) as error:
            raise RuntimeError(f"{target}: no picture was made ({error}); install Chromium, or save as .html") from error
    return path


# One point cloud in a plane ------------------------------------------------------------------------------------------------


def _is_pc(column: object) -> bool:
    return isinstance(column, str) and column[:2] == "pc" and column[2:].isdigit()


def _need(table: pd.DataFrame, columns: Sequence[str], where: str) -> None:
    if missing := [c for c in columns if c not in table]:
        raise ValueError(f"{where}: the table lacks column {', '.join(map(repr, missing))}; it has {list(table.columns)}")


def _round(values: Any, decimals: int = 4) -> np.ndarray:
    return np.round(np.asarray(values, dtype=float), decimals)


def _interval(table: pd.DataFrame, column: str, name: str | None = None, **style: Any) -> dict[str, Any] | None:
    """Plotly's error bars of `column`, from the columns "`name` low" and "`name` high"; None where the table lacks them."""
    low, high = (f"{column if name is None else name} {end}".strip() for end in ("low", "high"))
    if not {low, high} <= set(table.columns):
        return None
    up, down = _round(table[high] - table[column]), _round(table[column] - table[low])
    return dict(type="data", symmetric=False, array=up, arrayminus=down, thickness=1.5, width=3, **style)


def _plane(points: pd.DataFrame, components: tuple[int, int], where: str) -> pd.DataFrame:
    """The two coordinates as columns x, y, on the index of `points`."""
    _need(points, ["query_id", "prompt", "harmful", *(f"pc{c}" for c in components)], where)
    if points.empty:
        raise ValueError(f"{where}: the points table is empty; check what it was filtered by")
    return pd.DataFrame({"x": _round(points[f"pc{components[0]}"]), "y": _round(points[f"pc{components[1]}"])}, points.index)


def class_names(table: pd.DataFrame) -> pd.Series:
    """harmless, harmful or unlabelled (no agreed answer) for each row."""
    harmful = table["harmful"].astype("boolean")
    return harmful.map({True: "harmful", False: "harmless"}).astype(object).where(harmful.notna(), "unlabelled")


def _group_means(points: pd.DataFrame, xy: pd.DataFrame) -> dict[tuple[str, str], tuple[float, float]]:
    means = xy.groupby([points["prompt"], class_names(points)]).mean()
    return {(str(p), str(c)): (x, y) for (p, c), x, y in zip(means.index, means["x"], means["y"], strict=True)}


def _style(names: Sequence[str], name: str) -> tuple[str, dict[str, str]]:
    """The hue of a prompt and its marker per class."""
    at = names.index(name)
    symbols = SYMBOLS[at // len(PROMPT_COLORS) % len(SYMBOLS)]
    return PROMPT_COLORS[at % len(PROMPT_COLORS)], dict(zip(CLASSES, symbols, strict=True))


@lru_cache(maxsize=8192)
def _wrapped(value: str) -> str:
    value = value if len(value) <= 400 else value[:396] + " ..."
    return "<br>".join(text(line) for line in textwrap.wrap(value, 64))


def _hover(table: pd.DataFrame) -> list[str]:
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
        columns.append(["refusal rate: not judged" if np.isnan(r) else f"refusal rate: {r:.2f}" for r in rates])
    if "text" in table:
        columns.append(["" if pd.isna(t) else _wrapped(str(t)) for t in table["text"]])
    return ["<br>".join(filter(None, lines)) for lines in zip(*columns, strict=True)]


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
    hover = pd.Series(_hover(points), index=points.index, dtype=object)
    for name in names:
        hue, symbols = _style(names, name)
        for cls in CLASSES:
            keep = (points["prompt"] == name) & (classes == cls)
            if not keep.any():
                continue
            marker: dict[str, Any] = dict(symbol=symbols[cls], size=7)
            if color == "prompt":
                marker["color"] = hue
            else:
                values = points.loc[keep, color].astype("Float64").to_numpy(float, na_value=np.nan)
                marker.update(color=[UNKNOWN if np.isnan(v) else round(v, 4) for v in values], coloraxis="coloraxis")
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
    for cls in CLASSES:  # the legend entry of a trace of many colours would be black: these stand in for it
        if (classes == cls).any():
            marker = dict(symbol=SYMBOLS[0][CLASSES.index(cls)], color=GREY, size=7)
            entry = go.Scatter(x=[None], y=[None], mode="markers", marker=marker, name=cls, legendgroup=cls)
            fig.add_trace(entry.update(visible=color != "prompt"))
    if color != "prompt":
        values = points[color].astype("Float64").to_numpy(float, na_value=np.nan)
        top = 1.0 if color in UNIT_COLUMNS or not np.isfinite(values).any() else float(np.nanmax(values)) or 1.0
        bar = dict(title=text(color).replace("_", " "), len=0.5, y=0, yanchor="bottom", thickness=14, outlinewidth=0)
        fig.update_layout(coloraxis=dict(colorscale=SCALE, cmin=0, cmax=round(top, 4), colorbar=bar))
        fig.update_layout(legend_maxheight=0.48)  # a longer one scrolls above the colour bar


def _add_strips(
    fig: go.Figure, table: pd.DataFrame, column: str, names: Sequence[str], hues: Sequence[str] | None = None
) -> None:
    """`column` of every row over its prompt and class, spread sideways to be seen, with a bar at the mean."""
    classes = class_names(table)
    present = [c for c in CLASSES if (classes == c).any()]
    for name in names:
        hue, symbols = _style(list(dict.fromkeys([*(hues or ()), *names])), name)
        for cls in present:
            part = table[(table["prompt"] == name) & (classes == cls)]
            if part.empty:
                continue
            centre = names.index(name) + (present.index(cls) - (len(present) - 1) / 2) * 0.8 / len(present)
            half = 0.3 / len(present)
            spread = (np.arange(len(part)) * 0.618034) % 1 * 2 - 1  # golden ratio: even, and the same each time
            fig.add_trace(
                go.Scatter(
                    x=np.round(centre + half * spread, 4),
                    y=_round(part[column]),
                    mode="markers",
                    marker=dict(color=hue, symbol=symbols[cls], size=6, opacity=OPACITY),
                    hovertext=_hover(part),
                    hoverinfo="text" if column == "refusal_rate" else "text+y",
                    name=label(f"{cls}, {name}"),
                )
            )
            mean = round(float(part[column].mean()), 4)
            fig.add_trace(
                go.Scatter(
                    x=[round(centre - half * 1.2, 4), round(centre + half * 1.2, 4)],
                    y=[mean, mean],
                    mode="lines",
                    line=dict(color=GREY, width=4),
                    hovertext=text(f"mean of {len(part)} {cls} queries, prompt {name}: {mean:.3f}"),
                    hoverinfo="text",
                    name="mean",
                    legendgroup="mean",
                    legendrank=2000,  # last
                    showlegend=not any(t.name == "mean" for t in fig.data),
                )
            )
    fig.update_xaxes(tickvals=list(range(len(names))), ticktext=[label(n) for n in names], title_text="safety prompt")


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
        x=_round([tail[0], head[0]]),
        y=_round([tail[1], head[1]]),
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
    directions = [] if direction is None else list(direction) if isinstance(direction, Sequence) else [direction]
    low, high = _view(xy)
    for at, d in enumerate(directions):
        weight = np.asarray(d.weight, dtype=float)
        names = [f"pc{i + 1}" for i in range(len(weight))]
        _need(points, names, f"{where}: direction {d.name!r}")
        w = weight[[c - 1 for c in components]]
        others = [i for i in range(len(weight)) if i + 1 not in components]
        offset = float(d.bias) + float(weight[others] @ points[names].mean().to_numpy()[others])
        line = _clip(w, offset, low, high)
        dash = "dash" if at == 0 else "dot"
        name = f"{d.name} boundary" if line is not None else f"{d.name}: out of view"
        fig.add_trace(
            go.Scatter(
                x=[None] if line is None else _round(line[:, 0]),
                y=[None] if line is None else _round(line[:, 1]),
                mode="lines",
                line=dict(color=GREY, dash=dash, width=2),
                hoverinfo="skip",
                name=label(name),
            )
        )
        # Towards an end of the line, where few points lie; the second direction takes the other end.
        tail = (low + high) / 2 if line is None else line[0] + (line[1] - line[0]) * (0.85 if at % 2 == 0 else 0.15)
        way = w / np.linalg.norm(w) * 0.16 * (high - low).min() if w.any() else np.nan * w  # no gradient, no arrow
        margin = 0.08 * (high - low)  # for the head, which plotly hides outside of the view, and its label
        head = np.clip(tail + way, low + margin, high - margin)
        tail = head - way
        adjective = {"refusal": "refusal", "harmfulness": "harmful"}.get(d.name, d.name)
        hover = f"gradient of the {d.name} logit"
        fig.add_trace(_arrow(tuple(tail), tuple(head), color=GREY, hover=hover, tip=f"more {adjective}"))


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


# Layout --------------------------------------------------------------------------------------------------------------------

ARROW, LANE = 3, 7  # width of an arrow and distance between two that lie side by side, in pixels
LEFT, RIGHT, TOP, BOTTOM = 65, 218, 55, 60  # margins in pixels
ASPECT = (WIDTH - LEFT - RIGHT) / (HEIGHT - TOP - BOTTOM)  # of a plane's plotting area
BETWEEN = 85  # pixels between two rows of panels: ticks, the upper one's axis title and the lower one's title


def _finish_plane(
    fig: go.Figure,
    xy: pd.DataFrame,
    components: tuple[int, int],
    explained: Sequence[float] | None,
    title: str,
    note: str | None,
) -> go.Figure:
    low, high = _view(xy)
    titles = [f"PC{c}" + (f" ({100 * explained[c - 1]:.0f} % of variance)" if explained is not None else "") for c in components]
    fig.update_xaxes(title_text=titles[0], range=_round([low[0], high[0]]))
    fig.update_yaxes(title_text=titles[1], range=_round([low[1], high[1]]), scaleanchor="x", scaleratio=1)
    return _finish(fig, title, note)


def _diagonal(low: float, high: float, name: str) -> go.Scatter:
    ends = _round([low, high])
    return go.Scatter(x=ends, y=ends, mode="lines", line=dict(color=GREY, dash="dash"), hoverinfo="skip", name=name)


def _benchmark_hover(part: pd.DataFrame, labels: pd.Series) -> list[str]:
    extra = [c for c in ("n_queries", "n_samples", "judge") if c in part]
    return [
        text(f"{line}: {row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}], {row['model']}")
        + "".join(f"<br>{c}: {text(row[c])}" for c in extra)
        for line, (_, row) in zip(labels, part.iterrows(), strict=True)
    ]


def _finish(
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
