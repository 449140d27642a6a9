"""The anchor space: principal components of hidden states, and how states move in it.

All functions are pure numpy in float64, and repeat exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from ..data.labels import with_labels

Array = NDArray[np.float64]


LARGEST = 1e100  # sums of squares of greater numbers may be infinite


class FitError(ValueError):
    """The data cannot carry the fit. The message says why and what to change.

    Examples
    --------
    >>> import numpy as np
    >>> from analysis_lib import AnchorSpace
    >>> AnchorSpace.fit(np.eye(3), k=4)
    Traceback (most recent call last):
    ...
    analysis_lib.analysis.space.FitError: k = 4 components asked of states with 3 dimensions; \
choose 1 <= k <= 3
    """


@dataclass(frozen=True)
class AnchorSpace:
    """Principal components of the anchor states, completed to an orthonormal basis.

    Parameters
    ----------
    mean : array (d,)
        Mean of the fitted states.
    basis : array (d, d)
        Orthonormal columns. The first k are the principal components.
    k : int
        Number of components that `transform` keeps.
    explained : array (k,)
        Share of variance along each component, in [0, 1].

    References
    ----------
    Zheng et al. (2024), "On Prompt-Driven Safeguarding for Large Language Models", section 2:
    4 components of the last token's state.

    Examples
    --------
    >>> import numpy as np
    >>> from analysis_lib import AnchorSpace
    >>> states = np.random.default_rng(0).normal(size=(20, 6))
    >>> space = AnchorSpace.fit(states, k=2)
    >>> space.basis.shape, space.transform(states).shape
    ((6, 6), (20, 2))
    """

    mean: Array
    basis: Array
    k: int
    explained: Array

    @classmethod
    def fit(cls, states: ArrayLike, k: int = 4, *, like: ArrayLike | None = None) -> AnchorSpace:
        """Fits the space by a full singular value decomposition.

        Parameters
        ----------
        states : array (n, d)
            Hidden states, one row a query and prompt; n > k.
        k : int
            Number of components to keep.
        like : array (n, j) with j >= k, optional
            Coordinates of the same rows in another space, such as another layer's. Each component
            then takes the sign that correlates positively with the same column of `like`.
            Without it each component's largest loading is positive. Either way the signs repeat.

        Returns
        -------
        AnchorSpace

        Raises
        ------
        FitError
            Where rows hold NaN or infinity, there are fewer than k + 1 rows, the states vary in
            fewer than k directions, or `like` has other rows or too few columns.

        Examples
        --------
        >>> import numpy as np
        >>> from analysis_lib import AnchorSpace
        >>> space = AnchorSpace.fit([[0, 0], [3, 4], [6, 8]], k=1)
        >>> space.basis[:, 0].round(3)
        array([0.6, 0.8])
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
        # Where rows outnumber dimensions, the thin decomposition has the whole basis already.
        _, singular, rows = np.linalg.svd(X - mean, full_matrices=n < d)
        if singular[k - 1] <= 1e-9 * max(1.0, singular[0]):
            rank = int(np.sum(singular > 1e-9 * max(1.0, singular[0])))
            raise FitError(
                f"the states vary in {rank} directions only, {k} components were asked; "
                "are all states equal?"
            )
        basis = rows.T
        basis = basis * np.where(basis[np.abs(basis).argmax(axis=0), np.arange(d)] < 0, -1.0, 1.0)
        if like is not None:
            like = finite(like, "coordinates to be like")
            if len(like) != n or like.shape[1] < k:
                raise FitError(
                    f"like has shape {like.shape}; give the coordinates of the same {n} rows, "
                    f"{k} columns or more"
                )
            agreement = np.sum(like[:, :k] * ((X - mean) @ basis[:, :k]), axis=0)
            basis[:, :k] *= np.where(agreement < 0, -1.0, 1.0)
        return cls(mean, basis, k, singular[:k] ** 2 / np.sum(singular**2))

    def transform(self, states: ArrayLike) -> Array:
        """Coordinates of states on the principal components.

        Parameters
        ----------
        states : array (n, d)

        Returns
        -------
        array (n, k)
            In the states' own unit.

        Examples
        --------
        >>> from analysis_lib import AnchorSpace
        >>> space = AnchorSpace.fit([[0, 0], [3, 4], [6, 8]], k=1)
        >>> space.transform([[6, 8], [3, 4]]).round(3) + 0
        array([[5.],
               [0.]])
        """
        moved = np.asarray(states, dtype=np.float64) - self.mean
        return np.asarray(moved @ self.basis[:, : self.k])

    def to_state(self, weight: ArrayLike) -> Array:
        """A direction of this space as a vector of the hidden space.

        Parameters
        ----------
        weight : array (k,)

        Returns
        -------
        array (d,)

        Examples
        --------
        >>> from analysis_lib import AnchorSpace
        >>> space = AnchorSpace.fit([[0, 0], [3, 4], [6, 8]], k=1)
        >>> space.to_state([10.0]).round(3)
        array([6., 8.])
        """
        return np.asarray(self.basis[:, : self.k] @ np.asarray(weight, dtype=np.float64))


