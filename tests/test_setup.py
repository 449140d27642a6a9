"""The set-up files agree with each other, with the code and with what is installed."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from shutil import which

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
FILES = ("pyproject.toml", "requirements.lock", "environment.yml", "Makefile", "README.md")


def read_files() -> dict[str, str]:
    return {
        name: (ROOT / name).read_text(encoding="utf-8") for name in FILES if (ROOT / name).exists()
    }


def locked(text: str) -> dict[str, Version]:
    return {
        canonicalize_name(name): Version(version)
        for name, version in re.findall(r"^([\w.\-]+)==(\S+)$", text, re.MULTILINE)
    }


def faults(files: dict[str, str]) -> list[str]:
    """Where the set-up files contradict each other; empty where they agree."""
    found = []
    pyproject = tomllib.loads(files["pyproject.toml"])
    project = pyproject["project"]
    lock = locked(files["requirements.lock"])
    found += [
        f"requirements.lock: {line!r} is not name==version"
        for line in files["requirements.lock"].splitlines()
        if "==" not in line
    ]
    found += [
        f"requirements.lock: {name} has a local version"
        for name, version in lock.items()
        if version.local
    ]
    extras = [line for extra in project["optional-dependencies"].values() for line in extra]
    for requirement in map(Requirement, [*project["dependencies"], *extras]):
        version = lock.get(canonicalize_name(requirement.name))
        if version is None or version not in requirement.specifier:
            found.append(f"pyproject asks for {requirement}, requirements.lock has {version}")

    wanted = SpecifierSet(project["requires-python"])
    lowest = str(wanted).removeprefix(">=")
    environment = yaml.safe_load(files["environment.yml"])["dependencies"]
    pip = next(entry["pip"] for entry in environment if isinstance(entry, dict))
    names = [re.split(r"[=<>! ]", entry)[0] for entry in environment if isinstance(entry, str)]
    if names != ["python", "pip"] or pip != ["-r requirements.lock", "-e ."]:
        found.append(
            f"environment.yml holds {environment}; python, pip, the lock and the project are all it may"
        )
    conda = re.fullmatch(r"python=(3\.\d+)", environment[0])
    if conda is None or conda[1] not in wanted:
        found.append(f"environment.yml: {environment[0]} does not name a Python in {wanted}")
    if f"sys.version_info < ({lowest.replace('.', ', ')})" not in files["Makefile"]:
        found.append(f"Makefile does not check for Python {lowest}")
    if pyproject["tool"]["ruff"]["target-version"] != "py" + lowest.replace(".", ""):
        found.append(f"ruff's target-version is not Python {lowest}")
    if pyproject["tool"]["mypy"]["python_version"] != lowest:
        found.append(f"mypy's python_version is not Python {lowest}")
    told = re.findall(r"Python (3\.\d+)", files.get("README.md", f"Python {lowest}"))
    if not told or any(version not in wanted for version in told):
        found.append(f"README.md names Python {told}, pyproject {wanted}")
    return found


def test_files_agree():
    assert faults(read_files()) == []


@pytest.mark.parametrize(
    ("file", "old", "new", "told"),
    [
        ("pyproject.toml", r'"torch>=[\d.]+"', '"torch>=99"', "torch>=99"),
        ("pyproject.toml", r'"nh3>', '"not-locked>', "not-locked"),
        (
            "pyproject.toml",
            r'requires-python = ">=3.11"',
            'requires-python = ">=3.13"',
            "environment.yml",
        ),
        ("requirements.lock", r"^(torch==.*)$", r"\1+cpu", "local version"),
        ("requirements.lock", r"^plotly==.*\n", "", "plotly"),
        ("requirements.lock", r"^plotly==", "plotly @ file:///", "not name==version"),
        ("environment.yml", r"python=3\.\d+", "python=3.9", "python=3.9"),
        ("environment.yml", r"  - pip\n", "  - pip\n  - numpy\n", "numpy"),
        ("Makefile", r"\(3, 11\)", "(3, 9)", "Makefile"),
        ("README.md", r"\Z", "Needs Python 3.9.", "README.md"),
    ],
)
def test_planted_fault_is_found(file, old, new, told):
    files = {"README.md": "Python 3.11", **read_files()}
    changed, count = re.subn(old, new, files[file], count=1, flags=re.MULTILINE)
    assert count == 1
    assert any(told in fault for fault in faults({**files, file: changed}))


def test_installed_packages_are_the_locked_ones():
    installed = {}
    lock = locked((ROOT / "requirements.lock").read_text(encoding="utf-8"))
    for name in lock:
        installed[name] = Version(
            Version(importlib.metadata.version(name)).public
        )  # +cpu and +cu130 are the same release
    assert installed == lock


def test_every_import_of_the_library_is_a_declared_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {
        canonicalize_name(Requirement(line).name)
        for line in [*project["dependencies"], *project["optional-dependencies"]["notebooks"]]
    }
    providers = importlib.metadata.packages_distributions()
    missing = {}
    for path in sorted((ROOT / "analysis_lib").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                modules = [node.module]
            for top in (
                {module.partition(".")[0] for module in modules}
                - sys.stdlib_module_names
                - {"analysis_lib"}
            ):
                if not declared & {canonicalize_name(name) for name in providers.get(top, [])}:
                    missing[top] = str(path.relative_to(ROOT))
    assert missing == {}


def fake(folder: Path, name: str, script: str) -> Path:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


def test_setup_refuses_an_old_python(tmp_path):
    old = fake(tmp_path, "old-python", "exit 1")
    made = subprocess.run(
        ["make", "setup", f"PYTHON={old}", f"VENV={tmp_path}/venv"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert made.returncode != 0
    assert f"Python 3.11 or later is needed, and {old} is not" in made.stdout
    assert not (tmp_path / "venv").exists()


@pytest.mark.parametrize("status", [0, 3])
@pytest.mark.parametrize("apt", [0, 100])
@pytest.mark.parametrize("pause", [0, 1])
@pytest.mark.parametrize("there", [(), ("chromium",), ("python3",), ("python3", "chromium")])
def test_ci_ends_with_the_status_of_make_test(tmp_path, status, apt, pause, there):
    """Whatever is there, and whether or not it can be installed. Nothing is installed by a test."""
    for tool in ("bash", "dirname"):
        (tmp_path / tool).symlink_to(which(tool))
    fake(tmp_path, "make", f'echo "called: $*"\nexit {status}')
    fake(tmp_path, "apt-get", f'echo "apt-get $*"\nexit {apt}')
    fake(tmp_path, "sleep", f"exit {pause}")
    for name in there:
        fake(tmp_path, name, "exit 0")
    ran = subprocess.run(
        [ROOT / ".ci" / "run"],
        env={**os.environ, "PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        cwd=tmp_path,
    )
    assert ran.returncode == status
    assert ran.stdout.splitlines()[-1] == "called: test"
    assert ("Installing: chromium fonts-dejavu-core" in ran.stdout) == ("chromium" not in there)
    assert ("Installing: python3 python3-venv" in ran.stdout) == ("python3" not in there)
    assert ("Going on without" in ran.stderr) == (len(there) < 2 and (apt, pause) != (0, 0))


WRITES_SKIPPED = """echo "called: $*"
for argument; do
    case $argument in
        --skipped-to=*) echo "2 tests skipped: no Chromium" > "${argument#*=}";;
    esac
