"""The DRO console: train a soft prompt, watch, stop, save."""

from __future__ import annotations

import atexit
import threading
import time
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from plotly.subplots import make_subplots

from .. import figures
from ..data.user_files import FILE_NAME, fits_file_name, shown
from .panel import Panel, check_space, control, html, kept

import ipywidgets as widgets  # isort: skip  (after figures, which makes it quick)
import plotly.graph_objects as go  # isort: skip

if TYPE_CHECKING:
    from ..analysis.study import Study

PAUSE = 0.5  # seconds between two redraws while training
LOSSES = {
    "loss": "weighted sum",
    "refusal": "refusal loss",
    "harmfulness": "harmfulness loss",
    "norm": "norm loss",
}
TRAINED = "trained"


class Console(Panel):
    """Trains a soft prompt from one of a study's text prompts, as `train_dro` does, in a thread.

    A training of whole epochs that ran to its end is kept in the study's store, and read instead of
    repeated. Another cell that uses the same model meanwhile gets its turn between two steps.

    Parameters
    ----------
    study : Study
        Its queries, space and directions are trained on. It has states of layer -1 under `base` and
        under every text prompt.
    config : DROConfig, optional
        What the controls show at first.
    start : str, optional
        The prompt chosen at first. Default: the study's `start`.
    out : str or Path
        `save` writes soft_prompts/NAME.safetensors there, `export` the folder exports/NAME.
    n_shown : int
        Queries of each class whose points are followed.
    base : str
        The prompt that movements start from.
    note : str, optional
        A caption under the plot. Default: the study's.

    Attributes
    ----------
    start_prompt, learning_rate, steps, weight_refusal, weight_harmfulness, weight_norm, name
        The controls.
    start, stop, save, export
        The buttons. `stop` keeps what was learned.
    soft_prompt : SoftPrompt or None
        The last one trained.

    Raises
    ------
    ValueError
        Where the study's states, space, directions and prompts do not fit together.

    Examples
    --------
    >>> from analysis_lib import Study
    >>> from analysis_lib.widgets import dro_console
    >>> study = Study("organism", "anchor", {"none": "", "mine": "Be careful."}, n_samples=2)
    >>> console = dro_console(study)
    >>> console.steps.value = 2
    >>> console.start.click()
    >>> console.wait()
    >>> len(console.soft_prompt.history)
    2
    """

    _kind = "console"
    _choices = (
        "start_prompt",
        "learning_rate",
        "steps",
        "weight_refusal",
        "weight_harmfulness",
        "weight_norm",
        "name",
    )

    def __init__(
        self,
        study: Study,
        *,
        config: Any = None,
        start: str | None = None,
        out: str | Path = "reports",
        n_shown: int = 20,
        base: str = "none",
        note: str | None = None,
    ) -> None:
        from ..train.dro import DROConfig

        check_space("dro_console", study, "refusal", "harmfulness")
        texts = {n: p for n, p in study.prompts.items() if isinstance(p, str) and p.strip()}
        start = study.start if start is None else start
        if start not in texts or TRAINED in study.prompts:
            raise ValueError(
                f"dro_console: start={start!r} must be a text prompt of {list(texts)}, "
                f"and none called {TRAINED!r}"
            )
        states, rows = study.states.at(-1)
        if lacking := {base, *texts} - set(rows["prompt"]):
            raise ValueError(
                f"dro_console: no states under {sorted(lacking)}; capture these prompts too, "
                "or leave them out"
            )
        self._model, self._prompts, self._space = study.model, texts, study.space
        self._refusal, self._harmfulness = study.refusal, study.harmfulness
        self._config, self._store = config or DROConfig(), study.store
        self._out, self._base, self._note = Path(out), base, study.note if note is None else note
        self._queries = study.queries[study.queries["harmful"].notna()]
        self._followed = self._queries.groupby("harmful", sort=False).head(n_shown)
        keep = (
            rows["query_id"].isin(self._followed["query_id"]) & rows["prompt"].isin([base, *texts])
        ).to_numpy()
        self._rows = rows.loc[keep, ["query_id", "prompt", "harmful"]]
        self._Z = self._space.transform(np.asarray(states)[keep])
        # Coordinates (f, k) of the followed queries under the trained prompt
        self._trained: np.ndarray | None = None
        self._history: list[dict[str, float]] = []
        self._thread: threading.Thread | None = None
        self._stopping = threading.Event()
        self.soft_prompt: Any = None
        self._open(self._controls(start), [self.detail])
        self._enable(True)

    def _controls(self, start: str) -> list[widgets.Widget]:
        """Makes the controls; returns the columns of them."""
        config, texts = self._config, list(self._prompts)
        steps = config.epochs * self._steps_per_epoch(config)
        self.start_prompt = control(widgets.Dropdown, "Start prompt", options=texts, value=start)
        self.learning_rate = control(
            widgets.BoundedFloatText, "Learning rate", value=config.learning_rate, min=1e-8, max=1
        )
        self.steps = control(widgets.BoundedIntText, "Steps", value=steps, min=1, max=100_000)
        self.weight_refusal, self.weight_harmfulness, self.weight_norm = (
            control(widgets.BoundedFloatText, label, value=getattr(config, name), min=0, max=1e6)
            for label, name in (
                ("Refusal loss x", "weight_refusal"),
                ("Harmfulness x", "weight_harmfulness"),
                ("Norm loss x", "weight_norm"),
            )
        )
        self.name = control(widgets.Text, "Name", value="mine", continuous_update=False)
        self.progress = control(widgets.IntProgress, "Progress", min=0, max=1, value=0)
        self.start, self.stop, self.save, self.export = (
            widgets.Button(description=text) for text in ("Start", "Stop", "Save", "Export")
        )
        self.status, self.detail = widgets.HTML(), widgets.HTML()
        self.start.on_click(self._start)
        self.stop.on_click(lambda _button: self._stopping.set())
        self.save.on_click(self._save)
        self.export.on_click(self._export)
        left = widgets.VBox([self.start_prompt, self.learning_rate, self.steps, self.name])
        right = widgets.VBox(
            [self.weight_refusal, self.weight_harmfulness, self.weight_norm, self.progress]
        )
        buttons = widgets.HBox([self.start, self.stop, self.save, self.export])
        return [left, right, widgets.VBox([buttons, self.status])]

    @property
    def table(self) -> pd.DataFrame:
        """Mean logits of the followed queries, per prompt of the path and class; 2 decimals."""
        points = self._points()
        Z = points.filter(regex=r"^pc\d+$").to_numpy()
        points = points.assign(
            group=figures.class_names(points),
            refusal_logit=self._refusal.logit(Z),
            harmfulness_logit=self._harmfulness.logit(Z),
        )
        grouped = points.groupby(["prompt", "group"], sort=False)
        table = grouped[["refusal_logit", "harmfulness_logit"]].mean()
        table.insert(0, "n", grouped.size())
        return (table.round(2) + 0.0).astype({"n": int}).reset_index()

    def wait(self) -> None:
        """Returns when no training runs."""
        if self._thread is not None:
            self._thread.join()

    def _end(self) -> None:
        self._stopping.set()
        self.wait()

    @property
    def training(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def _take_over(self, before: Panel) -> None:
        """An earlier run of the cell stops training; what it learned stays."""
        assert isinstance(before, Console)
        super()._take_over(before)
        before._end()
        if before.soft_prompt is not None and before.soft_prompt.model == self._model.fingerprint:
            self.soft_prompt, self._history = before.soft_prompt, before._history
            self._trained = self._follow(before.soft_prompt, self._store)

    def _steps_per_epoch(self, config: Any) -> int:
        return max(1, round(len(self._queries) / config.batch_size))

    def _follow(self, soft: Any, store: Any = None) -> np.ndarray:
        from ..collect.states import hidden_states

        n_check = 0 if store is None else 2
        options = {"n_check": n_check, "store": store, "progress": False}
        captured = kept(hidden_states, self._model, self._followed, {TRAINED: soft}, **options)
        return self._space.transform(captured.states[:, 0])

    def _points(self) -> pd.DataFrame:
        """The followed queries under base, start prompt and soft prompt.

        The soft prompt starts where the start prompt is.
        """
        tables = []
        for name in (self._base, self.start_prompt.value):
            own = (self._rows["prompt"] == name).to_numpy()
            tables.append(figures.points_table(self._Z[own], self._rows[own]))
        if self._trained is None:
            tables.append(tables[-1].assign(prompt=TRAINED))
        else:
            about = self._followed[["query_id", "harmful"]].assign(prompt=TRAINED)
            tables.append(figures.points_table(self._trained, about))
        return pd.concat(tables, ignore_index=True)

    def _build(self) -> go.Figure:
        plane = figures.plot_dro(
            self._points(),
            [self._base, self.start_prompt.value, TRAINED],
            direction=self._refusal,
            explained=tuple(self._space.explained),
        )
        fig = make_subplots(
            rows=2,
            cols=2,
            specs=[[{}, {"rowspan": 2}], [{}, None]],
            column_widths=[0.36, 0.64],
            horizontal_spacing=0.1,
        )
        history = pd.DataFrame(self._history, columns=["step", *LOSSES]).astype(float)
        for at, loss in enumerate(LOSSES):
            line = dict(
                color=figures.PROMPT_COLORS[at],
                width=2,
                dash=("solid", "dash", "dot", "dashdot")[at],
            )
            trace = go.Scatter(
                x=history["step"],
                y=history[loss].round(6),
                mode="lines",
                line=line,
                name=LOSSES[loss],
            )
            fig.add_trace(trace, row=2 if loss == "norm" else 1, col=1)
        fig.add_traces(plane.data, rows=[1] * len(plane.data), cols=[2] * len(plane.data))
        fig.update_xaxes(title_text="step", row=2, col=1)
        fig.update_yaxes(title_text="loss", row=1, col=1)
        fig.update_yaxes(title_text="norm loss", row=2, col=1)
        x, y = plane.layout.xaxis, plane.layout.yaxis
        fig.update_xaxes(title_text=x.title.text, range=x.range, row=1, col=2)
        fig.update_yaxes(title_text=y.title.text, range=y.range, scaleanchor="x2", row=1, col=2)
        return figures.finish(
            fig, "Losses, and the queries followed", self._note, width=960, height=500, right=210
        )

    def _start(self, _button: object) -> None:
        from ..train.dro import DROConfig

        thread = None
        with self._told():
            if self.training:
                raise RuntimeError("a training is running; stop it first")
            weights = {
                name: getattr(self, name).value
                for name in ("weight_refusal", "weight_harmfulness", "weight_norm")
            }
            config = DROConfig(
                **{**vars(self._config), **weights, "learning_rate": self.learning_rate.value}
            )
            steps = self.steps.value
            config = replace(config, epochs=-(-steps // self._steps_per_epoch(config)))
            self._history, self._trained = [], None
            self._stopping.clear()
            self.progress.value, self.progress.max, self.status.value = 0, steps, "training ..."
            self._enable(False)
            arguments = (config, steps, self.start_prompt.value, self.name.value)
            thread = threading.Thread(target=self._train, args=arguments, daemon=True)
        if thread is not None:  # begun here: an error at once must not be wiped out by `_told`
            self._thread = thread
            atexit.register(self._end)  # an interpreter that ends under a training thread aborts
            thread.start()

    def _enable(self, ready: bool) -> None:
        for part in (self.start, *(getattr(self, name) for name in self._choices)):
            part.disabled = not ready
        self.save.disabled = self.export.disabled = not ready or self.soft_prompt is None
        self.stop.disabled = ready

    def _train(self, config: Any, steps: int, start: str, name: str) -> None:
        """In a thread. Redraws at most every PAUSE seconds and a fifth of the time."""
        from ..model.soft_prompt import SoftPrompt
        from ..train.dro import train_dro

        text = self._prompts[start]
        begun = SoftPrompt.from_text(self._model, text, name=name)
        drawn, took = time.monotonic(), 0.0

        def on_step(losses: dict[str, float], embeddings: np.ndarray) -> bool:
            nonlocal drawn, took
            self._history.append(losses)
            self.progress.value = losses["step"]  # one that goes on from a checkpoint begins later
            if time.monotonic() - drawn > max(PAUSE, 4 * took):
                begin = time.monotonic()
                self._trained = self._follow(replace(begun, embeddings=embeddings))
                self._redraw()
                drawn, took = time.monotonic(), time.monotonic() - begin
            time.sleep(0.001)  # whoever waits for the model gets it between two steps
            return self._stopping.is_set() or losses["step"] >= steps

        try:
            arguments = (
                self._model,
                self._queries,
                text,
                self._space,
                self._refusal,
                self._harmfulness,
                config,
            )
            store = (
                None if steps % self._steps_per_epoch(config) else self._store
            )  # a whole training answers for no part of it
            self.soft_prompt = train_dro(
                *arguments, name=name, on_step=on_step, store=store, progress=False
            )
            self._history = self.soft_prompt.history.to_dict("records")
            self.progress.value = len(self._history)
            self._trained = self._follow(self.soft_prompt, self._store)
            self._redraw()
            self.status.value = (
                f"{len(self._history)} of {steps} steps done; the soft prompt is in "
                "<code>.soft_prompt</code>"
            )
        except Exception as error:  # of a thread: shown, or nobody would know
            self.status.value = ""
            self._show(error)
        finally:
            atexit.unregister(self._end)
            self._enable(True)

    def _named(self) -> tuple[Any, str]:
        """The soft prompt under the name in `.name`, which becomes part of a path."""
        name = self.name.value.strip()
        if self.soft_prompt is None:
            raise ValueError("there is no soft prompt yet; press Start first")
        if not fits_file_name(name) or set(name) & set('*?"<>|'):
            raise ValueError(f"{shown(name)} is no file name; {FILE_NAME}")
        return replace(self.soft_prompt, name=name), name

    def _save(self, _button: object) -> None:
        with self._told():
            soft, name = self._named()
            path = self._out / "soft_prompts" / f"{name}.safetensors"
            soft.save(path)
            self.status.value = f"saved as {escape(str(path))}"

    def _export(self, _button: object) -> None:
        from ..train.export import export

        with self._told():
            soft, name = self._named()
            written = export(soft, self._model, self._out / "exports" / name)
            self.status.value = f"exported to {escape(', '.join(map(str, written.values())))}"

    def _tell(self) -> None:
        self.detail.value = "<p>Mean logits of the queries followed:</p>" + html(self.table)


dro_console = Console
