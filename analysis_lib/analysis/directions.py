"""Directions in the anchor space: fitted, scored on held-out queries, resampled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from ..data.labels import read_labels
from ..data.units import query_units
from .estimators import Estimator, fit_data, grouped_folds, logistic, run_estimator
from .space import AnchorSpace, Array, FitError, probabilities, varies

Groups = Sequence[object] | NDArray[Any] | pd.Series  # (n,): the query of each row


@dataclass(frozen=True)
class Direction:
    """A linear logit on anchor-space coordinates. It points towards higher targets.

    Parameters
    ----------
    name : str
    weight : array (k,)
        Change of the logit per unit of coordinate.
    bias : float
        The logit at coordinates 0.
    scores : mapping of str to float
        Figures on held-out queries, see `held_out_scores`.

    Examples
    --------
    >>> import numpy as np
    >>> from analysis_lib import Direction
    >>> refusal = Direction("refusal", np.array([3.0, 4.0]), bias=-5.0)
    >>> refusal.unit
    array([0.6, 0.8])
    """

    name: str
    weight: Array
    bias: float
    scores: Mapping[str, float] = field(default_factory=dict)

    def logit(self, Z: ArrayLike) -> Array:
        """Log odds at coordinates Z (n, k), shape (n,). The boundary is logit = 0.

        Examples
        --------
        >>> import numpy as np
        >>> from analysis_lib import Direction
        >>> Direction("refusal", np.array([3.0, 4.0]), -5.0).logit([[1, 1], [0, 0]])
        array([ 2., -5.])
        """
        return np.asarray(np.asarray(Z, dtype=np.float64) @ self.weight + self.bias)

    def probability(self, Z: ArrayLike) -> Array:
        """The logistic function of the logit at coordinates Z (n, k), shape (n,), in (0, 1).

        Examples
        --------
        >>> import numpy as np
        >>> from analysis_lib import Direction
        >>> Direction("refusal", np.array([3.0, 4.0]), -5.0).probability([[1, 0.5]])
        array([0.5])
        """
        return probabilities(self.logit(Z))

    @property
    def unit(self) -> Array:
        """The unit vector (k,) along the weight. Raises FitError where the weight is 0."""
        if not np.any(self.weight):
            raise FitError(f"the weight of {self.name!r} is 0, which has no direction")
        return np.asarray(self.weight / np.linalg.norm(self.weight))

    def angle(self, other: Direction) -> float:
        """Angle to another direction of the same space, in degrees, 0 to 180.

        Examples
        --------
        >>> import numpy as np
        >>> from analysis_lib import Direction
        >>> right, up = (Direction(n, np.array(w), 0.0) for n, w in [("x", [2, 0]), ("y", [0, 1])])
        >>> right.angle(up)
        90.0
        """
        return float(np.degrees(np.arccos(np.clip(self.unit @ other.unit, -1, 1))))


Fold = tuple[NDArray[np.bool_], Direction]  # the rows held out (n,), and the fit to the others


def fit_direction(
    Z: ArrayLike,
    y: ArrayLike,
    *,
    name: str,
    groups: Groups,
    estimator: Estimator | str = logistic,
    n_splits: int = 5,
    seed: int = 42,
) -> Direction:
    """Fits a direction to all rows, and scores it on held-out groups.

    Parameters
    ----------
    Z : array (n, k)
        Coordinates, as `AnchorSpace.transform` gives them.
    y : array (n,)
        Targets in [0, 1]: a rate or a 0/1 label.
    name : str
        Stands in messages and legends.
    groups : array (n,)
        Rows of one group never stand on both sides of a held-out split; give `query_units(rows)`.
    estimator : function or str
        A function of (Z, y, groups, seed) to (weight (k,), bias), such as `logistic`,
        `mean_difference`, `published_estimator` or your own; or its name: "logistic",
        "mean_difference", "paper".
    n_splits : int
        Number of held-out folds.
    seed : int
        Shuffles the groups into folds, and goes to the estimator.

    Returns
    -------
    Direction
        Its scores are those of `held_out_scores`.

    Raises
    ------
    FitError
        Where a target lies outside [0, 1] or is NaN, all targets are equal, there are too few rows
        or groups, or the estimator returns anything but k finite weights and a bias.

    References
    ----------
    Zheng et al. (2024), "On Prompt-Driven Safeguarding for Large Language Models", section 2.

    Examples
    --------
    >>> import numpy as np
    >>> from analysis_lib import fit_direction
    >>> Z = np.random.default_rng(0).normal(size=(60, 2))
    >>> direction = fit_direction(Z, Z[:, 0] > 0, name="right", groups=np.arange(60))
    >>> direction.unit.round(1), direction.scores["accuracy"] > 0.9
    (array([1., 0.]), True)
    >>> def first_axis(Z, y, groups, seed):
    ...     return np.array([1.0, 0.0]), 0.0
    >>> fit_direction(Z, Z[:, 0] > 0, name="x", groups=range(60), estimator=first_axis).weight
    array([1., 0.])
    """
    Z, y, groups = fit_data(Z, y, groups, name)
    folds = fit_folds(
        Z, y, name=name, groups=groups, estimator=estimator, n_splits=n_splits, seed=seed
    )
    weight, bias = run_estimator(estimator, Z, y, groups, seed)
    return Direction(name, weight, bias, held_out_scores(Z, y, folds))


def fit_folds(
    Z: ArrayLike,
    y: ArrayLike,
    *,
    name: str,
    groups: Groups,
    estimator: Estimator | str = logistic,
    n_splits: int = 5,
    seed: int = 42,
) -> list[Fold]:
    """The fits behind held-out scores: one direction a fold of groups.

    Parameters
    ----------
    Z, y, name, groups, estimator, n_splits, seed
        As in `fit_direction`.

    Returns
    -------
    list of n_splits pairs (test, direction)
        test (n,) is True in the rows held out; the direction is fitted to the others.

    Raises
    ------
    FitError
        As `fit_direction` does.

    Examples
    --------
    >>> import numpy as np
    >>> from analysis_lib.analysis.directions import fit_folds
    >>> Z = np.random.default_rng(0).normal(size=(60, 2))
    >>> folds = fit_folds(Z, Z[:, 0] > 0, name="right", groups=np.arange(60), n_splits=3)
    >>> [int(test.sum()) for test, direction in folds]
    [20, 20, 20]
    """
    Z, y, groups = fit_data(Z, y, groups, name)
    n_groups = len(np.unique(groups.astype(str)))
    if not 2 <= n_splits <= n_groups:
        raise FitError(
            f"{n_groups} groups cannot be split into {n_splits} folds; "
            "give n_splits from 2 to the number of groups"
        )
    folds: list[Fold] = []
    for test in grouped_folds(groups, n_splits, seed):
        train = ~test
        if not varies(y[train]):
            raise FitError(
                f"a fold of {name!r} holds a single target value; "
                "use fewer folds or more varied queries"
            )
        weight, bias = run_estimator(estimator, Z[train], y[train], groups[train], seed)
        folds.append((test, Direction(name, weight, bias)))
    return folds


def held_out_scores(Z: ArrayLike, y: ArrayLike, folds: Sequence[Fold]) -> dict[str, float]:
    """How well each fold's direction tells the targets of the rows that it did not see.

    Parameters
    ----------
    Z : array (n, k)
        Coordinates.
    y : array (n,)
        Targets in [0, 1].
    folds : sequence of pairs (test, direction)
        As `fit_folds` returns them. Each row is held out in one of them.

    Returns
    -------
    dict
        bce: mean cross-entropy in nats. bce_constant: the same of the mean target of each fold's
        other rows. mse: mean squared error of the probability. accuracy: share of rows on the right
        side, where y > 0.5 is one side. spearman: rank correlation of logit and y.

    Examples
    --------
    >>> import numpy as np
    >>> from analysis_lib import Direction
    >>> from analysis_lib.analysis.directions import held_out_scores
    >>> right, first = Direction("right", np.array([4.0]), 0.0), np.array([True, False])
    >>> held_out_scores([[-1.0], [1.0]], [0, 1], [(first, right), (~first, right)])["accuracy"]
    1.0
    """
    Z, y = np.asarray(Z, dtype=np.float64), np.asarray(y, dtype=np.float64)
    logit, constant = np.zeros(len(y)), np.zeros(len(y))
    for test, direction in folds:
        logit[test] = direction.logit(Z[test])
        constant[test] = np.clip(y[~test].mean(), 1e-6, 1 - 1e-6)
    return {
        "bce": float(np.mean(np.logaddexp(0, logit) - y * logit)),
        "bce_constant": float(-np.mean(y * np.log(constant) + (1 - y) * np.log(1 - constant))),
        "mse": float(np.mean((probabilities(logit) - y) ** 2)),
        "accuracy": float(np.mean((logit > 0) == (y > 0.5))),
        "spearman": float(pd.Series(logit).corr(pd.Series(y), method="spearman")),
    }


def bootstrap_directions(
    Z: ArrayLike,
    y: ArrayLike,
    *,
    groups: Groups,
    n_draws: int = 200,
    estimator: Estimator | str = logistic,
    seed: int = 0,
) -> Array:
    """Directions refitted on resampled groups: how far the direction itself is known.

    Parameters
    ----------
    Z : array (n, k)
        Coordinates.
    y : array (n,)
        Targets in [0, 1].
    groups : array (n,)
        What is drawn with replacement; give `query_units(rows)`.
    n_draws : int
        Number of refits. Draws with a single target value are drawn again.
    estimator : function or str
        As in `fit_direction`.
    seed : int
        Fixes the draws, and goes to the estimator.

    Returns
    -------
    array (n_draws, k)
        Unit vectors.

    Raises
    ------
    FitError
        As `fit_direction` does, and where the estimator returns a weight of 0.

    Examples
    --------
    >>> import numpy as np
    >>> from analysis_lib import bootstrap_directions
    >>> Z = np.random.default_rng(0).normal(size=(60, 2))
    >>> draws = bootstrap_directions(Z, Z[:, 0] > 0, groups=np.arange(60), n_draws=5)
    >>> draws.shape, bool((draws[:, 0] > 0.9).all())
    ((5, 2), True)
    """
    Z, y, groups = fit_data(Z, y, groups, "the bootstrap")
    if n_draws < 1:
        raise FitError(f"n_draws = {n_draws}: give 1 draw or more")
    rng, names = np.random.default_rng(seed), np.unique(groups)
    rows_of = {g: np.flatnonzero(groups == g) for g in names}
    draws: list[Array] = []
    while len(draws) < n_draws:
        rows = np.concatenate([rows_of[g] for g in rng.choice(names, len(names))])
        if not varies(y[rows]):
            continue
        weight, _ = run_estimator(estimator, Z[rows], y[rows], groups[rows], seed)
        if not weight.any():
            raise FitError("the estimator found a weight of 0, which has no direction; try another")
        draws.append(weight / np.linalg.norm(weight))
    return np.stack(draws)


def separation(states: ArrayLike, rows: pd.DataFrame, *, k: int = 4) -> float:
    """Held-out accuracy of a linear boundary between harmful and harmless queries.

    The boundary lies in k principal components. They see all states, but no label.

    Parameters
    ----------
    states : array (n, d)
        Hidden states.
    rows : DataFrame with query_id, harmful and perhaps text, pair_id
        Rows without a label are left out. A pair stays on one side of a split, as copies of a text
        do: the label of one twin would tell that of the other.
    k : int
        Number of components.

    Returns
    -------
    float
        In [0, 1]; 0.5 is chance where both classes have as many queries.

    Raises
    ------
    FitError
        As `AnchorSpace.fit` and `fit_direction` do.

    Examples
    --------
    >>> import numpy as np, pandas as pd
    >>> from analysis_lib import separation
    >>> harmful = np.arange(40) % 2 == 0
    >>> states = np.random.default_rng(0).normal(size=(40, 6)) + 9 * harmful[:, None]
    >>> separation(states, pd.DataFrame({"query_id": range(40), "harmful": harmful}))
    1.0
    """
    harmful, groups = read_labels(rows["harmful"]), query_units(rows, pairs=True)
    known = harmful.notna().to_numpy()
    Z = AnchorSpace.fit(np.asarray(states)[known], k).transform(np.asarray(states)[known])
    labels = harmful[known].astype(float)
    return fit_direction(Z, labels, name="harmfulness", groups=groups[known]).scores["accuracy"]


def calibrate_refusal(estimates: pd.DataFrame, rates: pd.DataFrame) -> Direction:
    """A logistic calibration of `refusal_probability` to sampled rates. Fit it on anchor data.

    Parameters
    ----------
    estimates : DataFrame with query_id, prompt, log_odds
        As `refusal_probability` gives them.
    rates : DataFrame with query_id, prompt, refusal_rate
        As `refusal_rates` gives them. Rows without a rate are left out.

    Returns
    -------
    Direction
        On one coordinate, the log odds. Give it to `refusal_probability(calibration=...)`. Its
        scores are held out by query.

    Raises
    ------
    FitError
        As `fit_direction` does.

    Examples
    --------
    >>> import numpy as np, pandas as pd
    >>> from analysis_lib import calibrate_refusal
    >>> keys = {"query_id": [f"q{i}" for i in range(20)], "prompt": "none"}
    >>> odds = np.linspace(-3, 3, 20)
    >>> rates = pd.DataFrame(keys).assign(refusal_rate=1 / (1 + np.exp(-odds - 1)))
    >>> calibration = calibrate_refusal(pd.DataFrame(keys).assign(log_odds=odds), rates)
    >>> bool(calibration.bias > 0.5)
    True
    """
    keys = ["query_id", "prompt"]
    both = estimates.merge(rates[[*keys, "refusal_rate"]], on=keys).dropna()
    Z, y = both[["log_odds"]].to_numpy(), both["refusal_rate"]
    return fit_direction(Z, y, name="first tokens", groups=query_units(both))
