"""A study: one model, some queries, some safety prompts, and all that is measured of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ..collect.inputs import check_prompts, check_queries
from ..collect.responses import sample_responses
from ..collect.states import HiddenStates, checked_layers, hidden_states
from ..data.labels import with_labels
from ..data.prompts import load_safety_prompts
from ..data.queries import load_queries
from ..data.units import query_units, refuse_two_labels
from ..judge.strings import final_verdict_of, is_refusal
from ..judge.verdicts import RowJudge, TextJudge, judge_responses, refusal_rates
from ..model.chat import ChatModel
from ..model.rendering import Prompt
from ..store.store import Store
from .directions import Direction, fit_direction
from .space import AnchorSpace

ORGANISM_NOTE = "embedded model: shows the method, proves nothing about 7B models"

MEASURED = ("states", "responses", "judged", "rates", "space", "refusal", "harmfulness")


@dataclass(frozen=True, eq=False, repr=False, init=False)
class Study:
    """One model x queries x safety prompts. Each result is computed when first asked for, and kept.

    A Study does not change. Make another one with `dataclasses.replace`, or with `under`.

    Parameters
    ----------
    model : ChatModel or str
        A name is opened with `ChatModel.load`.
    queries : DataFrame with query_id and text, or str
        A name or a file is read with `load_queries`. The column harmful is needed for
        `harmfulness`.
    prompts : mapping of names to text or SoftPrompt, or str, optional
        A file is read with `load_safety_prompts`. Default: the built-in ones.
    store : Store, optional
        States and replies are read from it and kept in it.
    layers : sequence of int
        As in `hidden_states`.
    k : int
        Components of the space.
    judge : function of str, or RowJudge
        As in `judge_responses`.
    n_samples, max_new_tokens, temperature, top_p, top_k, seed
        As in `sample_responses`.
    stop_when : function of str, "auto" or None
        Ends a reply early, as in `sample_responses`. "auto" ends it where a string judge's
        verdict is final; any other judge reads whole replies.
    anchor : Study, optional
        The study whose space and directions are taken, see `under`.
    known : mapping, optional
        Results that are there already, such as {"rates": table}. They are taken as they are.

    Attributes
    ----------
    states : HiddenStates
        Of every query under every prompt, prompts outer, queries inner: n rows.
    responses : DataFrame
        `n_samples` replies to each row.
    judged : DataFrame
        The replies with the judge's verdicts.
    rates : DataFrame
        query_id, prompt, refusal_rate in [0, 1], n_judged.
    space : AnchorSpace
        Fitted to the states of `layer`.
    coordinates : array (n, k)
        The states in the space.
    points : DataFrame
        The rows of the states with the coordinates pc1 .. pck, as figures take them.
    rows : DataFrame
        The rows of the states with their refusal rates.
    refusal : Direction
        Fitted to the refusal rates. Rows without a rate are left out.
    harmfulness : Direction
        Fitted to the labels. Queries without a label are left out.

    Raises
    ------
    TypeError, ValueError
        Where something is no model, table, prompt, layer, number of components or judge.

    Examples
    --------
    >>> from analysis_lib import Study
    >>> study = Study("organism", "anchor", n_samples=1)
    >>> study
    <Study of 'organism': 200 queries x 4 prompts; measured: nothing yet>
    >>> round(study.harmfulness.scores["accuracy"], 2)
    0.96
    >>> study.points[["pc1", "pc2", "pc3", "pc4"]].shape
    (800, 4)
    """

    model: ChatModel
    queries: pd.DataFrame
    prompts: dict[str, Prompt]
    store: Store | None
    layers: tuple[int, ...]
    k: int
    judge: RowJudge | TextJudge
    n_samples: int
    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    seed: int
    stop_when: Callable[[str], bool] | str | None
    anchor: Study | None

    def __init__(
        self,
        model: ChatModel | str | Path,
        queries: pd.DataFrame | str | Path,
        prompts: Mapping[str, Prompt] | str | Path | None = None,
        *,
        store: Store | None = None,
        layers: Sequence[int] = (-1,),
        k: int = 4,
        judge: RowJudge | TextJudge = is_refusal,
        n_samples: int = 20,
        max_new_tokens: int = 300,
        temperature: float = 1.0,
        top_p: float = 0.9,
        top_k: int = 50,
        seed: int = 0,
        stop_when: Callable[[str], bool] | str | None = "auto",
        anchor: Study | None = None,
        known: Mapping[str, Any] | None = None,
    ) -> None:
        model, queries, prompts = _model(model), _queries(queries), _prompts(prompts)
        layers = checked_layers(model, (layers,) if isinstance(layers, int) else layers)
        if not 1 <= k <= model.hidden_size:
            raise ValueError(f"k = {k}: give a number of components from 1 to {model.hidden_size}")
        if not callable(judge):
            raise TypeError(f"judge = {judge!r}: give one function, such as is_refusal")
        if isinstance(stop_when, str) and stop_when != "auto":
            raise ValueError(f"stop_when = {stop_when!r}: give a function, 'auto' or None")
        if unknown := set(known or {}) - set(MEASURED):
            raise ValueError(f"known = {sorted(unknown)}: names are {', '.join(MEASURED)}")
        given = {name: value for name, value in locals().items() if name in self.__annotations__}
        vars(self).update(given | dict(known or {}))

    def __repr__(self) -> str:
        done = ", ".join(name for name in MEASURED if name in vars(self)) or "nothing yet"
        asked = f"{len(self.queries)} queries x {len(self.prompts)} prompts"
        return f"<Study of {self.model.name!r}: {asked}; measured: {done}>"

    def under(
        self,
        prompts: Mapping[str, Prompt] | str | Path,
        *,
        queries: pd.DataFrame | str | Path | None = None,
        **changed: Any,
    ) -> Study:
        """Other prompts, and perhaps other queries or settings, seen in this study's space.

        The new study has its own states, replies and rates. Its space and its directions are those
        of this one.

        Parameters
        ----------
        prompts : mapping of names to text or SoftPrompt, or str
        queries : DataFrame or str, optional
            Default: the same.
        **changed
            Other parameters of the class.

        Examples
        --------
        >>> from analysis_lib import Study
        >>> study = Study("organism", "anchor")
        >>> mine = study.under({"none": "", "mine": "Be careful."}, queries="facts")
        >>> mine.anchor is study
        True
        """
        asked = self.queries if queries is None else queries
        changed = {"anchor": self.anchor or self, **changed}
        return replace(self, prompts=prompts, queries=asked, **changed)  # type: ignore[arg-type]

    @property
    def layer(self) -> int:
        """The layer of the space: -1 where it is among `layers`, else the highest."""
        return -1 if -1 in self.layers else max(self.layers)

    @property
    def start(self) -> str:
        """Where a training starts: your own first prompt, else "default", else the first text."""
        texts = [n for n, p in self.prompts.items() if isinstance(p, str) and p.strip()]
        own = [name for name in texts if name not in load_safety_prompts()]
        if not texts:
            raise ValueError(
                f"no prompt of {list(self.prompts)} is a text to start from; add one to prompts"
            )
        return (own or [name for name in texts if name == "default"] or texts)[0]

    @property
    def note(self) -> str:
        """A caption for figures: the model's name, or what the embedded model cannot show."""
        return ORGANISM_NOTE if self.model.name == "organism" else self.model.name

    @property
    def sampling(self) -> dict[str, Any]:
        """The options of `sample_responses` in this study, but for the store."""
        names = ("n_samples", "max_new_tokens", "temperature", "top_p", "top_k", "seed")
        stop: Any = self.stop_when
        if stop == "auto":
            stop = final_verdict_of(self.judge)
        return {name: getattr(self, name) for name in names} | {"stop_when": stop}

    @cached_property
    def states(self) -> HiddenStates:
        return hidden_states(
            self.model, self.queries, self.prompts, layers=self.layers, store=self.store
        )

    @cached_property
    def responses(self) -> pd.DataFrame:
        return sample_responses(
            self.model, self.queries, self.prompts, store=self.store, **self.sampling
        )

    @cached_property
    def judged(self) -> pd.DataFrame:
        return judge_responses(self.responses, self.judge, queries=self.queries)

    @cached_property
    def rates(self) -> pd.DataFrame:
        return refusal_rates(self.judged)

    @cached_property
    def space(self) -> AnchorSpace:
        if self.anchor is not None:
            return self.anchor.space
        return AnchorSpace.fit(self.states.at(self.layer)[0], self.k)

    @cached_property
    def coordinates(self) -> NDArray[np.float64]:
        return self.space.transform(self.states.at(self.layer)[0])

    @cached_property
    def rows(self) -> pd.DataFrame:
        keys = ["query_id", "prompt"]
        return self.states.rows.merge(self.rates, on=keys, how="left", validate="one_to_one")

    @cached_property
    def points(self) -> pd.DataFrame:
        columns = {f"pc{i + 1}": values.round(4) for i, values in enumerate(self.coordinates.T)}
        return self.states.rows.assign(**columns)

    @cached_property
    def refusal(self) -> Direction:
        if self.anchor is not None:
            return self.anchor.refusal
        return self._direction("refusal", self.rows["refusal_rate"])

    @cached_property
    def harmfulness(self) -> Direction:
        if self.anchor is not None:
            return self.anchor.harmfulness
        if "harmful" not in self.queries:
            raise ValueError(
                "the queries have no column 'harmful', so no harmfulness can be fitted; add it, "
                "with true and false"
            )
        return self._direction("harmfulness", self.states.rows["harmful"].astype("Float64"))

    def _direction(self, name: str, target: pd.Series) -> Direction:
        known = target.notna().to_numpy()
        if not known.any():
            raise ValueError(
                f"no row has a value that {name!r} could be fitted to; give labelled queries, or a "
                "judge that scores"
            )
        groups = query_units(self.states.rows[known])
        return fit_direction(
            self.coordinates[known], target[known].astype(float), name=name, groups=groups
        )


def _model(given: ChatModel | str | Path) -> ChatModel:
    if isinstance(given, str | Path):
        return ChatModel.load(given)
    if not isinstance(given, ChatModel):
        raise TypeError(
            f"model = {given!r:.100}: give a name or a ChatModel; ChatModel.wrap(model, tokenizer) "
            "makes one of transformers objects"
        )
    return given


def _queries(given: pd.DataFrame | str | Path) -> pd.DataFrame:
    if isinstance(given, str | Path):
        given = load_queries(given)
    if not isinstance(given, pd.DataFrame):
        raise TypeError(
            f"queries = {given!r:.100}: give a table, or a name or file for load_queries"
        )
    check_queries(given)
    if given.empty:
        raise ValueError("the table of queries is empty; give at least one query")
    given = with_labels(given.copy())
    if "harmful" in given:
        refuse_two_labels(given, "queries", given["query_id"].astype(str).tolist())
    return given


def _prompts(given: Mapping[str, Prompt] | str | Path | None) -> dict[str, Prompt]:
    if given is None or isinstance(given, str | Path):
        return {**load_safety_prompts(given)}
    check_prompts(given)
    return dict(given)