done"""


def test_make_test_ends_with_what_was_skipped(tmp_path):
    """After the notebooks, which are compared last."""
    (tmp_path / ".installed").touch()
    python = fake(tmp_path, "python", WRITES_SKIPPED)
    given = {"VENV": tmp_path, "RUN": python, "SKIPPED": tmp_path / "skipped", "NOTEBOOKS": "all"}
    outer = ("MAKEFLAGS", "MAKELEVEL", "PYTHON")
    made = subprocess.run(
        ["make", "test", *(f"{name}={value}" for name, value in given.items())],
        env={name: value for name, value in os.environ.items() if name not in outer},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert made.returncode == 0, made.stderr
    *before, last = made.stdout.splitlines()
    assert "--nbval" in " ".join(before) and last == "2 tests skipped: no Chromium"


def make(target, **given):
    outer = ("MAKEFLAGS", "MAKELEVEL", "PYTHON")
    return subprocess.run(
        ["make", target, *(f"{name}={value}" for name, value in given.items())],
        env={name: value for name, value in os.environ.items() if name not in outer},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_make_hands_names_on_as_they_are(tmp_path):
    """A quote ends no word, and what looks like code of make or of the shell does not run."""
    (tmp_path / ".installed").touch()
    told = tmp_path / "told"
    python = fake(tmp_path, "python", f"printf '%s\\n' \"$@\" > '{told}'")
    evil = tmp_path / "evil"
    model = f"it's $(shell touch {evil}) `touch {evil}` $HOME; touch {evil}"
    given = {"MODEL": model, "HELDOUT": "o'ne $(shell.two)", "OUT": "a b"}
    made = make("reproduce", VENV=tmp_path, RUN=python, **given)
    assert made.returncode == 0, made.stderr
    assert told.read_text().splitlines()[2:] == [
        *("reproduce", "--model", model, "--heldout", "o'ne", "--heldout", "$(shell.two)"),
        *("--out", "a b"),
    ]
    assert not evil.exists()


def test_setup_mends_an_environment_that_was_interrupted_before_pip(tmp_path):
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    fake(venv / "bin", "python", "exit 1")  # no pip
    whole = fake(tmp_path, "whole", 'echo "$@" >> "$(dirname "$0")/ran"')
    made_by = fake(
        tmp_path,
        "python3",
        f'case "$*" in *venv*) echo "$*" > {tmp_path}/asked; cp {whole} {venv}/bin/python;; esac\n'
        "echo 3.11",
    )
    made = make("setup", PYTHON=made_by, VENV=venv)
    assert made.returncode == 0, made.stderr
    assert (tmp_path / "asked").read_text() == f"-m venv --clear {venv}\n"
    assert "pip install" in (venv / "bin" / "ran").read_text() and (venv / ".installed").exists()


def test_without_chromium_its_tests_are_skipped_and_counted(tmp_path):
    file = tmp_path / "new" / "skipped"
    absent = {"BROWSER_PATH": str(tmp_path / "absent"), "XDG_DATA_HOME": str(tmp_path)}
    absent["PYTEST_ADDOPTS"] = ""  # a user's, such as --durations, has lines of its own
    options = ["-p", "no:cacheprovider", f"--skipped-to={file}"]
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "tests/test_browser.py"],
        env={**os.environ, **absent},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stdout
    *_, told, totals = ran.stdout.splitlines()
    count = re.fullmatch(r"=+ (\d+) skipped\b.*", totals)
    assert count and int(count[1]) > 1
    assert told.startswith(f"{count[1]} tests skipped: no Chromium or Chrome")
    assert file.read_text() == f"{told}\n"
