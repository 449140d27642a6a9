"""Jailbreak wrappers: a query inside a generic template, or with a suffix computed beforehand.

Ten short templates of our own are in data/wrappers.csv. None is optimized against a model, and none names a harm.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from .data import ROOT, DataError

SLOT = "{query}"


def load_wrappers(path: str | Path | None = None) -> dict[str, str]:
    """Wrappers by name: templates with one slot {query}; ours, or those of a csv with the columns wrapper and template.

    Raises DataError naming the file and the wrapper.
    """
    path = ROOT / "wrappers.csv" if path is None else Path(path).expanduser()
    table = _read_csv(path, "wrapper", "template")
    wrappers = dict(zip(table["wrapper"], table["template"], strict=True))
    if len(wrappers) < len(table):
        twice = table.loc[table["wrapper"].duplicated(), "wrapper"].iloc[0]
        raise DataError(f"{path}: the wrapper {twice!r} occurs twice; give each its own name")
    for name, template in wrappers.items():
        if template.count(SLOT) != 1:
            raise DataError(f"{path}: the template of {name!r} holds {SLOT} {template.count(SLOT)} times; write it once")
    return wrappers


def wrap_queries(queries: pd.DataFrame, wrappers: Mapping[str, str] | None = None) -> pd.DataFrame:
    """Every query in every wrapper (default: `load_wrappers()`): wrappers outer, queries inner.

    query_id is "{query_id}+{wrapper}" and query_set "{query_set}+wrapped"; the new columns are wrapper, base_id and
    base_text (the query's own id and text). `benchmark_table` takes the variants of one base query as one unit, and
    reports them wrapper by wrapper with by="wrapper".
    """
    wrappers = load_wrappers() if wrappers is None else wrappers
    if wrong := [name for name, template in wrappers.items() if template.count(SLOT) != 1]:
        raise DataError(f"the template of {wrong[0]!r} must hold {SLOT} once")
    if not wrappers:
        raise DataError("no wrappers given; leave the argument out for the built-in ones")
    parts = [
        _variant(queries, [template.replace(SLOT, text) for text in queries["text"]], name) for name, template in wrappers.items()
    ]
    return pd.concat(parts, ignore_index=True)


def add_suffixes(queries: pd.DataFrame, path: str | Path) -> pd.DataFrame:
    """Every query followed by a space and its suffix from a file, as one line; columns as in `wrap_queries`.

    path: a .json object {position in `queries`, from 0: suffix}, where a suffix may also be an object with
    `final_suffix`, which is the study's gcg.json for the 100 queries of "advbench"; or a .csv with the columns query_id and suffix.
    The wrapper's name is the file's stem. Raises DataError where a query has no suffix.
    """
    path = Path(path).expanduser()
    if path.suffix.lower() == ".csv":
        table = _read_csv(path, "query_id", "suffix")
        suffixes = dict(zip(table["query_id"], table["suffix"], strict=True))
    else:
        suffixes = _positions(path, queries["query_id"].tolist())
    if lacking := [query_id for query_id in queries["query_id"] if query_id not in suffixes]:
        raise DataError(
            f"{path}: no suffix for {len(lacking)} of {len(queries)} queries, the first {lacking[0]!r}; give each one"
        )
    texts = [f"{text} {suffixes[query_id].strip()}" for query_id, text in zip(queries["query_id"], queries["text"], strict=True)]
    return _variant(queries, texts, path.stem)


def _variant(queries: pd.DataFrame, texts: list[str], wrapper: str) -> pd.DataFrame:
    return queries.assign(
        query_id=queries["query_id"].astype(str) + f"+{wrapper}",
        text=texts,
        query_set=queries["query_set"].astype(str) + "+wrapped",
        wrapper=wrapper,
        base_id=queries["query_id"],
        base_text=queries["text"],
    )


def _positions(path: Path, query_ids: list[str]) -> dict[str, str]:
    """The suffixes of a .json by query_id."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({error}); give {{position: suffix}}") from error
    if not isinstance(found, dict):
        raise DataError(f"{path}: not an object of suffixes; write {{position: suffix}}, positions from 0")
    suffixes = {}
    for key, value in found.items():
        text = value.get("final_suffix") if isinstance(value, dict) else value
        if not key.isdecimal() or not isinstance(text, str):
            raise DataError(f"{path}, {key!r}: write a position from 0 and its suffix, a text or an object with 'final_suffix'")
        if int(key) < len(query_ids):
            suffixes[query_ids[int(key)]] = text
    return suffixes


def _read_csv(path: Path, *columns: str) -> pd.DataFrame:
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
    except (OSError, ValueError) as error:  # pandas' parser errors are ValueErrors
        raise DataError(f"{path}: cannot be read as csv ({error}); give the columns {', '.join(columns)}") from error
    if lacking := [c for c in columns if c not in table]:
        raise DataError(f"{path}: no column {lacking[0]!r}, only {list(table.columns)}; give the columns {', '.join(columns)}")
    return table
