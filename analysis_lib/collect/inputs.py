"""What is checked before a capture, sampling or training begins, and the bar it shows."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd

from ..model.chat import ChatModel
from ..model.rendering import Prompt, SoftTokens
from ..model.tampering import altered, altered_everywhere
from ..store.batches import StoreError
from ..store.store import Store


class Progress:
    """A tqdm bar that says what was found and computed, the rate of computing and the time left.

    It opens at the first computed row and goes when all is done. With shown None it appears where a
    terminal or a notebook can show it.
    """

    def __init__(self, total: int, what: str, shown: bool | None):
        self._total, self._what, self._counts = total, what, {"found": 0, "computed": 0}
        self._shown = (
            ("ipykernel" in sys.modules or sys.stderr.isatty()) if shown is None else shown
        )
        self._bar: Any = None

    def add(self, *, found: int = 0, computed: int = 0) -> None:
        from tqdm.auto import tqdm

        if self._shown and self._bar is None and self._counts["found"] + found < self._total:
            with warnings.catch_warnings():  # a notebook without ipywidgets gets the plain bar
                warnings.simplefilter("ignore")
                self._bar = tqdm(total=self._total, desc=self._what, leave=False, smoothing=0)
        self._counts["found"] += found
        self._counts["computed"] += computed
        if self._bar is not None:
            # So the rate over the whole time is that of computing.
            self._bar.initial = self._counts["found"]
            self._bar.set_postfix(self._counts, refresh=False)
            self._bar.update(sum(self._counts.values()) - self._bar.n)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def usable(store: Store | None, model: ChatModel) -> Store | None:
    """The store, or None with a warning where no key covers what the model computes.

    See `tampering`: hooks, adapters, replaced functions, autocast.
    """
    if store is None:
        return None
    name = model.name
    why = altered(model.model, name) if model.loaded else altered_everywhere(name)
    if why:
        warnings.warn(
            f"{why}, which no key in the store knows of: nothing is read from the store and "
            "nothing kept; undo it to use the store",
            stacklevel=3,
        )
        return None
    return store


Keep = Callable[..., None]


def keeper() -> Keep:
    """keep(write, ...) of one call: write(...), with one warning where the store cannot be written.

    What was computed must not be lost with it.
    """
    told = False

    def keep(write: Callable[..., None], *rows: Any, **about: Any) -> None:
        nonlocal told
        try:
            write(*rows, **about)
        except StoreError as error:
            if not told:
                told = True
                warnings.warn(
                    f"what is computed is returned, but nothing is kept: {error}", stacklevel=4
                )

    return keep


def check_queries(queries: pd.DataFrame, *more: str) -> None:
    lacking = {"query_id", "text", *more} - set(queries.columns)
    if lacking:
        raise ValueError(
            f"the queries lack the column {', '.join(sorted(lacking))}; load them with load_queries"
        )
    twice = queries["query_id"][queries["query_id"].duplicated()]
    if len(twice):
        raise ValueError(f"query_id {twice.iloc[0]!r} occurs twice; every query needs its own")
    wrong = queries["query_id"][
        [not isinstance(text, str) or not text.strip() for text in queries["text"]]
    ]
    if len(wrong):
        raise ValueError(
            f"query {wrong.iloc[0]!r} has no text; "
            "drop such rows, or load the file with load_queries"
        )


def check_prompts(prompts: Mapping[str, Prompt]) -> None:
    if (
        not isinstance(prompts, Mapping)
        or not prompts
        or not all(isinstance(p, (str, SoftTokens)) for p in prompts.values())
    ):
        raise ValueError(
            f"prompts = {prompts!r:.100}: give {{name: text or SoftPrompt}}, "
            "such as load_safety_prompts()"
        )
