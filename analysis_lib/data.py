"""The data room: query sets, safety prompts and published results, and the validation of a user's own files.

A query table has the columns query_id (unique), text, harmful ("boolean"; <NA> = no agreed answer),
query_set, and pair_id, form, answer where its source has them. A prompt is a text by its name; the
text "" (the prompt "none") means no system message. Where each comes from: data/SOURCES.md.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import http.client
import io
import json
import os
import stat
import tempfile
import unicodedata
import urllib.request
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import platformdirs

ROOT = Path(__file__).resolve().parents[1] / "data"
QUERY_SETS = ("anchor", "heldout_harmless", "heldout_forms", "borderline", "facts")
HELDOUT_SETS = ("heldout_forms", "heldout_harmless", "borderline")
"""What the comparison of prompts is measured on, unless the user names other sets."""
PROMPTS = ("default", "short", "mistral")
OPTIONAL = ("pair_id", "form", "answer")
MIN_OF_EACH_CLASS = 5
"""With so few queries of a class the notebooks' folds still hold both; queries of one pair_id count once."""
MAX_BYTES = 64_000_000
"""The largest file of a user that is read."""
MAX_CHARACTERS = 20_000
"""The longest text of a user: some thousand tokens, whose attention still fits a small machine's memory."""
LABELS = {"true": True, "1": True, "harmful": True, "false": False, "0": False, "harmless": False, "": None}


class DataError(ValueError):
    """Something about a file or a name given by the user; the message says what, where and what to do."""


@dataclass(frozen=True)
class OfficialSet:
    """A query set of the study's repository: its path there, SHA-256, label, and how many of its lines the study uses."""

    path: str
    sha256: str
    harmful: bool
    n: int = 100

    @property
    def url(self) -> str:
        return f"https://raw.githubusercontent.com/chujiezheng/LLM-Safeguard/410bfb5c/code/{self.path}"


# The study's held-out harmless queries are called harmless_testset: heldout_harmless is our own set.
OFFICIAL_SETS: Mapping[str, OfficialSet] = {
    "custom_harmful": OfficialSet("data/custom.txt", "72963102a9fdb29f65044bc12ac54caab471f2a3f071dcd05cf8f8cb72873129", True),
    "custom_harmless": OfficialSet(
        "data_harmless/custom.txt", "919fc2d4422dcf940b2560b5378d3f56c30fc60d48d67dcaebdb8f1cabc07848", False
    ),
    "advbench": OfficialSet("data/advbench.txt", "21e7e0e375548477847ff35af13249c39ac17dcfd3c760953220b245b40e1da2", True),
    "malicious_instruct": OfficialSet(
        "data/MaliciousInstruct.txt", "675f7042ae18fd8ce9b79ec656f00824abc840d9954aa75a021db36689dd0002", True
    ),
    "harmless_testset": OfficialSet(
        "data_harmless/testset.txt", "d4ca81cd544de1489eea608e5ddb3093af51d21c0981e0ba351f7ed1c379452a", False
    ),
}


def load_queries(name_or_path: str | Path, *, harmful: bool | None = None) -> pd.DataFrame:
    """A query table: a set by name, or a user's file.

    Names: "anchor" (100 harmful and 100 harmless queries in pairs), "heldout_harmless", "heldout_forms",
    "borderline", "facts", and after `download()` those of OFFICIAL_SETS.

    Files, in UTF-8: .csv with a header, .jsonl with one object a line, .txt with one query a line.
    `text` is needed and stripped of surrounding space. `harmful` (true/false, 1/0 or harmful/harmless
    in any case, or empty) is <NA> where it is missing; for a file without that column the keyword
    `harmful` labels every query. `query_id` becomes stem-0001, ... and `query_set` the stem where
    missing; pair_id, form and answer are kept; other columns are left out with a warning. A file has at most MAX_BYTES, a text MAX_CHARACTERS.

    Raises DataError naming file, line and remedy.
    """
    if isinstance(name_or_path, str):
        if name_or_path in OFFICIAL_SETS:
            return _official(name_or_path, harmful)
        if name_or_path in QUERY_SETS:
            name_or_path = ROOT / "queries" / f"{name_or_path}.csv"
        elif not (Path(name_or_path).suffix or Path(name_or_path).name != name_or_path):
            raise DataError(
                f"no query set {name_or_path!r}; sets: {', '.join(QUERY_SETS)}; after `python -m analysis_lib download` also "
                f"{', '.join(OFFICIAL_SETS)}; or give the path of a .csv, .jsonl or .txt file"
            )
    path = Path(os.path.expanduser(name_or_path))
    readers = {".csv": _csv_rows, ".jsonl": _jsonl_rows, ".txt": _txt_rows}
    if (suffix := path.suffix.lower()) not in readers:
        raise DataError(f"{path}: a query file ends in .csv, .jsonl or .txt; save it as one of these")
    return _query_table(path, readers[suffix](path, _read(path)), harmful)


