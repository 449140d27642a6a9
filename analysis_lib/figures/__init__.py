"""Plotly figures: a table or an array in, a `go.Figure` out. Nothing is shown, fitted or tested."""

from __future__ import annotations

from .by_model import plot_by_model
from .calibration import plot_calibration, plot_truth
from .coordinates import points_table
from .decimals import fixed
from .labels import class_names, label, text
from .plane import plot_dro, plot_grid, plot_groups
from .rates import plot_rates, plot_separation, plot_shifts
from .style import CLASSES, GREY, OFFLINE, PROMPT_COLORS, finish, save
from .tables import plot_benchmark, plot_tradeoff
from .training import plot_losses, plot_nearest_tokens

__all__ = [
    "CLASSES",
    "GREY",
    "OFFLINE",
    "PROMPT_COLORS",
    "class_names",
    "finish",
    "fixed",
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
