"""Figures of refusal rates, of shifts, and of how well the classes separate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from .labels import class_names, counted, hover_texts, label, text
from .style import (
    CLASSES,
    GREY,
    OPACITY,
    PROMPT_COLORS,
    error_bars,
    finish,
    need_columns,
    prompt_style,
    rounded,
)


def plot_rates(
    rates: pd.DataFrame,
    queries: pd.DataFrame,
    *,
    title: str = "Refusal rates",
    note: str | None = None,
) -> go.Figure:
    """Refusal rates by prompt and class.

    Every query is a point, spread sideways to be seen, and the mean is a bar.

    Parameters
    ----------
    rates : DataFrame
        query_id, prompt, refusal_rate in [0, 1]; rows without a rate are left out.
    queries : DataFrame
        query_id, harmful and perhaps text.
    title, note : str
        Above and below the plot.

    Returns
    -------
    plotly.graph_objects.Figure
        Not shown yet.

    Raises
    ------
    ValueError
        Where a table lacks a column, and where a rated query is not among the queries.

    Examples
    --------
    >>> from analysis_lib.figures import plot_rates
    >>> rates = pd.DataFrame({"query_id": ["a", "b"], "prompt": "none", "refusal_rate": [0.9, 0.1]})
    >>> queries = pd.DataFrame({"query_id": ["a", "b"], "harmful": [True, False]})
    >>> [trace.name for trace in plot_rates(rates, queries).data]
    ['harmless, none', 'mean', 'harmful, none', 'mean']
    """
    where = "plot_rates"
    need_columns(rates, ["query_id", "prompt", "refusal_rate"], where)
    need_columns(queries, ["query_id", "harmful"], where)
    if unknown := sorted(set(rates["query_id"].astype(str)) - set(queries["query_id"].astype(str))):
        raise ValueError(
            f"{where}: {len(unknown)} rated queries are not among the queries, "
            f"such as {unknown[0]!r}"
        )
    about = queries[[c for c in ("query_id", "harmful", "text") if c in queries]]
    known = [c for c in about.columns if c != "query_id"]
    table = rates.drop(columns=known, errors="ignore").merge(
        about, on="query_id", how="left", validate="m:1"
    )
    table = table.dropna(subset=["refusal_rate"])
    fig = go.Figure()
    _add_strips(fig, table, "refusal_rate", list(dict.fromkeys(rates["prompt"])))
    fig.update_yaxes(title_text="refusal rate", range=[-0.04, 1.04])
    return finish(fig, title, note)


def plot_shifts(
    shifts: pd.DataFrame,
    *,
    axis: str = "shift of the refusal logit",
    prompts: Sequence[str] | None = None,
    title: str = "How far each query moves",
    note: str | None = None,
) -> go.Figure:
    """How far each query moves, by prompt and class.

    Every query is a point, the mean is a bar, and no shift is a line.

    Parameters
    ----------
    shifts : DataFrame
        query_id, prompt, harmful, shift (in the unit that `axis` names), perhaps text.
    axis : str
        Title of the axis.
    prompts : sequence of str or None
        Names in the order of their colours, where other figures show prompts that this one does
        not; by default those of `shifts`.
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
    >>> from analysis_lib.figures import plot_shifts
    >>> shifts = pd.DataFrame({"query_id": ["a", "b"], "prompt": "short", "harmful": True})
    >>> len(plot_shifts(shifts.assign(shift=[0.5, 1.5])).data)
    2
    """
    need_columns(shifts, ["query_id", "prompt", "harmful", "shift"], "plot_shifts")
    fig = go.Figure()
    known, names = shifts.dropna(subset=["shift"]), list(dict.fromkeys(shifts["prompt"]))
    _add_strips(fig, known, "shift", names, prompts)
    fig.add_hline(y=0, line=dict(color=GREY, width=1, dash="dash"))
    fig.update_yaxes(title_text=text(axis))
    return finish(fig, title, note)


def plot_separation(
    table: pd.DataFrame,
    *,
    title: str = "Separation of harmful and harmless queries",
    note: str | None = None,
) -> go.Figure:
    """Accuracy of telling harmful from harmless queries, by layer or by prompt.

    Parameters
    ----------
    table : DataFrame
        accuracy in [0, 1], layer and/or prompt, perhaps low, high. With layers there is one line a
        prompt; layer -1, the state after the final norm, stands last.
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
    >>> from analysis_lib.figures import plot_separation
    >>> fig = plot_separation(pd.DataFrame({"layer": [-1, 0, 1], "accuracy": [0.9, 0.5, 0.8]}))
    >>> fig.data[0].y.tolist()
    [0.5, 0.8, 0.9]
    """
    where = "plot_separation"
    need_columns(table, ["accuracy"], where)
    by_layer = "layer" in table
    if not by_layer:
        need_columns(table, ["prompt"], where)
    names = list(dict.fromkeys(table["prompt"])) if "prompt" in table else [""]
    keys: list[Any] = sorted(set(table["layer"]), key=lambda i: (i < 0, i)) if by_layer else names
    fig = go.Figure()
    for at, name in enumerate(names if by_layer else [None]):
        part = table[table["prompt"] == name] if by_layer and "prompt" in table else table
        places = [keys.index(k) for k in part["layer" if by_layer else "prompt"]]
        x = pd.Series(places, index=part.index).sort_values()
        part = part.loc[x.index]
        hue = PROMPT_COLORS[at % len(PROMPT_COLORS)]
        fig.add_trace(
            go.Scatter(
                x=x.to_numpy(),
                y=rounded(part["accuracy"]),
                error_y=error_bars(part, "accuracy", ""),
                mode="lines+markers" if by_layer else "markers",
                line=dict(color=hue, width=2),
                marker=dict(color=hue, size=8, symbol=("circle", "square", "diamond")[at // 4 % 3]),
                name=label(name if by_layer else "accuracy"),
                showlegend=by_layer and len(names) > 1,
            )
        )
    labels = ["-1<br>(final norm)" if by_layer and k == -1 else label(k) for k in keys]
    fig.update_xaxes(
        tickvals=list(range(len(keys))),
        ticktext=labels,
        title_text="layer" if by_layer else "safety prompt",
    )
    fig.update_yaxes(title_text="accuracy")
    return finish(fig, title, note)


def _add_strips(
    fig: go.Figure,
    table: pd.DataFrame,
    column: str,
    names: Sequence[str],
    hues: Sequence[str] | None = None,
) -> None:
    """Add `column` of every row over its prompt and class, with a bar at the mean."""
    classes = class_names(table)
    present = [c for c in CLASSES if (classes == c).any()]
    for name in names:
        hue, symbols = prompt_style(list(dict.fromkeys([*(hues or ()), *names])), name)
        for cls in present:
            part = table[(table["prompt"] == name) & (classes == cls)]
            if part.empty:
                continue
            aside = (present.index(cls) - (len(present) - 1) / 2) * 0.8 / len(present)
            centre, half = names.index(name) + aside, 0.3 / len(present)
            # The golden ratio spreads them evenly, and the same each time.
            spread = (np.arange(len(part)) * 0.618034) % 1 * 2 - 1
            fig.add_trace(
                go.Scatter(
                    x=np.round(centre + half * spread, 4),
                    y=rounded(part[column]),
                    mode="markers",
                    marker=dict(color=hue, symbol=symbols[cls], size=6, opacity=OPACITY),
                    hovertext=hover_texts(part),
                    hoverinfo="text" if column == "refusal_rate" else "text+y",
                    name=label(f"{cls}, {name}"),
                )
            )
            mean = round(float(part[column].mean()), 4)
            n = counted(len(part), f"{cls} query", f"{cls} queries")
            told = f"mean of {n}, prompt {name}: {mean:.3f}"
            first = not any(t.name == "mean" for t in fig.data)
            fig.add_trace(_mean_bar(centre, half * 1.2, mean, told, legend=first))
    fig.update_xaxes(
        tickvals=list(range(len(names))),
        ticktext=[label(n) for n in names],
        title_text="safety prompt",
    )


def _mean_bar(centre: float, half: float, mean: float, told: str, *, legend: bool) -> go.Scatter:
    return go.Scatter(
        x=[round(centre - half, 4), round(centre + half, 4)],
        y=[mean, mean],
        mode="lines",
        line=dict(color=GREY, width=4),
        hovertext=text(told),
        hoverinfo="text",
        name="mean",
        legendgroup="mean",
        legendrank=2000,  # last
        showlegend=legend,
    )
