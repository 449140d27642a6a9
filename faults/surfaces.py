"""Where texts are rendered: figures, widgets, tables, notebooks, the report."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
from IPython.core.formatters import DisplayFormatter

from analysis_lib import ChatModel, HiddenStates, Study, figures, fit_direction
from analysis_lib.report.html import write_report
from analysis_lib.report.run_notebooks import clean
from analysis_lib.widgets import dro_console, explore, inspect_directions, probe

from .samples import both, drawn, names_of, points_of, queries_of
from .texts import Surface, storable


def surfaces() -> dict[str, Surface]:
    """Surface -> function of texts, giving the HTML (or plotly's dialect of it) that it shows."""
    return {
        "figures": every_figure,
        "saved figure": saved,
        "table": lambda texts: [queries_of(texts).to_html()],
        "explorer": explorer,
        "inspector": inspector,
        "probe": probing,
        "DRO console": console,
        "stored outputs": stored,
        "report": report,
    }


def strings(value: Any) -> Iterator[str]:
    """Every string in a figure or a widget's state."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from strings(inner)
    elif isinstance(value, Iterable):
        for inner in value:
            yield from strings(inner)


def every_figure(texts: Sequence[str]) -> Iterator[str]:
    for pair in both(storable(texts)):
        yield from strings([figure.to_plotly_json() for figure in pair])


def saved(texts: Sequence[str]) -> Iterator[str]:
    points = points_of(texts := storable(texts))
    figure = figures.plot_groups(points, color="refusal_rate", title=texts[0], note=texts[1])
    with tempfile.TemporaryDirectory() as name:
        yield figures.save(figure, Path(name) / "figure.html").read_text(encoding="utf-8")


# ---------------------------------------------------------------------------------------- widgets


def rendered(widget: Any) -> Iterator[str]:
    """What a widget and its children render as HTML."""
    if hasattr(widget, "to_plotly_json"):
        yield from strings(widget.to_plotly_json())
    if type(widget).__name__ in ("HTML", "HTMLMath"):
        yield widget.value
    # Set as text, where the widget does not allow more
    for trait in ("description", "options", "value", "tooltip"):
        if getattr(widget, "description_allow_html", False):
            yield from strings(getattr(widget, trait, ""))
    for inner in getattr(widget, "children", ()):
        yield from rendered(inner)


def study_of(texts: Sequence[str], d: int = 8, **known: Any) -> Study:
    """A study of the texts, with drawn states of d dimensions and the rates of the points."""
    points, names = points_of(texts), names_of(texts)
    states = np.random.default_rng(0).standard_normal((len(points), 1, d)).astype(np.float32)
    prompts = {name: "" if name == "none" else "Be careful." for name in names}
    known |= {"states": HiddenStates(states, points, (-1,)), "rates": points}
    return Study(ChatModel.load("organism"), queries_of(texts), prompts, known=known)


def explorer(texts: Sequence[str]) -> Iterator[str]:
    made = explore(study_of(texts := storable(texts)), note=texts[0])
    for text in texts:
        made.query.value = text
        yield made.detail.value + made.message.value
    yield from rendered(made.view)


def inspector(texts: Sequence[str]) -> Iterator[str]:
    made = inspect_directions(study_of(texts := storable(texts)), note=texts[0])
    yield from rendered(made.view)


def with_a_model(texts: Sequence[str]) -> Study:
    """A study of the texts with states of the model's size, and one direction for both."""
    study = study_of(texts, ChatModel.load("organism").hidden_size)
    Z, labels = study.coordinates, {"name": "refusal", "groups": study.states.rows["query_id"]}
    refusal = fit_direction(Z, study.states.rows["refusal_rate"], **labels)
    known = {"states": study.states, "rates": study.rates}
    return replace(study, known=known | {"refusal": refusal, "harmfulness": refusal})


def probing(texts: Sequence[str]) -> Iterator[str]:
    made = probe(with_a_model(texts := storable(texts)), note=texts[0])
    for text in texts:
        # A longer one does not fit the model's context, which is told
        made.query.value = made.prompt.value = text[:400]
        yield made.detail.value + made.message.value
    yield from rendered(made.view)


def console(texts: Sequence[str]) -> Iterator[str]:
    study = with_a_model(texts := storable(texts))
    made = dro_console(study, start=texts[0], note=texts[0])
    yield made.detail.value + made.status.value
    yield from rendered(made.view)


# -------------------------------------------------------------------------------------- notebooks


def outputs(texts: Sequence[str]) -> list[dict[str, Any]]:
    show, table = DisplayFormatter(), points_of(texts).head(40)
    show.formatters["text/html"].enabled = True
    shown = (table, table.set_index("prompt"), table["text"].to_frame().T)
    return [*(show.format(one)[0] for one in shown), *({"text/plain": text} for text in texts)]


def notebook(texts: Sequence[str]) -> Any:
    v4 = nbformat.v4
    made = [v4.new_output("display_data", data=data) for data in outputs(texts)]
    made += [v4.new_output("stream", name="stdout", text="\n".join(texts))]
    for text in texts:
        made += [v4.new_output("error", ename="ValueError", evalue=text, traceback=[text])]
    for figure in drawn(storable(texts)):
        data = {"application/vnd.plotly.v1+json": json.loads(figure.to_json())}
        made += [v4.new_output("display_data", data=data)]
    cell = v4.new_code_cell("shown", outputs=made, execution_count=1)
    nb = v4.new_notebook(cells=[v4.new_markdown_cell("# Title"), cell])
    clean(nb)
    return nb


def report(texts: Sequence[str]) -> Iterator[str]:
    nb = nbformat.reads(json.dumps(notebook(texts)), as_version=4)  # as if stored and read again
    with tempfile.TemporaryDirectory() as name:
        page = write_report({"01_hostile": nb}, Path(name) / "report.html", note=texts[0])
        yield page.read_text(encoding="utf-8")


def stored(texts: Sequence[str]) -> Iterator[str]:
    for output in notebook(texts).cells[1].outputs:
        yield output.get("data", {}).get("text/html", "")
