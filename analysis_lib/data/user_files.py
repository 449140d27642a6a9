"""A user's own files: read with care, their faults named by file and line."""

from __future__ import annotations

import csv
import io
import json
import stat
import unicodedata
import warnings
from collections import Counter
from pathlib import Path
from typing import Any
from uuid import uuid4

import pandas as pd

OPTIONAL = ("pair_id", "form", "answer")

MAX_BYTES = 64_000_000
"""The largest file of a user that is read."""

MAX_CHARACTERS = 20_000
"""The longest text of a user: some thousand tokens, whose attention still fits a small machine's
memory.
"""

LABELS = {
    "true": True,
    "1": True,
    "harmful": True,
    "false": False,
    "0": False,
    "harmless": False,
    "": None,
}


class DataError(ValueError):
    """A file or a name given by the user is wrong; the message says what, where and what to do."""


FILE_NAME = "write letters, digits, space, - and _, at most 100 of them"


def fits_file_name(name: str) -> bool:
    """Whether a name can be part of a file's name on any system, with an ending beside it."""
    return (
        name.strip() != ""
        and name.isprintable()
        and not set(name) & set("/\\:")
        and name[0] != "."
        and len(name) <= 100
        and len(name.encode()) <= 200
    )


_Row = tuple[int, dict[str, object]]  # line in the file, from 1; fields


def csv_rows(path: Path, content: str) -> list[_Row]:
    reader = csv.reader(io.StringIO(content), strict=True)
    rows: list[_Row] = []
    header: list[str] = []
    line = 1
    try:
        for values in reader:
            if not values:
                pass
            elif not header:
                header = [name.strip() for name in values]
                if repeated := [name for name, count in Counter(header).items() if count > 1]:
                    raise DataError(
                        f"{path}, line {line}: the column "
                        f"{shown(repeated[0])} occurs twice; rename or delete one"
                    )
                if "text" not in header:
                    raise DataError(
                        f"{path}, line {line}: no column 'text', only {shown(header)}; "
                        "name the queries' column text (comma-separated)"
                    )
            elif len(values) != len(header):
                raise DataError(
                    f"{path}, line {line}: {len(values)} fields, but the header has {len(header)}; "
                    "put a text with a comma in double quotes"
                )
            else:
                rows.append((line, dict(zip(header, values, strict=True))))
            line = reader.line_num + 1
    except csv.Error as error:
        remedy = (
            "shorten it, or close an open quote"
            if "field larger" in str(error)
            else "put a text with a quote in double quotes and double each"
        )
        raise DataError(f"{path}, line {line}: not valid csv ({error}); {remedy}") from error
    return rows


def jsonl_rows(path: Path, content: str) -> list[_Row]:
    rows: list[_Row] = []
    for line, text in enumerate(content.split("\n"), start=1):
        if not text.strip():
            continue
        try:
            row = json.loads(text, object_pairs_hook=JsonPairs)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{path}, line {line}: not valid JSON ({error}); write one object a line"
            ) from error
        if not isinstance(row, JsonPairs) or "text" not in (fields := dict(row)):
            raise DataError(
                f'{path}, line {line}: no object with a field \'text\'; write {{"text": "..."}}'
            )
        if repeated := [
            name for name, count in Counter(name for name, _ in row).items() if count > 1
        ]:
            raise DataError(
                f"{path}, line {line}: the field "
                f"{shown(repeated[0])} occurs twice; rename or delete one"
            )
        rows.append((line, fields))
    return rows


class JsonPairs(list[tuple[str, Any]]):
    """The (name, value) pairs of a JSON object; a dict would keep the last of equal names."""


def txt_rows(path: Path, content: str) -> list[_Row]:
    return [
        (line, {"text": text})
        for line, text in enumerate(content.split("\n"), start=1)
        if text.strip()
    ]


def query_table(path: Path, rows: list[_Row], harmful: bool | None) -> pd.DataFrame:
    if not rows:
        raise DataError(f"{path}: no query in it; write at least one")
    columns = {column for _, row in rows for column in row}
    if harmful is not None and "harmful" in columns:
        raise DataError(
            f"{path}: has labels of its own (column 'harmful'); "
            f"leave out harmful={harmful}, or that column"
        )
    kept = ["query_id", "text", "harmful", "query_set", *(c for c in OPTIONAL if c in columns)]
    if ignored := sorted(columns - set(kept)):
        warnings.warn(
            f"{path}: columns left out: {shown(ignored)[1:-1]}; "
            f"known are {', '.join((*kept[:4], *OPTIONAL))}",
            stacklevel=4,
        )
    lines: dict[str, int] = {}
    table = []
    for number, (line, row) in enumerate(rows, start=1):
        where = f"{path}, line {line}"
        fields = {column: _field(row.get(column), column, where) for column in kept}
        if not fields["text"]:
            raise DataError(f"{where}, column 'text': blank; write the query or delete the line")
        if (label := fields["harmful"].lower()) not in LABELS:
            raise DataError(
                f"{where}, column 'harmful': {shown(fields['harmful'])}; write true, false, 1, 0, "
                "harmful, harmless or nothing"
            )
        query_id = fields["query_id"] or f"{path.stem}-{number:04d}"
        if (first := lines.setdefault(query_id, line)) != line:
            raise DataError(
                f"{where}, column 'query_id': {shown(query_id)} is the id of line {first} too; "
                "give each query its own"
            )
        labelled = LABELS[label] if harmful is None else harmful
        table.append(
            {
                **fields,
                "query_id": query_id,
                "harmful": labelled,
                "query_set": fields["query_set"] or path.stem,
            }
        )
    return pd.DataFrame(table, columns=kept).astype({"harmful": "boolean"})


def _field(value: object, column: str, where: str) -> str:
    """A cell as text, without surrounding space; "" where it is missing."""
    # An id or a label may be a number; JSON's true and false are ints too.
    number = isinstance(value, int) and column != "text"
    if not (value is None or isinstance(value, str) or number):
        raise DataError(f"{where}, column {column!r}: {shown(value)} is no text; put it in quotes")
    text = "" if value is None else str(value)
    check_text(text, f"{where}, column {column!r}")
    return text.strip()


def write_whole(path: Path, content: bytes) -> None:
    """Puts a file in place, whole or not at all. Missing folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # A short name: that of the file may be as long as the system takes.
    part = path.with_name(f".{uuid4().hex}.part")
    try:
        part.write_bytes(content)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def shown(value: object) -> str:
    """A user's value in an error message: on one line, and not the whole of a long one."""
    shown = repr(value)
    return shown if len(shown) <= 200 else f"{shown[:196]}...{shown[-1]}"


def check_text(text: str, where: str) -> None:
    if len(text) > MAX_CHARACTERS:
        raise DataError(
            f"{where}: {len(text):,} characters, the limit is {MAX_CHARACTERS:,}; shorten it"
        )
    for character in text:
        if character not in "\t\n" and unicodedata.category(character) in ("Cc", "Cs"):
            raise DataError(
                f"{where}: control character U+{ord(character):04X}; "
                "delete it (tab and newline may stay)"
            )


def read_text(path: Path) -> str:
    """The text of a UTF-8 file (with or without byte order mark) with \\n as its line end."""
    try:
        status = path.stat()
        content = (
            path.read_bytes()
            if stat.S_ISREG(status.st_mode) and status.st_size <= MAX_BYTES
            else None
        )
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise DataError(
            f"{path}: cannot be read ({why}); check the path and its permissions"
        ) from error
    # A pipe or a device may never end.
    if content is None:
        what = (
            f"{status.st_size:,} bytes, the limit is {MAX_BYTES:,}"
            if stat.S_ISREG(status.st_mode)
            else "not a regular file"
        )
        raise DataError(
            f"{path}: cannot be read ({what}); give a file, and split one that is too large"
        )
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise DataError(
            f"{path}, line {line}: not UTF-8 (byte 0x{content[error.start]:02X}); "
            "save the file as UTF-8"
        ) from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def csv_column(path: Path, key: str, value: str) -> dict[str, str]:
    """The column `value` of a csv by the column `key`, whose entries are unique. Raises DataError."""
    reader = csv.reader(io.StringIO(read_text(path)), strict=True)
    found: dict[str, str] = {}
    try:
        rows = filter(None, reader)
        header = next(rows, [])
        if lacking := [c for c in (key, value) if header.count(c) != 1]:
            raise DataError(
                f"{path}: no column {lacking[0]!r}, or several, in the header {header}; give the "
                f"columns {key}, {value}"
            )
        for fields in rows:
            where = f"{path}, line {reader.line_num}"
            if len(fields) != len(header):
                raise DataError(
                    f"{where}: {len(fields)} fields, but the header has {len(header)}; put a text "
                    "with a comma in double quotes"
                )
            name = fields[header.index(key)]
            if name in found:
                raise DataError(f"{where}: the {key} {name!r} occurs twice; give each one line")
            found[name] = fields[header.index(value)]
    except csv.Error as error:
        raise DataError(
            f"{path}, line {reader.line_num}: not valid csv ({error}); put a text with a quote in "
            "double quotes and double each"
        ) from error
    return found


def json_entries(path: Path, *fields: str) -> list[dict[str, Any]]:
    """The objects of a JSON list, each with a text in every one of `fields`. Raises DataError."""
    content = read_text(path)
    try:
        entries = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path}: cannot be read as JSON ({error}); "
            f"give a list of objects with {', '.join(fields)}"
        ) from error
    if not isinstance(entries, list) or not entries:
        raise DataError(f"{path}: not a list of objects; give one with {', '.join(fields)} in each")
    for number, entry in enumerate(entries, start=1):
        for field in fields:
            if (
                not isinstance(entry, dict)
                or not isinstance(entry.get(field), str)
                or not entry[field].strip()
            ):
                raise DataError(
                    f"{path}, entry {number}: no text in {field!r}; give every object one"
                )
    return entries
