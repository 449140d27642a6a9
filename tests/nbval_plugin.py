"""nbval's comparison as `analysis_lib.notebooks` stores outputs: pictures and live widgets are left out.

All else must agree, save that a printed number may differ by one unit of its last digit: another
processor may round it the other way. See `agree`. Loaded by `-p tests.nbval_plugin`. Figures are
tested as figures; a notebook pairs each with a small table, compared here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path

import pytest
from nbformat import NotebookNode
from nbval.plugin import IPyNbCell

from analysis_lib.report.html import PLOTLY_MIME
from analysis_lib.report.run_notebooks import clean_outputs

MARKUPS = ("text/html", "text/markdown", "image/svg+xml")

# A number with a decimal point, or with an exponent as Python prints it. One that is joined to a
# word or to another number (v1.5, orca-2.1, 1.2.3) is a name.
NUMBER = re.compile(
    r"(?<![\w.])(?<!\w-)(?P<number>[0-9]*\.[0-9]+(?:e[-+][0-9]{2,3})?|[0-9]+e[-+][0-9]{2,3})"
    r"(?!\w|\.[0-9]|-\w)"
)
TAG = (
    r"<(?P<element>script|style)\b.*?</(?P=element)\s*>|<!--.*?-->"
    r"|<[a-zA-Z/!?](?:[^\"'<>]|\"[^\"]*\"|'[^']*')*>"
)
TAG_OR_NUMBER = re.compile(f"{TAG}|{NUMBER.pattern}", re.DOTALL)


def agree(new: str, stored: str, markup: bool = False) -> bool:
    """Whether `new` is `stored`, save for one unit of the last digit of each number.

    The number keeps its sign and its count of decimals. An integer is never rounded, so it stays.
    Where a carry makes a number wider (9.999, 10.000), runs of spaces may change by one space. In
    markup they may not; there tags with their attributes, comments, scripts and styles must be
    equal.
    """
    gaps, numbers = _parts(new, markup)
    stored_gaps, stored_numbers = _parts(stored, markup)
    if len(numbers) != len(stored_numbers):
        return False
    if not all(map(_close, numbers, stored_numbers)):
        return False
    carried = [*map(len, numbers)] != [*map(len, stored_numbers)]
    if carried and not markup:
        return all(map(_same_words, gaps, stored_gaps))
    return gaps == stored_gaps


def _parts(text: str, markup: bool) -> tuple[list[str], list[str]]:
    """The numbers that rounding may change, and what stands before, between and after them."""
    gaps, numbers, end = [], [], 0
    for found in (TAG_OR_NUMBER if markup else NUMBER).finditer(text):
        if found["number"]:
            gaps.append(text[end : found.start()])
            numbers.append(found["number"])
            end = found.end()
    return [*gaps, text[end:]], numbers


def _close(new: str, stored: str) -> bool:
    values = Decimal(new), Decimal(stored)
    unit = Decimal(1).scaleb(min(value.as_tuple().exponent for value in values))
    return _decimals(new) == _decimals(stored) and abs(values[0] - values[1]) <= unit


def _decimals(number: str) -> tuple[int, str]:
    mantissa, exponent, _ = number.partition("e")
    return len(mantissa.partition(".")[2]), exponent


def _same_words(new: str, stored: str) -> bool:
    """Whether the words are equal, line ends among them, and each run of spaces within one."""
    words, runs = re.findall("[^ ]+", new), re.split("[^ ]+", new)
    stored_words, stored_runs = re.findall("[^ ]+", stored), re.split("[^ ]+", stored)
    if words != stored_words:
        return False
    return all(abs(len(run) - len(other)) <= 1 for run, other in zip(runs, stored_runs))


def settled(new: Sequence[NotebookNode], stored: Sequence[NotebookNode]) -> list[NotebookNode]:
    """The new outputs of a cell, where each text that agrees with the stored one is replaced by it."""
    pairs = [_settled(output, other) for output, other in zip(new, stored)]
    return [*pairs, *new[len(stored) :]]


def _settled(new: NotebookNode, stored: NotebookNode) -> NotebookNode:
    if new.get("name") != stored.get("name"):
        return new
    if "text" in new and "text" in stored and agree(new["text"], stored["text"]):
        return NotebookNode({**new, "text": stored["text"]})
    if "data" not in new or "data" not in stored:
        return new
    data = dict(new["data"])
    for kind in {"text/plain", *MARKUPS} & {*data} & {*stored["data"]}:
        if agree(data[kind], stored["data"][kind], markup=kind in MARKUPS):
            data[kind] = stored["data"][kind]
    return NotebookNode({**new, "data": data})


def pytest_itemcollected(item):
    if isinstance(item, IPyNbCell):
        compare = item.compare_outputs
        skipped = (*item.parent.skip_compare, PLOTLY_MIME)

        def lenient(new, stored):
            new, stored = clean_outputs(new), clean_outputs(stored)
            return compare(settled(new, stored), stored, skipped)

        item.compare_outputs = lenient


def pytest_configure(config):
    """Refuses a notebook outside the root folder.

    Its cells' ids would hold no path, and xdist runs only one of equal ids.
    """
    for argument in config.args:
        if not Path(argument.partition("::")[0]).resolve().is_relative_to(config.rootpath):
            what = f"{argument} is outside {config.rootpath}"
            raise pytest.UsageError(f"{what}: add --rootdir=FOLDER, a folder above it")
