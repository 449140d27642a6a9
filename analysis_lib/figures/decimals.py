"""Tables as they are shown: a fixed number of decimals."""

from __future__ import annotations

import pandas as pd


def fixed(table: pd.DataFrame, decimals: int, **own: int) -> pd.DataFrame:
    """The table with every float as text of so many decimals, whatever the other values are.

    own: the decimals of single columns. A value that rounds to 0 has no sign. NaN and all that is
    no float stay. The table is for showing: compute with the one that was given.

    >>> fixed(pd.DataFrame({"method": ["DRO"], "rate": [0.5]}), 2).to_dict("records")
    [{'method': 'DRO', 'rate': '0.50'}]
    """

    def shown(column: pd.Series) -> pd.Series:
        if not pd.api.types.is_float_dtype(column):
            return column
        digits = own.get(str(column.name), decimals)
        rounded = column.astype("float64").round(digits).astype(object)
        return rounded.map(f"{{:z.{digits}f}}".format, na_action="ignore")

    return table.apply(shown)
