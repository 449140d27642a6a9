"""Figures of how well a direction predicts refusal, observed or true."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from .labels import class_names, counted, hover_texts, label, text
from .style import GREY, OPACITY, PROMPT_COLORS, finish, need_columns, prompt_style, rounded

AXIS_TITLES = {
    "predicted": "predicted probability of refusal",
    "projection": "projection on the refusal direction (units of the hidden space)",
}


def plot_calibration(
    table: pd.DataFrame,
    *,
    x: str = "predicted",
    bins: int = 10,
    title: str = "Predicted and observed refusal",
    note: str | None = None,
) -> go.Figure:
    """Observed refusal rate against the predicted probability, or against what predicts it.

    Every row is a point. A line joins the means of equal bins of the predicted probability, and
    another one shows the prediction.

    Parameters
    ----------
    table : DataFrame
        predicted, observed (both in [0, 1]), perhaps query_id, prompt, text.
    x : str
        "predicted", or a column that the prediction is a function of, such as "projection" (on the
        refusal direction, in units of the hidden space).
    bins : int
        How many.
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
    >>> from analysis_lib.figures import plot_calibration
    >>> fig = plot_calibration(pd.DataFrame({"predicted": [0.1, 0.9], "observed": [0.0, 1.0]}))
    >>> [trace.name for trace in fig.data]
    ['perfectly calibrated', 'query under a prompt', 'mean of a bin (of 10)']
    """
    need_columns(table, ["predicted", "observed", x], "plot_calibration")
    table = table.dropna(subset=["predicted", "observed", x]).sort_values(x, kind="stable")
    fig = go.Figure()
    if x == "predicted":
        fig.add_trace(_diagonal(0, 1, "perfectly calibrated"))
    else:
        fig.add_trace(_prediction(table, x))
    fig.add_trace(
        go.Scatter(
            x=rounded(table[x]),
            y=rounded(table["observed"]),
            mode="markers",
            marker=dict(color=PROMPT_COLORS[1], size=5, symbol="circle-open", opacity=OPACITY),
            hovertext=hover_texts(table),
            hoverinfo="text+x+y",
            name="query under a prompt",
        )
    )
    fig.add_trace(_bin_means(table, x, bins))
    fig.update_xaxes(
        title_text=AXIS_TITLES.get(x, text(x).replace("_", " ")),
        range=[-0.03, 1.03] if x == "predicted" else None,
    )
    fig.update_yaxes(title_text="observed refusal rate", range=[-0.03, 1.03])
    return finish(fig, title, note, width=720)


def _prediction(table: pd.DataFrame, x: str) -> go.Scatter:
    """The curve of the prediction, through at most 200 rows."""
    some = table
    if len(table):
        some = table.iloc[np.unique(np.linspace(0, len(table) - 1, 200).astype(int))]
    return go.Scatter(
        x=rounded(some[x]),
        y=rounded(some["predicted"]),
        mode="lines",
        line=dict(color=GREY, dash="dash"),
        hoverinfo="skip",
    ).update(name="predicted probability")


def _bin_means(table: pd.DataFrame, x: str, bins: int) -> go.Scatter:
    which = np.clip((table["predicted"].to_numpy(float) * bins).astype(int), 0, bins - 1)
    binned = table[list(dict.fromkeys([x, "observed"]))].groupby(which).agg(["mean", "size"])
    return go.Scatter(
        x=rounded(binned[x, "mean"]),
        y=rounded(binned["observed", "mean"]),
        mode="lines+markers",
        marker=dict(color=PROMPT_COLORS[3], size=10),
        line=dict(color=PROMPT_COLORS[3], width=2),
        hovertext=[
            f"mean of {counted(m, 'point', 'points')}"
            for m in binned["observed", "size"].to_numpy()
        ],
        hoverinfo="text+x+y",
        name=f"mean of a bin (of {bins})",
    )


def plot_truth(
    table: pd.DataFrame, *, title: str = "Predicted and true refusal logit", note: str | None = None
) -> go.Figure:
    """Predicted logit against the true one, known for the embedded model only.

    Parameters
    ----------
    table : DataFrame
        predicted_logit, true_logit, and perhaps query_id, prompt, harmful, text.
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
    >>> from analysis_lib.figures import plot_truth
    >>> table = pd.DataFrame({"predicted_logit": [-1.0, 2.0], "true_logit": [-1.5, 1.0]})
    >>> [trace.name for trace in plot_truth(table).data]
    ['equal', 'query']
    """
    need_columns(table, ["predicted_logit", "true_logit"], "plot_truth")
    fig = go.Figure()
    both = table[["predicted_logit", "true_logit"]].to_numpy(float)
    both = both[np.isfinite(both).all(axis=1)]
    if len(both):
        fig.add_trace(_diagonal(float(both.min()), float(both.max()), "equal"))
    classes = class_names(table) if "harmful" in table else pd.Series("query", index=table.index)
    prompts = table["prompt"] if "prompt" in table else pd.Series("", index=table.index)
    names = list(dict.fromkeys(prompts))
    for name in names:
        hue, symbols = prompt_style(names, name)
        for cls in dict.fromkeys(classes):
            part = table[(prompts == name) & (classes == cls)]
            if part.empty:
                continue
            symbol = symbols.get(cls, "circle")
            fig.add_trace(
                go.Scatter(
                    x=rounded(part["true_logit"]),
                    y=rounded(part["predicted_logit"]),
                    mode="markers",
                    marker=dict(color=hue, symbol=symbol, size=7, opacity=OPACITY),
                    hovertext=hover_texts(part),
                    hoverinfo="text+x+y",
                    name=label(", ".join(filter(None, [cls, str(name)]))),
                )
            )
    fig.update_xaxes(title_text="true logit of refusal")
    fig.update_yaxes(title_text="predicted logit of refusal")
    return finish(fig, title, note, width=720)


def _diagonal(low: float, high: float, name: str) -> go.Scatter:
    ends = rounded([low, high])
    return go.Scatter(
        x=ends,
        y=ends,
        mode="lines",
        line=dict(color=GREY, dash="dash"),
        hoverinfo="skip",
        name=name,
    )
