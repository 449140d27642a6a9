"""Executed notebooks as one self-contained HTML page.

Figures are interactive, nothing is requested from outside, and untrusted text is escaped.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import mistune
import nh3
from nbformat import NotebookNode
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

from ..figures.pages import plotly_script

PLOTLY_MIME = "application/vnd.plotly.v1+json"

_ANSI = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")


_TAGS = set(
    "a b blockquote br caption code col colgroup dd details div dl dt em h1 h2 h3 h4 h5 h6 hr i "
    "kbd li ol p pre s small span strong sub summary sup table tbody td tfoot th thead tr "
    "ul".split()
)

_ATTRIBUTES = {
    "a": {"href", "title"},
    "td": {"colspan", "rowspan"},
    "th": {"colspan", "rowspan", "scope"},
}

_DRAW = """
const draw = (entries, watch) => entries.filter(e => e.isIntersecting).forEach(e => {
  watch.unobserve(e.target);
  const figure = JSON.parse(e.target.nextElementSibling.textContent);
  Plotly.newPlot(e.target, figure.data, figure.layout,
    {responsive: true, displaylogo: false, showSendToCloud: false});
});
const watch = new IntersectionObserver(draw, {rootMargin: '400px'});
document.querySelectorAll('.figure').forEach(figure => watch.observe(figure));
window.addEventListener('beforeprint', () => draw(
  [...document.querySelectorAll('.figure:empty')].map(target => ({target, isIntersecting: true})),
  watch));
"""

_CSS = """
:root { color-scheme: light dark; --text: #1d2329; --soft: #59636e; --back: #fff;
  --box: #f4f6f8; --line: #d5dae0; --link: #0550ae; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e3e8ee; --soft: #9aa5b1; --back: #14181d;
    --box: #1d232a; --line: #353d47; --link: #79b8ff; }
}
body { margin: 0 auto; max-width: 60rem; padding: 1.5rem; font: 16px/1.6 system-ui, sans-serif;
  color: var(--text); background: var(--back); }
