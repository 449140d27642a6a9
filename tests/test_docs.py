"""The pages: their code runs, their links lead somewhere, their tables have every option, and the site is built."""

from __future__ import annotations

import contextlib
import inspect
import io
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
from nbval_plugin import agree

import analysis_lib
from analysis_lib.__main__ import main
from analysis_lib.report.run_notebooks import parameters, read_notebook

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [
    *ROOT.glob("*.md"),
    *DOCS.glob("*.md"),
    *ROOT.glob("data/**/*.md"),
    *ROOT.glob("bench/**/*.md"),
]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def text_of(path: Path) -> str:
    """A page as Markdown; of a notebook, its Markdown cells."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".ipynb":
        return text
    cells = json.loads(text)["cells"]
    return "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


# README --------------------------------------------------------------------------------------


def test_readme_is_short_and_names_what_it_imports():
    readme = text_of(ROOT / "README.md")
    assert len(readme.split()) < 900
    assert "import *" not in readme
    (code,) = [code for kind, code in FENCE.findall(readme) if kind == "python"]
    assert len([line for line in code.splitlines() if line]) <= 10


# Code ----------------------------------------------------------------------------------------


def run_page(text: str, *, shell: bool = False) -> int:
    """Runs a page's Python, and with `shell` its commands of the library; returns how many.

    A `text` block right behind a `python` block is what it prints.
    """
    count, names, blocks = 0, {}, FENCE.findall(text)
    for (kind, code), (following, told) in itertools.pairwise([*blocks, ("", "")]):
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            if kind == "python":
                exec(compile(code, "page", "exec"), names)
                count += 1
            for line in code.splitlines() if shell and kind == "sh" else []:
                if line.startswith("python -m analysis_lib "):
                    assert main(shlex.split(line)[3:]) == 0, line
                    count += 1
        if kind == "python" and following == "text":
            printed = "\n".join(line.rstrip() for line in out.getvalue().splitlines())
            assert agree(printed, told.rstrip("\n")), f"printed:\n{printed}\ntold:\n{told}"
    return count


@pytest.mark.parametrize(
    ("page", "count"), [("README.md", 1), ("docs/tutorial.md", 9), ("docs/serving.md", 1)]
)
def test_the_code_of_a_page_runs_and_prints_what_is_told(page, count, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ANALYSIS_LIB_STORE", str(tmp_path / "store"))
    assert run_page(text_of(ROOT / page), shell=page == "docs/tutorial.md") == count


def test_no_other_page_has_python():
    others = {named(page) for page in PAGES if "```python" in text_of(page)}
    assert others == {"README.md", "docs/tutorial.md", "docs/serving.md"}


def test_a_wrong_output_is_found():
    page = "```python\nprint(1 / 3)\n```\n\n```text\n{}\n```\n"
    assert run_page(page.format(1 / 3)) == 1
    with pytest.raises(AssertionError, match="0.4333"):
        run_page(page.format("0.4333333333333333"))


# Options -------------------------------------------------------------------------------------


def help_of(command: tuple[str, ...]) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit):
        main([*command, "--help"])
    return out.getvalue()


@cache
def commands(command: tuple[str, ...] = ()) -> dict[str, set[str]]:
    """{command: its flags and positional arguments}, as the command line's help lists them."""
    text = help_of(command)
    if below := re.search(r"^  \{([\w,]+)\}", text, re.MULTILINE):
        parts = [commands((*command, name)) for name in below[1].split(",")]
        return {name: flags for part in parts for name, flags in part.items()}
    listed = re.findall(r"^  (-.*?|[A-Z_]+)(?:  |$)", text, re.MULTILINE)
    flags = {flag for line in listed for flag in re.findall(r"--[a-z-]+|^[A-Z_]+$", line)}
    return {" ".join(command): flags - {"--help"}}


def options() -> set[tuple[str, str]]:
    return {(command, flag) for command, flags in commands().items() for flag in flags}


