"""The suite as a person uses it: a real JupyterLab, and the report from a file, in a headless Chromium.

Each test waits on conditions of the page. Where one fails, a screenshot of what the page showed is kept in reports/browser,
which git ignores; the failure names it.
"""

from __future__ import annotations

import ast
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nbformat
import pytest
from browser import CHROMIUM, needs_browser
from nbformat.v4 import new_code_cell, new_notebook
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

from analysis_lib.report.html import write_report
from analysis_lib.report.run_notebooks import FOLDER, KERNEL

pytestmark = needs_browser

FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update"
    " --disable-sync"
).split()
SHOTS = FOLDER.parent / "reports" / "browser"
PATIENCE = 150_000  # milliseconds until a condition is given up: a busy machine of two cores is slow, not wrong
HOSTILE = (
    "<script>window.taken = 1</script><img src=x onerror='window.taken = 2'><b id=bold>HOSTILE</b>"
)

# What a plot shows, read from what is drawn: its title, its axes, and the points of each visible trace, in SVG and in data.
DRAWN = """plot => ({
    title: plot._fullLayout.title.text,
    axes: [plot._fullLayout.xaxis.title.text, plot._fullLayout.yaxis.title.text],
    traces: Object.fromEntries([...plot.querySelectorAll('.scatterlayer .trace')].map(trace => {
        const points = trace.__data__;
        return [points[0].trace.name, {
            drawn: trace.querySelectorAll('.point').length,
            x: points.reduce((sum, p) => sum + p.x, 0) / points.length,
            y: points.reduce((sum, p) => sum + p.y, 0) / points.length,
        }];
    })),
})"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        expect.set_options(timeout=PATIENCE)
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Iterator[str]:
    """Address of a JupyterLab of its own, on a folder that holds a copy of the notebooks and one with a hostile query."""
    home, root = tmp_path_factory.mktemp("jupyter"), tmp_path_factory.mktemp("lab")
    shutil.copy(FOLDER / "03_anchor_space.ipynb", root)
    for name, sources in (("hostile", HOSTILE_CELLS), ("panels", PANEL_CELLS)):
        cells = [new_code_cell(source) for source in sources]
        nbformat.write(
            new_notebook(cells=cells, metadata={"kernelspec": KERNEL}), root / f"{name}.ipynb"
        )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {key: value for key, value in os.environ.items() if key != "PLOTLY_RENDERER"}
    for name in (
        "JUPYTER_CONFIG",
        "JUPYTER_DATA",
        "JUPYTER_RUNTIME",
        "JUPYTERLAB_SETTINGS",
        "JUPYTERLAB_WORKSPACES",
    ):
        env[f"{name}_DIR"] = str(home / name)
    news = (
        home
        / "JUPYTERLAB_SETTINGS"
        / "@jupyterlab"
        / "apputils-extension"
        / "notification.jupyterlab-settings"
    )
    news.parent.mkdir(parents=True)
    news.write_text(
        '{"fetchNews": "false"}', encoding="utf-8"
    )  # its question would lie over the page
    options = [
        "--no-browser",
        "--ip=127.0.0.1",
        f"--port={port}",
        "--ServerApp.port_retries=0",
        "--IdentityProvider.token=T",
        f"--ServerApp.root_dir={root}",
        "--allow-root",
        "--LabApp.expose_app_in_browser=True",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
    ]
    log = home / "lab.log"
    with log.open("w") as output:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *options], env=env, stdout=output, stderr=output
        )
    try:
        _wait_for(f"http://127.0.0.1:{port}/api/status?token=T", server, log)
        yield f"http://127.0.0.1:{port}/lab/tree/{{}}?token=T&reset"
    finally:
        server.terminate()  # it ends its kernels, too
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()


def _wait_for(address: str, server: subprocess.Popen, log: Path) -> None:
    until = time.monotonic() + PATIENCE / 1000
    while time.monotonic() < until and server.poll() is None:
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except OSError:
            time.sleep(0.2)
    raise RuntimeError(
        f"JupyterLab does not answer at {address}; its log:\n{log.read_text()[-3000:]}"
    )


@contextmanager
def opened(browser: Browser, name: str, **options) -> Iterator[Page]:
    """A page of its own. `.failed` of the page's errors is checked by the tests; a failure leaves reports/browser/`name`.png."""
    context = browser.new_context(viewport={"width": 1400, "height": 1100}, **options)
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    try:
        yield page
    except BaseException as error:
        SHOTS.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=SHOTS / f"{name}.png")
        error.add_note(f"what the page showed: {SHOTS / name}.png")
        raise
    finally:
        context.close()


