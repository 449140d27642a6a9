"""DOC analysis_lib.figures.rates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from .style import (
    CLASSES,
    GREY,
    OPACITY,
    PROMPT_COLORS,
    class_names,
    finish,
    hover_lines,
    interval,
    label,
    need,
    prompt_style,
    rounded,
    text,
)


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
    need(table, ["predicted", "observed", x], "plot_calibration")
    table = table.dropna(subset=["predicted", "observed", x]).sort_values(x, kind="stable")
    which = np.clip((table["predicted"].to_numpy(float) * bins).astype(int), 0, bins - 1)
    binned = table[list(dict.fromkeys([x, "observed"]))].groupby(which).agg(["mean", "size"])
    n = binned["observed", "size"].to_numpy()
    fig = go.Figure()
    if x == "predicted":
        fig.add_trace(_diagonal(0, 1, "perfectly calibrated"))
    else:
        some = (
            table.iloc[np.unique(np.linspace(0, len(table) - 1, 200).astype(int))]
            if len(table)
            else table
        )
        line = dict(color=GREY, dash="dash")
        curve = go.Scatter(
            x=rounded(some[x]),
            y=rounded(some["predicted"]),
            mode="lines",
            line=line,
            hoverinfo="skip",
        )
        fig.add_trace(curve.update(name="predicted probability"))
    fig.add_trace(
        go.Scatter(
            x=rounded(table[x]),
            y=rounded(table["observed"]),
            mode="markers",
            marker=dict(color=PROMPT_COLORS[1], size=5, symbol="circle-open", opacity=OPACITY),
            hovertext=hover_lines(table),
            hoverinfo="text+x+y",
            name="query under a prompt",
        )
    )
    fig.add_trace(
        go.Scatter(
            x=rounded(binned[x, "mean"]),
            y=rounded(binned["observed", "mean"]),
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
    fig.update_xaxes(
        title_text=titles.get(x, text(x).replace("_", " ")),
        range=[-0.03, 1.03] if x == "predicted" else None,
    )
    fig.update_yaxes(title_text="observed refusal rate", range=[-0.03, 1.03])
    return finish(fig, title, note, width=720)


def plot_truth(
    table: pd.DataFrame, *, title: str = "Predicted and true refusal logit", note: str | None = None
) -> go.Figure:
    """Predicted logit against the true one, known for the embedded model only.

    table: predicted_logit, true_logit, and perhaps query_id, prompt, harmful, text.
    """
    need(table, ["predicted_logit", "true_logit"], "plot_truth")
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
                hue, symbols = prompt_style(names, name)
                fig.add_trace(
                    go.Scatter(
                        x=rounded(part["true_logit"]),
                        y=rounded(part["predicted_logit"]),
                        mode="markers",
                        marker=dict(
                            color=hue, symbol=symbols.get(cls, "circle"), size=7, opacity=OPACITY
                        ),
                        hovertext=hover_lines(part),
                        hoverinfo="text+x+y",
                        name=label(", ".join(filter(None, [cls, str(name)]))),
                    )
                )
    fig.update_xaxes(title_text="true logit of refusal")
    fig.update_yaxes(title_text="predicted logit of refusal")
    return finish(fig, title, note, width=720)


def plot_rates(
    rates: pd.DataFrame,
    queries: pd.DataFrame,
    *,
    title: str = "Refusal rates",
    note: str | None = None,
) -> go.Figure:
    """Refusal rates by prompt and class: every query as a point (spread sideways to be seen) and the mean as a bar.

    rates: query_id, prompt, refusal_rate; queries: query_id, harmful and perhaps text.
    """
    where = "plot_rates"
    need(rates, ["query_id", "prompt", "refusal_rate"], where)
    need(queries, ["query_id", "harmful"], where)
    if unknown := sorted(set(rates["query_id"].astype(str)) - set(queries["query_id"].astype(str))):
        raise ValueError(
            f"{where}: {len(unknown)} rated queries are not among the queries, such as {unknown[0]!r}"
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
    """The distribution of per-query shifts by prompt and class: every query as a point, the mean as a bar, and no shift as a line.

    shifts: query_id, prompt, harmful, shift (in the unit that `axis` names), perhaps text. prompts: names in the order of
    their colours, where other figures show prompts that this one does not; by default those of `shifts`.
    """
    need(shifts, ["query_id", "prompt", "harmful", "shift"], "plot_shifts")
    fig = go.Figure()
    _add_strips(
        fig,
        shifts.dropna(subset=["shift"]),
        "shift",
        list(dict.fromkeys(shifts["prompt"])),
        prompts,
    )
    fig.add_hline(y=0, line=dict(color=GREY, width=1, dash="dash"))
    fig.update_yaxes(title_text=text(axis))
    return finish(fig, title, note)


def plot_separation(
    table: pd.DataFrame,
    *,
    title: str = "Separation of harmful and harmless queries",
    note: str | None = None,
) -> go.Figure:
    """Accuracy of telling harmful from harmless, by layer where the table has that column (a line per prompt), else by prompt.

    table: accuracy, layer and/or prompt, perhaps low, high. Layer -1, the state after the final norm, stands last.
    """
    where = "plot_separation"
    need(table, ["accuracy"], where)
    by_layer = "layer" in table
    if not by_layer:
        need(table, ["prompt"], where)
    names = list(dict.fromkeys(table["prompt"])) if "prompt" in table else [""]
    keys: list[Any] = sorted(set(table["layer"]), key=lambda i: (i < 0, i)) if by_layer else names
    fig = go.Figure()
    for at, name in enumerate(names if by_layer else [None]):
        part = table[table["prompt"] == name] if by_layer and "prompt" in table else table
        x = pd.Series(
            [keys.index(k) for k in part["layer" if by_layer else "prompt"]], index=part.index
        ).sort_values()
        part = part.loc[x.index]
        hue = PROMPT_COLORS[at % len(PROMPT_COLORS)]
        fig.add_trace(
            go.Scatter(
                x=x.to_numpy(),
                y=rounded(part["accuracy"]),
                error_y=interval(part, "accuracy", ""),
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
    """`column` of every row over its prompt and class, spread sideways to be seen, with a bar at the mean."""
    classes = class_names(table)
    present = [c for c in CLASSES if (classes == c).any()]
    for name in names:
        hue, symbols = prompt_style(list(dict.fromkeys([*(hues or ()), *names])), name)
        for cls in present:
            part = table[(table["prompt"] == name) & (classes == cls)]
            if part.empty:
                continue
            centre = names.index(name) + (present.index(cls) - (len(present) - 1) / 2) * 0.8 / len(
                present
            )
            half = 0.3 / len(present)
            spread = (
                np.arange(len(part)) * 0.618034
            ) % 1 * 2 - 1  # golden ratio: even, and the same each time
            fig.add_trace(
                go.Scatter(
                    x=np.round(centre + half * spread, 4),
                    y=rounded(part[column]),
                    mode="markers",
                    marker=dict(color=hue, symbol=symbols[cls], size=6, opacity=OPACITY),
                    hovertext=hover_lines(part),
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
    fig.update_xaxes(
        tickvals=list(range(len(names))),
        ticktext=[label(n) for n in names],
        title_text="safety prompt",
    )


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
