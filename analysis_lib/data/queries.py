"""Query sets by name, and a user's own from files.

A query table has the columns query_id (unique), text, harmful ("boolean"; <NA> where there is no
agreed answer) and query_set. It has pair_id, form and answer where its source does. data/SOURCES.md
says where each set comes from.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from .download import OFFICIAL_SETS, official_queries
from .shipped import ROOT
from .units import query_units, refuse_two_labels, text_key, told_of_copies
from .user_files import DataError, csv_rows, jsonl_rows, query_table, read_text, txt_rows

QUERY_SETS = ("anchor", "heldout_harmless", "heldout_forms", "borderline", "facts")

HELDOUT_SETS = ("heldout_forms", "heldout_harmless", "borderline")
"""What the comparison of prompts is measured on, unless the user names other sets."""

MIN_OF_EACH_CLASS = 5
"""With so few queries of a class the notebooks' folds still hold both; queries of one pair_id count
once.
"""


def load_queries(name_or_path: str | Path, *, harmful: bool | None = None) -> pd.DataFrame:
    """A query table: a set by name, or a user's file.

    Parameters
    ----------
    name_or_path : str or Path
        "anchor" (100 harmful and 100 harmless queries in pairs), "heldout_harmless",
        "heldout_forms", "borderline", "facts", or after `download()` one of OFFICIAL_SETS. Or a
        file in UTF-8: .csv with a header, .jsonl with one object a line, .txt with one query a
        line. A file has at most MAX_BYTES, a text MAX_CHARACTERS.
    harmful : bool, optional
        Labels every query of a file without the column harmful.

    Returns
    -------
    DataFrame
        query_id, text, harmful ("boolean"), query_set, and of pair_id, form and answer those that
        the source has.

        Of a file, `text` is needed and stripped of surrounding space. `harmful` (true/false, 1/0 or
        harmful/harmless in any case, or empty) is <NA> where it is missing. Where they are missing,
        `query_id` becomes stem-0001, ... and `query_set` the stem. Other columns are left out with
        a warning. Another one tells texts that occur several times: see `query_units`.

    Raises
    ------
    DataError
        Names file, line and remedy. One text that is labelled both ways is such a fault.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> from analysis_lib import load_queries
    >>> len(load_queries("anchor"))
    200
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = Path(folder, "mine.txt")
    ...     _ = file.write_text("How to bake bread?")
    ...     mine = load_queries(file, harmful=False)
    >>> mine["query_id"].tolist(), mine["harmful"].tolist()
    (['mine-0001'], [False])
    """
    queries, told = _read(name_or_path, harmful)
    if told:
        warnings.warn(told, stacklevel=2)
    return queries


def _read(name_or_path: str | Path, harmful: bool | None) -> tuple[pd.DataFrame, str]:
    """The queries, and what is to be told of copies among them."""
    if isinstance(name_or_path, str):
        if name_or_path in OFFICIAL_SETS:
            return official_queries(name_or_path, harmful)
        if name_or_path in QUERY_SETS:
            name_or_path = ROOT / "queries" / f"{name_or_path}.csv"
        elif not (Path(name_or_path).suffix or Path(name_or_path).name != name_or_path):
            raise DataError(
                f"no query set {name_or_path!r}; sets: {', '.join(QUERY_SETS)}; "
                f"after `python -m analysis_lib download` also {', '.join(OFFICIAL_SETS)}; "
                "or give the path of a .csv, .jsonl or .txt file"
            )
    path = Path(os.path.expanduser(name_or_path))
    readers = {".csv": csv_rows, ".jsonl": jsonl_rows, ".txt": txt_rows}
    if (suffix := path.suffix.lower()) not in readers:
        raise DataError(
            f"{path}: a query file ends in .csv, .jsonl or .txt; save it as one of these"
        )
    rows = readers[suffix](path, read_text(path))
    table = query_table(path, rows, harmful)
    return table, told_of_copies(table, str(path), [f"line {line}" for line, _ in rows])


def load_anchor_queries(name_or_path: str | Path = "anchor") -> pd.DataFrame:
    """Queries that can take the anchor set's place: all labelled, with enough of both classes.

    Parameters
    ----------
    name_or_path : str or Path
        As in `load_queries`.

    Returns
    -------
    DataFrame
        As from `load_queries`, with MIN_OF_EACH_CLASS queries or more of each class; queries of one
        pair_id count once.

    Raises
    ------
    DataError
        As `load_queries`, and where labels or queries of a class are missing.

    Examples
    --------
    >>> from analysis_lib import load_anchor_queries
    >>> queries = load_anchor_queries()
    >>> int(queries["harmful"].sum()), len(queries)
    (100, 200)
    """
    queries, told = _read(name_or_path, None)
    harmful = queries["harmful"]
    if lacking := int(harmful.isna().sum()):
        raise DataError(
            f"{name_or_path}: {lacking} of {len(queries)} queries have no label, and every query "
            "needs one; fill the column harmful with true and false"
        )
    units = query_units(queries, pairs=True)
    found = {
        kind: units[harmful == label].nunique()
        for kind, label in (("harmful", True), ("harmless", False))
    }
    if empty := next((kind for kind, n in found.items() if not n), None):
        only = next(kind for kind in found if kind != empty)
        raise DataError(
            f"{name_or_path}: every query is labelled {only}, and both classes are needed; add at "
            f"least {MIN_OF_EACH_CLASS} {empty} ones"
        )
    if few := next((kind for kind, n in found.items() if n < MIN_OF_EACH_CLASS), None):
        pairs = " (queries of one pair_id count once)" if "pair_id" in queries else ""
        raise DataError(
            f"{name_or_path}: {found[few]} {few} queries{pairs}, and at least {MIN_OF_EACH_CLASS} "
            f"of each class are needed; add {MIN_OF_EACH_CLASS - found[few]} or more"
        )
    if told:
        warnings.warn(told, stacklevel=2)
    return queries


def load_heldout_queries(
    names: Sequence[str | Path] | None = None, anchor: pd.DataFrame | None = None
) -> pd.DataFrame:
    """The held-out sets as one table, without the texts of the anchor queries.

    Parameters
    ----------
    names : sequence of str or Path, optional
        Sets or files as in `load_queries`. Default: HELDOUT_SETS.
    anchor : DataFrame, optional
        The anchor queries. Held-out queries with one of their texts are left out with a warning;
        see `query_units` for what counts as the same text.

    Returns
    -------
    DataFrame
        As from `load_queries`.

    Raises
    ------
    DataError
        As `load_queries`; for an id that occurs twice; where nothing is left; and for "facts",
        which have a question of their own.

    Examples
    --------
    >>> from analysis_lib import load_heldout_queries
    >>> queries = load_heldout_queries()
    >>> len(queries), queries["query_set"].unique().tolist()
    (340, ['heldout_forms', 'heldout_harmless', 'borderline'])
    """
    names = list(names or HELDOUT_SETS)
    if "facts" in names:
        raise DataError(
            "the facts are asked of the embedded model anyway; leave them out of the held-out sets"
        )
    queries = pd.concat([load_queries(name) for name in names], ignore_index=True)
    named = ", ".join(map(str, names))
    if len(twice := queries["query_id"][queries["query_id"].duplicated()]):
        raise DataError(
            f"query_id {twice.iloc[0]!r} occurs twice in the held-out sets ({named}); "
            "name each set once, and give files different names or ids of their own"
        )
    if len(names) > 1:
        refuse_two_labels(queries, f"the held-out sets ({named})", queries["query_id"].tolist())
    kept = queries
    if anchor is not None:
        known = set(anchor["text"].map(text_key))
        kept = queries[~queries["text"].map(text_key).isin(known)]
    if 0 < (left_out := len(queries) - len(kept)) < len(queries):
        warnings.warn(
            f"{left_out} of {len(queries)} held-out queries ({named}) "
            "are among the anchor queries and left out",
            stacklevel=2,
        )
    if kept.empty:
        raise DataError(
            f"every query of the held-out sets ({named}) is among the anchor queries; give sets "
            "that nothing is fitted to"
        )
    return kept.reset_index(drop=True)