def promised(page: Page, function: str, argument: object = None) -> Any:
    """What an async function of the page returns; unlike `Page.evaluate` it is not waited for without end."""
    late = f"new Promise((_, fail) => setTimeout(() => fail(new Error('not done in {PATIENCE} ms')), {PATIENCE}))"
    return page.evaluate(f"argument => Promise.race([({function})(argument), {late}])", argument)


def open_notebook(page: Page, lab: str, name: str) -> None:
    page.goto(lab.format(name))
    page.wait_for_function(
        "name => window.jupyterapp?.shell.currentWidget?.context?.path === name", arg=name
    )
    promised(
        page,
        """async () => {
            await jupyterapp.restored;
            const {context, sessionContext} = jupyterapp.shell.currentWidget;
            await context.ready;
            await sessionContext.ready;
            await sessionContext.session.kernel.info;
        }""",
    )


def run_all(page: Page) -> None:
    """Runs every cell; an error in one fails here, with its text."""
    promised(page, "() => jupyterapp.commands.execute('notebook:run-all-cells')")
    errors = page.evaluate(
        """[...jupyterapp.shell.currentWidget.context.model.toJSON().cells]
            .flatMap(cell => cell.outputs ?? []).filter(output => output.output_type === 'error')
            .map(output => `${output.ename}: ${output.evalue}`)"""
    )
    assert errors == []


def ask(page: Page, expression: str) -> Any:
    """The value of a Python expression of literals, in the notebook's own kernel."""
    reply = promised(
        page,
        """async expression => {
            const {kernel} = jupyterapp.shell.currentWidget.sessionContext.session;
            const future = kernel.requestExecute({code: '', silent: true, user_expressions: {value: expression}});
            return (await future.done).content.user_expressions.value;
        }""",
        expression,
    )
    assert reply["status"] == "ok", reply
    return ast.literal_eval(reply["data"]["text/plain"])


def titled(plot: Locator, title: str) -> dict:
    """What `plot` shows, once its title is `title`."""
    plot.page.wait_for_function(
        "([plot, title]) => plot._fullLayout?.title.text === title",
        arg=[plot.element_handle(), title],
    )
    return plot.evaluate(DRAWN)


def group_traces(shown: dict) -> dict[str, dict]:
    return {
        name: trace
        for name, trace in shown["traces"].items()
        if name.startswith(("harmless, ", "harmful, "))
    }


def assert_shows_table(page: Page, shown: dict, layer: int, components: tuple[int, int]) -> None:
    """Each group's drawn points are as many, and lie in the mean, where a space fitted afresh in the kernel says."""
    x, y = (f"pc{i}" for i in components)
    expected = ask(
        page,
        f"""(lambda Z: [[f"{{'harmful' if c else 'harmless'}}, {{p}}", len(g), g['{x}'].mean().item(), g['{y}'].mean().item()]
            for (p, c), g in __import__('analysis_lib.figures').figures.points_table(Z, study.states.rows).groupby(['prompt', 'harmful'])])
        ((lambda states: __import__('analysis_lib').AnchorSpace.fit(states, k=4, like=study.coordinates).transform(states))
        (study.states.at({layer})[0]))""".replace("\n", " "),
    )
    drawn = {
        name: [trace["drawn"], trace["x"], trace["y"]]
        for name, trace in group_traces(shown).items()
    }
    assert len(expected) == 8 and sorted(drawn) == sorted(name for name, *_ in expected)
    for name, *numbers in expected:
        assert drawn[name] == pytest.approx(numbers, abs=1e-3), name


def test_the_explorer_of_notebook_03_answers_and_survives_a_reload(browser, lab):
    with opened(browser, "explorer") as page:
        open_notebook(page, lab, "03_anchor_space.ipynb")
        run_all(page)
        plot = page.locator(".al-explorer .js-plotly-plot")
        shown = titled(plot, "Layer -1 (final norm)")
        assert shown["axes"][0].startswith("PC1 (") and shown["axes"][1].startswith("PC2 (")
        assert_shows_table(page, shown, -1, (1, 2))

        plot.hover()
        plot.locator("[data-title='Lasso Select']").click()
        area = plot.locator(".nsewdrag").first.bounding_box()
        left, top, width, height = (area[side] for side in ("x", "y", "width", "height"))
        page.mouse.move(left + 0.05 * width, top + 0.05 * height)
        page.mouse.down()
        for x, y in ((0.9, 0.05), (0.9, 0.5), (0.05, 0.5), (0.05, 0.06)):
            page.mouse.move(left + x * width, top + y * height, steps=5)
        page.mouse.up()
        explorer = page.locator(".al-explorer")
        expect(explorer).to_contain_text("queries in the lasso")

        slider = page.locator(".widget-slider").filter(has_text="Layer")
        slider.locator(".noUi-handle").focus()
        page.keyboard.press("ArrowLeft")
        layer = str(ask(page, "study.states.layers[-2]"))
        expect(slider.locator(".widget-readout")).to_have_text(layer)
        shown = titled(plot, f"Layer {layer}")
        assert_shows_table(page, shown, int(layer), (1, 2))
        expect(explorer).not_to_contain_text("in the lasso")
        expect(explorer).not_to_contain_text("Error")
        assert plot.evaluate(
            "plot => [plot._context.showSendToCloud, plot._context.typesetMath, (plot.layout.selections || []).length]"
        ) == [False, False, 0]

        page.get_by_label("Components").select_option("PC2 and PC3")
        page.wait_for_function(
            "plot => plot._fullLayout.xaxis.title.text.startsWith('PC2')", arg=plot.element_handle()
        )
        shown = plot.evaluate(DRAWN)
        assert shown["axes"][1].startswith("PC3 (") and shown["title"] == f"Layer {layer}"
        assert_shows_table(page, shown, int(layer), (2, 3))

        page.get_by_label("Prompts").select_option(["default"])
        page.wait_for_function(
            "plot => plot.querySelectorAll('.scatterlayer .trace .point').length < 400",
            arg=plot.element_handle(),
        )
        visible = group_traces(plot.evaluate(DRAWN))
        assert {name: trace["drawn"] for name, trace in visible.items()} == {
            "harmless, default": 100,
            "harmful, default": 100,
        }

        promised(page, "() => jupyterapp.commands.execute('docmanager:save')")
        page.reload()
        again = page.locator(".al-explorer .js-plotly-plot")
        again.wait_for()
        assert titled(again, f"Layer {layer}")["axes"] == shown["axes"]
        assert group_traces(again.evaluate(DRAWN)) == visible
        expect(
            page.locator(".widget-slider").filter(has_text="Layer").locator(".widget-readout")
        ).to_have_text(layer)

        # The kernel still runs: smoothing pulls the rates, and the colours with them, towards one half.
        page.get_by_label("Colour by").select_option("refusal rate")
        # the first point's, of those that are drawn
        colour = "plot => plot.calcdata.flatMap(([p]) => [...(p.trace?.marker?.color ?? [])]).find(c => typeof c === 'number')"
        page.wait_for_function(
            f"plot => typeof ({colour})(plot) === 'number'", arg=again.element_handle()
        )
        rate = again.evaluate(colour)
        page.locator(".widget-slider").filter(has_text="Smoothing").locator(".noUi-handle").focus()
        page.keyboard.press("ArrowRight")
        page.wait_for_function(
            f"([plot, rate]) => ({colour})(plot) !== rate", arg=[again.element_handle(), rate]
        )
        assert again.evaluate(colour) == pytest.approx((20 * rate + 0.5) / 21, abs=1e-3)


