"""Runs notebooks as copies with a report, and cleans what differs from run to run."""

from __future__ import annotations

import ast
import asyncio
import os
import time
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import nbformat
import pandas as pd
from ipykernel.kernelspec import RESOURCES, get_kernel_dict
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode

from ..data.shipped import shipped
from .html import plain_text, write_report
from .pictures import NotebookError

FOLDER = shipped("notebooks")

T = TypeVar("T")

WIDGET_MIME = "application/vnd.jupyter.widget-view+json"

ORGANISM = (
    "These figures come from the embedded model organism. It shows the phenomenon and lets the "
    "estimators be checked against a known truth; it proves nothing about models of other sizes. "
    "Notebook 08 alone shows the study's own published results."
)

KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}


@dataclass(frozen=True)
class Run:
    """One executed notebook. `error` is None, or the failing cell and its exception."""

    notebook: Path
    nb: NotebookNode
    seconds: float
    error: str | None


class _ThisPython(AsyncKernelManager):
    """Starts the kernel in the running interpreter, whatever kernels the machine has."""

    @property
    def kernel_spec(self) -> KernelSpec:
        return KernelSpec(resource_dir=RESOURCES, **get_kernel_dict())


def run_notebooks(
    out: str | Path = "reports",
    *,
    model: str | None = None,
    prompt: str | Path | None = None,
    queries: str | Path | None = None,
    heldout: Sequence[str | Path] | None = None,
    guard: str | None = None,
    template: str | Path | None = None,
    folder: str | Path = FOLDER,
    jobs: int = 2,
    env: Mapping[str, str] | None = None,
) -> tuple[Run, ...]:
    """Runs every `folder`/NN_*.ipynb into `out`: executed copies, `report.html` and their tables.

    `model`, `prompt` (a file), `queries` (a name or a file), `heldout` (several such), `guard` (a
    model), `template` (a name or a file) and `out` replace MODEL, PROMPT, QUERIES, HELDOUT, GUARD,
    TEMPLATE and OUT in the cell tagged `parameters` of each notebook that assigns them. `env` joins
    the environment of their kernels (such as ANALYSIS_LIB_DEVICE). `jobs` notebooks run at a time;
    lines are printed in order. A failing notebook does not stop the others: look at `Run.error`.
    Raises NotebookError where nothing can be run.
    """
    out = Path(out).resolve()
    if out == Path(folder).resolve():
        raise NotebookError(
            f"the results would overwrite the notebooks in {folder}; give another folder"
        )
    if prompt is not None and not Path(prompt).is_file():
        raise NotebookError(
            f"the prompt file {prompt} does not exist; give the path of a text file"
        )
    values = {
        "MODEL": model,
        "PROMPT": prompt,
        "QUERIES": queries,
        "GUARD": guard,
        "TEMPLATE": template,
    }
    given: dict[str, Any] = {
        parameter: _absolute(value) for parameter, value in values.items() if value is not None
    }
    if heldout is not None:
        given["HELDOUT"] = [_absolute(value) for value in heldout]
    notebooks = _prepared(Path(folder), given, out)
    out.mkdir(parents=True, exist_ok=True)
    table = out / "tables" / "benchmark.csv"
    table.unlink(missing_ok=True)  # an earlier run's table must not be printed as this one's
    name = given.get("MODEL", "organism")
    print(
        f"Running notebooks ({len(notebooks)}, {jobs} at a time) on the model {name!r}", flush=True
    )
    runs = run_loop(_run_all(notebooks, jobs, env or {}, out))
    report = write_report(
        {run.notebook.stem: run.nb for run in runs},
        out / "report.html",
        note=ORGANISM if name == "organism" else f"Model: {name}",
    )
    _print_benchmark(table)
    print(f"\nReport: {report}")
    return runs


Notebooks = Sequence[tuple[Path, NotebookNode]]


def _prepared(folder: Path, given: Mapping[str, Any], out: Path) -> Notebooks:
    """The folder's notebooks in order, with the given parameters. Raises NotebookError."""
    paths = sorted(folder.glob("[0-9][0-9]_*.ipynb"))
    if not paths:
        raise NotebookError(
            f"no notebooks NN_*.ipynb in {folder}; "
            "give the folder that holds the project's notebooks"
        )
    notebooks = [(path, read_notebook(path)) for path in paths]
    for parameter in given:
        if not any(parameter in parameters(nb) for _, nb in notebooks):
            raise NotebookError(
                f"no notebook in {folder} has the parameter {parameter}; "
                "assign it in a cell tagged `parameters`"
            )
    for _, nb in notebooks:
        inject(nb, {**given, "OUT": str(out)})
    return notebooks


async def _run_all(
    notebooks: Notebooks, jobs: int, env: Mapping[str, str], out: Path
) -> tuple[Run, ...]:
    """Runs the notebooks, writes each into `out` as it ends, and says so."""
    runs: list[Run] = []
    async for run in execute(notebooks, jobs, env):
        clean(run.nb)
        nbformat.write(run.nb, out / run.notebook.name)
        print(progress_line(run, len(runs) + 1, len(notebooks)), flush=True)
        runs.append(run)
    return tuple(runs)


def _print_benchmark(table: Path) -> None:
    if not table.is_file():
        print(f"\nNo benchmark table: no notebook wrote {table}")
        return
    rows = pd.read_csv(table)
    wide = rows.pivot_table("value", ["query_set", "metric"], ["method", "prompt"], sort=False)
    print(f"\nBenchmark ({table}):\n{wide.round(3).to_string(na_rep='')}")


