"""Runs notebooks: as copies with a report (`run_notebooks`), or in place with outputs that repeat byte for byte (`store_outputs`).

`python -m analysis_lib.notebooks [NOTEBOOK ...]` is what `make notebooks` calls.
"""

from __future__ import annotations

import argparse
import ast
import asyncio
import base64
import os
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
from ipykernel.kernelspec import RESOURCES, get_kernel_dict
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode

from .report import PLOTLY_MIME, plain_text, write_report

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
WIDGET_MIME = "application/vnd.jupyter.widget-view+json"
MAX_BYTES = 1_000_000
MAX_LINES = 15
ORGANISM = (
    "These figures come from the embedded model organism. It shows the phenomenon and lets the estimators be checked"
    " against a known truth; it proves nothing about models of other sizes. Notebook 08 alone shows the study's own published results."
)
KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}


class NotebookError(Exception):
    """A notebook cannot be run or stored as asked; the message says what to do."""


@dataclass(frozen=True)
class Run:
    """One executed notebook. `error` is None where every cell ran, else the failing cell and its exception."""

    notebook: Path
    nb: NotebookNode
    seconds: float
    error: str | None


class _ThisPython(AsyncKernelManager):
    """Starts the kernel in the running interpreter, whatever kernels are registered on the machine."""

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
    """Runs every `folder`/NN_*.ipynb into `out`: executed copies, `report.html`, and the tables that the notebooks write.

    `model`, `prompt` (a file), `queries` (a name or a file), `heldout` (several such), `guard` (a model), `template` (a name
    or a file) and `out` replace MODEL, PROMPT, QUERIES, HELDOUT, GUARD, TEMPLATE and OUT in the cell tagged `parameters` of each notebook that assigns them. `env` joins the environment
    of their kernels (ANALYSIS_LIB_DEVICE and ANALYSIS_LIB_DTYPE, say). `jobs` notebooks run at a time; lines are printed in order.
    A failing notebook does not stop the others: look at `Run.error`. Raises NotebookError where nothing can be run.
    """
    out = Path(out).resolve()
    paths = sorted(Path(folder).glob("[0-9][0-9]_*.ipynb"))
    if not paths:
        raise NotebookError(
            f"no notebooks NN_*.ipynb in {folder}; run from a checkout of the project, installed with `pip install -e .`"
        )
    if prompt is not None and not Path(prompt).is_file():
        raise NotebookError(f"the prompt file {prompt} does not exist; give the path of a text file")
    values = {"MODEL": model, "PROMPT": prompt, "QUERIES": queries, "GUARD": guard, "TEMPLATE": template}
    given: dict[str, Any] = {parameter: _absolute(value) for parameter, value in values.items() if value is not None}
    if heldout is not None:
        given["HELDOUT"] = [_absolute(value) for value in heldout]
    notebooks = [_read(path) for path in paths]
    for parameter in given:
        if not any(parameter in parameters(nb) for nb in notebooks):
            raise NotebookError(f"no notebook in {folder} has the parameter {parameter}; assign it in a cell tagged `parameters`")
    for nb in notebooks:
        inject(nb, {**given, "OUT": str(out)})

    out.mkdir(parents=True, exist_ok=True)
    table = out / "tables" / "benchmark.csv"
    table.unlink(missing_ok=True)  # an earlier run's table must not be printed as this one's
    name = given.get("MODEL", "organism")
    print(f"Running {len(paths)} notebooks, {jobs} at a time, on the model {name!r}", flush=True)

    async def run_all() -> tuple[Run, ...]:
        runs: list[Run] = []
        async for run in _execute(list(zip(paths, notebooks, strict=True)), jobs, env or {}):
            clean(run.nb)
            nbformat.write(run.nb, out / run.notebook.name)
            print(_line(run, len(runs) + 1, len(paths)), flush=True)
            runs.append(run)
        return tuple(runs)

    runs = asyncio.run(run_all())
    report = write_report(
        {run.notebook.stem: run.nb for run in runs},
        out / "report.html",
        note=ORGANISM if name == "organism" else f"Model: {name}",
    )
    if table.is_file():
        wide = pd.read_csv(table).pivot_table("value", ["query_set", "metric"], ["method", "prompt"], sort=False)
        print(f"\nBenchmark ({table}):\n{wide.round(3).to_string(na_rep='')}")
    else:
        print(f"\nNo benchmark table: no notebook wrote {table}")
    print(f"\nReport: {report}")
    return runs


