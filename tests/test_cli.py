"""The command line: exit codes, and messages that say what to do in one line."""

from __future__ import annotations

import builtins
import functools
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from analysis_lib import __main__ as cli
from analysis_lib.data.shipped import ROOT
from analysis_lib.store import upkeep
from analysis_lib.store.batches import row_key
from analysis_lib.store.store import Store


def run(*arguments):
    """In a process of its own, as a user has it."""
    return subprocess.run(
        [sys.executable, "-m", "analysis_lib", *arguments], capture_output=True, text=True
    )


@pytest.fixture
def call(capsys):
    """Exit code, output and error output of a command in this process."""

    def called(*arguments):
        try:
            code = cli.main([str(a) for a in arguments])
        except SystemExit as exit:
            code = exit.code
        out = capsys.readouterr()
        return code, out.out, out.err

    return called


@pytest.fixture
def store(tmp_path):
    """Three files: two of model aaa (one of them 40 days old), one of model bbb."""
    store = Store(tmp_path / "store")
    for i, model in enumerate(["aaa", "aaa", "bbb"]):
        states = np.full((4, 8), i, dtype=np.float32)
        keys = [row_key(model=model, row=row, i=i) for row in range(4)]
        store.write_states(
            keys,
            states,
            dtype="float32",
            about={"model": model * 20, "model_name": model, "prompts": ["none"], "layer": -1},
        )
    first = min(files(store), key=lambda path: path.stat().st_mtime_ns)
    os.utime(first, (time.time() - 40 * 86400,) * 2)
    return store


def files(store):
    return sorted((store.folder / "v1" / "states").iterdir())


def fails(result, *words, code=2):
    """A one-line message with these words, no traceback, and nothing on standard output."""
    status, out, err = result
    assert status == code and out == ""
    assert "Traceback" not in err and len(err.strip().splitlines()) == 1
    for word in words:
        assert word in err


def refused(result, *words):
    """argparse's way: the usage, then one line with the words; exit status 2."""
    status, out, err = result
    assert status == 2 and out == "" and err.startswith("usage: ")
    for word in words:
        assert word in err.splitlines()[-1]


# Help and arguments


def test_help_has_examples_that_parse():
    done = run("--help")
    assert done.returncode == 0 and not done.stderr
    for command in ("reproduce", "export", "cache", "organism", "download"):
        assert command in done.stdout
    _, _, examples = done.stdout.partition("examples:\n")
    lines = [line.split() for line in examples.splitlines() if line.strip()]
    assert len(lines) >= 4
    for line in lines:
        assert line[:3] == ["python", "-m", "analysis_lib"]
        assert cli._parser().parse_args(line[3:]).command == line[3]


@pytest.mark.parametrize(
    "command",
    ["reproduce", "export", "cache", "organism", "download", "cache prune", "organism train"],
)
def test_every_command_has_help(call, command):
    code, out, _ = call(*command.split(), "--help")
    assert code == 0 and out.startswith(f"usage: python -m analysis_lib {command}")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("", ["required: command"]),
        ("cash", ["invalid choice: 'cash'"]),
        ("cache", ["required: action"]),
        ("cache list", ["invalid choice: 'list'"]),
        (
            "cache prune",
            ["say what to prune", "--older-than", "--max-bytes", "--model"],
        ),
        ("cache prune --dry-run", ["say what to prune"]),
        (
            "cache prune --older-than soon",
            ["--older-than", "'soon' is not an age; write 45m, 12h, 30d or 4w"],
        ),
        (
            "cache prune --max-bytes much",
            ["--max-bytes", "'much' is not a size; write 500MB or 2GB"],
        ),
        ("cache prune --older-formats", ["unrecognized arguments: --older-formats"]),
        ("cache prune --model=", ["--model", "the model's name is empty"]),
        (
            "cache compact --dry-run",
            ["unrecognized arguments: --dry-run"],
        ),  # compact has no dry run, and must not run then
        ("organism", ["required: action"]),
        ("organism card --out x", ["unrecognized arguments: --out x"]),
        ("reproduce --jobs 0", ["--jobs", "'0' is no number of notebooks; write 1 or more"]),
        ("reproduce --jobs two", ["--jobs", "write 1 or more"]),
        ("reproduce --form onnx", ["--form", "invalid choice: 'onnx'"]),
        ("export", ["required: SOFT_PROMPT, --out"]),
    ],
)
def test_wrong_arguments(call, arguments, words):
    refused(call(*arguments.split()), *words)


# cache


def test_cache_ls(call, store):
    code, out, err = call("cache", "ls", "--store", store.folder)
    assert (code, err) == (0, "")
    header, *lines = out.splitlines()
    assert {"kind", "model_name", "rows", "files"} <= set(header.split()) and len(lines) == 2
    assert "aaa" in lines[0] and " 8 " in lines[0] and "bbb" in lines[1] and " 4 " in lines[1]


def test_cache_info(call, store):
    code, out, _ = call("cache", "info", "--store", store.folder)
    shown = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert code == 0
    assert (shown["states_rows"], shown["states_files"], shown["format"]) == ("12", "3", "1")
    assert shown["folder"] == str(store.folder)


def test_cache_of_an_empty_store(call, tmp_path):
    (tmp_path / "new").mkdir()
    for action in ("ls", "verify", "compact"):
        code, out, _ = call("cache", action, "--store", tmp_path / "new")
        assert code == 0 and f"{action}: nothing to report in {tmp_path / 'new'}" in out
    assert list((tmp_path / "new").iterdir()) == []