def load_anchor_queries(name_or_path: str | Path = "anchor") -> pd.DataFrame:
    """`load_queries` of what is to take the anchor set's place: every query labelled, MIN_OF_EACH_CLASS of both classes.

    Raises DataError as `load_queries` does, and where labels lack.
    """
    queries = load_queries(name_or_path)
    harmful = queries["harmful"]
    if lacking := int(harmful.isna().sum()):
        raise DataError(
            f"{name_or_path}: {lacking} of {len(queries)} queries have no label, and every query needs one; "
            "fill the column harmful with true and false"
        )
    units = (
        queries["query_id"].where(queries["pair_id"] == "", queries["pair_id"]) if "pair_id" in queries else queries["query_id"]
    )
    found = {kind: units[harmful == label].nunique() for kind, label in (("harmful", True), ("harmless", False))}
    if empty := next((kind for kind, n in found.items() if not n), None):
        only = next(kind for kind in found if kind != empty)
        raise DataError(
            f"{name_or_path}: every query is labelled {only}, and both classes are needed; add at least {MIN_OF_EACH_CLASS} {empty} ones"
        )
    if few := next((kind for kind, n in found.items() if n < MIN_OF_EACH_CLASS), None):
        pairs = " (queries of one pair_id count once)" if "pair_id" in queries else ""
        raise DataError(
            f"{name_or_path}: {found[few]} {few} queries{pairs}, and at least {MIN_OF_EACH_CLASS} of each class are needed; add "
            f"{MIN_OF_EACH_CLASS - found[few]} or more"
        )
    return queries


def load_heldout_queries(names: Sequence[str | Path] | None = None, anchor: pd.DataFrame | None = None) -> pd.DataFrame:
    """The sets (names or files as in `load_queries`; default HELDOUT_SETS) as one table, without the texts of the anchor queries.

    Raises DataError as `load_queries` does, for an id that occurs twice, where nothing is left, and for "facts", which
    have their own question.
    """
    names = list(names or HELDOUT_SETS)
    if "facts" in names:
        raise DataError("the facts are asked of the embedded model anyway; leave them out of the held-out sets")
    queries = pd.concat([load_queries(name) for name in names], ignore_index=True)
    named = ", ".join(map(str, names))
    if len(twice := queries["query_id"][queries["query_id"].duplicated()]):
        raise DataError(
            f"query_id {twice.iloc[0]!r} occurs twice in the held-out sets ({named}); name each set once, and give files different names "
            "or ids of their own"
        )
    kept = queries if anchor is None else queries[~queries["text"].isin(anchor["text"])]
    if 0 < (left_out := len(queries) - len(kept)) < len(queries):
        warnings.warn(
            f"{left_out} of {len(queries)} held-out queries ({named}) are among the anchor queries and left out", stacklevel=2
        )
    if kept.empty:
        raise DataError(
            f"every query of the held-out sets ({named}) is among the anchor queries; give sets that nothing is fitted to"
        )
    return kept.reset_index(drop=True)


RESERVED_PROMPTS = ("dro", "tuned")


