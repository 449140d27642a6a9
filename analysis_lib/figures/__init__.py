"""Plotly figures: a table or an array in, a `go.Figure` out. Nothing is shown, fitted or tested here."""

from __future__ import annotations

from .plane import plot_dro, plot_grid, plot_groups, points_table
from .rates import plot_calibration, plot_rates, plot_separation, plot_shifts, plot_truth
from .style import CLASSES, GREY, OFFLINE, PROMPT_COLORS, class_names, finish, label, save, text
from .tables import plot_benchmark, plot_by_model, plot_tradeoff
from .training import plot_losses, plot_nearest_tokens

__all__ = [
    "CLASSES",
    "GREY",
    "OFFLINE",
    "PROMPT_COLORS",
    "class_names",
    "finish",
    "label",
    "plot_benchmark",
    "plot_by_model",
    "plot_calibration",
    "plot_dro",
    "plot_grid",
    "plot_groups",
    "plot_losses",
    "plot_nearest_tokens",
    "plot_rates",
    "plot_separation",
    "plot_shifts",
    "plot_tradeoff",
    "plot_truth",
    "points_table",
    "save",
    "text",
]