def parameters(nb: NotebookNode) -> dict[str, int]:
    """The names that the cell tagged `parameters` assigns, each with that cell's index.

    There are none without such a cell.
    """
    for index, cell in enumerate(nb.cells):
        if "parameters" in cell.metadata.get("tags", []):
            assigned = [
                node for node in ast.parse(cell.source).body if isinstance(node, ast.Assign)
            ]
            return {
                target.id: index
                for node in assigned
                for target in node.targets
                if isinstance(target, ast.Name)
            }
    return {}


def inject(nb: NotebookNode, values: Mapping[str, Any]) -> None:
    """Adds a cell after the one tagged `parameters`; it sets the `values` assigned there.

    It replaces the cell of an earlier run, whose copy may be run again.
    """
    nb.cells = [c for c in nb.cells if "injected-parameters" not in c.metadata.get("tags", [])]
    known = parameters(nb)
    lines = [f"{name} = {value!r}" for name, value in values.items() if name in known]
    if lines:
        cell = nbformat.v4.new_code_cell(
            "\n".join(lines), metadata={"tags": ["injected-parameters"]}
        )
        nb.cells.insert(max(known.values()) + 1, cell)


def clean(nb: NotebookNode) -> None:
    """Removes, in place, what differs from run to run or is dead in a file.

    That is widget state and views, timings, versions and random ids.
    """
    nb.metadata = NotebookNode(kernelspec=KERNEL, language_info={"name": "python"})
    nb.nbformat, nb.nbformat_minor = 4, 5
    for index, cell in enumerate(nb.cells):
        cell.id = f"cell-{index:02d}"
        cell.metadata = NotebookNode(
            {key: value for key, value in cell.metadata.items() if key == "tags"}
        )
        if cell.cell_type == "code":
            cell.outputs = clean_outputs(cell.outputs)


def clean_outputs(outputs: Sequence[NotebookNode]) -> list[NotebookNode]:
    """Outputs without live widgets; a picture beside a widget stays.

    A widget's view and its text form, which holds random ids, go.
    """
    kept = []
    for output in outputs:
        data = output.get("data", {})
        if WIDGET_MIME in data:
            output = NotebookNode(
                {
                    **output,
                    "data": {
                        k: v
                        for k, v in data.items()
                        if k not in (WIDGET_MIME, "text/plain", "text/html")
                    },
                }
            )
            if not output.data:
                continue
        kept.append(output)
    return kept


class _Loop(asyncio.SelectorEventLoop):
    """Leaves signals alone: nbclient's handlers would end one kernel and let the others go on."""

    def add_signal_handler(self, *arguments: Any) -> None:  # type: ignore[override]
        raise RuntimeError("a signal ends the whole run")


def run_loop(running: Coroutine[Any, Any, T]) -> T:
    """Runs what calls `execute`. Ctrl-C, or what a handler of signals raises, ends all kernels.

    `Runner.run` would cancel instead, which nbclient takes for the death of one kernel.
    """
    with asyncio.Runner(loop_factory=_Loop) as runner:
        return runner.get_loop().run_until_complete(running)


async def execute(
    notebooks: Sequence[tuple[Path, NotebookNode]], jobs: int, env: Mapping[str, str]
) -> AsyncIterator[Run]:
    """Runs each notebook in its own kernel and folder, `jobs` at a time; yields them in order."""
    if jobs < 1:
        raise NotebookError(f"jobs is {jobs}; it must be 1 or more")
    threads = max(1, (os.cpu_count() or 1) // jobs)
    kernel_env = {
        "OMP_NUM_THREADS": str(threads),
        **os.environ,
        "PLOTLY_RENDERER": "plotly_mimetype",
        "TQDM_DISABLE": "1",  # a progress bar is a timing
        **env,
    }
    slots = asyncio.Semaphore(jobs)

    async def one(path: Path, nb: NotebookNode) -> Run:
        async with slots:
            start = time.perf_counter()
            client = NotebookClient(
                nb,
                kernel_manager_class=_ThisPython,
                extra_arguments=["--log-level=ERROR"],
                resources={"metadata": {"path": str(path.parent)}},
                coalesce_streams=True,
                record_timing=False,
            )
            error = None
            try:
                await client.async_execute(env=kernel_env)
            except CellExecutionError as failure:
                index = next(
                    i
                    for i, cell in enumerate(nb.cells)
                    if any(o.output_type == "error" for o in cell.get("outputs", []))
                )
                error = f"cell {index}: {failure.ename}: {plain_text(failure.evalue)}"
            except RuntimeError as failure:  # the kernel did not start, or died
                error = f"{failure}; the memory may have run out"
            return Run(path, nb, time.perf_counter() - start, error)

    tasks = [asyncio.create_task(one(path, nb)) for path, nb in notebooks]
    for task in tasks:
        yield await task


def progress_line(run: Run, number: int, total: int) -> str:
    return (
        f"[{number}/{total}] {run.notebook.name:<40} {run.seconds:6.1f} s  "
        f"{'ok' if run.error is None else 'FAILED  ' + run.error}"
    )


def read_notebook(path: Path) -> NotebookNode:
    if not path.is_file():
        raise NotebookError(f"no notebook {path}; check the path")
    return nbformat.read(path, as_version=4)


def notebook_text(nb: NotebookNode) -> str:
    return nbformat.writes(nb) + "\n"


def _absolute(value: str | Path) -> str:
    """A path of the caller's folder made absolute, since a notebook runs in its own folder.

    Names and hub ids stay.
    """
    names_a_path = Path(value).is_file() or (
        value != "organism" and Path(value, "config.json").is_file()
    )
    return str(Path(value).resolve()) if names_a_path else str(value)