def write_figures(runs: Sequence[Run], folder: str | Path) -> list[Path]:
    """Writes each plotly figure of executed notebooks as NOTEBOOK-N.html, and as .svg where Chromium is found.

    The .html files share one plotly.js, beside them, and open offline.
    """
    import plotly.io as pio

    folder = Path(folder)
    figures: dict[str, dict[str, Any]] = {}
    for run in runs:
        outputs = [output.get("data", {}) for cell in run.nb.cells for output in cell.get("outputs", [])]
        found = [data[PLOTLY_MIME] for data in outputs if PLOTLY_MIME in data]
        figures |= {f"{run.notebook.stem}-{n}": {k: data[k] for k in ("data", "layout")} for n, data in enumerate(found, 1)}
    if not figures:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        pio.write_html(figure, folder / f"{name}.html", include_plotlyjs="directory", validate=False, div_id="figure")
    written = [folder / f"{name}.html" for name in figures]
    try:
        with _Pictures() as pictures:
            for name, figure in figures.items():
                path = folder / f"{name}.svg"
                path.write_bytes(pictures.draw(figure, "svg"))
                written.append(path)
    except NotebookError as error:
        print(f"No .svg figures: {error}")
    return written


def store_outputs(paths: Sequence[str | Path] = (), *, jobs: int = 2) -> None:
    """Executes notebooks in place, on an empty store, and writes outputs that repeat: see `clean`. Default: every notebook.

    Each plotly figure gets an image/png beside its interactive form. Raises NotebookError where a notebook fails, or breaks
    a rule of `problems`; that file is then left as it was.
    """
    files = [Path(path) for path in paths] or sorted(FOLDER.glob("[0-9][0-9]_*.ipynb"))
    if not files:
        raise NotebookError(f"no notebooks NN_*.ipynb in {FOLDER}; name the notebooks to execute")
    notebooks = [(path, _read(path)) for path in files]
    with tempfile.TemporaryDirectory() as store, _Pictures() as pictures:
        env = {"ANALYSIS_LIB_STORE": store, "ANALYSIS_LIB_DEVICE": "", "ANALYSIS_LIB_DTYPE": ""}  # none of the user's settings

        async def run_all() -> list[str]:
            failed: list[str] = []
            done = 0
            async for run in _execute(notebooks, jobs, env):
                done += 1
                clean(run.nb)
                await asyncio.to_thread(pictures.add, run.nb)
                wrong = [run.error] if run.error else problems(run.nb)
                print(_line(run, done, len(files)), *[f"\n    {text}" for text in wrong if not run.error], flush=True)
                if wrong:
                    failed.append(run.notebook.name)
                else:
                    run.notebook.write_text(_text(run.nb), encoding="utf-8")
            return failed

        failed = asyncio.run(run_all())
    if not paths:
        update_readme()
    if failed:
        raise NotebookError(f"not stored: {', '.join(failed)}; mend what is listed above and run it again")


def readme_parts() -> tuple[bytes, str]:
    """What the README shows of the stored notebooks: the picture of notebook 03, and the last table of notebook 06."""
    anchor, benchmarks = (_read(next(FOLDER.glob(f"{number}_*.ipynb"))) for number in ("03", "06"))
    outputs = [output for cell in anchor.cells for output in cell.get("outputs", [])]
    picture = next(output.data["image/png"] for output in outputs if "image/png" in output.get("data", {}))
    streams = [output for cell in benchmarks.cells for output in cell.get("outputs", []) if output.output_type == "stream"]
    return base64.b64decode(picture), f"```\n{streams[-1].text.rstrip()}\n```"


