"""Estimators: plain functions from coordinates and targets to a direction's weight and bias.

An estimator takes coordinates Z (n, k), targets y (n,) in [0, 1], groups (n,) whose rows belong
together, and a seed. It returns a weight (k,) and a bias. `fit_direction(estimator=...)` takes any
such function. To add one to the names, write it here and add it to `ESTIMATORS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from .space import Array, FitError, finite, varies

Estimator = Callable[[Array, Array, NDArray[Any], int], tuple[Array, float]]


def logistic(Z: Array, y: Array, groups: NDArray[Any], seed: int) -> tuple[Array, float]:
    """The default estimator: maximum likelihood of soft labels with a weak L2 penalty.

    Coordinates are standardised before the fit, so that the penalty has no unit. A soft label
    counts as two weighted hard ones.

    Parameters
    ----------
    Z : array (n, k)
        Coordinates.
    y : array (n,)
        Targets in [0, 1].
    groups, seed
        Not used: the solver converges to the one optimum.

    Returns
    -------
    weight : array (k,)
        Change of the logit per unit of coordinate.
    bias : float

    Examples
    --------
    >>> import numpy as np
    >>> from analysis_lib import logistic
    >>> Z, y = np.array([[-1.0], [0.0], [1.0]]), np.array([0.1, 0.5, 0.9])
    >>> weight, bias = logistic(Z, y, np.arange(3), 0)
    >>> bool(weight[0] > 0), abs(round(bias, 6))
    (True, 0.0)
    """
    from sklearn.linear_model import LogisticRegression

    center, scale = Z.mean(axis=0), np.maximum(Z.std(axis=0), 1e-12)
    S = (Z - center) / scale
    fit = LogisticRegression(C=1.0, solver="newton-cholesky", tol=1e-10, max_iter=200)
    labels = np.concatenate([np.ones(len(y)), np.zeros(len(y))])
    fit.fit(np.vstack([S, S]), labels, sample_weight=np.concatenate([y, 1 - y]))
    weight = fit.coef_[0] / scale
    return weight, float(fit.intercept_[0] - weight @ center)


def mean_difference(Z: Array, y: Array, groups: NDArray[Any], seed: int) -> tuple[Array, float]:
    """The difference of the y-weighted means, scaled by a logistic fit along it.

    Parameters
    ----------
    Z : array (n, k)
        Coordinates.
    y : array (n,)
        Targets in [0, 1]. The second mean is weighted by 1 - y.
    groups, seed
        Not used.

    Returns
    -------
    weight : array (k,)
        Change of the logit per unit of coordinate.
    bias : float

    Raises
    ------
    FitError
        Where both means coincide.

    Examples
    --------
    >>> import numpy as np
    >>> from analysis_lib import mean_difference
    >>> Z, y = np.array([[0.0, 1.0], [3.0, 5.0], [0.0, 1.0]]), np.array([0.0, 1.0, 0.0])
    >>> weight, _ = mean_difference(Z, y, np.arange(3), 0)
    >>> (weight / np.linalg.norm(weight)).round(3)
    array([0.6, 0.8])
    """
    difference = np.average(Z, axis=0, weights=y) - np.average(Z, axis=0, weights=1 - y)
    if not np.linalg.norm(difference) > 0:
        raise FitError(
            "both means coincide, so no direction exists; use more varied queries or prompts"
        )
    unit = difference / np.linalg.norm(difference)
    slope, bias = logistic(Z @ unit[:, None], y, groups, seed)
    return slope[0] * unit, bias


def published_estimator(Z: Array, y: Array, groups: NDArray[Any], seed: int) -> tuple[Array, float]:
    """The study's estimator: AdamW from a random start, stopped early, averaged over 10 folds.

    It differs from the official code in one thing: a group stays on one side of a fold. It is slow,
    and on small coordinates it stops close to its start. It needs torch.

    Parameters
    ----------
    Z : array (n, k)
        Coordinates.
    y : array (n,)
        Targets in [0, 1].
    groups : array (n,)
        Rows of one group stand in one fold; with fewer than 10 groups there are as many folds.
    seed : int
        Fixes the folds and the starts.

    Returns
    -------
    weight : array (k,)
        Change of the logit per unit of coordinate.
    bias : float

    References
    ----------
    Zheng et al. (2024), "On Prompt-Driven Safeguarding for Large Language Models", and its code,
    chujiezheng/LLM-Safeguard.

    Examples
    --------
    >>> import numpy as np
    >>> from analysis_lib import published_estimator
    >>> y = np.tile([0.0, 1.0], 4)
    >>> Z = np.column_stack([50 * y, 1 - y])
    >>> weight, bias = published_estimator(Z, y, np.arange(8) // 4, 0)
    >>> weight.shape, type(bias)
    ((2,), <class 'float'>)
    """
    import torch

    torch.manual_seed(seed)
    X, Y = torch.tensor(Z, dtype=torch.float32), torch.tensor(y, dtype=torch.float32)[:, None]
    folds = grouped_folds(groups, min(10, len(np.unique(groups.astype(str)))), seed)
    test = torch.from_numpy(np.stack(folds, axis=1)).float()
    n_folds, fold_of = test.shape[1], test.argmax(1, keepdim=True)
    test_mean, train_mean = (test / test.sum(0)).T.contiguous(), (1 - test) / (1 - test).sum(0)
    # AdamW acts on each number by itself, so all folds are trained at once, one column each.
    starts = [torch.nn.Linear(X.shape[1], 1) for _ in range(n_folds)]
    # In memory as its gradient is: the fused AdamW takes both by address.
    weight = torch.cat([m.weight.detach() for m in starts]).T.contiguous()
    bias = torch.cat([m.bias.detach() for m in starts])
    optimizer = torch.optim.AdamW([weight, bias], lr=1e-4, fused=True)
    best, worse = torch.full((n_folds,), torch.inf), torch.zeros(n_folds)
    kept_weight, kept_bias = weight.clone(), bias.clone()
    for _ in range(10_000):
        logit = torch.addmm(bias, X, weight)
        own = logit.gather(1, fold_of)  # each row's in the fold that holds it out
        loss = torch.nn.functional.softplus(own) - Y * own
        held_out = (test_mean @ loss)[:, 0]  # of the weights before this step
        better = (held_out < best - 1e-4) & (worse < 3)
        best = torch.where(better, held_out, best)
        kept_weight = torch.where(better, weight, kept_weight)
        kept_bias = torch.where(better, bias, kept_bias)
        worse = torch.where(better, 0.0, torch.where(worse < 3, worse + 1, worse))
        if bool((worse >= 3).all()):
            break
        residual = (logit.sigmoid() - Y) * train_mean  # the cross-entropy's gradient by logit
        weight.grad, bias.grad = X.T @ residual, residual.sum(0)
        optimizer.step()
    return kept_weight.mean(1).double().numpy(), float(kept_bias.mean())


ESTIMATORS: Mapping[str, Estimator] = {
    "logistic": logistic,
    "mean_difference": mean_difference,
    "paper": published_estimator,
}


def fit_data(
    Z: ArrayLike, y: ArrayLike, groups: object, name: str
) -> tuple[Array, Array, NDArray[Any]]:
    """The checked arrays of a fit.

    Parameters
    ----------
    Z : array (n, k)
        Coordinates.
    y : array (n,)
        Targets in [0, 1].
    groups : array (n,)
    name : str
        What is fitted, for the messages.

    Returns
    -------
    arrays (n, k), (n,) and (n,)

    Raises
    ------
    FitError
        Where they carry no fit; see `fit_direction`.

    Examples
    --------
    >>> from analysis_lib.analysis.estimators import fit_data
    >>> Z, y, groups = fit_data([[1], [2]], [0, 1], ["a", "b"], "refusal")
    >>> y
    array([0., 1.])
    """
    Z, y, groups = finite(Z, "coordinates"), np.asarray(y, dtype=np.float64), np.asarray(groups)
    n, k = Z.shape
    if len(nameless := np.flatnonzero(pd.isna(groups))):
        raise FitError(
            f"{len(nameless)} of {len(groups)} rows have no group, the first is row "
            f"{nameless[0]}; give each row its query, as query_units(rows) does"
        )
    if len(y) != n or len(groups) != n:
        raise FitError(
            f"{n} rows of coordinates, {len(y)} targets and {len(groups)} groups: "
            "give one of each per row"
        )
    bad = np.flatnonzero(~((y >= 0) & (y <= 1)))
    if len(bad):
        raise FitError(
            f"targets of {name!r} must lie in [0, 1]; {_name_rows(bad, groups)} do not: "
            "drop unscored rows first"
        )
    if n <= k:
        raise FitError(
            f"{n} rows cannot fix a direction in {k} components; "
            "give more queries or fewer components"
        )
    if len(flat := np.flatnonzero(np.ptp(Z, axis=0) == 0)):
        raise FitError(
            f"coordinate {flat[0] + 1} of {k} is {Z[0, flat[0]]:g} in all {n} rows, so {name!r} "
            "has no slope along it; give rows that vary in it, or fewer components"
        )
    if not varies(y):
        raise FitError(
            f"all targets of {name!r} equal {y[0]:g}, so no direction exists; "
            "use more varied queries or prompts"
        )
    return Z, y, groups.astype(str) if groups.dtype == object else groups


def _name_rows(bad: NDArray[np.int_], groups: NDArray[Any]) -> str:
    shown = ", ".join(f"row {i} ({groups[i]})" for i in bad[:5])
    return shown + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")


def find_estimator(estimator: Estimator | str) -> Estimator:
    """The function itself, or the one that `ESTIMATORS` has under a name.

    Parameters
    ----------
    estimator : Estimator or str

    Returns
    -------
    Estimator

    Raises
    ------
    FitError
        Where the name is unknown.

    Examples
    --------
    >>> from analysis_lib.analysis.estimators import find_estimator
    >>> find_estimator("paper").__name__
    'published_estimator'
    """
    if callable(estimator):
        return estimator
    if estimator not in ESTIMATORS:
        raise FitError(
            f"unknown estimator {estimator!r}; choose one of {', '.join(ESTIMATORS)}, "
            "or pass a function of (Z, y, groups, seed)"
        )
    return ESTIMATORS[estimator]


def run_estimator(
    estimator: Estimator | str, Z: Array, y: Array, groups: NDArray[Any], seed: int
) -> tuple[Array, float]:
    """What an estimator finds, checked: its weight (k,) and bias are finite numbers.

    Parameters
    ----------
    estimator : Estimator or str
    Z, y, groups : arrays (n, k), (n,), (n,)
        As `fit_data` returns them.
    seed : int

    Returns
    -------
    weight : array (k,)
    bias : float

    Raises
    ------
    FitError
        Where the estimator returns anything else. What it raises itself is raised.

    Examples
    --------
    >>> import numpy as np
    >>> from analysis_lib.analysis.estimators import run_estimator
    >>> run_estimator(lambda Z, y, groups, seed: Z[0], np.ones((3, 2)), np.ones(3), np.ones(3), 0)
    Traceback (most recent call last):
    ...
    analysis_lib.analysis.space.FitError: the estimator <lambda> returned a weight of shape () and \
a bias of shape (); return (weight, bias): 2 finite numbers, one a coordinate, and one number
    """
    function, k = find_estimator(estimator), Z.shape[1]
    found: Any = function(Z, y, groups, seed)
    name = getattr(function, "__name__", repr(function))
    asked = f"return (weight, bias): {k} finite numbers, one a coordinate, and one number"
    try:
        weight, bias = (np.asarray(part, dtype=np.float64) for part in found)
    except (TypeError, ValueError):
        raise FitError(f"the estimator {name} returned {found!r:.100}; {asked}") from None
    if weight.shape != (k,) or bias.shape != ():
        raise FitError(
            f"the estimator {name} returned a weight of shape {weight.shape} and a bias of shape "
            f"{bias.shape}; {asked}"
        )
    if not (np.isfinite(weight).all() and np.isfinite(bias)):
        raise FitError(f"the estimator {name} returned NaN or infinity; {asked}")
    return weight, float(bias)


def grouped_folds(groups: NDArray[Any], n_splits: int, seed: int) -> list[NDArray[np.bool_]]:
    """Folds that keep the rows of a group together.

    Parameters
    ----------
    groups : array (n,)
    n_splits : int
        Number of folds; their numbers of groups differ by one at most.
    seed : int
        Shuffles the groups.

    Returns
    -------
    list of boolean arrays (n,)
        One mask a fold: the rows held out. Every row is held out once.

    Examples
    --------
    >>> import numpy as np
    >>> from analysis_lib.analysis.estimators import grouped_folds
    >>> folds = grouped_folds(np.array(["a", "a", "b"]), 2, seed=0)
    >>> sorted(fold.tolist() for fold in folds)
    [[False, False, True], [True, True, False]]
    """
    names, inverse = np.unique(groups.astype(str), return_inverse=True)
    fold_of = np.random.default_rng(seed).permutation(len(names)) % n_splits
    return [fold_of[inverse] == i for i in range(n_splits)]
