"""Who imports whom: the contract in pyproject.toml, and rooms run with what they must not need blocked."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import analysis_lib

ROOT = Path(__file__).resolve().parents[1]
CORE = ("data", "store", "model", "collect", "judge", "analysis", "train")
NOTEBOOK_PACKAGES = [
    "plotly",
    "ipywidgets",
    "anywidget",
    "IPython",
    "ipykernel",
    "nbformat",
    "nbclient",
    "jupyter_client",
    "jupyterlab",
    "kaleido",
    "nh3",
    "mistune",
]


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    command = "import sys; from importlinter.cli import lint_imports_command as main; main()"
    arguments = ["--no-cache"]
    return subprocess.run(
        [sys.executable, "-c", command, *arguments], cwd=folder, capture_output=True, text=True
    )


def test_the_import_contract_holds():
    done = lint(ROOT)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("room", "line", "broken"),
    [
        ("data/user_files.py", "from ..model import errors", "floors below it BROKEN"),
        ("collect/inputs.py", "def late():\n    import transformers", "transformers BROKEN"),
        ("report/cost.py", "import plotly", "import plotly, only widgets ipywidgets BROKEN"),
        ("figures/style.py", "import ipywidgets", "import plotly, only widgets ipywidgets BROKEN"),
        ("analysis/space.py", "import torch", "torch nor"),
        ("train/loop.py", "import nbformat", "no Jupyter BROKEN"),
    ],
)
def test_the_contract_sees_a_planted_import(tmp_path, room, line, broken):
    shutil.copytree(ROOT / "analysis_lib", tmp_path / "analysis_lib")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / "analysis_lib" / room).open("a", encoding="utf-8") as file:
        file.write(f"\n{line}\n")
    done = lint(tmp_path)
    assert done.returncode != 0 and broken in done.stdout


def modules(rooms: tuple[str, ...]) -> list[str]:
    paths = [path for room in rooms for path in (ROOT / "analysis_lib" / room).glob("*.py")]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in sorted(paths)]
    return [name.removesuffix(".__init__") for name in names]


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


BLOCK = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in blocked:
            raise ModuleNotFoundError(f"{name} is blocked")
sys.meta_path.insert(0, Blocked())
"""


def test_core_rooms_need_neither_plotly_nor_jupyter():
    """Imported and used, the contract's names included, with the notebook packages blocked."""
    rooms = "\n".join(f"import {module}" for module in modules(CORE))
    work = """
import analysis_lib, numpy as np, pandas as pd
for name in analysis_lib.__all__:
    getattr(analysis_lib, name)
from analysis_lib import ChatModel, hidden_states, load_queries, sample_responses
model, queries = ChatModel.load("organism"), load_queries("anchor").head(2)
assert hidden_states(model, queries, {"none": ""}).states.shape == (2, 1, 128)
assert len(sample_responses(model, queries, {"none": ""}, n_samples=2, max_new_tokens=3)) == 4
try:
    import analysis_lib.figures
except ModuleNotFoundError:
    print("blocked as it should be")
"""
    assert (
        python(f"blocked = {NOTEBOOK_PACKAGES!r}" + BLOCK + rooms + work)
        == "blocked as it should be\n"
    )


def test_light_rooms_run_without_torch_and_transformers():
    work = """
import numpy as np
from analysis_lib import AnchorSpace, Store, benchmark_table, fit_direction, is_refusal, load_queries
import analysis_lib.figures, analysis_lib.widgets, analysis_lib.organism.corpus
rng = np.random.default_rng(0)
Z = AnchorSpace.fit(rng.normal(size=(40, 8))).transform(rng.normal(size=(40, 8)))
fit_direction(Z, (Z[:, 0] > 0).astype(float), name="a", groups=np.arange(40))
print(is_refusal("I cannot help with that."), len(load_queries("anchor")))
"""
    assert python("blocked = ['torch', 'transformers']" + BLOCK + work) == "True 200\n"


def test_import_of_the_package_is_light():
    heavy = [
        "torch",
        "transformers",
        "pandas",
        "numpy",
        "sklearn",
        "safetensors",
        "plotly",
        "ipywidgets",
        "tqdm",
    ]
    assert (
        python(f"import sys, analysis_lib; print([m for m in {heavy!r} if m in sys.modules])")
        == "[]\n"
    )


CONTRACT = [
    "ChatModel", "load_queries", "load_safety_prompts", "hidden_states", "sample_responses", "judge_responses", "refusal_rates", "is_refusal",
    "AnchorSpace", "Direction", "fit_direction", "train_dro", "train_prompt_tuning", "SoftPrompt", "benchmark_table",
]  # fmt: skip


@pytest.mark.parametrize("name", CONTRACT)
def test_names_of_the_contract(name):
    assert callable(getattr(analysis_lib, name))
    assert name in analysis_lib.__all__ and name in dir(analysis_lib)


def test_an_unknown_name_is_named():
    with pytest.raises(AttributeError, match="no attribute 'hiden_states'"):
        analysis_lib.hiden_states  # noqa: B018