def table_rows(text: str) -> list[list[str]]:
    """The cells of a page's tables, heads and rules left out."""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in row] for row in rows if not set("".join(row)) <= set("- |")]


def options_table(text: str) -> tuple[set[str], set[tuple[str, str]], set[str], set[str]]:
    """Make variables, (command, flag) pairs, environment variables and arguments of `load`."""
    found: tuple[set[str], set, set[str], set[str]] = (set(), set(), set(), set())
    lines = [line for line in text.splitlines() if re.match(r"\| (`|\|)", line)]
    for line in lines[1:]:  # the head is first
        cells = [re.findall(r"`([^`]+)`", cell) for cell in line.split("|")[1:4]]
        found[0].update(span.removesuffix("=") for span in cells[0])
        for span in cells[1]:
            words = span.split()
            at = next(i for i, word in enumerate(words) if re.match(r"--|[A-Z_]+$", word))
            for command in itertools.product(*(word.split("/") for word in words[:at])):
                found[1].add((" ".join(command), words[at]))
        for span in cells[2]:
            found[2 if span.isupper() else 3].add(span)
    return found


def faults_of_options(text: str) -> list[str]:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    head = "".join(re.findall(r"^# make .*\[(.*)\]", makefile, re.MULTILINE))
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "analysis_lib").rglob("*.py")]
    wanted = (
        {*re.findall(r"\b([A-Z]+)=", head), *re.findall(r"^(\w+) \?=", makefile, re.MULTILINE)},
        set(options()),
        set(re.findall(r"\bANALYSIS_LIB_[A-Z]+", "".join(sources))),
        set(inspect.signature(analysis_lib.ChatModel.load).parameters),
    )
    found = []
    for have, want in zip(options_table(text), wanted):
        found += [f"no row for {item}" for item in sorted(want - have)]
        found += [f"a row for {item}, which is not there" for item in sorted(have - want)]
    return found


def test_the_table_has_every_option_and_no_other():
    assert {("reproduce", "--to"), ("export", "SOFT_PROMPT"), ("cache ls", "--store")} <= options()
    assert commands()["organism card"] == set()
    assert faults_of_options(text_of(DOCS / "options.md")) == []


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("`reproduce --jobs N`", "", "no row for ('reproduce', '--jobs')"),
        ("`reproduce --jobs N`", "`reproduce --job N`", "a row for ('reproduce', '--job')"),
        ("ls/info/verify", "ls/verify", "no row for ('cache info', '--store')"),
        ("`export SOFT_PROMPT`", "", "no row for ('export', 'SOFT_PROMPT')"),
        ("| `GUARD=` |", "| |", "no row for GUARD"),
        ("`ANALYSIS_LIB_DATA`", "", "no row for ANALYSIS_LIB_DATA"),
        ("`quantization`", "`bits`", "a row for bits"),
    ],
)
def test_a_missing_option_is_found(old, new, told):
    text = text_of(DOCS / "options.md")
    assert text.count(old) == 1
    assert any(fault.startswith(told) for fault in faults_of_options(text.replace(old, new)))


def unknown_commands(text: str) -> list[str]:
    """The commands of a page that the command line does not take."""
    found = []
    for line in re.findall(r"python -m analysis_lib +([^\n`|]*)", text):
        command = next((name for name in commands() if f"{line} ".startswith(f"{name} ")), None)
        flags = set(re.findall(r"(?<!\S)--[a-z-]+", line))
        if command is None or not flags <= commands()[command]:
            found.append(line)
    return found


def test_every_command_of_a_page_is_one():
    found = {named(page): unknown_commands(text_of(page)) for page in [*PAGES, *NOTEBOOKS]}
    assert {page: lines for page, lines in found.items() if lines} == {}
    assert unknown_commands("`python -m analysis_lib cache ls --store a`") == []
    assert unknown_commands("`python -m analysis_lib reproduce --modle a`") != []
    assert unknown_commands("`python -m analysis_lib reproduced`") != []


