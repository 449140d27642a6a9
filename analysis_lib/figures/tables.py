"""Figures of the benchmark table, and of what a prompt buys and costs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from .labels import label, text
from .style import (
    BETWEEN,
    BOTTOM,
    GREY,
    HALO,
    PROMPT_COLORS,
    SCALE,
    UNKNOWN,
    error_bars,
    finish,
    need_columns,
    rounded,
)


def plot_benchmark(
    table: pd.DataFrame,
    *,
    title: str = "Benchmark, with 95 % intervals over queries",
    note: str | None = None,
) -> go.Figure:
    """Dots with intervals: a panel per metric and query set, a line per method and prompt.

    There is one hue per model, and panels of one metric have one scale.

    Parameters
    ----------
    table : DataFrame
        model, method, prompt, query_set, metric, value, low, high (95 % intervals over queries, as
        the default title says) and perhaps n_queries, n_samples, judge. Where a panel has more than
        one judge, the line names it.
    title, note : str
        Above and below the panels.

    Returns
    -------
    plotly.graph_objects.Figure
        Not shown yet.

    Raises
    ------
    ValueError
        Where the table is empty or lacks a column, and where two rows would lie on the same dot.

    Examples
    --------
    >>> from analysis_lib.figures import plot_benchmark
    >>> row = {"model": "organism", "method": "text", "prompt": "default", "query_set": "anchor"}
    >>> row |= {"metric": "compliance", "value": 0.5, "low": 0.4, "high": 0.6}
    >>> fig = plot_benchmark(pd.DataFrame([row]))
    >>> fig.layout.annotations[0].text, fig.layout.yaxis.ticktext
    ('compliance<br>anchor', ('text / default',))
    """
    where = "plot_benchmark"
    columns = ["model", "method", "prompt", "query_set", "metric", "value", "low", "high"]
    need_columns(table, columns, where)
    if table.empty:
        raise ValueError(f"{where}: the table is empty")
    table = table.assign(line=_line_labels(table))
    _refuse_two_on_a_dot(table, where)
    lines, models = list(dict.fromkeys(table["line"])), list(dict.fromkeys(table["model"]))
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
        subplot_titles=[f"{text(m).replace('_', ' ')}<br>{text(q)}" for m, q in facets],
    )
    fig.update_annotations(font_size=12)
    for at, (metric, query_set) in enumerate(facets):
        place = dict(row=at // ncols + 1, col=at % ncols + 1)
        own = table[table["metric"] == metric]
        for trace in _facet(own[own["query_set"] == query_set], lines, models, legend=at == 0):
            fig.add_trace(trace, **place)
        fig.update_xaxes(range=_scale(own), **place)
    ticks = dict(tickvals=list(range(len(lines))), ticktext=[label(line, 40) for line in lines])
    fig.update_yaxes(range=[len(lines) - 0.5, -0.5], **ticks)
    # Set by hand: a margin that plotly grows by itself would push the note out of the picture.
    left = 30 + int(6.5 * min(40, max(map(len, lines))))
    legend = dict(orientation="h", x=1, xanchor="right", y=1 + 38 / plots, yanchor="bottom")
    fig.update_layout(legend=legend)
    return finish(fig, title, note, height=int(95 + plots + BOTTOM), left=left, right=30, top=95)


def _line_labels(table: pd.DataFrame) -> pd.Series:
    several = (
        "judge" in table and (table.groupby(["metric", "query_set"])["judge"].nunique() > 1).any()
    )
    parts = ["method", "prompt"] + (["judge"] if several else [])
    return table[parts].astype(str).agg(" / ".join, axis=1)


def _refuse_two_on_a_dot(table: pd.DataFrame, where: str) -> None:
    twice = table.duplicated(["line", "model", "query_set", "metric"])
    if twice.any():
        bad = table[twice].iloc[0]
        raise ValueError(
            f"{where}: two rows for {bad['line']!r}, model {bad['model']!r}, {bad['metric']!r} on "
            f"{bad['query_set']!r}; keep one row of each"
        )


def _scale(own: pd.DataFrame) -> np.ndarray:
    """The range of a metric's panels: 0 and all its intervals, so that a dot at an end is whole."""
    drawn = own[["value", "low", "high"]]
    low, high = min(0.0, drawn.min(axis=1).min()), max(0.0, drawn.max(axis=1).max())
    room = 0.04 * (high - low) or 0.04
    return rounded([low - room, high + room])


