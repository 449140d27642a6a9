"""Executes notebooks in place and stores outputs that repeat byte for byte: `python -m tools.store_outputs [NOTEBOOK ...]`."""

from __future__ import annotations

import argparse
import asyncio
import base64
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from nbformat import NotebookNode

from analysis_lib.report.html import PLOTLY_MIME
from analysis_lib.report.pictures import NotebookError, Pictures
from analysis_lib.report.run_notebooks import (
    FOLDER,
    WIDGET_MIME,
    clean,
    execute,
    notebook_text,
    progress_line,
    read_notebook,
    run_loop,
)

MAX_BYTES = 1_000_000

MAX_LINES = 15


def store_outputs(paths: Sequence[str | Path] = (), *, jobs: int = 2) -> None:
    """Executes notebooks in place, on an empty store, and writes outputs that repeat: see `clean`. Default: every notebook.

    Each plotly figure gets an image/png beside its interactive form. Raises NotebookError where a notebook fails, or breaks
    a rule of `problems`; that file is then left as it was.
    """
    files = [Path(path) for path in paths] or sorted(FOLDER.glob("[0-9][0-9]_*.ipynb"))
    if not files:
        raise NotebookError(f"no notebooks NN_*.ipynb in {FOLDER}; name the notebooks to execute")
    notebooks = [(path, read_notebook(path)) for path in files]
    with tempfile.TemporaryDirectory() as store, Pictures() as pictures:
        env = {
            "ANALYSIS_LIB_STORE": store,
            "ANALYSIS_LIB_DEVICE": "",
            "ANALYSIS_LIB_DTYPE": "",
            "ANALYSIS_LIB_DATE": "",
        }  # none of the user's settings

        async def run_all() -> list[str]:
            failed: list[str] = []
            done = 0
            async for run in execute(notebooks, jobs, env):
                done += 1
                clean(run.nb)
                await asyncio.to_thread(pictures.add, run.nb)
                wrong = [run.error] if run.error else problems(run.nb)
                print(
                    progress_line(run, done, len(files)),
                    *[f"\n    {text}" for text in wrong if not run.error],
                    flush=True,
                )
                if wrong:
                    failed.append(run.notebook.name)
                else:
                    run.notebook.write_text(notebook_text(run.nb), encoding="utf-8")
            return failed

        failed = run_loop(run_all())
    if not paths:
        update_readme()
    if failed:
        raise NotebookError(
            f"not stored: {', '.join(failed)}; mend what is listed above and run it again"
        )


def readme_parts() -> tuple[bytes, str]:
    """What the README shows of the stored notebooks: the picture of notebook 03, and the last table of notebook 06."""
    anchor, benchmarks = (
        read_notebook(next(FOLDER.glob(f"{number}_*.ipynb"))) for number in ("03", "06")
    )
    outputs = [output for cell in anchor.cells for output in cell.get("outputs", [])]
    picture = next(
        output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})
    )
    streams = [
        output
        for cell in benchmarks.cells
        for output in cell.get("outputs", [])
        if output.output_type == "stream"
    ]
    return base64.b64decode(picture), f"```\n{streams[-1].text.rstrip()}\n```"


def update_readme() -> None:
    """Writes `readme_parts` into docs/anchor_space.png and between the README's benchmark marks."""
    picture, table = readme_parts()
    root = FOLDER.parent
    (root / "docs").mkdir(exist_ok=True)
    (root / "docs" / "anchor_space.png").write_bytes(picture)
    readme = root / "README.md"
    head, mark, rest = readme.read_text(encoding="utf-8").partition(
        "<!-- benchmark: written by make notebooks -->\n"
    )
    _, end, tail = rest.partition("\n<!-- end -->")
    if not end:
        raise NotebookError(f"{readme} lacks the marks around the benchmark table; restore them")
    readme.write_text(f"{head}{mark}{table}{end}{tail}", encoding="utf-8")


def problems(nb: NotebookNode) -> list[str]:
    """What keeps the stored outputs of `nb` from being read, compared by nbval, or repeated. Empty where all is well."""
    found = []
    for index, cell in enumerate(nb.cells):
        if cell.cell_type != "code":
            continue
        if cell.source.strip() and cell.execution_count is None:
            found.append(
                f"cell {index} was not executed, so nbval compares nothing; run `make notebooks`"
            )
        if (lines := len(cell.source.splitlines())) > MAX_LINES:
            found.append(
                f"cell {index} has {lines} lines, the limit is {MAX_LINES}; move what is not taught into the library"
            )
        for output in cell.outputs:
            data = output.get("data", {})
            if output.output_type == "error":
                found.append(
                    f"cell {index} stores the error {output.ename}; mend the cell and run `make notebooks`"
                )
            if output.get("name") == "stderr":
                found.append(
                    f"cell {index} writes to stderr, which does not repeat; mend its cause: {output.text.strip()[:200]}"
                )
            if PLOTLY_MIME in data and "image/png" not in data:
                found.append(
                    f"cell {index} stores a figure without image/png; run `make notebooks`"
                )
            if WIDGET_MIME in data:
                found.append(f"cell {index} stores a widget view; run `make notebooks`")
    if "widgets" in nb.metadata:
        found.append("metadata.widgets holds widget state; run `make notebooks`")
    if (size := len(notebook_text(nb).encode())) >= MAX_BYTES:
        found.append(f"{size:,} bytes, the limit is {MAX_BYTES:,}; store fewer or smaller figures")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.store_outputs",
        description="Execute notebooks in place and store clean outputs.",
    )
    parser.add_argument(
        "notebooks", nargs="*", type=Path, help="default: every notebook of the project"
    )
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
