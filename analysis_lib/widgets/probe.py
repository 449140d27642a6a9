"""The probe: any query under any safety prompt."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from .. import figures
from .panel import Panel, check_space, control, html, kept, pairs

import ipywidgets as widgets  # isort: skip  (after figures, which makes it quick)
import plotly.graph_objects as go  # isort: skip

if TYPE_CHECKING:
    from ..analysis.study import Study

TYPED = "typed"  # the name of the typed safety prompt


class Probe(Panel):
    """A typed query under every prompt of a study, and under a typed safety prompt.

    The study's space, refusal direction, sampling settings, judge and store serve what is typed.
    Its queries under `base` are the background. Replies are shown for the embedded model only,
    whose replies hold no instructions.

    Parameters
    ----------
    study : Study
    prompts : mapping of names to text or SoftPrompt, optional
        Default: those of the study.
    query, prompt : str
        What is typed at first.
    n_samples : int, optional
        Replies sampled per prompt on the button. Default: as many as in the study.
    base : str
        The prompt that the lines start from.
    note : str, optional
        A caption under the plot. Default: the study's.

    Raises
    ------
    ValueError
        Where the study's states, space and model do not fit, a prompt is called "typed", or `base`
        is missing.

    Examples
    --------
    >>> from analysis_lib import Study
    >>> from analysis_lib.widgets import probe
    >>> study = Study("organism", "anchor", {"none": "", "mine": "Be careful."}, n_samples=2)
    >>> probe(study, query="How to bake bread?", prompt="Be kind.").table["prompt"].tolist()
    ['none', 'mine', 'typed']
    """

    _kind = "probe"
    _choices = ("query", "prompt", "components")

    def __init__(
        self,
        study: Study,
        *,
        prompts: Mapping[str, Any] | None = None,
        query: str = "",
        prompt: str = "",
        n_samples: int | None = None,
        base: str = "none",
        note: str | None = None,
    ) -> None:
        check_space("probe", study, "refusal")
        self._fixed: dict[str, Any] = dict(study.prompts if prompts is None else prompts)
        if TYPED in self._fixed or base not in self._fixed:
            raise ValueError(
                f"probe: prompts {list(self._fixed)} need {base!r}, and none called {TYPED!r}; "
                "rename it, or pass base="
            )
        self._study, self._model, self._space = study, study.model, study.space
        self._refusal, self._base = study.refusal, base
        self._n_samples = study.n_samples if n_samples is None else n_samples
        self._note = study.note if note is None else note
        states, rows = study.states.at(-1, prompt=base)
        about = rows[["query_id", "prompt", "harmful"]]
        self._background = figures.points_table(self._space.transform(states), about)
        self._known: dict[
            tuple[str, str, str], np.ndarray
        ] = {}  # (query, prompt's name, its text) -> (k,)
        self._sampled: dict[
            tuple[str, str, str], tuple[float, str]
        ] = {}  # -> refusal rate, commonest reply
        typed = {"continuous_update": False}
        self.query = control(widgets.Textarea, "Query", value=query, rows=2, **typed)
        self.prompt = control(widgets.Textarea, "Safety prompt", value=prompt, rows=4, **typed)
        self.components = control(widgets.Dropdown, "Components", options=pairs(self._space.k))
        self.sample = widgets.Button(
            description=f"Sample {self._n_samples} replies per prompt",
            layout=widgets.Layout(width="260px"),
        )
        self.detail = widgets.HTML()
        self.sample.on_click(self._sample)
        buttons = widgets.VBox([self.components, self.sample])
        self._open([self.query, self.prompt, buttons], [self.detail])

    @property
    def table(self) -> pd.DataFrame:
        """Per prompt: predicted, sampled, and for the embedded model true.

        sampled is NaN before sampling, true is NaN outside the grammar.
        """
        query, prompts = self.query.value.strip(), self._prompts()
        keys = [self._key(query, name) for name in prompts] if query else []
        Z = self._coordinates()
        points = np.array([*Z.values()]).reshape(len(Z), self._space.k)
        table = pd.DataFrame({"prompt": list(Z), "predicted": self._refusal.probability(points)})
        table["sampled"] = [self._sampled.get(key, (np.nan, ""))[0] for key in keys]
        if self._is_organism:
            from ..organism import true_refusal

            table["true"] = (
                true_refusal(self._asked(), prompts)["true_rate"].to_numpy() if keys else []
            )
        return table.round(3)

    @property
    def _is_organism(self) -> bool:
        return bool(self._model.name == "organism")

    def _prompts(self) -> dict[str, Any]:
        typed = self.prompt.value.strip()
        return {**self._fixed, TYPED: typed} if typed else self._fixed

    def _asked(self) -> pd.DataFrame:
        unknown = pd.array([pd.NA], dtype="boolean")
        return pd.DataFrame(
            {"query_id": ["query"], "text": [self.query.value.strip()], "harmful": unknown}
        )

    def _key(self, query: str, name: str) -> tuple[str, str, str]:
        prompt = self._prompts()[name]
        return query, name, prompt if isinstance(prompt, str) else ""

    def _coordinates(self) -> dict[str, np.ndarray]:
        """{prompt: (k,)} of the typed query; nothing without one."""
        from ..collect.states import hidden_states

        query, prompts = self.query.value.strip(), self._prompts()
        if not query:
            return {}
        if missing := {
            name: p for name, p in prompts.items() if self._key(query, name) not in self._known
        }:
            store = self._study.store
            n_check = 0 if store is None else 1  # what is kept is checked
            options = {"n_check": n_check, "store": store, "progress": False}
            captured = kept(hidden_states, self._model, self._asked(), missing, **options)
            for name, z in zip(missing, self._space.transform(captured.states[:, 0]), strict=True):
                self._known[self._key(query, name)] = z
        return {name: self._known[self._key(query, name)] for name in prompts}

    def _build(self) -> go.Figure:
        components = self.components.value
        Z = self._coordinates()
        fig = figures.plot_groups(
            self._background,
            direction=self._refusal,
            components=components,
            arrows=None,
            explained=tuple(self._space.explained),
            title="The typed query under each prompt",
            note=self._note,
        )
        fig.update_traces(marker_color=figures.GREY, opacity=0.3, selector=dict(mode="markers"))
        ends = {name: [round(float(z[c - 1]), 4) for c in components] for name, z in Z.items()}
        self._add_query(fig, Z, ends)
        for axis, values in (
            ("xaxis", [e[0] for e in ends.values()]),
            ("yaxis", [e[1] for e in ends.values()]),
        ):
            low, high = fig.layout[axis].range
            margin = 0.05 * (high - low)  # a query far from the others widens the view
            fig.layout[axis].range = [
                min([low, *(v - margin for v in values)]),
                max([high, *(v + margin for v in values)]),
            ]
        return fig

    def _add_query(
        self, fig: go.Figure, Z: Mapping[str, np.ndarray], ends: Mapping[str, list[float]]
    ) -> None:
        """The typed query under each prompt, as a line from where it lies under `base`."""
        predicted = {name: float(self._refusal.probability(z[None])[0]) for name, z in Z.items()}
        for at, name in enumerate([*self._fixed, TYPED]):
            path = [ends[self._base], ends[name]] if name in ends else [[None, None]]
            hue = (
                figures.GREY
                if name == self._base
                else figures.PROMPT_COLORS[at % len(figures.PROMPT_COLORS)]
            )
            symbol = "star" if name == TYPED else "diamond"
            marker = dict(
                color=hue,
                size=[0, 13][-len(path) :],
                symbol=symbol,
                opacity=1,
                line=dict(width=1, color="#FFFFFF"),
            )
            hover = (
                figures.text(f"{name}: predicted refusal {predicted[name]:.2f}")
                if name in ends
                else ""
            )
            x, y = zip(*path, strict=True)
            fig.add_trace(
                go.Scatter(
                    x=x,
                    y=y,
                    mode="lines+markers",
                    marker=marker,
                    line=dict(color=hue, width=2),
                    hovertext=hover,
                    hoverinfo="text",
                    name=figures.label(f"query, {name}"),
                    visible=name in ends,
                )
            )

    def _sample(self, _button: object) -> None:
        from ..collect.responses import sample_responses
        from ..judge.verdicts import judge_responses, refusal_rates

        with self._told():
            query, prompts = self.query.value.strip(), self._prompts()
            if not query:
                raise ValueError("there is no query to sample replies to; type one first")
            missing = {
                name: p
                for name, p in prompts.items()
                if self._key(query, name) not in self._sampled
            }
            if missing:
                self.sample.disabled, self.message.value = True, "sampling ..."
                study, asked = self._study, self._asked()
                options = {**study.sampling, "n_samples": self._n_samples, "progress": False}
                try:
                    replies = kept(
                        sample_responses, self._model, asked, missing, store=study.store, **options
                    )
                    judged = judge_responses(replies, study.judge, queries=asked)
                finally:
                    self.sample.disabled = False
                rates = refusal_rates(judged).set_index("prompt")["refusal_rate"]
                for name, own in replies.groupby("prompt", sort=False)["response"]:
                    self._sampled[self._key(query, str(name))] = (
                        float(rates[name]),
                        str(own.mode()[0]),
                    )
            self._tell()

    def _tell(self) -> None:
        table, query = self.table, self.query.value.strip()
        if table.empty:
            self.detail.value = (
                "<i>Type a query to see where it lies, and a safety prompt to see how it moves.</i>"
            )
            return
        sampled = f"refused of {self._n_samples} samples"
        shown = table.rename(columns={"predicted": "predicted refusal", "sampled": sampled}).astype(
            object
        )
        shown[sampled] = shown[sampled].fillna("not sampled")
        if self._is_organism:
            shown["true"] = shown["true"].fillna("no truth outside the grammar")
            known = [
                self._sampled.get(self._key(query, name), (0, ""))[1].replace("\n", " ")
                for name in table["prompt"]
            ]
            shown["commonest reply"] = known
        text = f"<p><b>query</b>: {escape(query)}</p>" + html(shown)
        if self._is_organism:
            text += (
                "<small>true: the probability that the grammar taught; samples at top-p 0.9 lose "
                "what is rarer than a tenth.</small>"
            )
        self.detail.value = text


probe = Probe