a { color: var(--link); }
h2 { margin-top: 3rem; padding-top: 1rem; border-top: 1px solid var(--line); }
nav ul { list-style: none; padding-left: 1.2rem; } nav > ul { padding-left: 0; }
.note { padding: .6rem 1rem; border-left: 4px solid #E69F00; background: var(--box); }
pre { overflow-x: auto; padding: .7rem 1rem; border-radius: 4px; background: var(--box);
  font-size: .85rem; line-height: 1.45; }
code { font-size: .9em; } summary { color: var(--soft); cursor: pointer; font-size: .85rem; }
.error { border-left: 4px solid #d1242f; }
.output { overflow-x: auto; margin: .8rem 0; } .output img { max-width: 100%; background: #fff; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid var(--line); text-align: right; }
th { font-weight: 600; }
"""


def write_report(
    notebooks: Mapping[str, NotebookNode],
    path: str | Path,
    *,
    note: str = "",
    title: str = "Safety prompts, analysed",
) -> Path:
    """Writes executed `notebooks` {name: notebook} as one page to `path`, and returns it.

    `note` stands at its head.
    """
    contents, sections = [], []
    for name, nb in notebooks.items():
        markdown = _Markdown(name, notebooks)
        body = "\n".join(_cell(cell, markdown) for cell in nb.cells)
        first, *others = markdown.headings or [(1, name, "")]
        inner = "".join(
            f'<li><a href="#{target}">{text}</a></li>'
            for level, text, target in others
            if level == 2
        )
        contents.append(
            f'<li><a href="#{escape(name)}">{first[1]}</a>'
            + (f"<ul>{inner}</ul>" if inner else "")
            + "</li>"
        )
        sections.append(f'<section id="{escape(name)}">\n{body}\n</section>')
    scripts = [plotly_script().replace("\r", ""), _DRAW]
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
        for script in scripts
    )
    # plotly.js compiles the callers of its WebGL shaders. No script but these two can start.
    policy = (
        f"default-src 'none'; script-src {hashes} 'unsafe-eval'; "
        "style-src 'unsafe-inline'; img-src data: blob:"
    )
    styles = _CSS + HtmlFormatter(style="default").get_style_defs(".code")
    dark = HtmlFormatter(style="github-dark").get_style_defs(".code")
    page = [
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title>\n<style>{styles}\n@media (prefers-color-scheme: dark) "
        f"{{ {dark} }}\n.code, .code pre {{ background: none }}</style>",
        f"</head>\n<body>\n<h1>{escape(title)}</h1>",
        f'<p class="note">{escape(note)}</p>' if note else "",
        f'<nav aria-label="Contents"><ul>{"".join(contents)}</ul></nav>\n<main>',
        *sections,
        "</main>",
        *(f"<script>{script}</script>" for script in scripts),
        "</body>\n</html>\n",
    ]
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # A lone surrogate is no UTF-8.
    path.write_text("\n".join(page), encoding="utf-8", errors="replace")
    return path


def plain_text(text: str) -> str:
    """Text without a terminal's colour codes."""
    return _ANSI.sub("", text)


class _Markdown(mistune.HTMLRenderer):
    """Markdown of one notebook: raw HTML is escaped, images from elsewhere are left out.

    Links between notebooks stay inside the page.
    """

    def __init__(self, name: str, notebooks: Mapping[str, NotebookNode]):
        super().__init__(escape=True)
        self.name, self.notebooks = name, notebooks
        self.headings: list[tuple[int, str, str]] = []  # level, HTML text, id
        self.convert = mistune.create_markdown(
            renderer=self, plugins=["table", "strikethrough", "footnotes"]
        )

    def heading(self, text: str, level: int, **attributes: object) -> str:
        target = f"{self.name}-{len(self.headings)}"
        self.headings.append((level, text, target))
        return f'<h{min(level + 1, 6)} id="{escape(target)}">{text}</h{min(level + 1, 6)}>\n'

    def link(self, text: str, url: str, title: str | None = None) -> str:
        stem = url.partition("#")[0].removesuffix(".ipynb")
        return super().link(text, f"#{stem}" if stem in self.notebooks else url, title)

    def image(self, text: str, url: str, title: str | None = None) -> str:
        return f"<em>{text}</em>"


def _cell(cell: NotebookNode, markdown: _Markdown) -> str:
    if cell.cell_type == "markdown":
        return str(markdown.convert(cell.source))
    if cell.cell_type != "code" or not cell.source.strip():
        return ""
    code = highlight(cell.source, PythonLexer(), HtmlFormatter(cssclass="code"))
    return f"<details><summary>Code</summary>{code}</details>\n" + "\n".join(
        _output(output, markdown) for output in cell.outputs
    )


def _output(output: NotebookNode, markdown: _Markdown) -> str:
    if output.output_type == "stream":
        return _pre(output.text)
    if output.output_type == "error":
        return _pre("\n".join(output.traceback), "error")
    data = output.data
    if PLOTLY_MIME in data:
        return _figure(data[PLOTLY_MIME])
    if "image/png" in data:
        return (
            '<div class="output"><img alt="" '
            f'src="data:image/png;base64,{escape("".join(data["image/png"].split()))}"></div>'
        )
    if "text/html" in data:
        html = nh3.clean(_whole(data["text/html"]), tags=_TAGS, attributes=_ATTRIBUTES)
        return f'<div class="output">{html}</div>'
    if "text/markdown" in data:
        return f'<div class="output">{markdown.convert(data["text/markdown"])}</div>'
    return _pre(data.get("text/plain", ""))


def _whole(text: str) -> str:
    """The text with half Unicode pairs, which no file can hold, as question marks."""
    return text.encode("utf-8", "replace").decode()


def _figure(figure: Mapping[str, Any]) -> str:
    layout = figure.get("layout", {})
    height = int(layout.get("height") or 450)
    label = layout.get("title", {}).get("text") or "figure"
    # "<" would end the script element early. As \u003c it is the same JSON.
    data = json.dumps({"data": figure.get("data", []), "layout": layout}).replace("<", "\\u003c")
    return (
        f'<div class="output"><div class="figure" role="img" aria-label="{escape(label)}" '
        f'style="height:{height}px"></div>'
        f'<script type="application/json">{data}</script></div>'
    )


def _pre(text: str, kind: str = "text") -> str:
    return f'<pre class="{kind}">{escape(plain_text(text))}</pre>' if text.strip() else ""
