"""The explorer: walk through models, layers, components, prompts and single queries."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from .. import figures
from ..analysis.directions import Direction
from ..analysis.space import AnchorSpace
from .layers import layer_name, layer_options, of_layer, shift_lengths
from .panel import Panel, arrays, control, html, join, pairs

import ipywidgets as widgets  # isort: skip  (after figures, which makes it quick)
import plotly.graph_objects as go  # isort: skip

if TYPE_CHECKING:
    from ..analysis.study import Study

Spaces = Mapping[int, AnchorSpace] | Callable[[np.ndarray], AnchorSpace]
Directions = (
    Mapping[int, Sequence[Direction]] | Callable[[np.ndarray, pd.DataFrame], Sequence[Direction]]
)

COLORS = {  # label of the control -> column of the points table
    "prompt": "prompt",
    "harmfulness": "harmful",
    "refusal rate": "refusal_rate",
    "predicted refusal": "predicted_refusal",
    "shift length": "shift_length",
}
MOST_LISTED = 20  # queries of a lasso that are listed


@dataclass(frozen=True)
class LayerView:
    """What one layer shows: computed on the first visit, then kept."""

    space: AnchorSpace
    directions: tuple[Direction, ...]
    points: pd.DataFrame  # one row per state: query_id, prompt, text, pc1 .. pck, shift_length ...


def explore(
    study: Study | Mapping[str, Study],
    *,
    rates: bool = True,
    spaces: Spaces | None = None,
    directions: Directions | None = None,
    base: str = "none",
    note: str | None = None,
) -> Explorer:
    """An `Explorer` of a study's states, in each of its layers.

    Parameters
    ----------
    study : Study, or mapping of model names to Study
        Several studies have the same queries and prompts.
    rates : bool
        False leaves refusal rates out, so that no reply is sampled.
    spaces : mapping of layer to AnchorSpace, or function of states (n, d) to AnchorSpace, optional
        Default: a space is fitted to each layer. Its signs are like those of the (first model's)
        last layer, so that no component turns round between layers.
    directions : mapping of layer to Directions, or function of (Z (n, k), rows) to them, optional
        The one named "refusal" gives the predicted refusal.
    base : str
        The prompt that shifts are measured from.
    note : str, optional
        A caption under the plot. Default: the study's.

    Returns
    -------
    Explorer

    Raises
    ------
    ValueError
        Where the tables do not fit together.

    Examples
    --------
    >>> from analysis_lib import Study
    >>> from analysis_lib.widgets import explore
    >>> explorer = explore(Study("organism", "anchor", {"none": ""}), rates=False)
    >>> explorer.table[["prompt", "group", "n"]]
      prompt     group    n
    0   none   harmful  100
    1   none  harmless  100
    """
    studies: Mapping[str, Study] = study if isinstance(study, Mapping) else {"": study}
    captured = {name: arrays("explore", one) for name, one in studies.items()}
    joined = {name: join("explore", one, rates) for name, one in studies.items()}
    first, *others = joined
    for name in others:
        keys = ["query_id", "prompt"]
        if not joined[name][keys].equals(joined[first][keys]):
            raise ValueError(
                f"explore: the rows of {name!r} are others; capture the same queries under "
                "the same prompts"
            )
        if list(joined[name]) != list(joined[first]):
            raise ValueError(
                f"explore: {first!r} and {name!r} do not both have refusal rates; measure both, or "
                "pass rates=False"
            )
    note = studies[first].note if note is None else note
    return Explorer(captured, joined, spaces, directions, base, note)


class Explorer(Panel):
    """Layers, components, prompts and single queries; made by `explore`.

    Attributes
    ----------
    model, layer, components, prompts, color, smoothing, query
        The controls. Set their `.value` from code.
    selected : tuple
        The queries of the last lasso.
    """

    _kind = "explorer"
    _choices = ("model", "layer", "components", "color", "smoothing", "query", "prompts")

    def __init__(
        self,
        states: dict[str, tuple[np.ndarray, tuple[int, ...]]],
        rows: dict[str, pd.DataFrame],
        spaces: Spaces | None,
        directions: Directions | None,
        base: str,
        note: str | None,
    ) -> None:
        self._states, self._rows = states, rows
        self._spaces, self._directions, self._base, self._note = spaces, directions, base, note
        # Model and layer -> space, coordinates, lengths of shifts
        self._coordinates: dict[tuple[str, int], tuple[AnchorSpace, np.ndarray, Any]] = {}
        self._views: dict[tuple[str, int, float], LayerView] = {}
        self._like: np.ndarray | None = None  # coordinates of the first view
        self.selected: tuple[Any, ...] = ()
        self._settling = False
        self._lasso: list[Any] = []
        self._open(self._controls(), [self.detail])
        self._listen()

    def _controls(self) -> list[widgets.Widget]:
        """Makes the controls; returns the two columns of them."""
        table = next(iter(self._rows.values()))
        names = list(dict.fromkeys(table["prompt"]))
        models = [(name or "this model", name) for name in self._states]
        self.model = control(widgets.Dropdown, "Model", options=models)
        layers = self._layers()
        self.layer = control(widgets.SelectionSlider, "Layer", options=layers, value=layers[-1][1])
        self.smoothing = control(
            widgets.FloatSlider, "Smoothing a", min=0, max=5, step=0.5, value=0
        )
        self.model.observe(self._offer_layers, names="value")
        first = self._view()
        self.components = control(widgets.Dropdown, "Components", options=pairs(first.space.k))
        colors = [(label, column) for label, column in COLORS.items() if column in first.points]
        self.color = control(widgets.Dropdown, "Colour by", options=colors)
        ids = [("none chosen", None), *((str(i), i) for i in dict.fromkeys(table["query_id"]))]
        self.query = control(widgets.Dropdown, "Query", options=ids)
        self.prompts = control(
            widgets.SelectMultiple,
            "Prompts",
            options=[(str(name), name) for name in names],
            value=names,
            rows=min(6, max(2, len(names))),
        )
        self.detail = widgets.HTML()
        left = [self.layer, self.components, self.color, self.query]
        right = [self.prompts]
        if len(self._states) > 1:
            left.insert(0, self.model)
        if all("n_judged" in part for part in self._rows.values()):
            about = widgets.HTML("<small>refusal rate = (refused + a) / (judged + 2 a)</small>")
            right += [self.smoothing, about]
        return [widgets.VBox(left), widgets.VBox(right)]

    def _listen(self) -> None:
        """To clicks on points and lassos around them."""
        # The point traces come first, one per group that has queries
        table = next(iter(self._rows.values()))
        classes = figures.class_names(table)
        members = [
            table["query_id"][(table["prompt"] == name) & (classes == cls)].tolist()
            for name in dict.fromkeys(table["prompt"])
            for cls in figures.CLASSES
        ]
        self._members = list(filter(None, members))
        for trace, ids in zip(self.figure.data, self._members, strict=False):
            trace.on_click(
                lambda _trace, clicked, _state, ids=ids: self._clicked(ids, clicked.point_inds)
            )
            trace.on_selection(
                lambda trace, chosen, _shape, ids=ids: self._chosen(trace, ids, chosen.point_inds)
            )

    @property
    def table(self) -> pd.DataFrame:
        """The present view in numbers, per shown prompt and class; 3 decimals.

        The size, the means of the shown components and of what is known (refusal rate, predicted
        refusal, shift length), then the held-out scores of the directions.
        """
        view = self._view()
        columns = [f"pc{i}" for i in self.components.value]
        columns += [
            c for c in COLORS.values() if c in view.points and c not in ("prompt", "harmful")
        ]
        points = view.points[view.points["prompt"].isin(self.prompts.value)]
        grouped = points.assign(group=figures.class_names(points)).groupby(
            ["prompt", "group"], sort=False
        )
        table = grouped[columns].mean().astype(float)
        table.insert(0, "n", grouped.size())
        for direction in view.directions:
            for score, value in direction.scores.items():
                table[f"{direction.name}_{score}"] = float(value)
        return (table.round(3) + 0.0).astype({"n": int}).reset_index()  # + 0.0: no "-0.0"

    def _layers(self) -> list[tuple[str, int]]:
        return layer_options(self._states[self.model.value][1])

    def _view(self) -> LayerView:
        model, layer, smoothing = self.model.value, self.layer.value, self.smoothing.value
        if (model, layer) not in self._coordinates:
            states, layers = self._states[model]
            at = states[:, layers.index(layer)]
            if self._spaces is None:
                space = AnchorSpace.fit(at, like=self._like)
            else:
                space = (
                    self._spaces(at)
                    if callable(self._spaces)
                    else of_layer(self._spaces, layer, "space")
                )
            rows = self._rows[model]
            shifts = (
                shift_lengths(at, rows, self._base) if self._base in set(rows["prompt"]) else None
            )
            Z = np.asarray(space.transform(at))
            self._coordinates[model, layer] = space, Z, shifts
            self._like = Z if self._like is None else self._like
        if (model, layer, smoothing) not in self._views:
            space, Z, shifts = self._coordinates[model, layer]
            rows = self._rows[model]
            if smoothing and "n_judged" in rows:
                n, refused = rows["n_judged"], rows["refusal_rate"] * rows["n_judged"]
                rows = rows.assign(refusal_rate=(refused + smoothing) / (n + 2 * smoothing))
            points = figures.points_table(Z, rows)
            if shifts is not None:
                points["shift_length"] = shifts
            if callable(self._directions):
                directions = tuple(self._directions(Z, rows))
            else:
                directions = (
                    ()
                    if self._directions is None
                    else tuple(of_layer(self._directions, layer, "directions"))
                )
            for direction in directions:
                if direction.name == "refusal":
                    points["predicted_refusal"] = direction.probability(Z).round(4)
            self._views[model, layer, smoothing] = LayerView(space, directions, points)
        return self._views[model, layer, smoothing]

    def _offer_layers(self, _change: object) -> None:
        """Another model's layers; the same one stays chosen where it has it."""
        layer, offered = self.layer.value, self._layers()
        self._settling = True
        self.layer.options = offered
        self.layer.value = layer if layer in dict(offered).values() else offered[-1][1]
        self._settling = False

    def _update(self, change: Any = None) -> None:
        if self._settling:
            return
        if change is not None and change["owner"] in (
            self.query,
            self.model,
            self.layer,
            self.components,
        ):
            self.selected = ()
        super()._update(change)

    def _build(self) -> go.Figure:
        view = self._view()
        color, components = self.color.value, self.components.value
        if max(components) > view.space.k:
            raise ValueError(
                f"the space of layer {self.layer.value} has {view.space.k} components; "
                "choose lower ones"
            )
        fig = figures.plot_groups(
            view.points,
            direction=view.directions,
            components=components,
            color=color,
            arrows="mean_shift" if self._base in set(view.points["prompt"]) else None,
            base=self._base,
            prompts=self.prompts.value,
            explained=tuple(view.space.explained),
            title=f"Layer {layer_name(self.layer.value)}"
            + (f" of {self.model.value}" if self.model.value else ""),
            note=self._note,
        )
        fig.add_trace(self._path(view.points, components))
        return fig

    def _path(self, points: pd.DataFrame, components: tuple[int, int]) -> go.Scatter:
        """The chosen query under every shown prompt, as spokes from the base prompt."""
        own = points[
            (points["query_id"] == self.query.value)
            & points["prompt"].isin([self._base, *self.prompts.value])
        ]
        xy = own[[f"pc{i}" for i in components]].to_numpy()
        start = xy[(own["prompt"] == self._base).to_numpy()]
        ends: list[Any] = []
        for end in xy:
            ends += [*start[:1], end, (None, None)]
        x, y = zip(*ends, strict=True) if ends else ((None,), (None,))
        marker = dict(symbol="circle-open", size=16, color=figures.GREY, line=dict(width=2))
        line = dict(color=figures.GREY, width=1)
        return go.Scatter(
            x=x,
            y=y,
            mode="lines+markers",
            marker=marker,
            line=line,
            hoverinfo="skip",
            name="chosen query",
            visible=bool(ends),
        )

    def _clicked(self, ids: list[Any], indices: list[int]) -> None:
        if indices:  # a click tells every trace, those without the point too
            self.selected = ()
            self.query.value = ids[indices[0]]
            with self._told():
                self._tell()

    def _chosen(self, trace: Any, ids: list[Any], indices: list[int]) -> None:
        """A lasso tells every trace in turn, also one without a point; the last completes it."""
        self._lasso += [ids[i] for i in indices]
        if trace is not self.figure.data[len(self._members) - 1]:
            return
        self.selected, self._lasso = tuple(dict.fromkeys(self._lasso)), []
        with self._told():
            self._tell()

    def _tell(self) -> None:
        points = self._view().points
        if self.selected:
            self.detail.value = self._listed(points)
            return
        if self.query.value is None:
            self.detail.value = (
                "<i>Click a point, or choose a query, to read it; draw a lasso around points to "
                "list them.</i>"
            )
            return
        own = points[points["query_id"] == self.query.value]
        about = own.iloc[0]
        columns = [
            "prompt",
            *(c for c in COLORS.values() if c in own and c not in ("prompt", "harmful")),
        ]
        columns += [f"pc{i}" for i in self.components.value]
        shown = own[columns].rename(columns={c: label for label, c in COLORS.items()})
        self.detail.value = (
            f"<p><b>{escape(str(about['query_id']))}</b> ({figures.class_names(own).iloc[0]}): "
            f"{escape(str(about['text']))}</p>" + html(shown)
        )

    def _listed(self, points: pd.DataFrame) -> str:
        """The queries of a lasso, with refusal rates (else shift lengths) under every prompt."""
        own = points[points["query_id"].isin(self.selected[:MOST_LISTED])]
        about = (
            own.assign(**{"class": figures.class_names(own)})
            .drop_duplicates("query_id")
            .set_index("query_id")[["class", "text"]]
        )
        value = next((c for c in ("refusal_rate", "shift_length") if c in own), None)
        if value:
            about = about.join(
                own.pivot(index="query_id", columns="prompt", values=value).astype(float)
            )
        more = len(self.selected) - MOST_LISTED
        columns = f", with their {value.replace('_', ' ')} under each prompt" if value else ""
        first = f"; the first {MOST_LISTED} of them" if more > 0 else ""
        return f"<p>{len(self.selected)} queries in the lasso{columns}{first}:</p>" + html(
            about.loc[list(self.selected[:MOST_LISTED])].reset_index()
        )