def load_safety_prompts(path: str | Path | None = None) -> dict[str, str]:
    """Safety prompts by name: "none" (no system message), "default", "short", "mistral", then the user's.

    path: a .txt file (its stem is the name), a folder of them, or a .json file {name: text}. Texts are
    stripped of surrounding space. Raises DataError for a blank text, a built-in name with another text, a name of
    RESERVED_PROMPTS or one that cannot be part of a file's name, and a link in the folder that leads out of it.
    """
    prompts = {"none": ""} | {name: _read(ROOT / "prompts" / f"{name}.txt").strip() for name in PROMPTS}
    if path is None:
        return prompts
    path = Path(os.path.expanduser(path))
    for name, text, where in _user_prompts(path):
        _check_text(text, where)
        if not name.isprintable() or set(name) & set("/\\:") or name[0] == "." or len(name) > 100:  # files are saved under it
            raise DataError(
                f"{where}: the name {_shown(name)} cannot be part of a file's name; write letters, digits, space, - and _, "
                "at most 100 of them"
            )
        if not text.strip():
            raise DataError(
                f"{where}: the prompt {name!r} has no text; write one, or use the built-in 'none' for no system message"
            )
        if name in RESERVED_PROMPTS:
            raise DataError(f"{where}: {name!r} is the name of a trained prompt in the notebooks; give this one another name")
        if prompts.setdefault(name, text.strip()) != text.strip():
            kind = "a built-in prompt" if name in ("none", *PROMPTS) else "another prompt of yours"
            raise DataError(f"{where}: {name!r} is the name of {kind} with another text; give this one a name of its own")
    return prompts


def load_published() -> tuple[pd.DataFrame, pd.DataFrame]:
    """The published results of Zheng et al. 2024: (summary, complied).

    summary, one row per cell: kind (harmful, harmless, alpaca), query_set, model, method (text, vpt =
    vanilla prompt tuning, dro, dro_without_<loss>), safety_prompt (the text, or the one the soft prompt
    started from), count, n_queries, source. count is the queries with at least one of 20 samples judged
    compliant (harmful), those with at least one refusal (harmless), or the wins (alpaca).

    complied, one row per query: kind, query_set, model, method, safety_prompt, query (position in its set,
    from 0), complied (how many of 20 samples were judged compliant). The query set heldout_harmless of
    both tables is the study's, here `harmless_testset`.
    """
    summary = pd.read_csv(ROOT / "published" / "summary.csv")
    wide = pd.read_csv(ROOT / "published" / "complied_of_20.csv")
    keys = ["kind", "query_set", "model", "method", "safety_prompt"]
    complied = wide.melt(keys, var_name="query", value_name="complied", ignore_index=False).sort_index(kind="stable")
    return summary, complied.assign(query=complied["query"].str.removeprefix("q").astype(int)).reset_index(drop=True)


def queries_folder() -> Path:
    """Where downloaded query sets lie: ANALYSIS_LIB_DATA, else the user's cache folder of the platform."""
    given = os.environ.get("ANALYSIS_LIB_DATA")
    return Path(given).expanduser() if given else platformdirs.user_cache_path("analysis_lib") / "queries"


def download(folder: str | Path | None = None, *, fetch: Callable[[str], bytes] | None = None) -> dict[str, Path]:
    """Fetch the study's query sets over https into `folder` (default: `queries_folder()`): {name: file}.

    A file whose SHA-256 is the pinned one is put in place by an atomic rename; another is not kept, and
    DataError is raised. Files already there are not fetched again. With a folder of your own, set
    ANALYSIS_LIB_DATA to it so that `load_queries` finds them by name. fetch: url -> content.
    """
    folder = queries_folder() if folder is None else Path(folder).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for name, official in OFFICIAL_SETS.items():
        path = files[name] = folder / f"{name}.txt"
        if path.is_file() and _sha256(path.read_bytes()) == official.sha256:
            continue
        try:
            content = (fetch or _fetch)(official.url)
        except (OSError, http.client.HTTPException) as error:
            raise DataError(f"{official.url}: {error}; check the connection, or save the file by hand as {path}") from error
        if (found := _sha256(content)) != official.sha256:
            raise DataError(
                f"{official.url}: SHA-256 {found} instead of {official.sha256}, nothing kept; "
                "something on the way changes the file: try another connection"
            )
        _write_atomically(path, content)
    return files


