"""The package as a user installs it: a wheel in an environment of its own, run from an empty folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    skipped = shutil.ignore_patterns(".git", ".venv", "reports", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, source, ignore=skipped)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet"]
    subprocess.run([*build, "--wheel-dir", folder, source], check=True, timeout=120)
    (built,) = folder.glob("analysis_lib-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The folder of programs of a fresh environment that holds the wheel, and the locked packages beside it."""
    venv = tmp_path_factory.mktemp("installed") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True, timeout=120)
    python = venv / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet"]
    subprocess.run([*pip, "--no-deps", "--no-index", wheel], check=True, timeout=120)
    (site,) = venv.glob("lib/python*/site-packages")
    (site / "locked.pth").write_text(sysconfig.get_paths()["purelib"] + "\n", encoding="utf-8")
    return venv / "bin"


def run(installed: Path, folder: Path, *command: str) -> str:
    env = {**os.environ, "ANALYSIS_LIB_STORE": str(folder / "store")}
    env.pop("PYTHONPATH", None)
    done = subprocess.run(
        [installed / command[0], *command[1:]],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_holds_data_notebooks_and_licence(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    inside = {
        f"analysis_lib/shipped/{path.relative_to(ROOT)}" for path in tracked("data", "notebooks")
    }
    assert inside <= names
    assert {"LICENSE", "NOTICE"} <= {Path(name).name for name in names if "dist-info" in name}
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"analysis_lib"}


def tracked(*folders: str) -> list[Path]:
    paths = [path for name in folders for path in (ROOT / name).rglob("*") if path.is_file()]
    return [path for path in paths if not path.name.startswith(".")]


def test_an_installed_package_finds_its_data(installed, tmp_path):
    code = (
        "import analysis_lib; from analysis_lib import ChatModel, is_refusal, load_queries;"
        "print(analysis_lib.__file__, len(load_queries('anchor')), is_refusal('I cannot help with that.'),"
        "ChatModel.load().fingerprint[:4] != '')"
    )
    path, *rest = run(installed, tmp_path, "python", "-c", code).split()
    assert Path(path).is_relative_to(installed.parent) and rest == ["200", "True", "True"]


def test_the_console_script_runs_a_shipped_notebook(installed, tmp_path):
    assert "reproduce" in run(installed, tmp_path, "analysis-lib", "--help")
    told = run(installed, tmp_path, "analysis-lib", "reproduce", "--out", "out", "--dry-run")
    assert "Would run the notebooks on 'organism'" in told and not (tmp_path / "out").exists()
    code = (
        "import shutil; from pathlib import Path; from analysis_lib.report import run_notebooks as room;"
        "Path('one').mkdir(); name = '00_queries_and_prompts.ipynb';"
        "shutil.copy(room.FOLDER / name, 'one'); (ran,) = room.run_notebooks('out', folder='one');"
        "assert ran.error is None, ran.error"
    )
    assert "ok" in run(installed, tmp_path, "python", "-c", code)
    assert (tmp_path / "out" / "report.html").is_file()