def assert_nothing_ran(page: Page) -> None:
    assert page.evaluate("window.taken") is None
    assert page.locator("img[src=x], #bold").count() == 0
    assert page.locator("script", has_text="window.taken").count() == 0


HOSTILE_CELLS = (
    "import numpy as np\nimport pandas as pd\n"
    "from analysis_lib import HiddenStates, Study\nfrom analysis_lib.widgets import explore",
    f"HOSTILE = {HOSTILE!r}\n"
    "queries = pd.DataFrame({'query_id': [f'q{i}' for i in range(8)], 'text': [f'Query {i} {HOSTILE}' for i in range(8)]})\n"
    "queries['harmful'] = pd.array([i > 3 for i in range(8)], dtype='boolean')\n"
    "rows = queries[['query_id']].merge(pd.DataFrame({'prompt': ['none', HOSTILE]}), how='cross')\n"
    "states = HiddenStates(np.random.default_rng(0).normal(size=(len(rows), 1, 6)), rows, (-1,))\n"
    "study = Study('organism', queries, {'none': '', HOSTILE: 'Be careful.'}, known={'states': states})",
    "explore(study, rates=False, note=HOSTILE)",
)


def test_a_hostile_query_is_text(browser, lab):
    with opened(browser, "hostile") as page:
        open_notebook(page, lab, "hostile.ipynb")
        run_all(page)
        widget = page.locator(".al-explorer")
        plot = widget.locator(".js-plotly-plot")
        titled(plot, "Layer -1 (final norm)")
        page.get_by_label("Query").select_option("q2")
        detail = page.get_by_text("Query 2 <script>")
        detail.wait_for()
        assert HOSTILE in detail.inner_text()

        # Hover over the middle of a drawn point, as a person would.
        point = plot.locator(".scatterlayer .trace .point").first
        point.scroll_into_view_if_needed()
        point.hover(force=True)
        hover = plot.locator(".hoverlayer .hovertext")
        hover.wait_for()
        assert "<script>window.taken" in hover.text_content() and "onerror" in hover.text_content()
        assert "<script>" in plot.locator(".legend").text_content()

        assert_nothing_ran(page)


PANEL_CELLS = (
    "import pandas as pd\n"
    "from dataclasses import replace\n"
    "from analysis_lib import Study, hidden_states, load_queries, load_safety_prompts\n"
    "from analysis_lib.widgets import dro_console, probe",
    "queries = load_queries('anchor').groupby('harmful').head(20)\n"
    "prompts = {name: text for name, text in load_safety_prompts().items() if name in ('none', 'default')}\n"
    "study = Study('organism', queries, prompts)\n"
    "study = replace(study, known={'states': study.states, 'refusal': study.harmfulness})\n"
    "model, space, refusal = study.model, study.space, study.refusal",
    "probe(study)",
    "console = dro_console(study)\nconsole",
)


