"""The anchor space: principal components of hidden states, and directions in it.

All functions are pure numpy / scikit-learn in float64 and deterministic.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


class FitError(ValueError):
    """The data cannot carry the fit; the message says why and what to change."""


@dataclass(frozen=True)
class AnchorSpace:
    """Principal components of the anchor states, completed to an orthonormal basis of the whole space.

    mean       (d,) mean of the fitted states
    basis      (d, d) orthonormal columns; the first k are the principal components
    k          number of components kept by `transform`
    explained  (k,) share of variance along each component, in [0, 1]
    """

    mean: Array
    basis: Array
    k: int
    explained: Array

    @classmethod
    def fit(cls, states: ArrayLike, k: int = 4, *, like: ArrayLike | None = None) -> AnchorSpace:
        """PCA of states (n, d) with a full SVD; each component's largest loading is positive, so that it repeats.

        like (n, j >= k): coordinates of the same rows in another space, such as another layer's, where loadings mean something
        else; each component's sign is then the one that correlates positively with the same column of `like`.
        Raises FitError for NaN or infinite rows (named), fewer than k + 1 rows, states without k independent directions,
        and a `like` of other rows or fewer columns.
        """
        X = finite(states, "states")
        n, d = X.shape
        if not 1 <= k <= d:
            raise FitError(
                f"k = {k} components asked of states with {d} dimensions; choose 1 <= k <= {d}"
            )
        if n <= k:
            raise FitError(f"{n} states cannot span {k} components; give at least {k + 1} queries")
        mean = X.mean(axis=0)
        _, singular, rows = np.linalg.svd(X - mean, full_matrices=True)
        if singular[k - 1] <= 1e-9 * max(1.0, singular[0]):
            rank = int(np.sum(singular > 1e-9 * max(1.0, singular[0])))
            raise FitError(
                f"the states vary in {rank} directions only, {k} components were asked; are all states equal?"
            )
        basis = rows.T
        basis = basis * np.where(basis[np.abs(basis).argmax(axis=0), np.arange(d)] < 0, -1.0, 1.0)
        if like is not None:
            like = finite(like, "coordinates to be like")
            if len(like) != n or like.shape[1] < k:
                raise FitError(
                    f"like has shape {like.shape}; give the coordinates of the same {n} rows, {k} columns or more"
                )
            basis[:, :k] *= np.where(
                np.sum(like[:, :k] * ((X - mean) @ basis[:, :k]), axis=0) < 0, -1.0, 1.0
            )
        return cls(mean, basis, k, singular[:k] ** 2 / np.sum(singular**2))

    def transform(self, states: ArrayLike) -> Array:
        """Coordinates (n, k) of states (n, d) on the principal components."""
        return (np.asarray(states, dtype=np.float64) - self.mean) @ self.basis[:, : self.k]

    def to_state(self, weight: ArrayLike) -> Array:
        """The direction weight (k,) of this space as a vector (d,) of the hidden space."""
        return self.basis[:, : self.k] @ np.asarray(weight, dtype=np.float64)


def mean_shifts(Z: ArrayLike, rows: pd.DataFrame, *, base: str = "none") -> pd.DataFrame:
    """Mean movement of each class from prompt `base` to every other prompt.

    Z (n, k) with rows [query_id, prompt, harmful]; returns [prompt, harmful, n, length, shift_1 .. shift_k].
    Only queries present under both prompts count, and only those with a label. Raises FitError where nothing can be paired.
    """
    Z = finite(Z, "coordinates")
    if len(Z) != len(rows):
        raise FitError(
            f"{len(Z)} coordinates for {len(rows)} rows: give the rows that belong to these states"
        )
    twice = rows.duplicated(["query_id", "prompt"])
    if twice.any():
        first = rows[twice].iloc[0]
        raise FitError(
            f"query {first['query_id']!r} occurs twice under prompt {first['prompt']!r}; keep one row each"
        )
    columns = [f"shift_{i + 1}" for i in range(Z.shape[1])]
    table = pd.concat(
        [
            rows[["query_id", "prompt", "harmful"]].reset_index(drop=True),
            pd.DataFrame(Z, columns=columns),
        ],
        axis=1,
    )
    start = table[table["prompt"] == base].set_index("query_id")[columns]
    if start.empty:
        raise FitError(
            f"no state under prompt {base!r}; the prompts present are {', '.join(map(str, table['prompt'].unique()))}"
        )
    out = []
    for (prompt, harmful), part in table[table["prompt"] != base].groupby(
        ["prompt", "harmful"], sort=False
    ):
        part = part[part["query_id"].isin(start.index)]
        if part.empty:
            raise FitError(
                f"no query under prompt {prompt!r} occurs under {base!r}; capture the same queries under both"
            )
        moved = part[columns].to_numpy() - start.loc[part["query_id"]].to_numpy()
        mean = moved.mean(axis=0)
        out.append(
            {
                "prompt": prompt,
                "harmful": harmful,
                "n": len(part),
                "length": np.linalg.norm(mean),
                **dict(zip(columns, mean, strict=True)),
            }
        )
    return pd.DataFrame(out)


def cosines(vectors: ArrayLike) -> Array:
    """Cosine matrix (m, m) of the rows of vectors (m, k)."""
    V = np.asarray(vectors, dtype=np.float64)
    V = V / np.linalg.norm(V, axis=1, keepdims=True)
    return V @ V.T


def finite(values: ArrayLike, what: str) -> Array:
    X = np.asarray(values, dtype=np.float64)
    if X.ndim != 2:
        raise FitError(f"{what} must be a table (rows, dimensions), not of shape {X.shape}")
    bad = np.flatnonzero(~np.isfinite(X).all(axis=1))
    if len(bad):
        shown = ", ".join(map(str, bad[:5])) + (", ..." if len(bad) > 5 else "")
        raise FitError(
            f"{len(bad)} of {len(X)} {what} hold NaN or infinity (rows {shown}); capture them again in float32 or bfloat16"
        )
    return X
