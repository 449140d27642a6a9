"""Settings of the documentation. The API reference is written from the docstrings, a page a room.

`make docs` builds it, offline.
"""

from __future__ import annotations

import inspect
import re
from collections import defaultdict
from importlib import import_module
from pathlib import Path
from typing import Any

import analysis_lib

project = "analysis-lib"
html_title = "Safety prompts, seen from inside"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
myst_heading_anchors = 3  # a heading is an anchor here as it is in the forges' views of a page

# Docstrings: NumPy's style; `name` is code.
default_role = "code"
napoleon_google_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
autodoc_typehints = "none"  # the docstrings say types, with shapes and units
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
add_module_names = False
toc_object_entries_show_parents = "hide"
python_maximum_signature_line_length = 80

html_theme = "alabaster"
html_theme_options = {
    "description": "Representation analysis of safety prompts for chat models",
    "page_width": "1180px",
    "sidebar_width": "230px",
    "fixed_sidebar": True,
    "font_family": "system-ui, 'DejaVu Sans', sans-serif",
    "head_font_family": "system-ui, 'DejaVu Sans', sans-serif",
    "code_font_size": "0.85em",
    "link": "#0b5a8a",
    "show_powered_by": False,
}
html_sidebars = {"**": ["about.html", "searchfield.html", "navigation.html"]}
html_static_path = ["_static"]
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False

ROOMS_OF_THEIR_OWN = ("figures", "organism", "widgets")  # imported by the room's name


def public_names() -> dict[str, dict[str, list[str]]]:
    """{room: {module: names}}: the library's public names, and those of the rooms beside them."""
    found: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    sources = [analysis_lib, *(import_module(f"analysis_lib.{n}") for n in ROOMS_OF_THEIR_OWN)]
    for source in sources:
        for name in source.__all__:
            item = getattr(source, name)
            if inspect.isclass(item) or inspect.isfunction(item):
                found[item.__module__.split(".")[1]][item.__module__].append(name)
    return found


def page(room: str, modules: dict[str, list[str]]) -> str:
    """One page of the reference, in reStructuredText, which the docstrings are in too."""
    source = f"analysis_lib.{room}" if room in ROOMS_OF_THEIR_OWN else "analysis_lib"
    about = inspect.getdoc(import_module(f"analysis_lib.{room}")) or ""
    parts = [".. highlight:: none", "", room, "=" * len(room), "", *prose(about.splitlines()), ""]
    parts += [".. code-block:: python", "", f"   from {source} import ...", ""]
    for module, names in sorted(modules.items()):
        head = module.removeprefix(f"analysis_lib.{room}").lstrip(".") or room
        parts += [head, "-" * len(head), "", f".. automodule:: {module}"]
        parts += [f"   :members: {', '.join(sorted(names))}", ""]
    return "\n".join(parts)


def prose(lines: list[str]) -> list[str]:
    """A docstring without NumPy's sections: its first paragraph, and what follows as it stands."""
    if any(re.fullmatch(r"\s*-{3,}\s*", line) for line in lines) or "" not in lines:
        return lines
    end = lines.index("")
    rest = [f"   {line}" for line in lines[end + 1 :]]
    return [*lines[:end], "", "::", "", *rest, ""] if any(map(str.strip, rest)) else lines


def write_reference(app: Any) -> None:
    """docs/api: written where it changed, so that a second build is quick."""
    folder = Path(app.srcdir) / "api"
    folder.mkdir(exist_ok=True)
    pages = {f"{room}.rst": page(room, modules) for room, modules in public_names().items()}
    for path in folder.glob("*.rst"):
        if path.name not in pages:
            path.unlink()
    for name, text in pages.items():
        path = folder / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def offer_files(app: Any, name: str, source: list[str]) -> None:
    """A link out of docs/ becomes a file to download; on a forge it opens the file."""
    source[0] = re.sub(r"\]\((\.\./[^)#:]+)\)", r"](path:\1)", source[0])


def show_plainly(app: Any, what: str, name: str, item: Any, options: Any, lines: list[str]) -> None:
    lines[:] = prose(lines)


def setup(app: Any) -> None:
    app.connect("builder-inited", write_reference)
    app.connect("source-read", offer_files)
    app.connect("autodoc-process-docstring", show_plainly, priority=400)  # before napoleon