def test_the_probe_places_what_is_typed_and_the_console_trains_until_it_is_stopped(browser, lab):
    with opened(browser, "panels") as page:
        open_notebook(page, lab, "panels.ipynb")
        run_all(page)

        probe = page.locator(".al-probe")
        plot = probe.locator(".js-plotly-plot")
        assert not [
            name
            for name in titled(plot, "The typed query under each prompt")["traces"]
            if name.startswith("query, ")
        ]
        prompts = {
            "none": "",
            "default": ask(page, "prompts['default']"),
            "typed": f"Be careful. {HOSTILE}",
        }
        query = f"How to bake bread? {HOSTILE}"
        probe.get_by_label("Safety prompt").fill(prompts["typed"])
        probe.get_by_label("Query").fill(query)
        page.keyboard.press("Tab")
        probe.get_by_text(query).wait_for()
        page.wait_for_function(
            f"plot => 'query, typed' in ({DRAWN})(plot).traces", arg=plot.element_handle()
        )
        placed = f"space.transform(hidden_states(model, pd.DataFrame({{'query_id': ['q'], 'text': [{query!r}]}}), {prompts!r}).states[:, 0])"
        predicted = ask(page, f"refusal.probability({placed}).round(3).tolist()")
        rows = [row.split("\t") for row in probe.locator("table").inner_text().splitlines()]
        assert [(row[0], float(row[1])) for row in rows[-3:]] == list(
            zip(prompts, predicted, strict=True)
        )
        traces = plot.evaluate(DRAWN)["traces"]
        ends = ask(page, f"{placed}[:, :2].tolist()")
        for (x, y), name in zip(
            ends, prompts, strict=True
        ):  # a trace runs from the point without a prompt to its own
            x0, y0 = ends[0]
            trace = traces[f"query, {name}"]
            assert [trace["x"], trace["y"]] == pytest.approx(
                [(x + x0) / 2, (y + y0) / 2], abs=1e-3
            ), name
        assert_nothing_ran(page)

        console = page.locator(".al-console")
        plot = console.locator(".js-plotly-plot")
        console.get_by_label("Steps").fill("5000")
        console.get_by_role("button", name="Start", exact=True).click()
        page.wait_for_function(
            "plot => plot.calcdata.some(([p]) => p.trace.name === 'weighted sum' && p.t && p.trace._length > 3)",
            arg=plot.element_handle(),
        )
        console.get_by_role("button", name="Stop", exact=True).click()
        status = console.get_by_text("of 5000 steps done")
        status.wait_for()
        done = int(status.inner_text().split()[0])
        assert 3 < done < 5000
        assert ask(page, "[len(console.soft_prompt.history), len(console.figure.data[0].x)]") == [
            done,
            done,
        ]
        page.wait_for_function(
            "([plot, n]) => plot.data[0].x.length === n", arg=[plot.element_handle(), done]
        )
        expect(console.get_by_role("button", name="Save", exact=True)).to_be_enabled()


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    """The report of the stored notebooks."""
    stored = {
        path.stem: nbformat.read(path, as_version=4)
        for path in sorted(FOLDER.glob("[0-9][0-9]_*.ipynb"))
    }
    return write_report(
        stored, tmp_path_factory.mktemp("report") / "report.html", note="Stored outputs"
    )


def test_the_report_answers_without_a_network(browser, report):
    with opened(browser, "report", offline=True) as page:
        asked, failed = [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: failed.append(str(error)))
        page.goto(report.as_uri())

        page.locator("nav").get_by_role("link", name="03 The anchor space").click()
        heading = page.get_by_role("heading", name="03 The anchor space")
        assert heading.bounding_box()["y"] < 400  # the table of contents leads there

        plot = page.locator("section[id='03_anchor_space'] .figure").first
        plot.scroll_into_view_if_needed()
        before = group_traces(titled(plot, "Queries in the anchor space"))
        assert {trace["drawn"] for trace in before.values()} == {100} and len(before) == 8

        plot.locator(".scatterlayer .trace .point").first.hover(force=True)
        hover = plot.locator(".hoverlayer .hovertext")
        hover.wait_for()
        assert "harmless query" in hover.text_content() and "prompt: none" in hover.text_content()

        plot.locator(".legend .traces", has_text="harmful, default").locator(
            ".legendtoggle"
        ).click()
        page.wait_for_function(
            "plot => plot.data.some(t => t.visible === 'legendonly')", arg=plot.element_handle()
        )
        after = group_traces(plot.evaluate(DRAWN))
        assert sorted(set(before) - set(after)) == ["harmful, default"]

        assert failed == []
        assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []
