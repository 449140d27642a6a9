"""Texts in figures: escaped, cut to a label, wrapped under the mouse; and the names of the classes.

Every string handed in (query, prompt name, title, note) is plain text. It is escaped before plotly
sees it, because plotly renders a subset of HTML.
"""

from __future__ import annotations

import textwrap
from functools import lru_cache
from html import escape

import numpy as np
import pandas as pd

from ..data.labels import read_labels


def text(value: object) -> str:
    """A value as plain text for plotly.

    Plotly knows &lt; &gt; &amp; and would print &quot; as it stands, so quotes stay quotes.

    Parameters
    ----------
    value : object
        Anything that has a text.

    Returns
    -------
    str
        Its text, escaped.

    Examples
    --------
    >>> text('<b>"Hello"</b>')
    '&lt;b&gt;"Hello"&lt;/b&gt;'
    """
    return escape(str(value), quote=False)


def counted(n: int, one: str, several: str) -> str:
    """ "1 point", "3 points": a number with its noun."""
    return f"{n} {one if n == 1 else several}"


def label(value: object, most: int = 24) -> str:
    """A value for a legend, tick or arrow, cut where it would take its room from the plot.

    The hover text has the value in full.

    Parameters
    ----------
    value : object
        Anything that has a text.
    most : int
        Characters at most.

    Returns
    -------
    str
        Its text, cut and escaped.

    Examples
    --------
    >>> label("a rather long name", 10)
    'a rather \u2026'
    """
    value = str(value)
    return text(value if len(value) <= most else value[: most - 1] + "\u2026")


def class_names(table: pd.DataFrame) -> pd.Series:
    """The class of each row.

    Parameters
    ----------
    table : DataFrame
        With the column harmful; a missing value is a query without an agreed answer.

    Returns
    -------
    Series of str
        "harmless", "harmful" or "unlabelled".

    Examples
    --------
    >>> class_names(pd.DataFrame({"harmful": [True, False, None]})).tolist()
    ['harmful', 'harmless', 'unlabelled']
    """
    harmful = read_labels(table["harmful"])
    return (
        harmful.map({True: "harmful", False: "harmless"})
        .astype(object)
        .where(harmful.notna(), "unlabelled")
    )


@lru_cache(maxsize=8192)
def _wrapped(value: str) -> str:
    value = value if len(value) <= 400 else value[:396] + " ..."
    return "<br>".join(text(line) for line in textwrap.wrap(value, 64))


def hover_texts(table: pd.DataFrame) -> list[str]:
    """What a point says under the mouse.

    Parameters
    ----------
    table : DataFrame
        Perhaps with query_id, harmful, prompt, refusal_rate, text.

    Returns
    -------
    list of str
        One text a row, with what the table has, escaped.

    Examples
    --------
    >>> hover_texts(pd.DataFrame({"query_id": ["q1"], "refusal_rate": [0.25]}))
    ['<b>q1</b><br>refusal rate: 0.25']
    """
    columns: list[list[str]] = []
    if "query_id" in table:
        columns.append([f"<b>{text(i)}</b>" for i in table["query_id"]])
    if "harmful" in table:
        columns.append([f"{c} query" for c in class_names(table)])
    if "prompt" in table:
        columns.append([f"prompt: {text(p)}" for p in table["prompt"]])
    if "refusal_rate" in table:
        rates = table["refusal_rate"].astype(float)
        columns.append(
            ["refusal rate: not judged" if np.isnan(r) else f"refusal rate: {r:.2f}" for r in rates]
        )
    if "text" in table:
        columns.append(["" if pd.isna(t) else _wrapped(str(t)) for t in table["text"]])
    return ["<br>".join(filter(None, lines)) for lines in zip(*columns, strict=True)]
