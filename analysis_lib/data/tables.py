"""Tables for other programs."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from .user_files import FILE_NAME, DataError, fits_file_name, shown

RUN_BY_SPREADSHEETS = ("=", "+", "-", "@", "\t")


def save_table(table: pd.DataFrame, out: str | Path, name: str) -> Path:
    """Writes a table to `out`/tables/`name`.csv.

    A text that a spreadsheet would run as a formula (it begins with = + - @ or a tab)
    gets an apostrophe in front, in column names too. Ids and names of prompts may come from
    anybody.

    Parameters
    ----------
    table : DataFrame
        Its index is left out.
    out : str or Path
        The folder of results; made where it lacks.
    name : str
        Without its ending.

    Returns
    -------
    Path
        The file.

    Raises
    ------
    DataError
        Where the name cannot be a file's name. Nothing is written outside `out`/tables.

    Examples
    --------
    >>> import tempfile
    >>> import pandas as pd
    >>> from analysis_lib import save_table
    >>> table = pd.DataFrame({"prompt": ["none", "=1+1"], "rise": [0.5, -1.0]})
    >>> with tempfile.TemporaryDirectory() as out:
    ...     print(save_table(table, out, "rates").read_text().split())
    ['prompt,rise', 'none,0.5', "'=1+1,-1.0"]
    """
    if not fits_file_name(name):
        raise DataError(f"the table's name {shown(name)} cannot be a file's name; {FILE_NAME}")
    file = Path(out) / "tables" / f"{name}.csv"
    file.parent.mkdir(parents=True, exist_ok=True)
    safe = table.map(_as_text).rename(columns=_as_text)
    safe.to_csv(file, index=False)
    return file


def _as_text(value: object) -> object:
    runs = isinstance(value, str) and value.startswith(RUN_BY_SPREADSHEETS)
    return f"'{value}" if runs else value