def update_readme() -> None:
    """Writes `readme_parts` into docs/anchor_space.png and between the README's benchmark marks."""
    picture, table = readme_parts()
    root = FOLDER.parent
    (root / "docs").mkdir(exist_ok=True)
    (root / "docs" / "anchor_space.png").write_bytes(picture)
    readme = root / "README.md"
    head, mark, rest = readme.read_text(encoding="utf-8").partition("<!-- benchmark: written by make notebooks -->\n")
    _, end, tail = rest.partition("\n<!-- end -->")
    if not end:
        raise NotebookError(f"{readme} lacks the marks around the benchmark table; restore them")
    readme.write_text(f"{head}{mark}{table}{end}{tail}", encoding="utf-8")


def parameters(nb: NotebookNode) -> dict[str, int]:
    """The names that the cell tagged `parameters` assigns, each with that cell's index; empty without such a cell."""
    for index, cell in enumerate(nb.cells):
        if "parameters" in cell.metadata.get("tags", []):
            assigned = [node for node in ast.parse(cell.source).body if isinstance(node, ast.Assign)]
            return {target.id: index for node in assigned for target in node.targets if isinstance(target, ast.Name)}
    return {}


def inject(nb: NotebookNode, values: Mapping[str, Any]) -> None:
    """Adds a cell after the one tagged `parameters` which sets those of `values` that it assigns."""
    known = parameters(nb)
    lines = [f"{name} = {value!r}" for name, value in values.items() if name in known]
    if lines:
        cell = nbformat.v4.new_code_cell("\n".join(lines), metadata={"tags": ["injected-parameters"]})
        nb.cells.insert(max(known.values()) + 1, cell)


def clean(nb: NotebookNode) -> None:
    """Removes, in place, what differs from run to run or is dead in a file: widget state and views, timings, versions, random ids."""
    nb.metadata = NotebookNode(kernelspec=KERNEL, language_info={"name": "python"})
    nb.nbformat, nb.nbformat_minor = 4, 5
    for index, cell in enumerate(nb.cells):
        cell.id = f"cell-{index:02d}"
        cell.metadata = NotebookNode({key: value for key, value in cell.metadata.items() if key == "tags"})
        if cell.cell_type == "code":
            cell.outputs = clean_outputs(cell.outputs)


def clean_outputs(outputs: Sequence[NotebookNode]) -> list[NotebookNode]:
    """Outputs without live widgets: their view and text form (it holds random ids) go, a picture beside them stays."""
    kept = []
    for output in outputs:
        data = output.get("data", {})
        if WIDGET_MIME in data:
            output = NotebookNode(
                {**output, "data": {k: v for k, v in data.items() if k not in (WIDGET_MIME, "text/plain", "text/html")}}
            )
            if not output.data:
                continue
        kept.append(output)
    return kept


def problems(nb: NotebookNode) -> list[str]:
    """What keeps the stored outputs of `nb` from being read, compared by nbval, or repeated. Empty where all is well."""
    found = []
    for index, cell in enumerate(nb.cells):
        if cell.cell_type != "code":
            continue
        if cell.source.strip() and cell.execution_count is None:
            found.append(f"cell {index} was not executed, so nbval compares nothing; run `make notebooks`")
        if (lines := len(cell.source.splitlines())) > MAX_LINES:
            found.append(f"cell {index} has {lines} lines, the limit is {MAX_LINES}; move what is not taught into the library")
        for output in cell.outputs:
            data = output.get("data", {})
            if output.output_type == "error":
                found.append(f"cell {index} stores the error {output.ename}; mend the cell and run `make notebooks`")
            if output.get("name") == "stderr":
                found.append(f"cell {index} writes to stderr, which does not repeat; mend its cause: {output.text.strip()[:200]}")
            if PLOTLY_MIME in data and "image/png" not in data:
                found.append(f"cell {index} stores a figure without image/png; run `make notebooks`")
            if WIDGET_MIME in data:
                found.append(f"cell {index} stores a widget view; run `make notebooks`")
    if "widgets" in nb.metadata:
        found.append("metadata.widgets holds widget state; run `make notebooks`")
    if (size := len(_text(nb).encode())) >= MAX_BYTES:
        found.append(f"{size:,} bytes, the limit is {MAX_BYTES:,}; store fewer or smaller figures")
    return found


