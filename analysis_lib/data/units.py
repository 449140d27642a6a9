"""What counts as one query: rows with one text are one unit, whatever their ids."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import numpy as np
import pandas as pd

from .labels import read_labels
from .user_files import DataError, shown


def text_key(text: str) -> str:
    """What two texts share that count as equal: case, spaces and Unicode forms do not matter.

    Examples
    --------
    >>> from analysis_lib.data.units import text_key
    >>> text_key(" How to  bake BREAD? ") == text_key("How to bake bread?")
    True
    """
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def query_units(rows: pd.DataFrame, *, pairs: bool = False) -> pd.Series:
    """The unit of each row, for the folds of a fit and for what an interval is taken over.

    Rows with the same text are one unit, whatever their ids: copies on both sides of a held-out
    split would tell each other's label. Texts count as the same whatever their case, their spaces
    and their Unicode form. So are the variants of one query that `wrap_queries` makes.

    Parameters
    ----------
    rows : DataFrame with query_id, perhaps text, base_id, base_text and pair_id
        Queries, or rows of states or rates. Without the column text, an id is a unit.
    pairs : bool
        Whether queries of one pair_id are one unit, too.

    Returns
    -------
    Series (n,)
        The name of each row's unit: the first query_id (base_id, pair_id) in it.

    Examples
    --------
    >>> import pandas as pd
    >>> from analysis_lib import query_units
    >>> rows = pd.DataFrame({"query_id": ["a", "b", "c"], "text": ["Why?", "How?", "why? "]})
    >>> query_units(rows).tolist()
    ['a', 'b', 'a']
    """
    names = rows["query_id"].astype(object)
    texts = rows["text"].astype(object) if "text" in rows else names.map(lambda _: None)
    if "base_id" in rows:
        base = rows["base_id"].notna()
        names = rows["base_id"].astype(object).where(base, names)
        own = rows["base_text"] if "base_text" in rows else pd.Series(None, rows.index, object)
        texts = own.astype(object).where(base, texts)
    if pairs and "pair_id" in rows:
        paired = rows["pair_id"].notna() & (rows["pair_id"].astype(str) != "")
        names = rows["pair_id"].astype(object).where(paired, names)
    return _joined(names, texts)


def _joined(names: pd.Series, texts: pd.Series) -> pd.Series:
    """Names, where those that share a text, through others too, take the first one's name."""
    codes, found = pd.factorize(names, use_na_sentinel=False)
    joined = list(range(len(found)))

    def first(code: int) -> int:
        while joined[code] != code:
            code = joined[code]
        return code

    seen: dict[str, int] = {}
    for code, text in dict.fromkeys(zip(codes.tolist(), texts, strict=True)):
        if isinstance(text, str):
            one, other = first(code), first(seen.setdefault(text_key(text), code))
            joined[max(one, other)] = min(one, other)
    return pd.Series(
        [found[first(code)] for code in codes.tolist()], index=names.index, dtype=object
    )


def refuse_two_labels(queries: pd.DataFrame, where: str, names: Sequence[str]) -> list[list[int]]:
    """The groups of rows with one text; raises DataError where a group has both labels.

    names say which row is which: "line 3", or its id.
    """
    keys = queries["text"].map(text_key)
    labels = read_labels(queries["harmful"]).to_numpy(object)
    groups: dict[str, list[int]] = {}
    for i in np.flatnonzero(keys.duplicated(keep=False)):
        groups.setdefault(keys.iloc[i], []).append(int(i))
    for rows in groups.values():
        both = [[names[i] for i in rows if labels[i] is kind] for kind in (True, False)]
        if all(both):
            raise DataError(
                f"{where}: the text {shown(queries['text'].iloc[rows[0]])} is labelled both ways, "
                f"harmful ({_first(both[0])}) and harmless ({_first(both[1])}); label it one way"
            )
    return list(groups.values())


def told_of_copies(queries: pd.DataFrame, where: str, names: Sequence[str]) -> str:
    """As `refuse_two_labels`; what a warning says of texts that occur several times, "" of none."""
    groups = refuse_two_labels(queries, where, names)
    if not groups:
        return ""
    told = "; ".join(_first([names[i] for i in rows]) for rows in groups[:3])
    return (
        f"{where}: {len(groups)} of its texts occur several times ({told}"
        f"{'; ...' * (len(groups) > 3)}); copies count as one query, so leave them out"
    )


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + ", ..." * (len(names) > 4)