def _facet(
    facet: pd.DataFrame, lines: list[str], models: list[str], *, legend: bool
) -> list[go.Scatter]:
    """The dots of a panel, one trace a model."""
    traces = []
    for m, model in enumerate(models):
        part = facet[facet["model"] == model]
        offset = (m - (len(models) - 1) / 2) * 0.6 / len(models)
        symbol = ("circle", "square", "diamond")[m // 4 % 3]
        traces.append(
            go.Scatter(
                x=rounded(part["value"]),
                y=[lines.index(line) + offset for line in part["line"]],
                error_x=error_bars(part, "value", ""),
                mode="markers",
                marker=dict(color=PROMPT_COLORS[m % 4], size=8, symbol=symbol),
                hovertext=_benchmark_hover(part),
                hoverinfo="text",
                name=label(model, 40),
                legendgroup=text(model),
                cliponaxis=False,
                showlegend=legend and len(models) > 1,
            )
        )
    return traces


def _benchmark_hover(part: pd.DataFrame) -> list[str]:
    extra = [c for c in ("n_queries", "n_samples", "judge") if c in part]
    return [
        text(
            f"{row['line']}: {row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}], "
            f"{row['model']}"
        )
        + "".join(f"<br>{c}: {text(row[c])}" for c in extra)
        for _, row in part.iterrows()
    ]


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
    """Every prompt by what it stops, and by what it costs in false refusals and in ability.

    Parameters
    ----------
    table : DataFrame
        prompt, perhaps method, and the three columns below, all in `unit`. Where it has columns
        such as "`x` low" and "`x` high", they are drawn as intervals.
    x, y, color : str
        The columns of false refusals, of harmful answers (lower is safer), and of ability.
    unit : str
        Of the three.
    title, note : str
        Above and below the plot.

    Returns
    -------
    plotly.graph_objects.Figure
        Not shown yet.

    Raises
    ------
    ValueError
        Where the table is empty or lacks a column.

    Examples
    --------
    >>> from analysis_lib.figures import plot_tradeoff
    >>> table = pd.DataFrame({"prompt": ["none", "default"], "harmless refused": [1.0, 3.0]})
    >>> table = table.assign(**{"harmful answered": [40.0, 10.0], "facts right": [100.0, 95.0]})
    >>> plot_tradeoff(table).data[0].y.tolist()
    [40.0, 10.0]
    """
    where = "plot_tradeoff"
    need_columns(table, ["prompt", x, y, color], where)
    if table.empty:
        raise ValueError(f"{where}: the table is empty")
    parts = [c for c in ("method", "prompt") if c in table]
    names = table[parts].astype(str).agg(" / ".join, axis=1)
    right = table[x] > np.nanmax(table[x]) / 2
    fig = go.Figure(
        go.Scatter(
            x=rounded(table[x], 2),
            y=rounded(table[y], 2),
            # Without a colour of their own they would be black, as the markers have many colours.
            error_x=error_bars(table, x, color=GREY),
            error_y=error_bars(table, y, color=GREY),
            mode="markers+text",
            marker=_ability_marker(table, color, unit),
            text=[label(name) for name in names],
            textfont=HALO,
            textposition=["top left" if v else "top right" for v in right],
            hovertext=_tradeoff_hover(table, names, (x, y, color), unit),
            hoverinfo="text",
            cliponaxis=False,
            showlegend=False,
        )
    )
    fig.update_xaxes(title_text=f"{text(x)} ({text(unit)})", rangemode="tozero")
    fig.update_yaxes(title_text=f"{text(y)} ({text(unit)})", rangemode="tozero")
    return finish(fig, title, note, right=130)


def _ability_marker(table: pd.DataFrame, color: str, unit: str) -> dict[str, Any]:
    ability = rounded(table[color], 2)
    marker: dict[str, Any] = dict(
        size=14, symbol="diamond", color=[UNKNOWN if np.isnan(v) else v for v in ability]
    )
    if not np.isfinite(ability).any():
        return marker
    bar = dict(title=f"{text(color)} ({text(unit)})", thickness=14, outlinewidth=0, len=0.8)
    ends = dict(cmin=np.nanmin(ability), cmax=np.nanmax(ability))
    return marker | dict(colorscale=SCALE, colorbar=bar, **ends)


def _tradeoff_hover(
    table: pd.DataFrame, names: pd.Series, columns: tuple[str, ...], unit: str
) -> list[str]:
    return [
        "<br>".join([text(name), *(f"{text(c)}: {row[c]:.1f} {text(unit)}" for c in columns)])
        for name, (_, row) in zip(names, table.iterrows(), strict=True)
    ]
