"""Points in the anchor space, and the plane of two components in which they are seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd

from .labels import class_names
from .style import ASPECT, need_columns, rounded


def points_table(Z: np.ndarray, rows: pd.DataFrame) -> pd.DataFrame:
    """A table of rows with their coordinates, as the figures of the plane take it.

    Parameters
    ----------
    Z : ndarray
        Shape (n, k): coordinates in the anchor space.
    rows : DataFrame
        Their n rows, with any columns. Coordinates of an earlier call are replaced.

    Returns
    -------
    DataFrame
        `rows` with the columns pc1..pck, rounded to 4 decimals, on a new index.

    Raises
    ------
    ValueError
        Where the numbers of rows differ.

    Examples
    --------
    >>> rows = pd.DataFrame({"query_id": ["a", "b"]})
    >>> points_table(np.array([[0.5, 1.0], [2.0, 3.0]]), rows).columns.tolist()
    ['query_id', 'pc1', 'pc2']
    """
    Z = np.asarray(Z)
    if Z.ndim != 2 or len(Z) != len(rows):
        raise ValueError(
            f"coordinates of shape {Z.shape} for {len(rows)} rows: pass Z (n, k) and its own n rows"
        )
    kept = rows.drop(columns=[c for c in rows.columns if _is_pc(c)]).reset_index(drop=True)
    columns = {f"pc{i + 1}": np.round(Z[:, i].astype(float), 4) for i in range(Z.shape[1])}
    return kept.assign(**columns)


def _is_pc(column: object) -> bool:
    return isinstance(column, str) and column[:2] == "pc" and column[2:].isdigit()


@dataclass(frozen=True)
class Plane:
    """A point cloud seen in two principal components.

    Parameters
    ----------
    points : DataFrame
        With query_id, prompt, harmful and pc1..pck.
    xy : DataFrame
        Columns x and y on the index of `points`.
    components : tuple of int
        The two components, from 1.
    prompts : list of str
        In the order of their colours.

    Examples
    --------
    >>> points = pd.DataFrame({"query_id": ["a", "b"], "prompt": "none", "harmful": [True, False]})
    >>> plane = Plane.of(points.assign(pc1=[0.0, 2.0], pc2=[1.0, 1.0]), (1, 2), "example")
    >>> plane.prompts, plane.means["none", "harmful"]
    (['none'], (0.0, 1.0))
    """

    points: pd.DataFrame
    xy: pd.DataFrame
    components: tuple[int, int]
    prompts: list[str]

    @classmethod
    def of(
        cls,
        points: pd.DataFrame,
        components: tuple[int, int],
        where: str,
        prompts: Sequence[str] | None = None,
    ) -> Plane:
        """The plane of a points table.

        Parameters
        ----------
        points : DataFrame
            As above.
        components : tuple of int
            Which two.
        where : str
            The calling function, for messages.
        prompts : sequence of str or None
            By default the prompts in order of appearance.

        Raises
        ------
        ValueError
            Where a column is missing, or the table is empty.
        """
        columns = [f"pc{c}" for c in components]
        need_columns(points, ["query_id", "prompt", "harmful", *columns], where)
        if points.empty:
            raise ValueError(f"{where}: the points table is empty; check what it was filtered by")
        x, y = (rounded(points[column]) for column in columns)
        names = dict.fromkeys(points["prompt"]) if prompts is None else prompts
        return cls(points, pd.DataFrame({"x": x, "y": y}, points.index), components, list(names))

    @cached_property
    def corners(self) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper corner (2,) of the view, in the proportions of the plotting area."""
        low, high = self.xy.min().to_numpy(), self.xy.max().to_numpy()
        size = (high - low) * 1.16
        height = max(size[1], size[0] / ASPECT) or 1.0
        half = np.array([height * ASPECT, height]) / 2
        return (low + high) / 2 - half, (low + high) / 2 + half

    @cached_property
    def means(self) -> dict[tuple[str, str], tuple[float, float]]:
        """The mean point of each (prompt, class)."""
        means = self.xy.groupby([self.points["prompt"], class_names(self.points)]).mean()
        return {
            (str(p), str(c)): (x, y)
            for (p, c), x, y in zip(means.index, means["x"], means["y"], strict=True)
        }