def test_cache_of_a_store_that_is_not_there(call, tmp_path):
    for action in ("ls", "info", "verify", "compact", "prune --max-bytes 0"):
        fails(
            call("cache", *action.split(), "--store", tmp_path / "stroe"),
            "there is no store at",
            "stroe; check the path",
        )
    assert not (tmp_path / "stroe").exists()


def test_names_in_a_store_do_not_steer_the_terminal(call, tmp_path):
    about = {"model": "m", "model_name": "\x1b[2J\x9bgone\u202e", "prompts": ["\x1b]0;title\x07"]}
    Store(tmp_path).write_responses(
        [row_key(row=1)], [{"response": "r", "end": "eos"}], about=about
    )
    for action in (["ls"], ["info"], ["prune", "--model", "nope"]):
        code, out, err = call("cache", *action, "--store", tmp_path)
        assert not set(out + err) & set("\x1b\x9b\u202e\x07")
    assert "\\u001b[2J\\u009bgone\\u202e" in out + err


def test_a_warning_is_told_without_the_line_of_code_it_comes_from(call, store):
    (path, *_) = files(store)
    path.write_bytes(path.read_bytes()[:-3])
    code, out, err = call("cache", "ls", "--store", store.folder)
    assert code == 0 and "store.py" not in err and "_warn(" not in err
    content = path.read_bytes()
    path.write_bytes(b"x" + content[1:])
    code, out, err = call("cache", "ls", "--store", store.folder)
    assert err.startswith(f"StoreDamage: {path}: ") and len(err.splitlines()) == 1


def test_cache_uses_the_environment_variable(call, store, monkeypatch):
    monkeypatch.setenv("ANALYSIS_LIB_STORE", str(store.folder))
    assert str(store.folder) in call("cache", "info")[1]


def test_cache_verify_finds_damage(call, store):
    code, out, _ = call("cache", "verify", "--store", store.folder)
    assert code == 0 and out.count(" ok ") == 3
    damaged = files(store)[1]
    content = bytearray(damaged.read_bytes())
    content[-3] ^= 1
    damaged.write_bytes(content)
    code, out, _ = call("cache", "verify", "--store", store.folder)
    assert code == 1
    line = next(line for line in out.splitlines() if damaged.name in line)
    assert "rows fail their checksum" in line and out.count(" ok ") == 2


def test_cache_verify_hashes_weights_anew(call, store, tmp_path, monkeypatch):
    from analysis_lib import ChatModel
    from analysis_lib.model import fingerprint

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(fingerprint, "_memo", lambda path: tmp_path / path.name)
    model = ChatModel.load()
    args = ("cache", "verify", "--weights", "organism", "--store", store.folder)
    first = model.fingerprint
    code, out, _ = call(*args)
    assert code == 0 and out.count("weights") >= 2 and out.count(" ok ") == 5
    (tmp_path / "model.safetensors").write_text("0" * 64)
    assert ChatModel.load().fingerprint != first
    code, out, _ = call(*args)
    assert code == 1 and out.count("content changed, size and times did not") == 1
    assert call(*args)[0] == 0 and ChatModel.load().fingerprint == first
    code, _, err = call(*args[:3], "org/model")
    assert code == 2 and "give a folder" in err


def test_cache_compact_drops_damage(call, store):
    damaged = files(store)[1]
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x07")
    assert call("cache", "compact", "--now", "--store", store.folder)[0] == 0
    assert len(files(store)) == 2
    assert call("cache", "verify", "--store", store.folder)[0] == 0


def test_cache_prune_dry_run_removes_nothing(call, store):
    before = files(store)
    code, out, _ = call(
        "cache", "prune", "--older-than", "30d", "--dry-run", "--store", store.folder
    )
    assert code == 0 and out.count("would remove") == 1 and files(store) == before
    code, out, _ = call("cache", "prune", "--older-than", "30d", "--store", store.folder)
    assert code == 0 and " removed" in out and len(files(store)) == 2
    assert call("cache", "prune", "--older-than", "30d", "--store", store.folder)[1].startswith(
        "prune: nothing to report"
    )


@pytest.mark.parametrize(
    ("options", "left"),
    [
        (["--now", "--older-than", "5w"], 2),
        (["--now", "--older-than", "6w"], 3),
        (["--now", "--older-than", "0"], 0),
        (["--now", "--model", "aaa"], 1),
        (["--now", "--model", "aaa", "--older-than", "24h"], 2),
        (["--now", "--max-bytes", "0"], 0),
        (["--now", "--max-bytes", "1GB"], 3),
        (["--now", "--max-bytes", "one and a half"], 1),
        (["--older-than", "0"], 2),
        (["--model", "aaa"], 2),
        (["--max-bytes", "0"], 2),
    ],
)
def test_cache_prune(call, store, options, left):
    sizes = [path.stat().st_size for path in files(store)]
    options = [
        str(int(1.5 * max(sizes))) if option == "one and a half" else option for option in options
    ]
    assert max(sizes) < 1.1 * min(sizes)
    assert call("cache", "prune", *options, "--store", store.folder)[0] == 0
    assert len(files(store)) == left


