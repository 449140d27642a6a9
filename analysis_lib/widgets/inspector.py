"""The direction inspector: what an estimator finds, and what turning it costs."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from .. import figures
from ..analysis.directions import Direction, Fold, fit_folds, held_out_scores
from ..analysis.estimators import fit_data, logistic, mean_difference, run_estimator
from ..analysis.space import AnchorSpace, FitError
from ..data.units import query_units
from .layers import layer_name, layer_options
from .panel import Panel, arrays, control, html, join, pairs

import ipywidgets as widgets  # isort: skip  (after figures, which makes it quick)
import plotly.graph_objects as go  # isort: skip

if TYPE_CHECKING:
    from ..analysis.study import Study

ESTIMATORS = {  # label of the control -> target column, estimator
    "logistic on refusal rate": ("refusal_rate", logistic),
    "logistic on harmfulness": ("harmful", logistic),
    "difference of means by refusal rate": ("refusal_rate", mean_difference),
    "difference of means by harmfulness": ("harmful", mean_difference),
}
SEED = 42  # as in `fit_direction`


def inspect_directions(
    study: Study, *, most_components: int = 8, note: str | None = None
) -> Inspector:
    """An `Inspector` of the directions that different estimators find in a study's layers.

    Parameters
    ----------
    study : Study
    most_components : int
        Components of the spaces that are fitted.
    note : str, optional
        A caption under the plot. Default: the study's.

    Returns
    -------
    Inspector

    Raises
    ------
    ValueError
        Where the study's tables do not fit together.

    Examples
    --------
    >>> from analysis_lib import Study
    >>> from analysis_lib.widgets import inspect_directions
    >>> prompts = {"none": "", "mine": "Be careful."}
    >>> inspector = inspect_directions(Study("organism", "anchor", prompts, n_samples=2))
    >>> inspector.turn.value = 90
    >>> inspector.table["direction"][0]
    'shown (turned by 90 degrees)'
    """
    states, layers = arrays("inspect_directions", study)
    rows = join("inspect_directions", study)
    return Inspector(states, layers, rows, most_components, study.note if note is None else note)


class Inspector(Panel):
    """What an estimator finds, and what turning it costs; made by `inspect_directions`.

    Attributes
    ----------
    layer, estimator, k, components, turn
        The controls: `k` is the number of components that the fit sees, `components` the plane
        shown, `turn` the angle in that plane from the fitted direction, in degrees.
    """

    _kind = "inspector"
    _choices = ("layer", "estimator", "k", "components", "turn")

    def __init__(
        self,
        states: np.ndarray,
        layers: tuple[int, ...],
        rows: pd.DataFrame,
        most_components: int,
        note: str | None,
    ) -> None:
        self._states, self._layers, self._rows, self._note = states, layers, rows, note
        self._most = min(most_components, states.shape[2])
        self._points: dict[int, tuple[AnchorSpace, np.ndarray, pd.DataFrame]] = {}
        self._fits: dict[tuple[int, int, str], Direction] = {}
        self._folds: dict[tuple[int, int, str], list[Fold]] = {}
        options = layer_options(layers)
        self.layer = control(
            widgets.SelectionSlider, "Layer", options=options, value=options[-1][1]
        )
        self._like: np.ndarray | None = None
        self._like = self._layer()[1]  # no component turns round between layers
        self.estimator = control(widgets.Dropdown, "Estimator", options=list(ESTIMATORS))
        self.k = control(
            widgets.IntSlider, "Components fitted", min=2, max=self._most, value=min(4, self._most)
        )
        self.components = control(widgets.Dropdown, "Components shown", options=pairs(self._most))
        self.turn = control(widgets.IntSlider, "Turn (degrees)", min=-180, max=180, value=0)
        self.scores, self.detail = widgets.HTML(), widgets.HTML()
        left, right = (
            widgets.VBox([self.layer, self.estimator, self.k]),
            widgets.VBox([self.components, self.turn]),
        )
        self._open([left, right], [self.scores, self.detail])

    @property
    def direction(self) -> Direction:
        """The direction shown: fitted to all rows and turned. For its scores see `table`."""
        label = self.estimator.value
        return replace(
            self._turned(self._fit(label), self.turn.value),
            scores=self._scores(label, self.turn.value),
        )

    @property
    def table(self) -> pd.DataFrame:
        """The direction shown, and each estimator's.

        Its angle to the shown one in degrees (1 decimal) and, of the estimator in use, the held-out
        scores (3 decimals): each fold's own fit, turned alike, on the queries that it did not see.
        """
        shown, label = self.direction, self.estimator.value
        lines = [
            {
                "direction": f"shown (turned by {self.turn.value} degrees)",
                "angle": 0.0,
                **shown.scores,
            }
        ]
        for name in ESTIMATORS:
            scores = self._scores(name, 0) if name == label else {}
            try:
                angle = shown.angle(self._fit(name))
            except FitError:  # these queries or rates do not carry the other estimator
                angle = np.nan
            lines.append({"direction": name, "angle": angle, **scores})
        return pd.DataFrame(lines).round({"angle": 1} | dict.fromkeys(shown.scores, 3))

    @property
    def ranked(self) -> pd.DataFrame:
        """All queries by their mean logit over the prompts, highest first.

        Returns query_id, group, text, logit, refusal_rate.
        """
        rows = self._rows.assign(
            logit=self._turned(self._fit(self.estimator.value), self.turn.value).logit(
                self._layer()[1]
            )
        )
        by_query = rows.groupby("query_id", sort=False)
        about = (
            rows.assign(group=figures.class_names(rows))
            .drop_duplicates("query_id")
            .set_index("query_id")[["group", "text"]]
        )
        means = by_query[["logit", "refusal_rate"]].mean()
        return about.join(means).sort_values("logit", ascending=False, kind="stable").reset_index()

    def _layer(self) -> tuple[AnchorSpace, np.ndarray, pd.DataFrame]:
        layer = self.layer.value
        if layer not in self._points:
            states = self._states[:, self._layers.index(layer)]
            space = AnchorSpace.fit(states, self._most, like=self._like)
            Z = space.transform(states)
            self._points[layer] = space, Z, figures.points_table(Z, self._rows.drop(columns="text"))
        return self._points[layer]

    def _data(self, label: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Coordinates (m, k), target (m,) and units (m,) of the rows whose target is known."""
        column, _ = ESTIMATORS[label]
        target = self._rows[column].astype("Float64").to_numpy(float, na_value=np.nan)
        known = ~np.isnan(target)
        Z, groups = (
            self._layer()[1][known, : self.k.value],
            query_units(self._rows).to_numpy()[known],
        )
        return fit_data(Z, target[known], groups, label)

    def _fit(self, label: str) -> Direction:
        """An estimator's direction, of all rows; its weight padded with 0 to all components."""
        key = (self.layer.value, self.k.value, label)
        if key not in self._fits:
            weight, bias = run_estimator(ESTIMATORS[label][1], *self._data(label), SEED)
            self._fits[key] = self._padded(Direction(label, weight, bias))
        return self._fits[key]

    def _scores(self, label: str, degrees: float) -> dict[str, float]:
        """Those of `fit_direction`, for directions turned by some degrees."""
        key = (self.layer.value, self.k.value, label)
        Z, y, groups = self._data(label)
        if key not in self._folds:
            estimator = ESTIMATORS[label][1]
            self._folds[key] = fit_folds(
                Z, y, name=label, groups=groups, estimator=estimator, seed=SEED
            )
        turned = [
            (test, self._turned(self._padded(fit), degrees)) for test, fit in self._folds[key]
        ]
        return held_out_scores(np.pad(Z, ((0, 0), (0, self._most - Z.shape[1]))), y, turned)

    def _padded(self, direction: Direction) -> Direction:
        weight = np.pad(direction.weight, (0, self._most - len(direction.weight)))
        return replace(direction, weight=weight)

    def _turned(self, direction: Direction, degrees: float) -> Direction:
        """Turned about the mean of the states, from the first component shown to the second."""
        i, j = (c - 1 for c in self.components.value)
        weight, angle = direction.weight.copy(), np.radians(degrees)
        weight[i], weight[j] = (
            np.cos(angle) * weight[i] - np.sin(angle) * weight[j],
            np.sin(angle) * weight[i] + np.cos(angle) * weight[j],
        )
        return replace(direction, weight=weight)

    def _build(self) -> go.Figure:
        space, _, points = self._layer()
        target, _ = ESTIMATORS[self.estimator.value]
        fit = self._fit(self.estimator.value)
        shown = replace(
            self._turned(fit, self.turn.value),
            name="refusal" if target == "refusal_rate" else "harmfulness",
        )
        fig = figures.plot_groups(
            points,
            direction=[shown, replace(fit, name="fitted")],
            components=self.components.value,
            color=target,
            arrows=None,
            explained=tuple(space.explained),
            title=f"Layer {layer_name(self.layer.value)}: {self.estimator.value}",
            note=self._note,
        )
        fig.data[-1].visible = False  # one arrow is enough
        return fig

    def _tell(self) -> None:
        table, ranked = self.table, self.ranked
        angles = table["angle"].map("{:.1f}".format, na_action="ignore")
        scores = table.drop(columns=["bce_constant", "mse"]).assign(angle=angles)
        self.scores.value = "<p>Angles in degrees; scores held out, by query:</p>" + html(
            scores.astype(object).fillna("")
        )
        most, least = ranked.head(5), ranked.tail(5)
        self.detail.value = (
            f"<p>Queries furthest along it, and least, of {len(ranked)}:</p>"
            + html(pd.concat([most, least]))
        )