# Notebooks -----------------------------------------------------------------------------------


def faults_of_notebooks(index: str, options: str) -> list[str]:
    """Notebooks without a row in the index, rows without one, and settings that no page names."""
    shown = [path.stem.replace("_", " ") for path in NOTEBOOKS]
    rows = [row[0] for row in table_rows(index)]
    found = [
        f"no row for {name}" for name in shown if [row[:2] for row in rows].count(name[:2]) != 1
    ]
    found += [f"{row} is no notebook" for row in rows[1:] if row[:2] not in {s[:2] for s in shown}]
    section = options.partition("## The notebooks alone")[2].partition("\n## ")[0]
    of_all = set(re.findall(r"`([A-Z]+)`", section.partition("\n| ")[0]))
    more = {row[0]: set(re.findall(r"`(\w+)`", row[1])) for row in table_rows(section)[1:]}
    for path in NOTEBOOKS:
        own = set(parameters(read_notebook(path))) - of_all
        differing = sorted(own ^ more.get(path.name[:2], set()))
        found += [f"{name} of {path.name[:2]} is told wrongly" for name in differing]
    return found


def test_the_pages_have_every_notebook_and_its_settings():
    index, options = text_of(DOCS / "index.md"), text_of(DOCS / "options.md")
    assert faults_of_notebooks(index, options) == []
    less = re.sub(r"\| 05 DRO .*\n", "", index)
    assert faults_of_notebooks(less, options) == ["no row for 05 dro"]
    more = index.replace("| 05 DRO ", "| 15 DRO ")
    assert "15 DRO is no notebook" in faults_of_notebooks(more, options)
    other = options.replace("`REVEAL`", "`SHOW`")
    told = ["REVEAL of 02 is told wrongly", "SHOW of 02 is told wrongly"]
    assert faults_of_notebooks(index, other) == told


