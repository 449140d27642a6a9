"""What the widgets share: the panel, its controls, and the tables that they are given."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from html import escape
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from .. import figures  # first: its import makes FigureWidget quick
from ..analysis.directions import Direction

if TYPE_CHECKING:
    from ..analysis.study import Study

import ipywidgets as widgets  # isort: skip
import plotly.graph_objects as go  # isort: skip

STYLE, WIDE = {"description_width": "130px"}, "430px"

# What was chosen outlives another run of a notebook cell: (kind, id of the cell) -> its panel.
PANELS: dict[tuple[str, str], Panel] = {}


class _Plot(go.FigureWidget):
    """Is announced to the page once it holds its plot.

    plotly announces an empty one, which a slow page was seen to keep.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._config = {**(self._config or {}), **figures.OFFLINE}  # type: ignore[has-type]
        super().open()

    def open(self) -> None:
        """Called on the way by ipywidgets, and too early."""


def kept(compute: Callable[..., Any], *arguments: Any, store: Any, **options: Any) -> Any:
    """compute(..., store=store), and where that cannot be written, once more without it."""
    from ..store.batches import StoreError

    try:
        return compute(*arguments, store=store, **options)
    except StoreError as error:
        warnings.warn(f"nothing is kept: {error}", stacklevel=2)
        return compute(*arguments, store=None, **options)


class Panel:
    """What the widgets share.

    Controls are named in `_choices`. `_build` makes the one figure, `_tell` the text below it.
    """

    _kind = ""
    _choices: tuple[str, ...] = ()
    figure: go.FigureWidget
    view: widgets.VBox

    def _build(self) -> go.Figure:
        """The figure of the present choices.

        It has always the same number of traces, so that a redraw is an update.
        """
        raise NotImplementedError

    def _tell(self) -> None:
        """Brings the text below the figure up to date."""

    def _open(self, controls: Sequence[widgets.Widget], below: Sequence[widgets.Widget]) -> None:
        """Takes over an earlier run's choices, draws, and starts to listen."""
        key = (self._kind, _cell())
        before = PANELS.get(key)
        defaults = {name: getattr(self, name).value for name in self._choices}
        if before is not None:
            self._take_over(before)
        self.message = widgets.HTML()
        try:
            built = self._build()
        except Exception:
            if before is None:
                raise
            for name, value in defaults.items():  # the earlier choices do not fit the new data
                getattr(self, name).value = value
            built = self._build()
        self.figure = _Plot(data=built.data, layout=built.layout)
        self._tell()
        for name in self._choices:
            getattr(self, name).observe(self._update, names="value")
        row = widgets.HBox(list(controls), layout=widgets.Layout(flex_flow="row wrap"))
        self.view = widgets.VBox([row, self.message, self.figure, *below])
        self.view.add_class(f"al-{self._kind}")
        if key[1]:
            PANELS[key] = self

    def _take_over(self, before: Panel) -> None:
        for name in self._choices:
            with suppress(Exception):  # a choice that is no longer offered
                getattr(self, name).value = getattr(before, name).value

    def _update(self, _change: object = None) -> None:
        with self._told():
            self._redraw()

    def _redraw(self) -> None:
        built = self._build()
        # A lasso's outline goes; it holds values of the page that are no JSON, and cannot be kept.
        if self.figure._layout_obj._props.pop("selections", None):
            self.figure._send_relayout_msg({"selections": []})
        with self.figure.batch_update():
            for trace, new in zip(self.figure.data, built.data, strict=True):
                trace.update({"selectedpoints": None, **new.to_plotly_json()}, overwrite=True)
            layout = built.layout.to_plotly_json()
            for key in {*layout, *self.figure.layout.to_plotly_json()} - {"template"}:
                self.figure.layout[key] = layout.get(key)
        # Brings the widget's stored state up to date: else a reloaded page shows the first plot
        self.figure._repr_mimebundle_()
        self._tell()

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Shows what a callback raises or warns of, which would be lost in a log."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            try:
                yield
            except Exception as error:
                self._show(error)
                return
        said = {str(w.message): None for w in caught if issubclass(w.category, UserWarning)}
        self.message.value = escape("; ".join(said))

    def _show(self, error: Exception) -> None:
        self.message.value = (
            f'<b style="color:#CC3311">{escape(f"{type(error).__name__}: {error}")}</b>'
        )

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        """The widget, and beside it the figure alone where PLOTLY_RENDERER is set.

        Stored outputs and reports have no widgets.
        """
        bundle = self.view._repr_mimebundle_(**kwargs)
        if os.environ.get("PLOTLY_RENDERER"):
            bundle["application/vnd.plotly.v1+json"] = json.loads(str(self.figure.to_json()))
        return bundle