class _Pictures:
    """A browser that turns plotly JSON into PNG: one for all notebooks, since its start takes seconds."""

    def __enter__(self) -> _Pictures:
        import kaleido
        from choreographer.browsers.chromium import Chromium

        if not Chromium.find_browser(skip_local=False):
            raise NotebookError(
                "no Chromium or Chrome found, which draws the stored pictures; install one (Debian: apt-get install chromium)"
            )
        kaleido.start_sync_server(mathjax=False)  # MathJax would come from the network
        self._draw = kaleido.calc_fig_sync
        self._stop = kaleido.stop_sync_server
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop()

    def draw(self, figure: Mapping[str, Any], format: str) -> bytes:
        size = {"width": figure["layout"].get("width", 700), "height": figure["layout"].get("height", 450)}
        return self._draw(figure, opts={"format": format, **size})

    def add(self, nb: NotebookNode) -> None:
        for cell in nb.cells:
            for output in cell.get("outputs", []):
                if PLOTLY_MIME in output.get("data", {}):
                    figure = {key: output.data[PLOTLY_MIME][key] for key in ("data", "layout")}
                    output.data["image/png"] = base64.b64encode(self.draw(figure, "png")).decode()


async def _execute(notebooks: Sequence[tuple[Path, NotebookNode]], jobs: int, env: Mapping[str, str]) -> AsyncIterator[Run]:
    """Runs each notebook in its own kernel and its own folder, `jobs` at a time; yields in the order given."""
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
    loop = asyncio.get_running_loop()

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
                # nbclient's own handler ends this kernel alone; without it Ctrl-C is a KeyboardInterrupt that ends all
                on_notebook_start=lambda notebook: loop.remove_signal_handler(signal.SIGINT),
            )
            error = None
            try:
                await client.async_execute(env=kernel_env)
            except CellExecutionError as failure:
                index = next(
                    i for i, cell in enumerate(nb.cells) if any(o.output_type == "error" for o in cell.get("outputs", []))
                )
                error = f"cell {index}: {failure.ename}: {plain_text(failure.evalue)}"
            except RuntimeError as failure:  # the kernel did not start, or died
                error = f"{failure}; look for a lack of memory"
            return Run(path, nb, time.perf_counter() - start, error)

    tasks = [asyncio.create_task(one(path, nb)) for path, nb in notebooks]
    for task in tasks:
        yield await task


def _line(run: Run, number: int, total: int) -> str:
    return f"[{number}/{total}] {run.notebook.name:<40} {run.seconds:6.1f} s  {'ok' if run.error is None else 'FAILED  ' + run.error}"


def _read(path: Path) -> NotebookNode:
    if not path.is_file():
        raise NotebookError(f"no notebook {path}; check the path")
    return nbformat.read(path, as_version=4)


def _text(nb: NotebookNode) -> str:
    return nbformat.writes(nb) + "\n"


def _absolute(value: str | Path) -> str:
    """A notebook runs in its own folder, so a path given in the caller's folder is made absolute; names and hub ids stay."""
    names_a_path = Path(value).is_file() or (value != "organism" and Path(value, "config.json").is_file())
    return str(Path(value).resolve()) if names_a_path else str(value)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m analysis_lib.notebooks", description="Execute notebooks in place and store clean outputs."
    )
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: every notebook of the project")
    parser.add_argument("--jobs", type=int, default=2, help="notebooks run at a time (default 2)")
    args = parser.parse_args(argv)
    try:
        store_outputs(args.notebooks, jobs=args.jobs)
    except NotebookError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