def test_cache_says_what_is_younger_than_a_day_and_how_to_take_it_as_well(call, store):
    told = "files younger than a day stay; --now takes them too, when nothing else uses the store"
    code, out, _ = call("cache", "prune", "--max-bytes", "0", "--store", store.folder)
    *table, last = out.splitlines()
    assert code == 0 and last == told
    assert [line.count("kept: younger than a day") for line in table[1:]] == [0, 1, 1]
    code, out, _ = call("cache", "compact", "--store", store.folder)
    assert code == 0 and out.splitlines()[-1] == told and len(files(store)) == 2
    assert (
        told not in call("cache", "prune", "--now", "--max-bytes", "0", "--store", store.folder)[1]
    )
    assert not files(store)
    for action in ("prune", "compact"):
        page = " ".join(call("cache", action, "--help")[1].split())
        assert (
            "files younger than a day stay" in page
            and "--now also files younger than a day" in page
        )


@pytest.mark.parametrize("more", [[], ["--dry-run"], ["--older-than", "0"]])
def test_cache_prune_of_a_model_that_is_not_there(call, store, more):
    result = call("cache", "prune", "--model", "ccc", *more, "--store", store.folder)
    fails(result, "StoreError", "nothing of a model 'ccc'; it has aaa, bbb")
    assert len(files(store)) == 3
    # A model that is there, and no file of it as old as asked, is no mistake.
    assert (
        call("cache", "prune", "--model", "bbb", "--older-than", "24h", "--store", store.folder)[0]
        == 0
    )


def test_cache_where_the_store_is_a_file(call, tmp_path):
    (tmp_path / "v1").mkdir()
    (tmp_path / "v1" / "states").write_text("")
    fails(
        call("cache", "ls", "--store", tmp_path),
        "StoreError",
        "choose another folder with --store or ANALYSIS_LIB_STORE",
    )


# reproduce


@pytest.fixture
def no_notebooks(monkeypatch):
    """Inputs are checked before any notebook starts."""
    from analysis_lib.report import run_notebooks as notebooks

    monkeypatch.setattr(
        notebooks, "run_notebooks", lambda *a, **k: pytest.fail("the notebooks were started")
    )


def test_reproduce_in_its_own_process_with_a_missing_prompt(tmp_path):
    done = run("reproduce", "--prompt", str(tmp_path / "mine.txt"), "--out", str(tmp_path / "out"))
    fails(
        (done.returncode, done.stdout, done.stderr), "mine.txt", "cannot be read", "check the path"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (
            "a.csv",
            "text,harmful\nHow to bake bread?,perhaps\n",
            ["a.csv, line 2, column 'harmful': 'perhaps'; write true, false"],
        ),
        ("a.csv", "query,harmful\nHow?,true\n", ["line 1: no column 'text'"]),
        ("a.jsonl", '{"text": "How?"}\n{"text": \n', ["a.jsonl, line 2: not valid JSON"]),
        ("a.txt", "\n\n", ["no query in it; write at least one"]),
        ("a.xlsx", "x", ["ends in .csv, .jsonl or .txt; save it as one of these"]),
    ],
)
def test_reproduce_with_broken_queries(call, no_notebooks, tmp_path, name, content, words):
    (tmp_path / name).write_text(content, encoding="utf-8")
    fails(call("reproduce", "--queries", tmp_path / name), "DataError", *words)


def test_reproduce_with_missing_queries(call, no_notebooks, tmp_path):
    fails(call("reproduce", "--queries", tmp_path / "a.csv"), "a.csv", "check the path")
    fails(call("reproduce", "--queries", "ancor"), "no query set 'ancor'; sets: anchor")


def test_reproduce_with_a_blank_prompt(call, no_notebooks, tmp_path):
    (tmp_path / "mine.txt").write_text(" \n")
    fails(call("reproduce", "--prompt", tmp_path / "mine.txt"), "'mine' has no text; write one")


def test_reproduce_with_an_unknown_model(call, no_notebooks, tmp_path):
    fails(
        call("reproduce", "--model", tmp_path / "model"),
        "there is no folder",
        "give 'organism', an existing model folder or a hub id",
    )
    (tmp_path / "model").mkdir()
    fails(
        call("reproduce", "--model", tmp_path / "model"), "holds no config.json", "save_pretrained"
    )
    (tmp_path / "model" / "config.json").write_text("{}")
    fails(
        call("reproduce", "--model", tmp_path / "model"),
        "holds no *.safetensors",
        "safe_serialization=True",
    )


def test_reproduce_hands_on_what_it_was_given(call, monkeypatch, tmp_path):
    from analysis_lib.report import reproduce as room

    (tmp_path / "p.txt").write_text("Be careful.")
    (tmp_path / "q.csv").write_text(
        "text,harmful\n"
        + "".join(f"How to bake bread {i}?,false\nHow to rob bank {i}?,true\n" for i in range(5))
    )
    given = {}
    monkeypatch.setattr(
        room,
        "reproduce",
        lambda model, out, **options: given.update(options, model=model.name, out=out) or True,
    )
    files = [
        "--prompt",
        tmp_path / "p.txt",
        "--queries",
        tmp_path / "q.csv",
        "--out",
        tmp_path / "o",
    ]
    assert call("reproduce", *files, "--jobs", 1, "--form", "vllm", "--to", "safetensors")[0] == 0
    assert given == {
        "model": "organism",
        "prompt": tmp_path / "p.txt",
        "queries": str(tmp_path / "q.csv"),
        "heldout": None,
        "guard": None,
        "template": None,
        "forms": ["vllm", "plain"],
        "out": tmp_path / "o",
        "jobs": 1,
    }
    assert call("reproduce", "--thinking", "off", "--out", tmp_path / "o")[0] == 2  # no switch
    call("reproduce", "--template", "vicuna")
    assert (given["template"], given["forms"], given["jobs"]) == ("vicuna", None, 2)
    monkeypatch.setenv("ANALYSIS_LIB_STORE", "replaced")
    monkeypatch.chdir(tmp_path)
    call(
        "reproduce",
        "--heldout",
        tmp_path / "q.csv",
        "--heldout",
        "borderline",
        "--guard",
        "organism",
        "--store",
        "kept",
    )
    assert (given["heldout"], given["guard"]) == (
        [str(tmp_path / "q.csv"), "borderline"],
        "organism",
    )
    assert os.environ["ANALYSIS_LIB_STORE"] == str(tmp_path / "kept")