def control(kind: type, description: str, **kwargs: Any) -> Any:
    return kind(description=description, style=STYLE, layout=widgets.Layout(width=WIDE), **kwargs)


def pairs(k: int) -> list[tuple[str, tuple[int, int]]]:
    return [(f"PC{i} and PC{j}", (i, j)) for i, j in combinations(range(1, k + 1), 2)]


def html(table: pd.DataFrame) -> str:
    return str(
        table.to_html(
            index=False, escape=True, border=0, na_rep="not known", float_format="{:.3f}".format
        )
    )


def _cell() -> str:
    """Id of the running notebook cell, as JupyterLab sends it; "" elsewhere."""
    from IPython import get_ipython

    shell = get_ipython()
    parent = shell.get_parent() if hasattr(shell, "get_parent") else {}
    return str(parent.get("metadata", {}).get("cellId", ""))


def arrays(where: str, study: Study) -> tuple[np.ndarray, tuple[int, ...]]:
    """The study's states (n, number of layers, d) and their layers."""
    captured = study.states
    states, layers, n = np.asarray(captured.states), captured.layers, len(captured.rows)
    if layers is None:
        raise ValueError(
            f"{where}: an array of states needs layers=, the layer of each entry of its second axis"
        )
    if states.ndim != 3 or states.shape[:2] != (n, len(layers)):
        raise ValueError(
            f"{where}: states of shape {states.shape} for {n} rows and layers {tuple(layers)}; "
            "pass states (n, number of layers, d) with their own n rows"
        )
    return states, tuple(layers)


def join(where: str, study: Study, rated: bool = True) -> pd.DataFrame:
    """One row per state: query_id, prompt, text, harmful, and where `rated` its rate."""
    rates = study.rates if rated else None
    rows, queries = study.states.rows, study.queries
    _check(where, "rows", rows, "query_id", "prompt")
    _check(where, "queries", queries, "query_id", "text", "harmful")
    joined = rows[["query_id", "prompt"]].reset_index(drop=True)
    if unknown := sorted(set(joined["query_id"]) - set(queries["query_id"]), key=str):
        raise ValueError(
            f"{where}: {len(unknown)} queries of the rows are not in queries, "
            f"such as {unknown[0]!r}"
        )
    joined = joined.merge(queries[["query_id", "text", "harmful"]], on="query_id", how="left")
    if rates is not None:
        _check(where, "rates", rates, "query_id", "prompt", "refusal_rate")
        columns = [c for c in ("query_id", "prompt", "refusal_rate", "n_judged") if c in rates]
        joined = joined.merge(rates[columns], on=["query_id", "prompt"], how="left")
    return joined


def _check(where: str, name: str, table: pd.DataFrame, *columns: str) -> None:
    """The table has the columns, and each query once, under each prompt where it has prompts."""
    if missing := [c for c in columns if c not in table]:
        raise ValueError(
            f"{where}: {name} lacks column {', '.join(map(repr, missing))}; "
            f"it has {list(table.columns)}"
        )
    key = [c for c in ("query_id", "prompt") if c in columns]
    twice = table[table[key].duplicated()]
    if len(twice):
        raise ValueError(
            f"{where}: {name} has {dict(twice.iloc[0][key])} twice; keep one row of each"
        )


def check_space(where: str, study: Study, *directions: str) -> None:
    """States, space and the named directions of the study fit together, and lie in layer -1."""
    if study.layer != -1:
        raise ValueError(
            f"{where}: the study's space lies in layer {study.layer}, and what is typed or trained "
            "goes by layer -1; put -1 among the study's layers"
        )
    states, rows = study.states.at(-1)
    d, k = len(study.space.mean), study.space.k
    if np.shape(states) != (len(rows), d) or study.model.hidden_size != d:
        raise ValueError(
            f"{where}: states of shape {np.shape(states)} for {len(rows)} rows, a space of {d} "
            f"dimensions and a model of {study.model.hidden_size}; take the states of one model"
        )
    fits: list[Direction] = [getattr(study, name) for name in directions]
    if wrong := [fit.name for fit in fits if len(fit.weight) != k]:
        raise ValueError(
            f"{where}: directions {wrong} do not lie in the space of {k} components; fit them in it"
        )
