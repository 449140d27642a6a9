"""DOC analysis_lib.data.download."""

from __future__ import annotations

import hashlib
import http.client
import os
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import platformdirs

from .files import DataError, query_table, read_text, txt_rows, write_atomically


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
        write_atomically(path, content)
    return files


def official_queries(name: str, harmful: bool | None) -> pd.DataFrame:
    official, path = OFFICIAL_SETS[name], queries_folder() / f"{name}.txt"
    if harmful is not None:
        raise DataError(f"the query set {name!r} has labels of its own; leave out harmful={harmful}")
    if not path.is_file():
        raise DataError(f"{path}: the query set {name!r} is not downloaded; run `python -m analysis_lib download`")
    if _sha256(path.read_bytes()) != official.sha256:
        raise DataError(f"{path}: not the official file (wrong SHA-256); run `python -m analysis_lib download` to replace it")
    return query_table(path, txt_rows(path, read_text(path))[: official.n], official.harmful)


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
