"""Licence, notice, data sources, citation and version agree; hosted CI and hooks call ours."""

from __future__ import annotations

import csv
import hashlib
import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "data"
# SHA-256 of the licence as apache.org publishes it.
APACHE = "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"
HOLDER = "Copyright 2026 the analysis-lib developers"


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def project() -> dict:
    return tomllib.loads(text("pyproject.toml"))["project"]


def data_files() -> set[str]:
    """Every file below data/ but the page that names them."""
    files = {path.relative_to(DATA).as_posix() for path in DATA.rglob("*") if path.is_file()}
    hidden = {file for file in files if re.search(r"(^|/)(\.|__pycache__/)", file)}
    return files - hidden - {"SOURCES.md"}


def faults_of_sources(sources: str, notice: str, files: set[str]) -> list[str]:
    """What SOURCES.md leaves out, names in vain or does not explain; quotes missing in NOTICE."""
    table = sources[: sources.index("What each licence asks of you:")]
    rows = re.findall(r"^\| `([^`]+)` \|([^|]*)\|", table, re.MULTILINE)
    licences = {file: licence.strip() for file, licence in rows}
    explained = set(re.findall(r"^- \*\*(.+?)\*\*: ", sources, re.MULTILINE))
    found = [f"{file} has no row" for file in sorted(files - set(licences))]
    found += [f"{file} has a row and is not there" for file in sorted(set(licences) - files)]
    if len(licences) < len(rows):
        found.append("a file has two rows")
    for file, licence in licences.items():
        if licence not in explained:
            found.append(f"{file}: the licence {licence!r} is not told below the table")
        if licence.startswith("quoted") and f"data/{file}" not in notice:
            found.append(f"{file} is quoted, and NOTICE does not name it")
    return found


def test_every_data_file_has_its_licence():
    assert len(data_files()) > 20
    assert faults_of_sources(text("data/SOURCES.md"), text("NOTICE"), data_files()) == []


@pytest.mark.parametrize(
    ("sources", "notice", "added", "told"),
    [
        (("", ""), ("", ""), {"queries/new.csv"}, "queries/new.csv has no row"),
        (("| `wrappers.csv` |", "| wrappers |"), ("", ""), set(), "wrappers.csv has no row"),
        (
            ("`wrappers.csv` |", "`gone.csv` |"),
            ("", ""),
            set(),
            "gone.csv has a row and is not there",
        ),
        (("| `wrappers.csv` |", "| `models.csv` |"), ("", ""), set(), "a file has two rows"),
        (
            ("`models.csv` | Apache-2.0 |", "`models.csv` | |"),
            ("", ""),
            set(),
            "the licence '' is not told",
        ),
        (
            ("`models.csv` | Apache-2.0 |", "`models.csv` | GPL |"),
            ("", ""),
            set(),
            "the licence 'GPL' is not told",
        ),
        (("- **facts**: ", "- facts: "), ("", ""), set(), "the licence 'facts' is not told"),
        (
            ("", ""),
            ("data/prompts/short.txt", "a prompt"),
            set(),
            "prompts/short.txt is quoted, and NOTICE",
        ),
    ],
)
def test_a_missing_licence_is_found(sources, notice, added, told):
    pages = []
    for name, (old, new) in (("data/SOURCES.md", sources), ("NOTICE", notice)):
        assert old in text(name)
        pages.append(text(name).replace(old, new, 1))
    assert any(told in fault for fault in faults_of_sources(*pages, data_files() | added))


def longest_words(path: Path) -> int:
    """The most words that a cell of a csv holds."""
    with path.open(encoding="utf-8", newline="") as file:
        return max(len(cell.split()) for row in csv.reader(file) for cell in row)


def test_the_published_results_hold_counts_and_no_texts(tmp_path):
    files = sorted((DATA / "published").iterdir())
    assert files and all(path.suffix == ".csv" and longest_words(path) <= 3 for path in files)
    reply = tmp_path / "reply.csv"
    reply.write_text('model,output\nsome-model,"Here is what you asked for."\n', encoding="utf-8")
    assert longest_words(reply) > 3


def test_the_licence_is_apache_2_in_full():
    licence = text("LICENSE")
    assert licence.count(HOLDER) == 1 and HOLDER in text("NOTICE")
    original = licence.replace(HOLDER, "Copyright [yyyy] [name of copyright owner]")
    assert hashlib.sha256(original.encode()).hexdigest() == APACHE
    assert project()["license"] == "Apache-2.0"
    assert {"LICENSE", "NOTICE"} <= set(project()["license-files"])


def versions(pyproject: str, citation: str, changelog: str) -> list[str]:
    """The version as each of the three files gives it."""
    newest = re.search(r"^## \[?([^\]\s]+)", changelog, re.MULTILINE)
    assert newest is not None
    return [
        tomllib.loads(pyproject)["project"]["version"],
        str(yaml.safe_load(citation)["version"]),
        newest[1],
    ]


FILES = ("pyproject.toml", "CITATION.cff", "CHANGELOG.md")


def test_one_version_everywhere():
    assert len(set(versions(*map(text, FILES)))) == 1


@pytest.mark.parametrize("file", FILES)
def test_another_version_is_found(file):
    now = project()["version"]
    pages = {name: text(name) for name in FILES}
    pages[file] = pages[file].replace(now, "9.9.9", 1)
    assert sorted(versions(*pages.values())) == sorted([now, now, "9.9.9"])


def test_the_citation():
    """The software under its title and licence, and the paper that it starts from."""
    citation = yaml.safe_load(text("CITATION.cff"))
    assert citation["cff-version"] == "1.2.0"
    assert citation["title"] == "Safety prompts, seen from inside"
    assert citation["license"] == project()["license"]
    (paper,) = citation["references"]
    assert [author["family-names"] for author in paper["authors"]] == (
        ["Zheng", "Yin", "Zhou", "Meng", "Zhou", "Chang", "Huang", "Peng"]
    )
    assert (paper["volume"], paper["start"], paper["end"], paper["year"]) == (
        235,
        61593,
        61613,
        2024,
    )
    assert [identifier["value"] for identifier in paper["identifiers"]] == ["arXiv:2401.18018"]


def test_the_hosted_ci_calls_ci_run_on_each_python():
    job = yaml.safe_load(text(".github/workflows/ci.yml"))["jobs"]["tests"]
    pythons = job["strategy"]["matrix"]["python"]
    wanted = project()["requires-python"]
    assert pythons[0] == wanted.removeprefix(">=")
    assert len(pythons) == 3 and all(python in SpecifierSet(wanted) for python in pythons)
    checkout, python, run = job["steps"]
    assert checkout["uses"].startswith("actions/checkout@")
    assert python["uses"].startswith("actions/setup-python@")
    assert python["with"]["python-version"] == "${{ matrix.python }}"
    assert run == {"run": "bash .ci/run"} and (ROOT / ".ci" / "run").is_file()


def test_hooks_are_the_ruff_of_make_test():
    (repo,) = yaml.safe_load(text(".pre-commit-config.yaml"))["repos"]
    assert repo["repo"] == "local"  # nothing is fetched
    entries = [hook["entry"] for hook in repo["hooks"]]
    assert entries == [
        ".venv/bin/ruff format --force-exclude",
        ".venv/bin/ruff check --force-exclude",
    ]
