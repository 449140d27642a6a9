"""Writes the query sets of the embedded model's grammar to data/queries: `python -m analysis_lib.organism.queries`."""

from __future__ import annotations

import csv
from pathlib import Path

from ..data.files import ROOT
from .corpus import query_sets

FOLDER = ROOT / "queries"
COLUMNS = ("query_id", "text", "harmful", "query_set", "pair_id", "form", "answer")
LABELS = {True: "true", False: "false", None: ""}


def write_queries(folder: Path = FOLDER) -> list[Path]:
    """Write one csv per query set into `folder` and return their paths. The bytes depend on the grammar alone."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, rows in query_sets().items():
        path = folder / f"{name}.csv"
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows({**row, "harmful": LABELS[row["harmful"]]} for row in rows)  # type: ignore[index]
        paths.append(path)
    return paths


if __name__ == "__main__":
    for written in write_queries():
        print(written)
