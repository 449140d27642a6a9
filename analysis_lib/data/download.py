"""The study's own query sets, fetched and pinned by SHA-256."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import platformdirs

from .units import told_of_copies
from .user_files import DataError, query_table, read_text, txt_rows


@dataclass(frozen=True)
class OfficialSet:
    """A query set of the study's repository: path, SHA-256, label, and how many lines are used."""

    path: str
    sha256: str
    harmful: bool
    n: int = 100

    @property
    def url(self) -> str:
        return (
            f"https://raw.githubusercontent.com/chujiezheng/LLM-Safeguard/410bfb5c/code/{self.path}"
        )


# The study's held-out harmless queries are called harmless_testset; heldout_harmless is ours.
OFFICIAL_SETS: Mapping[str, OfficialSet] = {
    "custom_harmful": OfficialSet(
        "data/custom.txt", "72963102a9fdb29f65044bc12ac54caab471f2a3f071dcd05cf8f8cb72873129", True
    ),
    "custom_harmless": OfficialSet(
        "data_harmless/custom.txt",
        "919fc2d4422dcf940b2560b5378d3f56c30fc60d48d67dcaebdb8f1cabc07848",
        False,
    ),
    "advbench": OfficialSet(
        "data/advbench.txt",
        "21e7e0e375548477847ff35af13249c39ac17dcfd3c760953220b245b40e1da2",
        True,
    ),
    "malicious_instruct": OfficialSet(
        "data/MaliciousInstruct.txt",
        "675f7042ae18fd8ce9b79ec656f00824abc840d9954aa75a021db36689dd0002",
        True,
    ),
    "harmless_testset": OfficialSet(
        "data_harmless/testset.txt",
        "d4ca81cd544de1489eea608e5ddb3093af51d21c0981e0ba351f7ed1c379452a",
        False,
    ),
}


def queries_folder() -> Path:
    """Where downloaded query sets lie: ANALYSIS_LIB_DATA, else the platform's cache folder."""
    given = os.environ.get("ANALYSIS_LIB_DATA")
    return (
        Path(given).expanduser()
        if given
        else platformdirs.user_cache_path("analysis_lib") / "queries"
    )


Downloader = Callable[[str, Any, Any], None]  # url, output file, pooch


def download(
    folder: str | Path | None = None, *, downloader: Downloader | None = None
) -> dict[str, Path]:
    """Fetches the study's query sets into `folder` (default: `queries_folder()`): {name: file}.

    A file is put in place whole once its SHA-256 is the pinned one. Any other file is not kept, and
    DataError is raised. Files already there are not fetched again. With a folder of your own, set
    ANALYSIS_LIB_DATA to it so that `load_queries` finds them by name. downloader: one of pooch's,
    or a function like them; default: that of the address.
    """
    import pooch

    folder = queries_folder() if folder is None else Path(folder).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    pooch.get_logger().setLevel("WARNING")
    files = {}
    for name, official in OFFICIAL_SETS.items():
        path = files[name] = folder / f"{name}.txt"
        try:
            pooch.retrieve(
                official.url,
                f"sha256:{official.sha256}",
                fname=path.name,
                path=folder,
                downloader=downloader,
            )
        except OSError as error:  # what requests raises is one, too
            raise DataError(
                f"{official.url}: {error}; check the connection, or save the file by hand as {path}"
            ) from error
        except ValueError as error:
            raise DataError(
                f"{official.url}: its SHA-256 is not {official.sha256}, nothing kept; "
                "something on the way changes the file: try another connection"
            ) from error
    return files


def official_queries(name: str, harmful: bool | None) -> tuple[pd.DataFrame, str]:
    """The queries of a set, and what is to be told of copies among them."""
    official, path = OFFICIAL_SETS[name], queries_folder() / f"{name}.txt"
    if harmful is not None:
        raise DataError(
            f"the query set {name!r} has labels of its own; leave out harmful={harmful}"
        )
    if not path.is_file():
        raise DataError(
            f"{path}: the query set {name!r} is not downloaded; "
            "run `python -m analysis_lib download`"
        )
    if _sha256(path.read_bytes()) != official.sha256:
        raise DataError(
            f"{path}: not the official file (wrong SHA-256); "
            "run `python -m analysis_lib download` to replace it"
        )
    rows = txt_rows(path, read_text(path))[: official.n]
    table = query_table(path, rows, official.harmful)
    return table, told_of_copies(table, str(path), [f"line {line}" for line, _ in rows])


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
