"""Writes the query sets of the embedded model's grammar to data/queries.

Run it as `python -m analysis_lib.organism.queries`.
"""

from __future__ import annotations

import csv
from pathlib import Path

from ..data.shipped import ROOT
from .corpus import query_sets

FOLDER = ROOT / "queries"
COLUMNS = ("query_id", "text", "harmful", "query_set", "pair_id", "form", "answer")
LABELS: dict[object, str] = {True: "true", False: "false", None: ""}


def write_queries(folder: Path = FOLDER) -> list[Path]:
    """Write one csv per query set.

    The bytes depend on the grammar alone.

    Parameters
    ----------
    folder : Path
        Where; it is made where it is missing.

    Returns
    -------
    list of Path
        The files.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     [path.name for path in write_queries(Path(folder))][:2]
    ['anchor.csv', 'heldout_harmless.csv']
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, rows in query_sets().items():
        path = folder / f"{name}.csv"
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows({**row, "harmful": LABELS[row["harmful"]]} for row in rows)
        paths.append(path)
    return paths


if __name__ == "__main__":
    for written in write_queries():
        print(written)
