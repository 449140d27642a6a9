"""A sample for every argument of a figure, made of given texts: what a figure asks for by name.

A figure that is added anywhere under `analysis_lib.figures` is found by its name, `plot_...`, and
drawn with these. One with an argument of a new name needs a line in `samples`; one whose table has
new columns needs them in `tables`.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

import numpy as np
import pandas as pd

from analysis_lib import Direction, figures

Figure = Callable[..., Any]
K = 4  # components


def plot_functions() -> dict[str, Figure]:
    """Every public figure of `analysis_lib.figures` and of the modules in it, by name."""
    inside = pkgutil.iter_modules(getattr(figures, "__path__", []), f"{figures.__name__}.")
    modules = [figures, *(import_module(found.name) for found in inside)]
    found = {name: value for module in modules for name, value in vars(module).items()}
    return {name: found[name] for name in sorted(found) if name.startswith("plot_")}


def queries_of(texts: Sequence[str]) -> pd.DataFrame:
    """Queries whose every id and text is one of `texts`."""
    table = pd.DataFrame({"query_id": texts, "text": texts}, dtype=object)  # lone surrogates
    table["harmful"] = pd.array([True, False] * len(texts), dtype="boolean")[: len(texts)]
    return table


def names_of(texts: Sequence[str]) -> list[str]:
    """Names of prompts."""
    return ["none", *texts[:3]]


def states_of(n: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((n, 1, 8)).astype(np.float32)


def points_of(texts: Sequence[str]) -> pd.DataFrame:
    """The queries under every prompt, with coordinates and rates."""
    queries = queries_of(texts)
    parts = [queries.assign(prompt=name) for name in names_of(texts)]
    points = pd.concat(parts, ignore_index=True)
    states = states_of(len(points))
    for i in range(K):
        points[f"pc{i + 1}"] = states[:, 0, i].round(4)
    points["refusal_rate"] = np.linspace(0, 1, len(points))
    return points.assign(
        predicted=0.5, observed=0.4, predicted_logit=1.0, true_logit=2.0, shift=0.5
    )


def tables(texts: Sequence[str]) -> list[pd.DataFrame]:
    """One row per query and prompt; per prompt; per model, under one method and prompt."""
    by_prompt = pd.DataFrame({"model": texts, "method": texts, "prompt": texts})
    by_prompt = by_prompt.assign(query_set=texts[0], metric=texts[1], start=texts)
    by_prompt = by_prompt.assign(nearest=texts[::-1], value=0.5, low=0.4, high=0.6)
    by_prompt = by_prompt.assign(cosine=0.5, accuracy=0.9)
    rates = {"harmless refused": 1.0, "harmful answered": 2.0, "facts right": 3.0}
    by_prompt = by_prompt.assign(**rates)
    return [points_of(texts), by_prompt, by_prompt.assign(method=texts[2], prompt=texts[3])]


def samples(texts: Sequence[str]) -> dict[str, list[Any]]:
    """Argument -> what is tried in its place; the figure takes what it can."""
    points, names = points_of(texts), names_of(texts)
    direction = Direction(texts[0], np.ones(K) / 2, 0.1, {})
    losses = pd.DataFrame({"step": [1, 2], **dict.fromkeys(texts[:8], 0.5)})
    panels = {text: figures.plot_groups(points) for text in texts[:2]}
    return {
        "points": [points],
        "rates": [points],
        "shifts": [points],
        "table": tables(texts),
        "queries": [queries_of(texts)],
        "history": [losses],
        "figures": [panels],
        "path": [names[:3]],
        "prompts": [names],
        "direction": [direction],
        "explained": [np.ones(K) / K],
        "color": ["refusal_rate"],
        "title": [texts[0]],
        "note": [texts[1]],
        "axis": [texts[2]],
    }


class NoSample(LookupError):
    """A figure for which no sample can be made."""


def drawn(texts: Sequence[str], functions: Mapping[str, Figure] | None = None) -> list[Any]:
    """Every figure, with all that it can take of the samples. Raises NoSample."""
    return [full for _, full in both(texts, functions)]


def both(
    texts: Sequence[str], functions: Mapping[str, Figure] | None = None
) -> list[tuple[Any, Any]]:
    """Every figure: of what it must be given, and with all that it can take. Raises NoSample."""
    known = samples(texts)
    found = plot_functions() if functions is None else functions
    return [bare_and_full(name, plot, known, texts[3]) for name, plot in found.items()]


def is_text(annotation: object) -> bool:
    return annotation in (str, "str", "str | None")


def bare_and_full(
    name: str, plot: Figure, known: Mapping[str, list[Any]], text: str
) -> tuple[Any, Any]:
    """text: for arguments of no known name that are strings."""
    arguments = inspect.signature(plot).parameters
    must = [a for a, one in arguments.items() if one.default is inspect.Parameter.empty]
    if lacking := [argument for argument in must if argument not in known]:
        raise NoSample(
            f"{name} asks for {', '.join(lacking)}, for which faults/samples.py has no sample; add "
            "one to `samples`, made of the texts"
        )
    more = {a: known[a][0] for a in arguments if a in known and a not in must}
    more |= {a: text for a, one in arguments.items() if a not in known and is_text(one.annotation)}
    why = []
    for values in itertools.product(*(known[argument] for argument in must)):
        given = dict(zip(must, values, strict=True))
        try:
            bare = full = plot(**given)
        except (ValueError, KeyError) as error:
            why.append(f"{error!r:.200}")
            continue
        for argument, value in more.items():
            with contextlib.suppress(ValueError):  # such as a column that is not there
                full = plot(**given, **{argument: value})
                given[argument] = value
        return bare, full
    raise NoSample(
        f"{name} takes no sample of faults/samples.py; add the columns it needs to `tables`, or a "
        f"sample to `samples`. It said: {'; '.join(why)}"
    )