# Links ---------------------------------------------------------------------------------------


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as the forges and Sphinx make them."""
    found: Counter[str] = Counter()
    slugs = set()
    for heading in re.findall(r"^#{1,6} +(.+?) *$", FENCE.sub("", text), re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        slugs.add(f"{slug}-{found[slug]}" if found[slug] else slug)
        found[slug] += 1
    return slugs


def faults_of_links(path: Path, text: str) -> list[str]:
    """Links of a page to files or anchors of the project that are not there."""
    prose = re.sub(r"`[^`\n]*`", "", FENCE.sub("", text))
    links = re.findall(r"\]\(<?([^)\s>]+)|^\[[^\]]+\]: *(\S+)", prose, re.MULTILINE)
    found = []
    for link in map("".join, links):
        if re.match(r"[a-z]+:", link):
            continue
        target, _, anchor = link.partition("#")
        file = (path.parent / target).resolve() if target else path
        if not file.is_relative_to(ROOT) or not file.exists():
            found.append(f"{link}: no such file")
        elif anchor and anchor not in anchors(text_of(file) if target else text):
            found.append(f"{link}: no such anchor")
    return found


@pytest.mark.parametrize("path", [*PAGES, *NOTEBOOKS], ids=named)
def test_every_link_leads_somewhere(path):
    assert faults_of_links(path, text_of(path)) == []


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[a](docs/gone.md)", "no such file"),
        ("![a](docs/gone.png)", "no such file"),
        ("[`a`](docs/glossary.md#gone)", "no such anchor"),
        ("[a](#gone)", "no such anchor"),
        ("[a](/etc/passwd)", "no such file"),
        ("[a]: docs/gone.md", "no such file"),
    ],
)
def test_a_dead_link_is_found(text, told):
    (fault,) = faults_of_links(ROOT / "README.md", f"# Head\n\n{text}\n")
    assert fault.endswith(told)
    sound = "[a](docs/glossary.md#dro) [b](#head) <https://a.b/c> `[x](y)`\n```\n[x](y)\n```\n"
    assert faults_of_links(ROOT / "README.md", f"# Head\n\n{sound}") == []


# What a page has to hold ---------------------------------------------------------------------

TERMS = """cross-entropy holm-correction sign-flip-test principal-component logit bootstrap
wilson-interval certificate anchor-space refusal-direction harmfulness-direction dro soft-prompt
prompt-tuning string-judge guard false-refusal compliance held-out temperature top-p hidden-state
last-token model-organism spearman kappa kl-divergence fingerprint soft-label""".split()


def test_the_glossary_has_every_term_with_a_short_text():
    text = text_of(DOCS / "glossary.md")
    assert set(TERMS) <= anchors(text)
    entries = re.findall(r"^### (.+)\n\n((?:.+\n)+)(?=\n|\Z)", text, re.MULTILINE)
    assert len(entries) == len(re.findall(r"^### ", text, re.MULTILINE)) > len(TERMS)
    long = [name for name, entry in entries if len(entry.split()) > 75]
    assert long == []


def test_the_design_has_every_room():
    package = ROOT / "analysis_lib"
    rooms = {path.parent.name for path in package.glob("*/__init__.py")}
    rows = table_rows(text_of(DOCS / "design.md"))
    told = {row[1].strip("`") for row in rows if row[0].isdigit()}
    assert told == rooms | {"__main__.py"}


def test_the_limits_of_every_figure_are_told():
    from analysis_lib import figures

    rows = table_rows(text_of(DOCS / "limits.md"))
    told = {row[0].strip("`") for row in rows if row[0].startswith("`plot_")}
    assert told == {name for name in figures.__all__ if name.startswith("plot_")}


# The site ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The pages as `make docs` builds them."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / ".installed").touch()
    given = {"VENV": folder, "RUN": sys.executable, "SITE": folder / "html"}
    outer = ("MAKEFLAGS", "MAKELEVEL", "PYTHON")
    made = subprocess.run(
        ["make", "docs", *(f"{name}={value}" for name, value in given.items())],
        env={name: value for name, value in os.environ.items() if name not in outer},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert made.returncode == 0, made.stdout + made.stderr
    return folder / "html"


def test_a_warning_ends_the_build():
    recipe = re.search(r"^docs:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert recipe and " -m sphinx -W " in recipe[1]


def test_every_public_name_is_in_the_reference_once(site):
    pages = [path.read_text(encoding="utf-8") for path in (site / "api").glob("*.html")]
    ids = Counter(re.findall(r'<dt [^>]*\bid="(analysis_lib\.[\w.]+)"', "".join(pages)))
    items = {name: getattr(analysis_lib, name) for name in analysis_lib.__all__}
    counts = {name: ids[f"{item.__module__}.{name}"] for name, item in items.items()}
    assert len(counts) > 30 and set(counts.values()) == {1}, counts
    assert ids["analysis_lib.figures.plane.plot_groups"] == 1
    assert ids["analysis_lib.widgets.explorer.explore"] == 1


def test_the_site_asks_for_nothing_from_outside(site):
    outside = re.compile(r'<(?:script|link|img|iframe)\b[^>]*(?:src|href)="(?:https?:)?//')
    pages = sorted(site.rglob("*.html"))
    assert {"index.html", "tutorial.html", "options.html"} <= {path.name for path in pages}
    assert [page for page in pages if outside.search(page.read_text(encoding="utf-8"))] == []
    assert outside.search('<script defer src="https://a.b/c.js">')


def test_the_site_offers_the_files_that_its_pages_link_to(site):
    offered = {path.name for path in site.glob("_downloads/*/*")}
    assert {"CARD.md", "estimators.py", "tuning.py"} <= offered
    assert 'href="_downloads/' in (site / "limits.html").read_text(encoding="utf-8")


def test_the_site_has_the_anchors_that_notebooks_link_to(site):
    page = (site / "glossary.html").read_text(encoding="utf-8")
    assert [term for term in TERMS if f'id="{term}"' not in page] == []
