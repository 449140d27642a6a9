"""Dots with intervals by model, with a slider over metrics that needs no kernel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from .labels import label, text
from .style import GREY, PROMPT_COLORS, finish, need_columns, rounded

KEYS = ["query_set", "method", "prompt", "model", "metric"]
SLIDER = 100  # pixels below the axes


@dataclass(frozen=True)
class _Dots:
    """The table as arrays of shape (metrics, traces, models); a trace is a panel's condition."""

    metrics: list[str]
    panels: list[str]
    conditions: list[tuple[str, str]]
    models: list[str]
    value: np.ndarray
    low: np.ndarray
    high: np.ndarray

    @property
    def more(self) -> np.ndarray:
        return np.round(self.high - self.value, 4)

    @property
    def less(self) -> np.ndarray:
        return np.round(self.value - self.low, 4)


def plot_by_model(
    table: pd.DataFrame,
    *,
    start: str | None = None,
    axis: str = "",
    title: str = "Models and their average, with 95 % intervals",
    note: str | None = None,
) -> go.Figure:
    """Dots with intervals: a panel per query set, a line per model, a hue per method and prompt.

    Parameters
    ----------
    table : DataFrame
        model, method, prompt, query_set, metric, value, low, high, one row of each.
    start : str or None
        The metric at which the slider begins; by default the first. The slider is there where
        metrics are several.
    axis : str
        What the values are.
    title, note : str
        Above and below the panels.

    Returns
    -------
    plotly.graph_objects.Figure
        Not shown yet.

    Raises
    ------
    ValueError
        For a repeated or missing row, an unknown metric, and more conditions than hues.

    Examples
    --------
    >>> from analysis_lib.figures import plot_by_model
    >>> row = {"method": "text", "prompt": "default", "query_set": "anchor", "metric": "mean"}
    >>> row |= {"value": 0.5, "low": 0.4, "high": 0.6}
    >>> fig = plot_by_model(pd.DataFrame([row | {"model": "A"}, row | {"model": "B"}]))
    >>> fig.layout.yaxis.ticktext
    ('A', 'B')
    """
    dots = _dots(table, start, "plot_by_model")
    at = 0 if start is None else dots.metrics.index(start)
    fig = make_subplots(
        cols=len(dots.panels),
        shared_yaxes=True,
        horizontal_spacing=0.03,
        subplot_titles=[text(p) for p in dots.panels],
    )
    each = len(dots.conditions)
    for i in range(len(dots.panels) * each):
        fig.add_trace(_trace(dots, at, i), row=1, col=i // each + 1)
    for col in range(len(dots.panels)):
        part = slice(col * each, (col + 1) * each)
        ends = rounded([min(0, dots.low[:, part].min()), max(0, dots.high[:, part].max())])
        scale = [1.04 * ends[0] - 0.02 * ends[1], 1.04 * ends[1] - 0.02 * ends[0]]
        fig.update_xaxes(range=scale, row=1, col=col + 1)
    fig.update_yaxes(
        range=[len(dots.models) - 0.5, -0.5],
        tickvals=list(range(len(dots.models))),
        ticktext=[label(m, 40) for m in dots.models],
    )
    fig.update_xaxes(title_text=text(axis), row=1, col=1 + len(dots.panels) // 2)
    fig.update_layout(legend=dict(orientation="h", x=1, xanchor="right", y=1.07, yanchor="bottom"))
    height = 170 + 52 * len(dots.models)
    left = 30 + int(6.5 * min(40, max(map(len, dots.models))))
    fig = finish(fig, title, note, height=height, left=left, right=30, top=110)
    if len(dots.metrics) > 1:
        _add_slider(fig, dots, at)
    return fig


def _dots(table: pd.DataFrame, start: str | None, where: str) -> _Dots:
    """The table as arrays, checked for one row of each."""
    need_columns(table, [*KEYS, "value", "low", "high"], where)
    metrics, models, panels = (
        list(dict.fromkeys(table[column])) for column in ("metric", "model", "query_set")
    )
    conditions = list(dict.fromkeys(zip(table["method"], table["prompt"], strict=True)))
    if start not in (None, *metrics) or len(conditions) > len(PROMPT_COLORS):
        raise ValueError(
            f"{where}: start {start!r} must be one of {metrics}, "
            f"and conditions at most {len(PROMPT_COLORS)}: {conditions}"
        )
    cells = [(p, *c) for p in panels for c in conditions]
    lines = pd.MultiIndex.from_tuples(
        [(*cell, m, metric) for cell in cells for m in models for metric in metrics], names=KEYS
    )
    if table.duplicated(KEYS).any() or len(table) != len(lines):
        raise ValueError(
            f"{where}: {len(table)} rows for {len(lines)} dots; "
            "give one row for each model, condition, set and metric"
        )
    rows = table.set_index(KEYS)[["value", "low", "high"]].reindex(lines).to_numpy()
    shape = (len(cells), len(models), len(metrics), 3)
    value, low, high = rounded(rows).reshape(shape).transpose(3, 2, 0, 1)
    return _Dots(metrics, panels, conditions, models, value, low, high)


def _trace(dots: _Dots, at: int, i: int) -> go.Scatter:
    """The dots of a panel's condition, at one metric."""
    n, each = len(dots.models), len(dots.conditions)
    place = i % each
    name = " / ".join(dict.fromkeys(map(str, dots.conditions[place])))
    return go.Scatter(
        x=dots.value[at, i],
        y=np.round(np.arange(n) + (place - (each - 1) / 2) * 0.7 / each, 4),
        error_x=dict(
            type="data",
            symmetric=False,
            array=dots.more[at, i],
            arrayminus=dots.less[at, i],
            thickness=1.5,
            width=2,
        ),
        mode="markers",
        marker=dict(
            color=PROMPT_COLORS[place],
            size=7,
            symbol=("circle", "square", "diamond", "cross")[place],
        ),
        text=[text(f"{model}, {name}") for model in dots.models],
        hovertemplate="%{text}: %{x:.3f}<extra></extra>",
        name=label(name, 40),
        legendgroup=str(place),
        showlegend=i < each,
    )


def _add_slider(fig: go.Figure, dots: _Dots, at: int) -> None:
    """Add a slider over the metrics, in a room of its own above the note."""
    fig.update_layout(
        height=fig.layout.height + SLIDER,
        margin_b=fig.layout.margin.b + SLIDER,
        sliders=[
            dict(
                active=at,
                steps=_steps(dots),
                bgcolor=GREY,
                pad=dict(t=50),
                currentvalue=dict(prefix="metric: "),
                len=0.95,
                x=0,
            )
        ],
    )
    for note_line in fig.select_annotations(dict(name="note")):
        note_line.yshift -= SLIDER


def _steps(dots: _Dots) -> Sequence[dict[str, Any]]:
    return [
        dict(
            method="restyle",
            label=label(metric),
            args=[
                {
                    "x": dots.value[m].tolist(),
                    "error_x.array": dots.more[m].tolist(),
                    "error_x.arrayminus": dots.less[m].tolist(),
                }
            ],
        )
        for m, metric in enumerate(dots.metrics)
    ]
