"""DOC analysis_lib.figures.tables."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from .style import (
    BETWEEN,
    BOTTOM,
    GREY,
    HALO,
    PROMPT_COLORS,
    SCALE,
    UNKNOWN,
    finish,
    interval,
    label,
    need,
    rounded,
    text,
)


def plot_benchmark(
    table: pd.DataFrame,
    *,
    title: str = "Benchmark, with 95 % intervals over queries",
    note: str | None = None,
) -> go.Figure:
    """Dots with intervals: one panel per metric and query set, one line per method and prompt, one hue per model.

    Panels of one metric have one scale. table: model, method, prompt, query_set, metric, value, low, high (95 % intervals over
    queries, as the default title says) and perhaps n_queries, n_samples, judge; where a panel has more than one judge, the line
    names it. Raises ValueError where two rows would lie on the same dot.
    """
    where = "plot_benchmark"
    need(table, ["model", "method", "prompt", "query_set", "metric", "value", "low", "high"], where)
    if table.empty:
        raise ValueError(f"{where}: the table is empty")
    several = (
        "judge" in table and (table.groupby(["metric", "query_set"])["judge"].nunique() > 1).any()
    )
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
        subplot_titles=[
            f"{text(metric).replace('_', ' ')}<br>{text(query_set)}" for metric, query_set in facets
        ],
    )
    fig.update_annotations(font_size=12)
    drawn = table[["value", "low", "high"]]
    least, most = (
        drawn.min(axis=1).groupby(table["metric"]).min(),
        drawn.max(axis=1).groupby(table["metric"]).max(),
    )
    for at, (metric, query_set) in enumerate(facets):
        row, col = at // ncols + 1, at % ncols + 1
        for m, model in enumerate(models):
            keep = (
                (table["metric"] == metric)
                & (table["query_set"] == query_set)
                & (table["model"] == model)
            )
            part = table[keep]
            offset = (m - (len(models) - 1) / 2) * 0.6 / len(models)
            trace = go.Scatter(
                x=rounded(part["value"]),
                y=[lines.index(line) + offset for line in labels[keep]],
                error_x=interval(part, "value", ""),
                mode="markers",
                marker=dict(
                    color=PROMPT_COLORS[m % 4],
                    size=8,
                    symbol=("circle", "square", "diamond")[m // 4 % 3],
                ),
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
        fig.update_xaxes(range=rounded([low - room, high + room]), row=row, col=col)
    ticks = dict(tickvals=list(range(len(lines))), ticktext=[label(line, 40) for line in lines])
    fig.update_yaxes(range=[len(lines) - 0.5, -0.5], **ticks)
    # Set by hand: a margin that plotly grows by itself would push the note out of the picture.
    left = 30 + int(6.5 * min(40, max(map(len, lines))))
    legend = dict(orientation="h", x=1, xanchor="right", y=1 + 38 / plots, yanchor="bottom")
    fig.update_layout(legend=legend)
    return finish(fig, title, note, height=int(95 + plots + BOTTOM), left=left, right=30, top=95)


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
    need(table, [*keys, "value", "low", "high"], where)
    metrics, models = list(dict.fromkeys(table["metric"])), list(dict.fromkeys(table["model"]))
    panels = list(dict.fromkeys(table["query_set"]))
    conditions = list(dict.fromkeys(zip(table["method"], table["prompt"], strict=True)))
    start = metrics[0] if start is None else start
    if start not in metrics or len(conditions) > len(PROMPT_COLORS):
        raise ValueError(
            f"{where}: start {start!r} must be one of {metrics}, and conditions at most {len(PROMPT_COLORS)}: {conditions}"
        )
    cells = [(p, c) for p in panels for c in conditions]
    lines = pd.MultiIndex.from_tuples(
        [(p, *c, m, metric) for p, c in cells for m in models for metric in metrics], names=keys
    )
    if table.duplicated(keys).any() or len(table) != len(lines):
        raise ValueError(
            f"{where}: {len(table)} rows for {len(lines)} dots; give one row for each model, condition, set and metric"
        )
    rows = table.set_index(keys)[["value", "low", "high"]].reindex(lines).to_numpy()
    value, low, high = (
        rounded(rows).reshape(len(cells), len(models), len(metrics), 3).transpose(3, 2, 0, 1)
    )
    more, less = np.round(high - value, 4), np.round(value - low, 4)  # (metrics, traces, models)
    at = metrics.index(start)
    fig = make_subplots(
        cols=len(panels),
        shared_yaxes=True,
        horizontal_spacing=0.03,
        subplot_titles=[text(p) for p in panels],
    )
    for i, (panel, condition) in enumerate(cells):
        place = conditions.index(condition)
        name = " / ".join(dict.fromkeys(map(str, condition)))
        trace = go.Scatter(
            x=value[at, i],
            y=np.round(
                np.arange(len(models))
                + (place - (len(conditions) - 1) / 2) * 0.7 / len(conditions),
                4,
            ),
            error_x=dict(
                type="data",
                symmetric=False,
                array=more[at, i],
                arrayminus=less[at, i],
                thickness=1.5,
                width=2,
            ),
            mode="markers",
            marker=dict(
                color=PROMPT_COLORS[place],
                size=7,
                symbol=("circle", "square", "diamond", "cross")[place],
            ),
            text=[text(f"{model}, {name}") for model in models],
            hovertemplate="%{text}: %{x:.3f}<extra></extra>",
            name=label(name, 40),
            legendgroup=str(place),
            showlegend=panel == panels[0],
        )
        fig.add_trace(trace, row=1, col=panels.index(panel) + 1)
    for col in range(len(panels)):
        part = slice(col * len(conditions), (col + 1) * len(conditions))
        ends = rounded([min(0, low[:, part].min()), max(0, high[:, part].max())])
        fig.update_xaxes(
            range=[1.04 * ends[0] - 0.02 * ends[1], 1.04 * ends[1] - 0.02 * ends[0]],
            row=1,
            col=col + 1,
        )
    fig.update_yaxes(
        range=[len(models) - 0.5, -0.5],
        tickvals=list(range(len(models))),
        ticktext=[label(m, 40) for m in models],
    )
    fig.update_xaxes(title_text=text(axis), row=1, col=1 + len(panels) // 2)
    fig.update_layout(legend=dict(orientation="h", x=1, xanchor="right", y=1.07, yanchor="bottom"))
    fig = finish(
        fig,
        title,
        note,
        height=170 + 52 * len(models),
        left=30 + int(6.5 * max(map(len, models))),
        right=30,
        top=110,
    )
    if len(metrics) > 1:
        steps = [
            dict(
                method="restyle",
                label=label(metric),
                args=[
                    {
                        "x": value[m].tolist(),
                        "error_x.array": more[m].tolist(),
                        "error_x.arrayminus": less[m].tolist(),
                    }
                ],
            )
            for m, metric in enumerate(metrics)
        ]
        room = 100  # pixels below the axes
        fig.update_layout(
            height=fig.layout.height + room,
            margin_b=fig.layout.margin.b + room,
            sliders=[
                dict(
                    active=at,
                    steps=steps,
                    bgcolor=GREY,
                    pad=dict(t=50),
                    currentvalue=dict(prefix="metric: "),
                    len=0.95,
                    x=0,
                )
            ],
        )
        for note_line in fig.select_annotations(dict(name="note")):
            note_line.yshift -= room
    return fig


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
    need(table, ["prompt", x, y, color], where)
    if table.empty:
        raise ValueError(f"{where}: the table is empty")
    parts = [c for c in ("method", "prompt") if c in table]
    names = table[parts].astype(str).agg(" / ".join, axis=1)
    ability = rounded(table[color], 2)
    marker: dict[str, Any] = dict(
        size=14, symbol="diamond", color=[UNKNOWN if np.isnan(v) else v for v in ability]
    )
    bar = dict(title=f"{text(color)} ({text(unit)})", thickness=14, outlinewidth=0, len=0.8)
    if np.isfinite(ability).any():
        marker |= dict(
            colorscale=SCALE, colorbar=bar, cmin=np.nanmin(ability), cmax=np.nanmax(ability)
        )
    fig = go.Figure(
        go.Scatter(
            x=rounded(table[x], 2),
            y=rounded(table[y], 2),
            error_x=interval(
                table, x, color=GREY
            ),  # without it black, as the markers have many colours
            error_y=interval(table, y, color=GREY),
            mode="markers+text",
            marker=marker,
            text=[label(name) for name in names],
            textfont=HALO,
            textposition=[
                "top left" if v > np.nanmax(table[x]) / 2 else "top right" for v in table[x]
            ],
            hovertext=[
                "<br>".join(
                    [text(name), *(f"{text(c)}: {row[c]:.1f} {text(unit)}" for c in (x, y, color))]
                )
                for name, (_, row) in zip(names, table.iterrows(), strict=True)
            ],
            hoverinfo="text",
            cliponaxis=False,
            showlegend=False,
        )
    )
    fig.update_xaxes(title_text=f"{text(x)} ({text(unit)})", rangemode="tozero")
    fig.update_yaxes(title_text=f"{text(y)} ({text(unit)})", rangemode="tozero")
    return finish(fig, title, note, right=130)


def _benchmark_hover(part: pd.DataFrame, labels: pd.Series) -> list[str]:
    extra = [c for c in ("n_queries", "n_samples", "judge") if c in part]
    return [
        text(f"{line}: {row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}], {row['model']}")
        + "".join(f"<br>{c}: {text(row[c])}" for c in extra)
        for line, (_, row) in zip(labels, part.iterrows(), strict=True)
    ]