def mean_shifts(Z: ArrayLike, rows: pd.DataFrame, *, base: str = "none") -> pd.DataFrame:
    """Mean movement of each class of queries from one prompt to every other prompt.

    Parameters
    ----------
    Z : array (n, k)
        Coordinates.
    rows : DataFrame with query_id, prompt, harmful
        The n rows that the coordinates belong to. Only queries present under both prompts count,
        and only those with a label.
    base : str
        The prompt that the movement starts from.

    Returns
    -------
    DataFrame with prompt, harmful, n, length, shift_1 .. shift_k
        One row a prompt and class; n queries; lengths and shifts in the unit of Z.

    Raises
    ------
    FitError
        Where lengths differ, a query occurs twice under a prompt, or nothing can be paired.

    Examples
    --------
    >>> import pandas as pd
    >>> from analysis_lib import mean_shifts
    >>> rows = pd.DataFrame(
    ...     {"query_id": ["a", "b"] * 2, "prompt": ["none"] * 2 + ["short"] * 2, "harmful": True}
    ... )
    >>> mean_shifts([[0, 0], [1, 1], [3, 4], [4, 5]], rows)
      prompt  harmful  n  length  shift_1  shift_2
    0  short     True  2     5.0      3.0      4.0
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
            f"query {first['query_id']!r} occurs twice under prompt {first['prompt']!r}; "
            "keep one row each"
        )
    columns = [f"shift_{i + 1}" for i in range(Z.shape[1])]
    about = with_labels(rows)[["query_id", "prompt", "harmful"]].reset_index(drop=True)
    table = pd.concat([about, pd.DataFrame(Z, columns=columns)], axis=1)
    start = table[table["prompt"] == base].set_index("query_id")[columns]
    if start.empty:
        present = ", ".join(map(str, table["prompt"].unique()))
        raise FitError(f"no state under prompt {base!r}; the prompts present are {present}")
    out = []
    others = table[table["prompt"] != base].groupby(["prompt", "harmful"], sort=False)
    for (prompt, harmful), part in others:
        part = part[part["query_id"].isin(start.index)]
        if part.empty:
            raise FitError(
                f"no query under prompt {prompt!r} occurs under {base!r}; "
                "capture the same queries under both"
            )
        moved = part[columns].to_numpy() - start.loc[part["query_id"]].to_numpy()
        mean = moved.mean(axis=0)
        shift = dict(zip(columns, mean, strict=True))
        size = {"n": len(part), "length": np.linalg.norm(mean)}
        out.append({"prompt": prompt, "harmful": harmful, **size, **shift})
    return pd.DataFrame(out)


def cosines(vectors: ArrayLike) -> Array:
    """Cosines between the rows of a table of vectors.

    Parameters
    ----------
    vectors : array (m, k)
        No row may be 0.

    Returns
    -------
    array (m, m)
        In [-1, 1].

    Raises
    ------
    FitError
        Where a row is 0, NaN or infinite.

    Examples
    --------
    >>> from analysis_lib import cosines
    >>> cosines([[1, 0], [0, 2], [-3, 0]]) + 0
    array([[ 1.,  0., -1.],
           [ 0.,  1.,  0.],
           [-1.,  0.,  1.]])
    """
    V = finite(vectors, "vectors")
    if len(zero := np.flatnonzero(~V.any(axis=1))):
        raise FitError(f"vector {zero[0]} is 0, which has no direction; leave it out")
    V = V / np.linalg.norm(V, axis=1, keepdims=True)
    return np.asarray(V @ V.T)


def finite(values: ArrayLike, what: str) -> Array:
    """The values as a table of finite float64 numbers.

    Parameters
    ----------
    values : array (n, k)
    what : str
        What the rows are, for the message.

    Returns
    -------
    array (n, k)

    Raises
    ------
    FitError
        Where the values are no table, or rows hold NaN, infinity or numbers above LARGEST; the
        message names the rows.

    Examples
    --------
    >>> from analysis_lib.analysis.space import finite
    >>> finite([[1, 2]], "states")
    array([[1., 2.]])
    """
    X = np.asarray(values, dtype=np.float64)
    if X.ndim != 2:
        raise FitError(f"{what} must be a table (rows, dimensions), not of shape {X.shape}")
    for bad, fault, remedy in (
        (~np.isfinite(X), "NaN or infinity", "capture them again in float32 or bfloat16"),
        (np.abs(X) > LARGEST, f"numbers above {LARGEST:g}", "divide all of them by a constant"),
    ):
        if len(rows := np.flatnonzero(bad.any(axis=1))):
            shown = ", ".join(map(str, rows[:5])) + (", ..." if len(rows) > 5 else "")
            raise FitError(f"{len(rows)} of {len(X)} {what} hold {fault} (rows {shown}); {remedy}")
    return X


def probabilities(logits: Array) -> Array:
    """The logistic function, also of logits so low that it is 0 in float64.

    Examples
    --------
    >>> import numpy as np
    >>> from analysis_lib.analysis.space import probabilities
    >>> probabilities(np.array([-1e6, 0, 1e6]))
    array([0. , 0.5, 1. ])
    """
    with np.errstate(over="ignore"):  # 1 / (1 + infinity) is that 0
        return np.asarray(1 / (1 + np.exp(-logits)))


def varies(y: Array) -> bool:
    """Whether targets differ by more than the rounding of a mean.

    Examples
    --------
    >>> import numpy as np
    >>> from analysis_lib.analysis.space import varies
    >>> varies(np.array([0.3, 0.1 + 0.2])), varies(np.array([0.3, 0.35]))
    (False, True)
    """
    return bool(np.ptp(y) > 1e-9)