def test_reproduce_asks_for_sets_and_a_guard_that_are_there(call, no_notebooks, tmp_path):
    fails(call("reproduce", "--heldout", "advbench"), "advbench", "python -m analysis_lib download")
    fails(call("reproduce", "--heldout", "borderlin"), "no query set 'borderlin'")
    for more in ([], ["--dry-run"]):
        twice = call("reproduce", "--heldout", "borderline", "--heldout", "borderline", *more)
        fails(twice, "occurs twice in the held-out sets", "name each set once")
    refused(call("reproduce", "--store="), "--store", "the store's folder has no name")
    fails(call("reproduce", "--guard", tmp_path / "guard"), "there is no folder")
    guard = shutil.copytree(ROOT / "organism", tmp_path / "guard")
    (guard / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    fails(call("reproduce", "--guard", guard), "drops the query or the response; it cannot judge")


NOTEBOOK = [
    "MODEL = 'organism'\nPROMPT = None\nTEMPLATE = None\nOUT = '../reports'",
    "from pathlib import Path\nfrom analysis_lib import ChatModel, SoftPrompt, Store, hidden_states, load_queries\n"
    "model = ChatModel.load(MODEL, template=TEMPLATE)\n"
    "SoftPrompt.from_text(model, Path(PROMPT).read_text(), name='dro').save(Path(OUT) / 'soft_prompts' / 'dro_mine.safetensors')",
    "print(hidden_states(model, load_queries('anchor').head(4), {'none': ''}, store=Store()).certificate['computed'], 'computed')",
    "import plotly.graph_objects as go\ngo.Figure(go.Scatter(x=[1, 2], y=[3, 4]))",
    "tables = Path(OUT) / 'tables'\ntables.mkdir(exist_ok=True)\n(tables / 'mine.csv').write_text('a,b\\n1,2\\n')",
]


@pytest.fixture
def one_notebook(tmp_path, monkeypatch):
    """`reproduce` runs one small notebook in place of the project's; returns its folder."""
    import nbformat

    from analysis_lib.report import run_notebooks as room

    cells = [nbformat.v4.new_code_cell(source) for source in NOTEBOOK]
    cells[0].metadata["tags"] = ["parameters"]
    folder = tmp_path / "notebooks"
    folder.mkdir()
    nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / "00_small.ipynb")
    monkeypatch.setattr(room, "run_notebooks", functools.partial(room.run_notebooks, folder=folder))
    monkeypatch.setenv("ANALYSIS_LIB_STORE", str(tmp_path / "store"))
    return folder


def test_reproduce_leaves_a_folder(call, one_notebook, tmp_path):
    from analysis_lib import ChatModel

    (tmp_path / "mine.txt").write_text("You are a careful assistant.")
    out = tmp_path / "out"
    stale = out / "soft_prompts" / "dro_old.safetensors"
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"an earlier run's, perhaps of another model")
    (out / "tables").mkdir()
    (out / "tables" / "old.csv").write_text("an earlier run's")
    options = ["--template", "vicuna", "--form", "peft", "--form", "vllm", "--out", out]
    command = ["reproduce", "--prompt", tmp_path / "mine.txt", *options]
    code, shown, err = call(*command)
    assert code == 0, shown + err
    written = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert written >= {
        "00_small.ipynb", "report.html", "summary.json", "tables/mine.csv", "tables/dro_mine_history.csv",
        "figures/00_small-1.html", "figures/plotly.min.js", "soft_prompts/dro_mine.safetensors",
        "exports/dro_mine/peft/README.md", "exports/dro_mine/vllm/request.json",
    }  # fmt: skip
    assert (
        "plotly.min.js" in (out / "figures" / "00_small-1.html").read_text()
        and not (out / "exports" / "dro_mine" / "plain").exists()
    )
    if not any(
        line.startswith("No .svg figures") for line in shown.splitlines()
    ):  # no browser to draw them
        assert (out / "figures" / "00_small-1.svg").read_text().startswith("<svg")

    summary = json.loads((out / "summary.json").read_text())
    model = ChatModel.load(template="vicuna")
    assert {**model.about(), "device": "cpu"} == summary["model"] and summary["model"][
        "template"
    ] == "vicuna"
    assert (
        summary["versions"]["torch"] == torch.__version__.partition("+")[0]
        or summary["versions"]["torch"] == torch.__version__
    )
    assert summary["prompt"] == {"file": "mine.txt", "text": "You are a careful assistant."}
    (certificate,) = summary["certificates"]
    assert certificate["checked"] and certificate["max_rel"] < 1e-6
    soft = summary["soft_prompts"]["dro_mine"]
    assert soft["sha256"] == hashlib.sha256((out / soft["file"]).read_bytes()).hexdigest()
    assert (
        soft["exports"] == {form: f"exports/dro_mine/{form}" for form in ("peft", "vllm")}
        and "dro_old" not in summary["soft_prompts"]
    )
    assert summary["notebooks"][0]["error"] is None and summary["tables"] == [
        "tables/dro_mine_history.csv",
        "tables/mine.csv",
    ]

    assert "4 computed" in (out / "report.html").read_text()
    assert call(*command)[0] == 0  # again: nothing is computed twice
    assert "0 computed" in (out / "report.html").read_text()


def test_reproduce_says_that_a_notebook_failed(call, one_notebook, tmp_path):
    code, shown, _ = call("reproduce", "--out", tmp_path / "out")  # without a prompt file
    assert code == 1 and "FAILED" in shown
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert "TypeError" in summary["notebooks"][0]["error"] and summary["soft_prompts"] == {}


def test_the_notebooks_open_the_model_as_it_was_asked_for(call, one_notebook, tmp_path):
    """In its dtype, so that what a dry run looks for in the store is what the notebooks keep there."""
    from analysis_lib import ChatModel, Store, hidden_states, load_queries

    (tmp_path / "mine.txt").write_text("You are a careful assistant.")
    options = ["--prompt", tmp_path / "mine.txt", "--form", "vllm", "--out", tmp_path / "out"]
    assert call("reproduce", "--dtype", "float16", "--device", "cpu", *options)[0] == 0
    about = json.loads((tmp_path / "out" / "summary.json").read_text())["model"]
    assert (about["dtype"], about["device"]) == ("float16", "cpu")
    for dtype, computed in (("float16", 0), (None, 4)):
        model = ChatModel.load(dtype=dtype)
        found = hidden_states(model, load_queries("anchor").head(4), {"none": ""}, store=Store())
        assert found.certificate["computed"] == computed


def test_a_pinned_revision_reaches_every_command_and_the_notebooks(call, monkeypatch, tmp_path):
    import transformers.utils

    from analysis_lib import ChatModel
    from analysis_lib.report import reproduce as room
    from analysis_lib.report import run_notebooks as notebooks

    asked = []

    def no_hub(source, file, revision=None):
        asked.append((source, revision))
        raise OSError("offline")

    with monkeypatch.context() as patch:
        patch.setattr(transformers.utils, "cached_file", no_hub)
        for command in (
            ["reproduce"],
            ["reproduce", "--dry-run"],
            ["export", tmp_path / "soft.safetensors"],
        ):
            for pinned in (
                ["--model", "org/model", "--revision", "refs/pr/13"],
                ["--model", "org/model@refs/pr/13"],
            ):
                fails(
                    call(*command, *pinned, "--out", tmp_path / "out"),
                    "'org/model@refs/pr/13' is not in the local cache",
                )
                assert asked.pop() == ("org/model", "refs/pr/13")
    fails(
        call("reproduce", "--revision", "v2"),
        "'organism' is no model of the hub, so it has no revision 'v2'",
    )

    given = {}
    monkeypatch.setattr(
        notebooks, "run_notebooks", lambda out, **options: given.update(options) or ()
    )
    model = ChatModel.load(dtype="float32")
    model.name = "org/model@v2"  # as ChatModel.load keeps it
    tmp_path.joinpath("out").mkdir()
    assert room.reproduce(model, tmp_path / "out")
    assert given["model"] == "org/model@v2"
    assert given["env"] == {
        "ANALYSIS_LIB_STORE": os.environ["ANALYSIS_LIB_STORE"]
    }  # float32 is such a model's default here


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--dtype=float12", "unknown dtype 'float12'; give 'float64'"),
        ("--device=gpu9", "torch has no device 'gpu9' here"),
    ],
)
def test_a_dtype_or_device_that_is_not_there(call, no_notebooks, monkeypatch, option, words):
    fails(call("reproduce", option), "ChatModelError", words)
    name, _, value = option.removeprefix("--").partition("=")
    monkeypatch.setenv(f"ANALYSIS_LIB_{name.upper()}", value)
    fails(call("reproduce", "--dry-run"), "ChatModelError", words)


@pytest.mark.parametrize("command", ["reproduce", "export soft.safetensors --out x"])
def test_a_repositorys_own_code_cannot_be_turned_on(call, command):
    refused(
        call(*command.split(), "--trust-remote-code"), "unrecognized arguments: --trust-remote-code"
    )


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("vicuna-7b", "vicuna-7b-v1.5"),
        ("mistral-7b-instruct@main", "Mistral-7B-Instruct-v0.2, Mistral-7B-Instruct-v0.1,"),
        ("organisim", "organism"),
        ("org/vicuna-7b", "vicuna-7b-v1.5"),
        ("openchat/openchat_3.5", ""),  # near nothing of the study's, it is the study's
        ("org/bert-base", ""),
    ],
)
def test_a_name_near_the_studys_is_put_right(call, no_notebooks, name, meant):
    """A bare name is no id of the hub, so that the network is not asked for it."""
    result = call("reproduce", "--model", name)
    said = (
        f"'{name}' is not in the local cache and the hub cannot be reached"
        if "/" in name
        else f"'{name}' is no folder and no model of the study"
    )
    fails(result, said, f"; models with a similar name: {meant}" if meant else "local folder")
    assert ("similar name" in result[2]) == bool(meant)


def test_without_jupyter_and_plotly_the_dry_run_works_and_the_run_says_what_to_install(tmp_path):
    from test_imports import BLOCK, NOTEBOOK_PACKAGES

    queries = tmp_path / "few.csv"
    queries.write_text(
        "text,harmful\n"
        + "".join(f"How to bake bread {i}?,false\nHow to rob bank {i}?,true\n" for i in range(5))
    )
    blocked = f"blocked = {NOTEBOOK_PACKAGES!r}" + BLOCK
    quick = """
import pandas as pd
from analysis_lib.report import reproduce
numbers = {"rows": 8, "found": 0, "tokens": 80, "seconds": 60.0, "memory_bytes": 2e9}
reproduce.estimate = lambda *a, **k: pd.DataFrame([{"step": s, **numbers} for s in ("states", "responses", "DRO")])
"""

    def main(*arguments):
        code = f"{blocked}{quick}from analysis_lib.__main__ import main\nsys.exit(main({[str(a) for a in arguments]!r}))"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        return done.returncode, done.stdout, done.stderr

    command = ["reproduce", "--queries", queries, "--out", tmp_path / "out"]
    code, out, err = main(*command, "--dry-run")
    assert (code, err) == (0, "") and "Would run the notebooks on 'organism'" in out and "8" in out
    fails(
        main(*command),
        "ReproduceError",
        "the notebooks cannot be run here",
        "pip install -e '.[notebooks]'",
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("sent, status", [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_ends_the_whole_run(one_notebook, tmp_path, sent, status):
    """Not one notebook of it: the kernel ends with it, and the next notebook does not start."""
    import nbformat

    cell = nbformat.v4.new_code_cell(
        "import os, time\nopen('started', 'w').write(str(os.getpid()))\ntime.sleep(600)"
    )
    for name in ("00_small", "01_next"):
        nbformat.write(nbformat.v4.new_notebook(cells=[cell]), one_notebook / f"{name}.ipynb")
    code = (
        "import functools, sys; from analysis_lib import __main__ as cli; from analysis_lib.report import run_notebooks as room;"
        f"room.run_notebooks = functools.partial(room.run_notebooks, folder={str(one_notebook)!r});"
        f"sys.exit(cli.main(['reproduce', '--jobs', '1', '--out', {str(tmp_path / 'out')!r}]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    started = one_notebook / "started"
    deadline = time.monotonic() + 120
    while (
        not (started.is_file() and started.read_text())
        and time.monotonic() < deadline
        and process.poll() is None
    ):
        time.sleep(0.1)
    kernel = int(started.read_text())
    process.send_signal(getattr(signal, sent))
    _, err = process.communicate(timeout=60)
    assert process.returncode == status and "the same command goes on from there" in err
    assert (
        "AssertionError" not in err and "/analysis_lib/" not in err
    )  # a kernel may tell its own end
    with pytest.raises(ProcessLookupError):
        os.kill(kernel, 0)
    assert not (tmp_path / "out" / "01_next.ipynb").exists()


def test_figures_are_left_as_html_where_no_browser_is(monkeypatch, tmp_path, capsys):
    import nbformat
    import plotly.graph_objects as go

    from analysis_lib.report import pictures

    class NoBrowser:
        def __enter__(self):
            raise pictures.NotebookError("no Chromium")

        def __exit__(self, *exception): ...

    monkeypatch.setattr(pictures, "Pictures", NoBrowser)
    data = {pictures.PLOTLY_MIME: json.loads(go.Figure(go.Bar(y=[7.25])).to_json())}
    cell = nbformat.v4.new_code_cell(outputs=[nbformat.v4.new_output("display_data", data=data)])
    notebook = {"03_x": nbformat.v4.new_notebook(cells=[cell])}
    assert pictures.write_figures(notebook, tmp_path / "figures") == [
        tmp_path / "figures" / "03_x-1.html"
    ]
    assert "7.25" in (tmp_path / "figures" / "03_x-1.html").read_text()
    assert "No .svg figures: no Chromium" in capsys.readouterr().out


def test_reproduce_says_that_a_form_cannot_be_written(call, one_notebook, monkeypatch, tmp_path):
    """After hours of work: the rest is there, and the summary says what lacks."""
    import nbformat

    from analysis_lib.train import export

    kinds = ("ExportError", "OSError", "RuntimeError")
    notebook = nbformat.read(one_notebook / "00_small.ipynb", as_version=4)
    save = notebook.cells[1].source
    for kind in kinds:
        line = save.splitlines()[-1].replace("'dro'", repr(kind)).replace("dro_mine", kind)
        notebook.cells[1].source += "\n" + line
    nbformat.write(notebook, one_notebook / "00_small.ipynb")

    def refuses(soft, *arguments):
        raise getattr(export, soft.name, getattr(builtins, soft.name, None))("no space left")

    written = export.FORMS["plain"]

    def write(soft, *arguments):
        return (refuses if soft.name in kinds else written)(soft, *arguments)

    monkeypatch.setitem(export.FORMS, "plain", write)
    (tmp_path / "mine.txt").write_text("You are a careful assistant.")
    code, shown, _ = call(
        "reproduce", "--prompt", tmp_path / "mine.txt", "--form", "plain", "--out", tmp_path / "out"
    )
    soft = json.loads((tmp_path / "out" / "summary.json").read_text())["soft_prompts"]
    assert code == 1 and len(soft) == len(kinds) + 1
    assert soft["dro_mine"]["error"] is None and list(soft["dro_mine"]["exports"]) == ["plain"]
    for kind in kinds:
        assert f"Not exported: {kind}: {kind}: no space left" in shown
        found = soft[kind]
        assert (found["error"], found["exports"]) == (f"{kind}: no space left", {})
        assert len(found["sha256"]) == 64


def test_output_shows_names_on_any_terminal(tmp_path):
    """On one that knows ASCII alone, and with names that would steer it."""
    folder = tmp_path / "caf\u00e9 \x1b[31mred"
    env = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    ran = subprocess.run(
        [sys.executable, "-m", "analysis_lib", "cache", "ls", "--store", str(folder)],
        env=env, capture_output=True, timeout=120,
    )  # fmt: skip
    told = ran.stderr.decode("ascii")
    assert ran.returncode == 2 and "caf\\xe9 \\u001b[31mred; check the path" in told
    folder.mkdir()
    command = [sys.executable, "-m", "analysis_lib", "cache", "ls", "--store", str(folder)]
    ran = subprocess.run(command, env=env, capture_output=True, timeout=120)
    assert (ran.returncode, ran.stderr) == (0, b"")
    assert "nothing to report in" in ran.stdout.decode("ascii")
    assert b"\x1b" not in ran.stdout and b"caf\\xe9 \\u001b[31mred" in ran.stdout


def test_reproduce_dry_run_runs_nothing(call, no_notebooks, monkeypatch, tmp_path):
    from analysis_lib import ChatModel
    from analysis_lib.report import reproduce as room

    asked = []

    def cost(model, queries, prompts, *, layers=(-1,), sampling, tuning=None, store):
        asked.append((len(queries), list(prompts), layers, sampling["n_samples"]))
        steps = [
            "states",
            "responses",
            *(["DRO"] if "harmful" in queries else []),
            *(["prompt tuning"] if tuning else []),
        ]
        numbers = {"rows": 8, "found": 0, "tokens": 80, "seconds": 60.0, "memory_bytes": 2e9}
        return pd.DataFrame([{"step": step, **numbers} for step in steps])

    monkeypatch.setattr(room, "estimate", cost)
    (tmp_path / "mine.txt").write_text("Be careful.")
    code, out, _ = call(
        "reproduce", "--dry-run", "--prompt", tmp_path / "mine.txt", "--out", tmp_path / "out"
    )
    assert (
        code == 0
        and "'organism' (float64 on cpu), prompts into the system message" in out
        and "About 9.3 minutes" in out
    )  # 4 for the anchor queries, 2 for those held out, 1 for the ablations' responses, 7 x 10 / 40 + 3 / 5 for their trainings
    assert "Not counted: wrapped queries, trials of a weight" in out and "consoles" in out
    assert [line.split()[:-4] for line in out.splitlines() if line.split()[0] == "ablations"] == [
        ["ablations", "responses", "8"],
        ["ablations", "DRO", "14"],
        ["ablations", "prompt", "tuning", "4"],
    ]
    n_layers = ChatModel.load().n_layers
    assert asked[0] == (
        200,
        ["mine", "none", "default", "short", "mistral"],
        (*range(n_layers + 1), -1),
        20,
    )
    assert asked[1][:2] == (
        340,
        ["none", "default", "short", "mistral", "mine", "trained 1", "trained 2"],
    )
    assert asked[2] == (50, [f"trained {i}" for i in range(1, 9)], (-1,), 5)
    assert not (tmp_path / "out").exists()


def test_the_dry_run_counts_what_notebook_09_trains(monkeypatch):
    """The rows, steps, queries and samples of its stored outputs are those that its parameters declare."""
    import nbformat

    from analysis_lib import ChatModel, DROConfig, PromptTuningConfig, Store, load_queries
    from analysis_lib.report import reproduce as room
    from analysis_lib.report.run_notebooks import FOLDER

    (path,) = FOLDER.glob("09_*.ipynb")
    declared = room.parameters_of(path)
    assert set(room.DECLARED) <= set(declared) and declared["FULL"] is False
    asked = {}

    def cost(model, queries, prompts, *, sampling, store):
        asked.update(queries=queries, prompts=prompts, sampling=sampling)
        return pd.DataFrame({"step": ["states", "responses"], "rows": 1, "tokens": 1, "seconds": 1})

    monkeypatch.setattr(room, "estimate", cost)
    steps = {"DRO": DROConfig().epochs * 4, "prompt tuning": PromptTuningConfig().epochs * 20}
    whole = pd.DataFrame({"step": steps.keys(), "rows": steps.values(), "tokens": 1, "seconds": 1})
    model = ChatModel.load()
    counted = room.cost_of_rows(model, "Be careful.", declared, whole, Store())
    counted = counted.set_index("step")["rows"]

    cells = nbformat.read(path, as_version=4).cells
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    texts = [output.get("data", {}).get("text/plain", "") for output in outputs]
    (trained,) = ([line.split() for line in t.splitlines()[1:]] for t in texts if " steps\n" in t)
    (tried,) = ([line.split() for line in t.splitlines()[1:]] for t in texts if "weight " in t[:9])
    of_dro = [int(line[-1]) for line in trained if line[1].startswith("dro")]
    (tuned,) = (int(line[-1]) for line in trained if not line[1].startswith("dro"))
    assert len(asked["prompts"]) == len(trained) == 1 + len(of_dro)
    assert counted["DRO"] == sum(of_dro)
    assert counted["prompt tuning"] == tuned * (1 + len(tried))
    assert [float(line[1]) for line in tried] == list(declared["WEIGHTS"])
    expected = load_queries("heldout_forms").iloc[:: declared["EVERY"]]
    assert asked["queries"]["query_id"].tolist() == expected["query_id"].tolist()
    assert asked["sampling"]["n_samples"] == declared["N_SAMPLES"]


def test_a_new_notebook_that_trains_rows_is_counted_by_being_there(tmp_path):
    import nbformat

    from analysis_lib.report import reproduce as room

    source = "\n".join(f"{name} = ({i},)  # a comment" for i, name in enumerate(room.DECLARED))
    cells = [
        nbformat.v4.new_code_cell("EVERY = 1"),
        nbformat.v4.new_code_cell(source, metadata={"tags": ["parameters"]}),
    ]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "10_more.ipynb")
    nbformat.write(nbformat.v4.new_notebook(cells=cells[:1]), tmp_path / "11_none.ipynb")
    declared = room.parameters_of(tmp_path / "10_more.ipynb")
    assert declared == {name: (i,) for i, name in enumerate(room.DECLARED)}
    assert room.parameters_of(tmp_path / "11_none.ipynb") == {}


# export


def test_export(call, tmp_path):
    from analysis_lib import ChatModel, SoftPrompt

    SoftPrompt.from_text(ChatModel.load(), "You are careful.", name="s").save(
        tmp_path / "s.safetensors"
    )
    code, out, _ = call("export", tmp_path / "s.safetensors", "--out", tmp_path / "all")
    assert code == 0 and [line.split()[0] for line in out.splitlines()] == ["peft", "vllm", "plain"]
    assert all(
        (tmp_path / "all" / form / "README.md").is_file() for form in ("peft", "vllm", "plain")
    )
    code, out, _ = call(
        "export", tmp_path / "s.safetensors", "--form", "vllm", "--out", tmp_path / "one"
    )
    assert code == 0 and [path.name for path in (tmp_path / "one").iterdir()] == ["vllm"]
    fails(call("export", tmp_path / "no.safetensors", "--out", tmp_path), "no.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"12345678")
    fails(
        call("export", tmp_path / "bad.safetensors", "--out", tmp_path),
        "SoftPromptError",
        "SoftPrompt.save wrote",
    )
    other = call(
        "export", tmp_path / "s.safetensors", "--template", "vicuna", "--out", tmp_path / "two"
    )
    fails(other, "ChatModelError", "chat template")
    assert not (tmp_path / "two").exists()


def test_export_says_what_plain_would_copy(call, monkeypatch, tmp_path):
    from analysis_lib import ChatModel, SoftPrompt
    from analysis_lib.train import export

    SoftPrompt.from_text(ChatModel.load(), "You are careful.", name="s").save(
        tmp_path / "s.safetensors"
    )
    monkeypatch.setattr(export, "MOST_UNASKED", 1000)
    code, out, _ = call("export", tmp_path / "s.safetensors", "--out", tmp_path / "out")
    assert (
        code == 0
        and out.splitlines()[-1]
        == "plain left out: it copies 0.01 GB of weights; --form plain writes it"
    )
    assert not (tmp_path / "out" / "plain").exists()


# The process


def test_an_interrupted_run_says_how_to_go_on(call, monkeypatch):
    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(upkeep, "ls", interrupted)
    fails(call("cache", "ls"), "the same command goes on from there", code=130)


def test_a_reader_that_leaves_is_no_error(store):
    """`| head`: the pipe is closed before anything is written to it."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "analysis_lib", "cache", "ls", "--store", str(store.folder)]
    with os.fdopen(writing, "w") as pipe:
        done = subprocess.run(command, stdout=pipe, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (141, "")


def test_an_output_folder_that_cannot_be(call, tmp_path):
    (tmp_path / "file").write_text("")
    fails(
        call("reproduce", "--out", tmp_path / "file" / "out"),
        str(tmp_path / "file"),
        "check the path",
    )


def test_a_fault_of_the_program_keeps_its_traceback(call, monkeypatch):
    """Only errors of the library's own, and of the system, are messages to the user."""
    monkeypatch.setattr(upkeep, "ls", lambda store: [][0])
    with pytest.raises(IndexError):
        call("cache", "ls")
    monkeypatch.setattr(upkeep, "ls", lambda store: int("x"))
    with pytest.raises(ValueError, match="invalid literal"):
        call("cache", "ls")


# organism, download


def test_organism_train_hands_on_folder_and_seed(call, monkeypatch, tmp_path):
    from analysis_lib.organism import FOLDER
    from analysis_lib.organism import train as training

    given = []
    monkeypatch.setattr(
        training, "train", lambda out, seed: given.append((out, seed)) or {"final_loss": 0.25}
    )
    code, out, _ = call("organism", "train", "--out", tmp_path, "--seed", 7)
    assert code == 0 and "final_loss   0.25" in out and f"written to {tmp_path}" in out
    call("organism", "train")
    assert given == [(tmp_path, 7), (FOLDER, 2024)]


def test_download_reports_files_and_failures(call, monkeypatch, tmp_path):
    from analysis_lib.data import download

    tampered = lambda url, output_file, pooch: Path(output_file).write_bytes(b"tampered")  # noqa: E731
    monkeypatch.setattr("pooch.core.choose_downloader", lambda url, progressbar: tampered)
    fails(call("download", "--out", tmp_path), "SHA-256", "try another connection")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(download, "download", lambda folder: {"advbench": folder / "advbench.txt"})
    assert call("download", "--out", tmp_path)[1].split() == [
        "advbench",
        str(tmp_path / "advbench.txt"),
    ]


@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_reproduce_needs_queries_that_can_take_the_anchor_sets_place(
    tmp_path, call, no_notebooks, more
):
    path = tmp_path / "mine.csv"
    path.write_text("text,harmful\n" + "How to bake bread?,false\n" * 9, encoding="utf-8")
    result = call("reproduce", "--queries", path, "--out", tmp_path / "out", *more)
    fails(
        result,
        "DataError",
        "mine.csv: every query is labelled harmless",
        "add at least 5 harmful ones",
    )
    assert not (tmp_path / "out").exists()