def _official(name: str, harmful: bool | None) -> pd.DataFrame:
    official, path = OFFICIAL_SETS[name], queries_folder() / f"{name}.txt"
    if harmful is not None:
        raise DataError(f"the query set {name!r} has labels of its own; leave out harmful={harmful}")
    if not path.is_file():
        raise DataError(f"{path}: the query set {name!r} is not downloaded; run `python -m analysis_lib download`")
    if _sha256(path.read_bytes()) != official.sha256:
        raise DataError(f"{path}: not the official file (wrong SHA-256); run `python -m analysis_lib download` to replace it")
    return _query_table(path, _txt_rows(path, _read(path))[: official.n], official.harmful)


_Row = tuple[int, dict[str, object]]  # line in the file, from 1; fields


def _csv_rows(path: Path, content: str) -> list[_Row]:
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
                    raise DataError(f"{path}, line {line}: the column {_shown(repeated[0])} occurs twice; rename or delete one")
                if "text" not in header:
                    raise DataError(
                        f"{path}, line {line}: no column 'text', only {_shown(header)}; name the queries' column text "
                        "(comma-separated)"
                    )
            elif len(values) != len(header):
                raise DataError(
                    f"{path}, line {line}: {len(values)} fields, but the header has {len(header)}; put a text with a comma in double quotes"
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


def _jsonl_rows(path: Path, content: str) -> list[_Row]:
    rows: list[_Row] = []
    for line, text in enumerate(content.split("\n"), start=1):
        if not text.strip():
            continue
        try:
            row = json.loads(text, object_pairs_hook=_Pairs)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, line {line}: not valid JSON ({error}); write one object a line") from error
        if not isinstance(row, _Pairs) or "text" not in (fields := dict(row)):
            raise DataError(f'{path}, line {line}: no object with a field \'text\'; write {{"text": "..."}}')
        if repeated := [name for name, count in Counter(name for name, _ in row).items() if count > 1]:
            raise DataError(f"{path}, line {line}: the field {_shown(repeated[0])} occurs twice; rename or delete one")
        rows.append((line, fields))
    return rows


class _Pairs(list):
    """The (name, value) pairs of a JSON object, of which a dict would keep the last of equal names."""


def _txt_rows(path: Path, content: str) -> list[_Row]:
    return [(line, {"text": text}) for line, text in enumerate(content.split("\n"), start=1) if text.strip()]


def _query_table(path: Path, rows: list[_Row], harmful: bool | None) -> pd.DataFrame:
    if not rows:
        raise DataError(f"{path}: no query in it; write at least one")
    columns = {column for _, row in rows for column in row}
    if harmful is not None and "harmful" in columns:
        raise DataError(f"{path}: has labels of its own (column 'harmful'); leave out harmful={harmful}, or that column")
    kept = ["query_id", "text", "harmful", "query_set", *(c for c in OPTIONAL if c in columns)]
    if ignored := sorted(columns - set(kept)):
        warnings.warn(
            f"{path}: columns left out: {_shown(ignored)[1:-1]}; known are {', '.join((*kept[:4], *OPTIONAL))}",
            stacklevel=3,
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
                f"{where}, column 'harmful': {_shown(fields['harmful'])}; write true, false, 1, 0, harmful, harmless or nothing"
            )
        query_id = fields["query_id"] or f"{path.stem}-{number:04d}"
        if (first := lines.setdefault(query_id, line)) != line:
            raise DataError(
                f"{where}, column 'query_id': {_shown(query_id)} is the id of line {first} too; give each query its own"
            )
        labelled = LABELS[label] if harmful is None else harmful
        table.append({**fields, "query_id": query_id, "harmful": labelled, "query_set": fields["query_set"] or path.stem})
    return pd.DataFrame(table, columns=kept).astype({"harmful": "boolean"})


def _field(value: object, column: str, where: str) -> str:
    """A cell as text, without surrounding space; "" where it is missing."""
    number = isinstance(value, int) and column != "text"  # an id or a label; JSON's true and false are ints too
    if not (value is None or isinstance(value, str) or number):
        raise DataError(f"{where}, column {column!r}: {_shown(value)} is no text; put it in quotes")
    text = "" if value is None else str(value)
    _check_text(text, f"{where}, column {column!r}")
    return text.strip()


def _shown(value: object) -> str:
    """A user's value in an error message: on one line, and not the whole of a long one."""
    shown = repr(value)
    return shown if len(shown) <= 200 else f"{shown[:196]}...{shown[-1]}"


def _check_text(text: str, where: str) -> None:
    if len(text) > MAX_CHARACTERS:
        raise DataError(f"{where}: {len(text):,} characters, the limit is {MAX_CHARACTERS:,}; shorten it")
    for character in text:
        if character not in "\t\n" and unicodedata.category(character) in ("Cc", "Cs"):
            raise DataError(f"{where}: control character U+{ord(character):04X}; delete it (tab and newline may stay)")


def _read(path: Path) -> str:
    """The text of a UTF-8 file (with or without byte order mark) with \\n as its line end."""
    try:
        status = path.stat()
        content = path.read_bytes() if stat.S_ISREG(status.st_mode) and status.st_size <= MAX_BYTES else None
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: cannot be read ({why}); check the path and its permissions") from error
    if content is None:  # a pipe or a device may never end
        what = f"{status.st_size:,} bytes, the limit is {MAX_BYTES:,}" if stat.S_ISREG(status.st_mode) else "not a regular file"
        raise DataError(f"{path}: cannot be read ({what}); give a file, and split one that is too large")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise DataError(f"{path}, line {line}: not UTF-8 (byte 0x{content[error.start]:02X}); save the file as UTF-8") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _user_prompts(path: Path) -> Iterable[tuple[str, str, str]]:
    """(name, text, where) of a user's .txt, folder or .json."""
    suffix = path.suffix.lower()
    if path.is_dir():
        files = sorted(path.glob("*.txt"))
        if not files:
            raise DataError(f"{path}: no .txt file in this folder; put one file per safety prompt there")
        for file in files:
            if not Path(os.path.realpath(file)).is_relative_to(os.path.realpath(path)):
                raise DataError(f"{file}: a link that leads out of the folder; put the file itself there")
        return [(file.stem, _read(file), str(file)) for file in files]
    if suffix == ".txt":
        return [(path.stem, _read(path), str(path))]
    if suffix != ".json":
        raise DataError(
            f"{path}: unknown kind of file; safety prompts come as a .txt file, a folder of .txt files, or a .json file {{name: text}}"
        )
    content = _read(path)
    try:
        pairs = json.loads(content, object_pairs_hook=_Pairs)
    except (ValueError, RecursionError) as error:
        raise DataError(f'{path}: not valid JSON ({error}); write {{"name": "text"}}') from error
    if not isinstance(pairs, _Pairs) or not pairs or not all(name.strip() and isinstance(text, str) for name, text in pairs):
        raise DataError(f'{path}: not an object of names and texts; write {{"name": "text"}}')
    return [(name.strip(), text, f"{path}, {_shown(name)}") for name, text in pairs]


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _opener() -> urllib.request.OpenerDirector:
    """An opener that knows https alone: a redirect to http fails as an unknown kind of address."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
    ):
        opener.add_handler(handler)
    return opener


def _fetch(url: str) -> bytes:
    with _opener().open(url, timeout=60) as response:
        return response.read(1 << 20)  # the largest official file has 38 kB


def _write_atomically(path: Path, content: bytes) -> None:
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise
