"""Texts and repositories that are not trusted.

Nothing in them becomes markup, opens a role, runs, or ends in a strange error.
"""

from __future__ import annotations

import http.server
import json
import os
import pickle
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import ClassVar

import pytest
from pandas.io.formats.html import HTMLFormatter
from tiny_models import FAMILIES, chat

from analysis_lib import figures
from analysis_lib.data.shipped import ROOT
from analysis_lib.figures import labels
from analysis_lib.model.chat import ChatModel
from analysis_lib.model.rendering import Renderer
from analysis_lib.report import html
from faults import samples
from faults.files import hostile_files
from faults.surfaces import surfaces
from faults.texts import HOSTILE, ROLES, Elements, markup, roles, storable

SURFACES = surfaces()
SHORT = [text for text in HOSTILE if len(text) < 1000]  # for what is seen by any of them


def test_there_are_twenty_and_each_does_harm_somewhere():
    assert len(HOSTILE) == len(set(HOSTILE)) == 20
    for text in HOSTILE:
        raw = sum(Elements([text]).count.values())
        role = any(role in text for role in ROLES)
        assert (
            raw or role or not text.isprintable() or text[0] in "=@" or "](" in text or "&#" in text
        ), text


# --------------------------------------------------------------------------------------- rendering


def as_it_is(text, quote=True):
    return text


@pytest.mark.parametrize("name", SURFACES)
def test_no_text_becomes_markup(name):
    more, there = markup(SURFACES[name], HOSTILE)
    assert more == 0 and there


@pytest.mark.parametrize(
    ("name", "plant"),
    [
        ("figures", lambda patch: patch.setattr(labels, "escape", as_it_is)),
        (
            "saved figure",
            lambda patch: (
                patch.setattr(labels, "escape", as_it_is),
                patch.setattr("plotly.io._json._safe", lambda text, swap: text),
            ),
        ),
        ("explorer", lambda patch: patch.setattr("analysis_lib.widgets.explorer.escape", str)),
        ("inspector", lambda patch: patch.setattr(labels, "escape", as_it_is)),
        ("table", lambda patch: patch.setattr(HTMLFormatter, "_write_cell", write_cell)),
        ("stored outputs", lambda patch: patch.setattr(HTMLFormatter, "_write_cell", write_cell)),
        ("report", lambda patch: patch.setattr(html, "escape", as_it_is)),
    ],
)
def test_the_check_sees_a_surface_that_escapes_nothing(name, plant, monkeypatch):
    plant(monkeypatch)
    assert markup(SURFACES[name], SHORT)[0] > 0


# Every figure, by being there


def test_every_figure_is_found():
    """By a plain search of the sources, which knows nothing of how they are found."""
    folder, name = Path(figures.__file__).parent, Path(figures.__file__).stem
    sources = [folder / f"{name}.py"] if name != "__init__" else folder.glob("*.py")
    text = "".join(path.read_text(encoding="utf-8") for path in sources)
    assert [*samples.plot_functions()] == sorted(re.findall(r"^def (plot_\w+)", text, re.MULTILINE))


def test_every_figure_shows_texts_and_every_argument_that_takes_one_gets_one():
    shown = storable(SHORT)
    for name, plot in samples.plot_functions().items():
        ((bare, full),) = samples.both(shown, {name: plot})
        title, note = str(full.layout.title.text), str(full.layout.annotations)
        assert texts_in(bare) and figures.text(shown[0]) in title, name
        assert figures.text(shown[1])[:20] in title + note, name


def texts_in(figure):
    return "zq7" in figure.to_json()


def planted(table, *, caption: str = "", title: str = "A new one"):
    made = figures.plot_separation(table, title=title)
    return made.add_annotation(text=caption)


def test_a_new_figure_is_covered_by_being_there(monkeypatch):
    monkeypatch.setattr(figures, "plot_planted", planted, raising=False)
    assert "plot_planted" in samples.plot_functions()
    assert markup(SURFACES["figures"], SHORT)[0] > 0  # its caption is not escaped


@pytest.mark.parametrize(
    ("plot", "message"),
    [
        (lambda graph: None, "plot_new asks for graph, for which faults/samples.py has no sample"),
        (lambda table: table["colour"], "plot_new takes no sample.*`tables`.*KeyError.'colour'"),
    ],
    ids=["argument", "column"],
)
def test_a_figure_without_a_sample_is_told_of(plot, message, monkeypatch):
    monkeypatch.setattr(figures, "plot_new", plot, raising=False)
    with pytest.raises(samples.NoSample, match=message):
        markup(SURFACES["figures"], SHORT)


def write_cell(self, s, kind="td", indent=0, tags=None):
    self.write(f"<{kind}>{s}</{kind}>", indent)


def test_markup_in_a_stored_table_is_dropped_by_the_report(monkeypatch):
    """Someone else's notebook may hold any HTML; the report keeps harmless elements of it alone."""
    monkeypatch.setattr(HTMLFormatter, "_write_cell", write_cell)
    (page,) = SURFACES["report"](HOSTILE)
    (plain,) = SURFACES["report"]([f"plain {i}" for i in range(20)])
    more = Elements([page]).count
    more.subtract(Elements([plain]).count)
    added = [element for element, n in more.items() if n > 0 and isinstance(element, tuple)]
    assert added and {tag for tag, *_ in added} <= {"a", "b", "i"}
    links = [value for _, *attributes in added for name, value in attributes]
    assert all(value.startswith("https://") for value in links)


# -------------------------------------------------------------------------------------------- chat


@pytest.mark.parametrize("name", ["organism", *FAMILIES])
def test_no_query_opens_a_role(name):
    model = ChatModel.load() if name == "organism" else chat(name)
    assert roles(model, HOSTILE) == (0, 0)


def test_the_check_sees_a_template_that_takes_queries_as_they_are(monkeypatch):
    monkeypatch.setattr(Renderer, "escape", lambda self, text, what: text)
    opened = [
        roles(chat(family), HOSTILE) for family in ("qwen2", "llama", "gemma2", "phi3", "gpt_neox")
    ]
    assert all(found >= 1 for found, _ in opened) and any(unsaid for _, unsaid in opened)


# ------------------------------------------------------------------------------------------- files


def test_hostile_files_are_tables_or_refused(tmp_path):
    outcome = hostile_files(tmp_path)
    assert outcome["survived"] == outcome["tried"] == 80, outcome
    assert outcome["note"].split()[0] != "0" and " 0 refused" not in outcome["note"]


# ------------------------------------------------------------------------------------ repositories

HUB = """
import sys
from analysis_lib.model.chat import ChatModel
from analysis_lib.model.errors import ChatModelError
for name in sys.argv[1:]:
    try:
        model = ChatModel.load(name)
        assert model.revision == "a" * 40, model.revision
        model.model
        print("loaded")
    except ChatModelError as error:
        print(str(error).splitlines()[0])
"""


class Hub(http.server.BaseHTTPRequestHandler):
    """A hub with the embedded model's files.

    As they are, pickled only, with code of its own, without a template, or gated.
    """

    repositories: ClassVar[dict[str, dict[str, bytes]]] = {}

    def do_GET(self):
        path = self.path.partition("?")[0].lstrip("/")
        asked = path.removeprefix("api/models/")
        name, file = (
            "/".join(asked.split("/")[:2]),
            path.partition("/resolve/")[2].partition("/")[2],
        )
        files = self.repositories.get(name)
        if name == "org/gated" or files is None:
            self.answer(
                401, b"", {"X-Error-Code": "GatedRepo" if name == "org/gated" else "RepoNotFound"}
            )
        elif "/tree/" in path:
            self.answer(
                200,
                json.dumps(
                    [
                        {"type": "file", "path": path, "size": len(files[path]), "oid": "0"}
                        for path in files
                    ]
                ).encode(),
                {},
            )
        elif path == f"api/models/{name}":
            siblings = [{"rfilename": path} for path in files]
            self.answer(
                200, json.dumps({"id": name, "sha": "a" * 40, "siblings": siblings}).encode(), {}
            )
        elif file in files:
            self.answer(
                200, files[file], {"ETag": f'"{hash(files[file])}"', "X-Repo-Commit": "a" * 40}
            )
        else:
            self.answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": "a" * 40})

    do_HEAD = do_GET

    def answer(self, status, content, headers):
        self.send_response(status)
        for header, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(header, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *args):
        pass


def test_repositories_of_the_hub_that_cannot_be_used_are_told_in_one_line(tmp_path):
    folder = ROOT / "organism"
    whole = {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if path.suffix in (".json", ".jinja", ".safetensors")
    }
    pickled = {k: v for k, v in whole.items() if not k.endswith(".safetensors")} | {
        "pytorch_model.bin": pickle.dumps({})
    }
    config = json.loads(whole["config.json"]) | {
        "model_type": "own",
        "auto_map": {"AutoConfig": "own.Own"},
    }
    ran = f"import pathlib; pathlib.Path({str(tmp_path / 'ran')!r}).touch()".encode()
    code = whole | {"config.json": json.dumps(config).encode(), "own.py": ran}
    bare = {k: v for k, v in whole.items() if not k.endswith(".jinja")}
    settings = json.loads(bare["tokenizer_config.json"])
    settings.pop("chat_template", None)
    bare["tokenizer_config.json"] = json.dumps(settings).encode()
    Hub.repositories = {
        "org/whole": whole,
        "org/pickled": pickled,
        "org/code": code,
        "org/bare": bare,
        "org/lora": {"adapter_config.json": b'{"peft_type": "LORA"}', "adapter.bin": b""},
        "org/some-GGUF": {"some-Q4_K_M.gguf": b"GGUF"},
        "org/empty": {"README.md": b""},
    }
    expected = {
        "org/whole": "loaded",
        "org/pickled": "offers no safetensors weights; pickled weights can run code on load and "
        "are not read",
        "org/code": "needs its own Python code, which is never run",
        "org/bare": "no chat template in 'org/bare'",
        "org/lora": "'org/lora' holds an adapter alone (LORA), not the model",
        "org/some-GGUF": "holds GGUF files, quantized for llama.cpp",
        "org/empty": "holds no config.json, so it is no model",
        "org/gated": "is gated or private; accept its terms on its page and log in with "
        "`hf auth login`",
        "org/unknown": "is no model of the hub and no folder; check the spelling",
    }
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        place = {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_OFFLINE": "0",
        }
        env = {**os.environ, **place, "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
        done = subprocess.run(
            [sys.executable, "-c", HUB, *expected],
            env=env,
            capture_output=True,
            text=True,
            timeout=300,
        )
        server.shutdown()
    lines = done.stdout.splitlines()
    assert len(lines) == len(expected), done.stderr[-2000:]
    assert [
        words for line, words in zip(lines, expected.values(), strict=True) if words not in line
    ] == [], done.stderr
    assert not (tmp_path / "ran").exists()
