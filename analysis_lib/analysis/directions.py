"""DOC analysis_lib.analysis.directions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from .space import AnchorSpace, Array, FitError, finite


def calibrate_refusal(estimates: pd.DataFrame, rates: pd.DataFrame) -> Direction:
    """Logistic calibration of the log odds of `refusal_probability` to sampled rates [query_id, prompt, refusal_rate].

    Fit it on anchor data. scores are held out by query (bce, mse, spearman; see `fit_direction`).
    """
    both = estimates.merge(
        rates[["query_id", "prompt", "refusal_rate"]], on=["query_id", "prompt"]
    ).dropna()
    return fit_direction(
        both[["log_odds"]].to_numpy(),
        both["refusal_rate"],
        name="first tokens",
        groups=both["query_id"],
    )


@dataclass(frozen=True)
class Direction:
    """A linear logit on anchor-space coordinates, pointing towards higher y.

    weight  (k,) per unit of coordinate;  bias  scalar;  scores  held-out figures, see `fit_direction`
    """

    name: str
    weight: Array
    bias: float
    scores: Mapping[str, float] = field(default_factory=dict)

    def logit(self, Z: ArrayLike) -> Array:
        """Logit (n,) at coordinates Z (n, k); the boundary is logit = 0."""
        return np.asarray(Z, dtype=np.float64) @ self.weight + self.bias

    def probability(self, Z: ArrayLike) -> Array:
        """Logistic of the logit, (n,) in (0, 1)."""
        return 1 / (1 + np.exp(-self.logit(Z)))

    @property
    def unit(self) -> Array:
        """(k,) unit vector along the weight."""
        return self.weight / np.linalg.norm(self.weight)

    def angle(self, other: Direction) -> float:
        """Angle to another direction of the same space, in degrees, 0 to 180."""
        return float(np.degrees(np.arccos(np.clip(self.unit @ other.unit, -1, 1))))


def fit_direction(
    Z: ArrayLike,
    y: ArrayLike,
    *,
    name: str,
    groups: Sequence[object] | NDArray | pd.Series,
    estimator: str = "logistic",
    n_splits: int = 5,
    seed: int = 42,
) -> Direction:
    """Fits a direction to coordinates Z (n, k) and targets y (n,) in [0, 1] (a rate or a 0/1 label).

    estimator: "logistic" (default; maximum likelihood of the soft labels with a weak L2 penalty, solved to
        convergence), "mean_difference" (difference of y-weighted means, scaled by a one-dimensional logistic
        fit), or "paper" (the published procedure: AdamW 1e-4 from a random start, stopped early, averaged over
        folds; slow, and it can stop close to its start).
    groups (n,): rows of one group never stand on both sides of a held-out split; give query_id.

    scores, all held out over `n_splits` folds of groups: bce, bce_constant (of the fold's mean rate), mse,
    accuracy (of y > 0.5), spearman (rank correlation of logit and y).

    Raises FitError when y is outside [0, 1] or NaN, has a single value, or there are too few rows or groups.
    """
    Z, y, groups = fit_data(Z, y, groups, name, estimator)
    n = len(Z)
    n_groups = len(np.unique(groups.astype(str)))
    if not 2 <= n_splits <= n_groups:
        raise FitError(
            f"{n_groups} groups cannot be split into {n_splits} folds; give n_splits from 2 to the number of groups"
        )

    folds = grouped_folds(groups, n_splits, seed)
    held_out = np.zeros(n)
    constant = np.zeros(n)
    for test in folds:
        train = ~test
        constant[test] = np.clip(y[train].mean(), 1e-6, 1 - 1e-6)
        if np.ptp(y[train]) == 0:
            raise FitError(
                f"a fold of {name!r} holds a single target value; use fewer folds or more varied queries"
            )
        weight, bias = ESTIMATORS[estimator](Z[train], y[train], groups[train], seed)
        held_out[test] = Z[test] @ weight + bias
    weight, bias = ESTIMATORS[estimator](Z, y, groups, seed)
    p = 1 / (1 + np.exp(-held_out))
    scores = {
        "bce": float(np.mean(np.logaddexp(0, held_out) - y * held_out)),
        "bce_constant": float(-np.mean(y * np.log(constant) + (1 - y) * np.log(1 - constant))),
        "mse": float(np.mean((p - y) ** 2)),
        "accuracy": float(np.mean((held_out > 0) == (y > 0.5))),
        "spearman": float(pd.Series(held_out).corr(pd.Series(y), method="spearman")),
    }
    return Direction(name, weight, float(bias), scores)


def grouped_folds(groups: NDArray, n_splits: int, seed: int) -> list[NDArray[np.bool_]]:
    """Test masks (n,) of `n_splits` folds; all rows of a group fall into one fold, groups shuffled by `seed`."""
    names, inverse = np.unique(groups.astype(str), return_inverse=True)
    fold_of = np.random.default_rng(seed).permutation(len(names)) % n_splits
    return [fold_of[inverse] == i for i in range(n_splits)]


def bootstrap_directions(
    Z: ArrayLike,
    y: ArrayLike,
    *,
    groups: Sequence[object] | NDArray | pd.Series,
    n_draws: int = 200,
    estimator: str = "logistic",
    seed: int = 0,
) -> Array:
    """Unit directions (n_draws, k) refitted on resampled groups: how far the direction itself is known.

    Draws of a single target value are drawn again. Raises FitError as `fit_direction` does.
    """
    Z, y, groups = fit_data(Z, y, groups, "the bootstrap", estimator)
    rng, names = np.random.default_rng(seed), np.unique(groups)
    rows_of = {g: np.flatnonzero(groups == g) for g in names}
    draws: list[Array] = []
    while len(draws) < n_draws:
        rows = np.concatenate([rows_of[g] for g in rng.choice(names, len(names))])
        if np.ptp(y[rows]) == 0:
            continue
        weight, _ = ESTIMATORS[estimator](Z[rows], y[rows], groups[rows], seed)
        draws.append(weight / np.linalg.norm(weight))
    return np.stack(draws)


def separation(states: ArrayLike, rows: pd.DataFrame, *, k: int = 4) -> float:
    """Held-out accuracy, in [0, 1], of a linear boundary between harmful and harmless queries in k principal components.

    states (n, d) with rows [query_id, harmful] and perhaps pair_id: a pair stays on one side of a split, else the label of
    one twin would tell that of the other. The components see all states, but no label. Queries without a label are left
    out. Errors as in `fit_direction`.
    """
    known = rows["harmful"].notna().to_numpy()
    pairs = (
        rows["pair_id"].fillna("").astype(str)
        if "pair_id" in rows
        else pd.Series("", index=rows.index)
    )
    groups = pairs.where(pairs != "", rows["query_id"])[known]
    Z = AnchorSpace.fit(np.asarray(states)[known], k).transform(np.asarray(states)[known])
    labels = rows["harmful"][known].astype(float)
    return fit_direction(Z, labels, name="harmfulness", groups=groups).scores["accuracy"]


def _logistic(Z: Array, y: Array, groups: NDArray, seed: int) -> tuple[Array, float]:
    """Soft labels as two weighted hard rows; standardised coordinates, so that the penalty has no unit."""
    from sklearn.linear_model import LogisticRegression

    center, scale = Z.mean(axis=0), np.maximum(Z.std(axis=0), 1e-12)
    S = (Z - center) / scale
    fit = LogisticRegression(C=1.0, solver="newton-cholesky", tol=1e-10, max_iter=200)
    labels = np.concatenate([np.ones(len(y)), np.zeros(len(y))])
    fit.fit(np.vstack([S, S]), labels, sample_weight=np.concatenate([y, 1 - y]))
    weight = fit.coef_[0] / scale
    return weight, float(fit.intercept_[0] - weight @ center)


def _mean_difference(Z: Array, y: Array, groups: NDArray, seed: int) -> tuple[Array, float]:
    difference = np.average(Z, axis=0, weights=y) - np.average(Z, axis=0, weights=1 - y)
    if not np.linalg.norm(difference) > 0:
        raise FitError(
            "both means coincide, so no direction exists; use more varied queries or prompts"
        )
    unit = difference / np.linalg.norm(difference)
    slope, bias = _logistic(Z @ unit[:, None], y, groups, seed)
    return slope[0] * unit, bias


def _paper(Z: Array, y: Array, groups: NDArray, seed: int) -> tuple[Array, float]:
    """The published fit (Zheng et al. 2024), except that a query stays on one side of a fold.

    AdamW acts on each number by itself, so all folds are trained at once, one column each.
    """
    import torch

    torch.manual_seed(seed)
    X, Y = torch.tensor(Z, dtype=torch.float32), torch.tensor(y, dtype=torch.float32)[:, None]
    test = torch.from_numpy(
        np.stack(grouped_folds(groups, min(10, len(np.unique(groups.astype(str)))), seed), axis=1)
    ).float()
    n_folds = test.shape[1]
    starts = [torch.nn.Linear(X.shape[1], 1) for _ in range(n_folds)]
    weight = torch.cat([m.weight.detach() for m in starts]).T.clone().requires_grad_()
    bias = torch.cat([m.bias.detach() for m in starts]).clone().requires_grad_()
    optimizer = torch.optim.AdamW([weight, bias], lr=1e-4, fused=True)
    best, kept_weight, kept_bias = (
        torch.full((n_folds,), torch.inf),
        weight.detach().clone(),
        bias.detach().clone(),
    )
    worse = torch.zeros(n_folds)
    for _ in range(10_000):
        logit = X @ weight + bias
        loss = torch.nn.functional.softplus(logit) - Y * logit
        held_out = (loss.detach() * test).sum(0) / test.sum(0)  # of the weights before this step
        better = (held_out < best - 1e-4) & (worse < 3)
        best = torch.where(better, held_out, best)
        kept_weight, kept_bias = (
            torch.where(better, weight.detach(), kept_weight),
            torch.where(better, bias.detach(), kept_bias),
        )
        worse = torch.where(better, 0.0, torch.where(worse < 3, worse + 1, worse))
        if bool((worse >= 3).all()):
            break
        optimizer.zero_grad()
        ((loss * (1 - test)).sum(0) / (1 - test).sum(0)).sum().backward()
        optimizer.step()
    return kept_weight.mean(1).double().numpy(), float(kept_bias.mean())


ESTIMATORS = {"logistic": _logistic, "mean_difference": _mean_difference, "paper": _paper}


def fit_data(
    Z: ArrayLike, y: ArrayLike, groups: object, name: str, estimator: str
) -> tuple[Array, Array, NDArray]:
    """The checked arrays (n, k), (n,), (n,) of a fit."""
    Z, y, groups = finite(Z, "coordinates"), np.asarray(y, dtype=np.float64), np.asarray(groups)
    n, k = Z.shape
    if len(y) != n or len(groups) != n:
        raise FitError(
            f"{n} rows of coordinates, {len(y)} targets and {len(groups)} groups: give one of each per row"
        )
    bad = np.flatnonzero(~((y >= 0) & (y <= 1)))
    if len(bad):
        raise FitError(
            f"targets of {name!r} must lie in [0, 1]; {_name_rows(bad, groups)} do not: drop unscored rows first"
        )
    if n <= k:
        raise FitError(
            f"{n} rows cannot fix a direction in {k} components; give more queries or fewer components"
        )
    if len(flat := np.flatnonzero(np.ptp(Z, axis=0) == 0)):
        raise FitError(
            f"coordinate {flat[0] + 1} of {k} is {Z[0, flat[0]]:g} in all {n} rows, so {name!r} has no slope along it; give rows that "
            "vary in it, or fewer components"
        )
    if np.ptp(y) == 0:
        raise FitError(
            f"all targets of {name!r} equal {y[0]:g}, so no direction exists; use more varied queries or prompts"
        )
    if estimator not in ESTIMATORS:
        raise FitError(f"unknown estimator {estimator!r}; choose one of {', '.join(ESTIMATORS)}")
    return Z, y, groups


def _name_rows(bad: NDArray, groups: NDArray) -> str:
    shown = ", ".join(f"row {i} ({groups[i]})" for i in bad[:5])
    return shown + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
