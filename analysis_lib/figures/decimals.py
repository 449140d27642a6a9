"""Tables as they are shown: a fixed number of decimals."""

from __future__ import annotations

import pandas as pd


def fixed(table: pd.DataFrame, decimals: int, **own: int) -> pd.DataFrame:
    """The table with every float as text of so many decimals, whatever the other values are.

    It is for showing. Compute with the table that was given.

    Parameters
    ----------
    table : DataFrame
    decimals : int
    **own : int
        Decimals of single columns, by name.

    Returns
    -------
    DataFrame
        A value that rounds to 0 has no sign. NaN stays, and so does all that is no float.

    Examples
    --------
    >>> import pandas as pd
    >>> from analysis_lib.figures import fixed
    >>> table = pd.DataFrame({"method": ["text", "DRO"], "rate": [0.5, -0.001]})
    >>> fixed(table, 2)
      method  rate
    0   text  0.50
    1    DRO  0.00
    """

    def shown(column: pd.Series) -> pd.Series:
        if not pd.api.types.is_float_dtype(column):
            return column
        digits = own.get(str(column.name), decimals)
        rounded = column.astype("float64").round(digits).astype(object)
        return rounded.map(f"{{:z.{digits}f}}".format, na_action="ignore")

    return table.apply(shown)
