"""The column harmful, whoever made it: true, false or missing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pandas as pd

from .user_files import LABELS, DataError, shown


def read_labels(values: Iterable[Any]) -> pd.Series:
    """Labels as true, false or <NA>; a text is never taken for true because it is not empty.

    Parameters
    ----------
    values : iterable of n values
        True and False, 1 and 0, or "true", "false", "1", "0", "harmful" and "harmless" in any case.
        None, NaN, <NA> and "" are missing.

    Returns
    -------
    Series (n,) of the type "boolean"
        With the index of a Series that was given.

    Raises
    ------
    DataError
        Names the first value that is no label.

    Examples
    --------
    >>> from analysis_lib.data.labels import read_labels
    >>> read_labels([True, "false", 0, "Harmless", None]).tolist()
    [True, False, False, False, <NA>]
    """
    column = values if isinstance(values, pd.Series) else pd.Series(list(values), dtype=object)
    if pd.api.types.is_bool_dtype(column.dtype):
        return column.astype("boolean")
    known = {value: _label(value) for value in column.drop_duplicates()}
    return pd.Series(
        [known[value] if pd.notna(value) else None for value in column],
        index=column.index,
        dtype="boolean",
        name=column.name,
    )


def _label(value: Any) -> bool | None:
    if pd.isna(value):
        return None
    if not isinstance(value, str):
        value = int(value) if value in (0, 1) else value
    if (label := str(value).strip().lower()) not in LABELS:
        raise DataError(
            f"column 'harmful': {shown(value)} is no label; write True, False, 1, 0, 'harmful', "
            "'harmless' or nothing"
        )
    return LABELS[label]


def with_labels(table: pd.DataFrame) -> pd.DataFrame:
    """The table with its column harmful as `read_labels` gives it; as it is where it has none.

    Examples
    --------
    >>> import pandas as pd
    >>> from analysis_lib.data.labels import with_labels
    >>> with_labels(pd.DataFrame({"harmful": ["false", "true"]}))["harmful"].tolist()
    [False, True]
    """
    if "harmful" not in table or pd.api.types.is_bool_dtype(table["harmful"].dtype):
        return table
    return table.assign(harmful=read_labels(table["harmful"]))
