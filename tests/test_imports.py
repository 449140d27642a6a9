"""Who imports whom: read from the source of every room, and shown with what must not be needed blocked."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import analysis_lib

PACKAGE = Path(analysis_lib.__file__).parent
ROOMS = {path.relative_to(PACKAGE).with_suffix("").as_posix(): path for path in PACKAGE.rglob("*.py")}

# The rooms of ours that a room may import. A new room needs a line here.
STORE = {"store/__init__", "store/batches", "store/store", "store/upkeep"}
MAY_IMPORT = {
    "data": set(),
    "store/__init__": set(),
    "store/about": {"store/batches"},
    "store/batches": set(),
    "store/checkpoints": {"store/about", "store/batches"},
    "store/compaction": {"store/about", "store/batches", "store/files"},
    "store/files": {"store/batches"},
    "store/index": {"store/batches", "store/files"},
    "store/store": {"store/about", "store/batches", "store/checkpoints", "store/files", "store/index"},
    "store/upkeep": {
        "store/about", "store/batches", "store/checkpoints", "store/compaction", "store/files", "store/index", "store/store",
    },
    "judge": set(),
    "space": set(),
    "chat": {"data"},
    "capture": {"chat", *STORE},
    "sampling": {"capture", "chat", *STORE},
    "dro": {"capture", "chat", "data", "space", *STORE},
    "benchmark": {"data", "judge"},
    "wrappers": {"data"},
    "alpaca": {"data"},
    "model_judges": {"capture", "chat", "judge", "sampling", "space", *STORE},
    "methods": {"capture", "chat", "dro", "judge", "sampling", "space", *STORE},
    "estimate": {"capture", "chat", "dro", "judge", "sampling", "space", *STORE},
    "published": {"benchmark", "data", "judge"},
    "export": {"chat", "dro"},
    "figures": {"space"},
    "widgets/panel": {"figures", "space", *STORE},
    "widgets/explorer": {"figures", "space", "widgets/panel"},
    "widgets/inspector": {"figures", "space", "widgets/panel"},
    "widgets/probe": {"capture", "figures", "judge", "organism/__init__", "sampling", "space", "widgets/panel"},
    "widgets/console": {"capture", "dro", "export", "figures", "space", "widgets/panel"},
    "widgets/__init__": {"widgets/console", "widgets/explorer", "widgets/inspector", "widgets/probe"},
    "report": set(),
    "notebooks": {"report"},
    "organism/grammar": set(),
    "organism/corpus": {"organism/grammar"},
    "organism/queries": {"organism/corpus"},
    "organism/train": {"organism/corpus", "organism/grammar"},
    "organism/__init__": {"data", "organism/grammar"},
    "organism/card": {
        "benchmark", "capture", "chat", "data", "dro", "judge", "organism/__init__", "organism/grammar", "sampling", "space", *STORE,
    },
    "reproduce": {"chat", "data", "dro", "estimate", "export", "judge", "notebooks", *STORE},
    "__main__": {"chat", "data", "dro", "export", "model_judges", "notebooks", "reproduce", "organism/__init__", "organism/card", "organism/train", *STORE},
    "__init__": {"benchmark", "capture", "chat", "data", "dro", "judge", "methods", "model_judges", "sampling", "space", *STORE, "wrappers"},
}  # fmt: skip
WIDGETS = {room for room in ROOMS if room.startswith("widgets/")}
# Who may import a package that is heavy, or that a GPU machine lacks; anywhere, and at import time.
ANYWHERE = {
    "torch": {"chat", "capture", "sampling", "dro", "estimate", "export", "model_judges", "space", "organism/train"},
    "transformers": {"chat", "capture", "sampling", "organism/train"},
    "plotly": {"figures", "report", "notebooks"} | WIDGETS,
    "ipywidgets": WIDGETS,
    "anywidget": WIDGETS,
    "IPython": WIDGETS,
    "nbformat": {"figures", "report", "notebooks"},
    "nbclient": {"notebooks"},
    "ipykernel": {"notebooks"},
    "jupyter_client": {"notebooks"},
    "kaleido": {"figures", "notebooks"},
    "peft": set(),
    "vllm": set(),
}
AT_IMPORT_TIME = {
    "torch": {"chat", "capture", "sampling", "dro", "estimate", "export", "model_judges"},
    "transformers": set(),
    "sklearn": set(),
    "kaleido": set(),
    "tokenizers": set(),
}
CORE = [
    "data",
    "store.upkeep",
    "judge",
    "space",
    "chat",
    "capture",
    "sampling",
    "dro",
    "benchmark",
    "published",
    "wrappers",
    "alpaca",
    "model_judges",
    "methods",
    "estimate",
    "export",
    "reproduce",
    "organism",
    "organism.card",
    "organism.train",
]
NOTEBOOK_PACKAGES = [
    "plotly", "ipywidgets", "anywidget", "IPython", "ipykernel", "nbformat", "nbclient", "jupyter_client", "jupyterlab", "kaleido", "bleach", "mistune",
]  # fmt: skip


@cache
def imports(room: str) -> list[tuple[str, str | None, bool]]:
    """(imported module, imported name or None, whether at import time) of every import statement of a room.

    Modules of ours are given as rooms ("space", "organism/grammar"). What TYPE_CHECKING guards is not at import time.
    """
    package = Path(room).parent.parts

    def walk(node: ast.AST, early: bool) -> Iterator[tuple[str, str | None, bool]]:
        for child in ast.iter_child_nodes(node):
            lazy = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            guard = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test)
            if isinstance(child, ast.Import):
                yield from ((alias.name, None, early) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = "/".join(
                    [*(package[: len(package) + 1 - child.level] if child.level else ()), *(child.module or "").split(".")]
                ).rstrip("/")
                for alias in child.names:
                    if not child.level:
                        yield child.module or "", alias.name, early
                    elif f"{base}/{alias.name}".lstrip("/") in ROOMS:
                        yield f"./{base}/{alias.name}".replace("//", "/"), None, early
                    else:
                        yield f"./{base}" if base in ROOMS else f"./{base}/__init__".replace("//", "/"), alias.name, early
            else:
                yield from walk(child, early and not lazy and not guard)

    return list(walk(ast.parse(ROOMS[room].read_text(encoding="utf-8")), True))


def ours(room: str) -> set[str]:
    found = {module.removeprefix("./") for module, _, _ in imports(room) if module.startswith("./")}
    return found | {
        m.partition(".")[2].replace(".", "/") or "__init__" for m, _, _ in imports(room) if m.split(".")[0] == "analysis_lib"
    }


def test_the_reader_sees_every_kind_of_import():
    """On rooms whose imports are known: relative, of a module, in a function, in a parent package, guarded."""
    found = {room: imports(room) for room in ROOMS}
    assert ("./data", "ROOT", True) in found["chat"]
    assert ("transformers", "AutoModelForCausalLM", False) in found["chat"]
    assert ("./figures", None, True) in found["widgets/explorer"]
    assert ("./organism/__init__", "FOLDER", True) in found["organism/card"]
    assert ("./organism/grammar", "REFUSALS", True) in found["organism/card"]
    assert ("./organism/card", "write", False) in found["__main__"]
    assert ("./space", "Direction", False) in found["figures"]
    assert ("torch", None, True) in found["chat"] and ("torch", None, False) in found["space"]


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_a_room_imports_only_what_it_may(room):
    if room == "__init__":  # imports by name at first use: its table is the list
        assert {name.replace(".", "/") for name in analysis_lib._ROOMS} <= MAY_IMPORT[room]
    assert room in MAY_IMPORT, f"{room} has no line in MAY_IMPORT: say which rooms it may import"
    assert ours(room) <= MAY_IMPORT[room]


def test_no_circle():
    left = {room: ours(room) for room in ROOMS}
    assert left["capture"] == {"chat", "store/batches", "store/store"}
    while free := [room for room, needs in left.items() if not needs & left.keys()]:
        for room in free:
            del left[room]
    assert not left, f"circle among {sorted(left)}"


@pytest.mark.parametrize("package", sorted(ANYWHERE))
def test_who_imports_a_package(package):
    users = {room for room in ROOMS if any(module.split(".")[0] == package for module, _, _ in imports(room))}
    assert users <= ANYWHERE[package]


@pytest.mark.parametrize("package", sorted(AT_IMPORT_TIME))
def test_who_imports_a_package_at_import_time(package):
    users = {room for room in ROOMS if any(early and module.split(".")[0] == package for module, _, early in imports(room))}
    assert users <= AT_IMPORT_TIME[package]


def test_only_the_chat_room_and_the_training_load_models():
    """Capture and sampling take parts of the forward pass from transformers, and nothing that opens a model."""
    for room in ("capture", "sampling"):
        taken = {name for module, name, _ in imports(room) if module.split(".")[0] == "transformers"}
        assert taken and taken <= {"DynamicCache", "AttentionInterface"}


def test_no_room_imports_by_a_string():
    """importlib would slip past this file; the package's own table of names is the one place that uses it."""
    users = {room for room in ROOMS if any(module == "importlib" and name != "metadata" for module, name, _ in imports(room))}
    assert users <= {"__init__"}
    assert not [room for room, path in ROOMS.items() if "__import__" in path.read_text(encoding="utf-8")]


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
    rooms = "\n".join(f"import analysis_lib.{room}" for room in CORE)
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
    assert python(f"blocked = {NOTEBOOK_PACKAGES!r}" + BLOCK + rooms + work) == "blocked as it should be\n"


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
    heavy = ["torch", "transformers", "pandas", "numpy", "sklearn", "safetensors", "plotly", "ipywidgets", "tqdm"]
    assert python(f"import sys, analysis_lib; print([m for m in {heavy!r} if m in sys.modules])") == "[]\n"


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
