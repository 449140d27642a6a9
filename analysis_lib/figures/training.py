"""Figures of a training: its losses, and where the soft prompt ends up."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from .labels import label, text
from .style import PROMPT_COLORS, finish, need_columns, rounded


def plot_losses(
    history: pd.DataFrame, *, title: str = "Losses by step", note: str | None = None
) -> go.Figure:
    """One panel per numeric column of a training history, against its step.

    Parameters
    ----------
    history : DataFrame
        step, and columns such as loss, refusal, harmfulness, norm; see `SoftPrompt.history`.
    title, note : str
        Above and below the panels.

    Returns
    -------
    plotly.graph_objects.Figure
        Not shown yet.

    Raises
    ------
    ValueError
        Where there is no step, or no loss.

    Examples
    --------
    >>> from analysis_lib.figures import plot_losses
    >>> fig = plot_losses(pd.DataFrame({"step": [0, 1], "loss": [2.0, 1.0], "norm": [0.0, 0.5]}))
    >>> [trace.name for trace in fig.data]
    ['loss', 'norm']
    """
    need_columns(history, ["step"], "plot_losses")
    columns = [
        c
        for c in history.columns
        if c not in ("step", "epoch") and pd.api.types.is_numeric_dtype(history[c])
    ]
    if not columns or history.empty:
        raise ValueError(
            "plot_losses: no losses to draw; pass a SoftPrompt's .history with one row per step"
        )
    ncols = min(2, len(columns))
    nrows = -(-len(columns) // ncols)
    titles = [text(c) for c in columns]
    fig = make_subplots(
        rows=nrows, cols=ncols, shared_xaxes=True, subplot_titles=titles, vertical_spacing=0.14
    )
    for at, column in enumerate(columns):
        row, col = at // ncols + 1, at % ncols + 1
        line = dict(color=PROMPT_COLORS[at % 4], width=2)
        trace = go.Scatter(
            x=rounded(history["step"]),
            y=rounded(history[column], 6),
            mode="lines",
            line=line,
            name=titles[at],
        )
        fig.add_trace(trace, row=row, col=col)
        if at + ncols >= len(columns):
            fig.update_xaxes(title_text="step", showticklabels=True, row=row, col=col)
    fig.update_layout(showlegend=False)
    return finish(fig, title, note, height=180 + 170 * nrows, right=30, top=85)


def plot_nearest_tokens(
    table: pd.DataFrame,
    *,
    title: str = "The vocabulary tokens nearest to the soft prompt",
    note: str | None = None,
) -> go.Figure:
    """The cosine of each soft embedding with its nearest vocabulary token, by position.

    The token is written where it is not the text prompt's own.

    Parameters
    ----------
    table : DataFrame
        One row per position in order: start (the text prompt's token), nearest, cosine.
    title, note : str
        Above and below the plot.

    Returns
    -------
    plotly.graph_objects.Figure
        Not shown yet.

    Raises
    ------
    ValueError
        Where the table lacks a column.

    Examples
    --------
    >>> from analysis_lib.figures import plot_nearest_tokens
    >>> table = pd.DataFrame({"start": ["a", "b"], "nearest": ["a", "c"], "cosine": [0.9, 0.5]})
    >>> [trace.name for trace in plot_nearest_tokens(table).data]
    ['its own token (1)', 'another token (1)']
    """
    need_columns(table, ["start", "nearest", "cosine"], "plot_nearest_tokens")
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
                y=rounded(part["cosine"]),
                mode="markers+text" if name == "another token" else "markers",
                marker=dict(color=hue, symbol=symbol, size=9),
                text=[label(repr(t)) for t in part["nearest"]],
                textposition="bottom center",
                hovertext=_token_hover(position[keep], part),
                hoverinfo="text",
                name=f"{name} ({len(part)})",
            )
        )
    fig.update_layout(showlegend=True)  # with one kind alone, too: it says which
    fig.update_xaxes(title_text="position in the safety prompt")
    fig.update_yaxes(title_text="cosine with the nearest token's embedding")
    return finish(fig, title, note, height=420)


def _token_hover(position: np.ndarray, part: pd.DataFrame) -> list[str]:
    rows = zip(position, part["start"], part["nearest"], part["cosine"], strict=True)
    return [
        f"position {at}<br>start: {text(repr(start))}<br>nearest: {text(repr(nearest))}"
        f"<br>cosine: {cosine:.3f}"
        for at, start, nearest, cosine in rows
    ]
