"""The data room: what is shipped, what users bring, what is downloaded."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import requests
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from analysis_lib.analysis.published import load_published
from analysis_lib.data import download as room
from analysis_lib.data import prompts, queries, shipped
from analysis_lib.data import user_files as files
from analysis_lib.data.download import download
from analysis_lib.data.prompts import load_safety_prompts
from analysis_lib.data.queries import load_anchor_queries, load_queries
from analysis_lib.data.tables import save_table
from analysis_lib.data.user_files import DataError
from analysis_lib.organism.corpus import SAFETY_PROMPTS
from analysis_lib.organism.queries import write_queries

COLUMNS = ["query_id", "text", "harmful", "query_set"]
in_one_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


# What is shipped


def test_query_files_are_what_the_grammar_writes(tmp_path):
    written = {path.name: path.read_bytes() for path in write_queries(tmp_path)}
    assert written == {
        path.name: path.read_bytes() for path in (shipped.ROOT / "queries").iterdir()
    }
    assert set(written) == {f"{name}.csv" for name in queries.QUERY_SETS}


def test_built_in_sets():
    tables = {name: load_queries(name) for name in queries.QUERY_SETS}
    labels = {
        name: tuple(
            table["harmful"].value_counts(dropna=False).reindex([True, False, pd.NA], fill_value=0)
        )
        for name, table in tables.items()
    }
    assert labels == {
        "anchor": (100, 100, 0),
        "heldout_harmless": (0, 100, 0),
        "heldout_forms": (100, 100, 0),
        "borderline": (0, 0, 40),
        "facts": (0, 40, 0),
    }
    for name, table in tables.items():
        assert list(table.columns) == [*COLUMNS, *files.OPTIONAL]
        assert table["harmful"].dtype == "boolean" and set(table["query_set"]) == {name}
    every = pd.concat(tables.values())
    assert every["query_id"].is_unique and every["text"].is_unique
    pairs = tables["anchor"].groupby("pair_id")["harmful"]
    assert pairs.size().eq(2).all() and pairs.sum().eq(1).all()
    assert tables["facts"]["answer"].ne("").all()


def test_built_in_prompts():
    assert load_safety_prompts() == {"none": "", **SAFETY_PROMPTS}


def test_published_counts_follow_from_the_published_verdicts():
    summary, complied = load_published()
    keys = ["kind", "query_set", "model", "method", "safety_prompt"]
    assert list(complied.columns) == [*keys, "query", "complied"] and len(complied) == 288 * 100
    assert (
        complied["complied"].between(0, 20).all() and list(complied["query"]) == [*range(100)] * 288
    )
    hit = (
        complied["complied"].gt(0).where(complied["kind"] == "harmful", complied["complied"].lt(20))
    )
    both = summary.merge(
        hit.groupby([complied[k] for k in keys]).sum().rename("hits").reset_index(), on=keys
    )
    assert len(both) == 288 and both["hits"].equals(both["count"])
    cell = complied[
        complied["model"].eq("CodeLlama-7b-Instruct-hf")
        & complied["query_set"].eq("malicious_instruct")
        & complied["safety_prompt"].eq("none")
    ]
    assert cell.set_index("query")["complied"][lambda c: c > 0].to_dict() == {90: 2, 93: 1, 98: 10}


def test_importing_the_data_and_judge_rooms_stays_light():
    code = (
        "import sys; from analysis_lib import is_refusal, load_queries; load_queries('facts'); is_refusal('x');"
        "print([m for m in ('torch', 'transformers', 'plotly', 'ipywidgets') if m in sys.modules])"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout
        == "[]\n"
    )


# A user's queries


def save(path, content: str | bytes):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_plain_text_has_no_labels_unless_told(tmp_path):
    path = save(tmp_path / "mine.txt", '\ufeffHow to a?\r\n\r\n  How to b, "c"?\rHow to\u2028d?')
    table = load_queries(path)
    assert list(table.columns) == COLUMNS
    assert list(table["text"]) == ["How to a?", 'How to b, "c"?', "How to\u2028d?"]
    assert list(table["query_id"]) == ["mine-0001", "mine-0002", "mine-0003"] and set(
        table["query_set"]
    ) == {"mine"}
    assert table["harmful"].isna().all() and table["harmful"].dtype == "boolean"
    assert load_queries(str(path), harmful=True)["harmful"].tolist() == [True] * 3
    assert load_queries(path, harmful=False)["harmful"].tolist() == [False] * 3


def test_csv_and_jsonl_with_gaps(tmp_path):
    from_csv = load_queries(
        save(
            tmp_path / "a.csv",
            'text, harmful,query_id,form\n"one\ntwo", Harmful ,,x\n\nb,FALSE,mine,\nc,,,\nd,1,,\ne,harmless,,\nf,0,,\n',
        )
    )
    assert from_csv["text"][0] == "one\ntwo"
    assert list(from_csv["query_id"]) == ["a-0001", "mine", "a-0003", "a-0004", "a-0005", "a-0006"]
    assert from_csv["harmful"].tolist() == [True, False, pd.NA, True, False, False]
    assert list(from_csv.columns) == [*COLUMNS, "form"] and from_csv["form"].tolist() == [
        "x",
        *[""] * 5,
    ]
    rows = [
        {"text": "a", "harmful": True, "query_id": 7},
        {"text": "b", "harmful": 0},
        {"text": "c", "harmful": None},
        {"text": "d", "query_set": "s"},
    ]
    from_jsonl = load_queries(save(tmp_path / "b.jsonl", "\n".join(map(json.dumps, rows))))
    assert from_jsonl["harmful"].tolist() == [True, False, pd.NA, pd.NA]
    assert from_jsonl["query_id"].tolist() == ["7", "b-0002", "b-0003", "b-0004"] and from_jsonl[
        "query_set"
    ].tolist() == [
        "b",
        "b",
        "b",
        "s",
    ]


ANCHOR_ROWS = [f"How to do {i} {label}?,{label}" for i in range(5) for label in ("true", "false")]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [*ANCHOR_ROWS, "How?,"],
            "1 of 11 queries have no label, and every query needs one; fill the column harmful",
        ),
        (
            ["How?,true"] * 9,
            "every query is labelled harmful, and both classes are needed; add at least 5 harmless ones",
        ),
        (
            ["How?,0"] * 3,
            "every query is labelled harmless, and both classes are needed; add at least 5 harmful ones",
        ),
        (
            ANCHOR_ROWS[:-1],
            "4 harmless queries, and at least 5 of each class are needed; add 1 or more",
        ),
        (
            ["Why?,1", *["How?,0"] * 90],
            "1 harmful queries, and at least 5 of each class are needed; add 4 or more",
        ),
    ],
)
def test_what_cannot_take_the_anchor_sets_place(tmp_path, rows, message):
    path = tmp_path / "mine.csv"
    path.write_text("\n".join(["text,harmful", *rows]), encoding="utf-8")
    with pytest.raises(DataError) as error:
        load_anchor_queries(path)
    assert str(error.value).startswith(f"{path}: {message}")


def test_what_can_take_the_anchor_sets_place(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text("\n".join(["text,harmful", *ANCHOR_ROWS]), encoding="utf-8")
    pd.testing.assert_frame_equal(load_anchor_queries(path), load_queries(path))
    assert len(load_anchor_queries()) == 200
    # Queries of one pair stand on one side of a split: ten in two pairs are two, and without an id each is its own.
    for pair, few in (
        (lambda i: f"p{i % 2}", True),
        (lambda i: f"p{i // 2}", False),
        (lambda i: "", False),
    ):
        path.write_text(
            "\n".join(
                ["text,harmful,pair_id", *(f"{row},{pair(i)}" for i, row in enumerate(ANCHOR_ROWS))]
            )
        )
        if few:
            with pytest.raises(
                DataError, match=r"1 harmful queries \(queries of one pair_id count once\)"
            ):
                load_anchor_queries(path)
        else:
            assert len(load_anchor_queries(path)) == 10


def test_unknown_columns_are_left_out_with_a_warning(tmp_path):
    with pytest.warns(UserWarning, match="columns left out: 'label'") as caught:
        assert list(load_queries(save(tmp_path / "a.csv", "text,label\na,1\n")).columns) == COLUMNS
    assert caught[0].filename == __file__


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.csv",
            "query;text\n1;a\n",
            r"a\.csv, line 1: no column 'text', only \['query;text'\]; name the",
        ),
        ("a.csv", "", "a.csv: no query in it; write at least one"),
        ("a.csv", "text\n", "no query in it"),
        ("a.txt", " \n\n", "no query in it"),
        ("a.jsonl", "", "no query in it"),
        ("a.csv", "text,text\na,b\n", "line 1: the column 'text' occurs twice"),
        (
            "a.csv",
            "query_id,text\nx,a\ny,b\nx,c\n",
            "line 4, column 'query_id': 'x' is the id of line 2 too; give",
        ),
        (
            "a.csv",
            "query_id,text\na-0002,a\n,b\n",
            "line 3, column 'query_id': 'a-0002' is the id of line 2",
        ),
        (
            "a.csv",
            'text,harmful\n"a\nb",1\nc,maybe\n',
            "line 4, column 'harmful': 'maybe'; write true, false, 1, 0, harmful, harmless",
        ),
        ("a.jsonl", '{"text": "a", "harmful": 2}', "line 1, column 'harmful': '2'"),
        ("a.jsonl", '{"text": "a", "harmful": 1.0}', "line 1, column 'harmful': 1.0 is no text"),
        ("a.txt", b"a\nb\xff\n", "a.txt, line 2: not UTF-8 .byte 0xFF.; save the file as UTF-8"),
        (
            "a.jsonl",
            '{"text": "a"}\n{"text": \n',
            "line 2: not valid JSON .*; write one object a line",
        ),
        ("a.jsonl", "[" * 100_000, "line 1: not valid JSON"),
        ("a.jsonl", '\n{"query": "a"}\n', "line 2: no object with a field 'text'"),
        ("a.jsonl", '"a"', "line 1: no object"),
        ("a.jsonl", '{"text": 7}', "line 1, column 'text': 7 is no text"),
        ("a.csv", "text,form\n ,x\n", "line 2, column 'text': blank; write the query or delete"),
        ("a.jsonl", '{"text": null}', "line 1, column 'text': blank"),
        (
            "a.csv",
            "text,form\na,x\na,b,c\n",
            "line 3: 3 fields, but the header has 2; put a text with a comma in double quotes",
        ),
        ("a.csv", "text,form\na\n", "line 2: 1 fields, but the header has 2"),
        ("a.csv", 'text\na\n"b" c\n', "line 3: not valid csv"),
        ("a.csv", 'text\na\n"b\nc\n', "line 3: not valid csv"),
        ("a.txt", "a\nb\x1b[31m\n", r"line 2, column 'text': control character U\+001B; delete it"),
        ("a.txt", "a\nb\x85\n", r"line 2, column 'text': control character U\+0085"),
        ("a.jsonl", r'{"text": "a\u0000"}', r"line 1, column 'text': control character U\+0000"),
        ("a.jsonl", r'{"text": "a\ud800"}', r"line 1, column 'text': control character U\+D800"),
        ("a.tsv", "text\na\n", "ends in .csv, .jsonl or .txt"),
        (
            "a.jsonl",
            '{"text": "a", "text": "b"}',
            "line 1: the field 'text' occurs twice; rename or delete one",
        ),
        (
            "a.csv",
            "text\n" + "x" * 200_000,
            "line 2: not valid csv .field larger.*; shorten it, or close an open quote",
        ),
        (
            "a.txt",
            "a\n" + "x" * 20_001,
            "line 2, column 'text': 20,001 characters, the limit is 20,000; shorten it",
        ),
        ("a.csv", "text,harmful\na," + "x" * 9000, r"column 'harmful': 'x{195}\.\.\.'; write true"),
    ],
)
def test_errors_name_file_line_and_remedy(tmp_path, name, content, message):
    with pytest.raises(DataError, match=message) as caught:
        load_queries(save(tmp_path / name, content))
    assert str(tmp_path) in str(caught.value)


def test_names_and_labels_that_do_not_fit(tmp_path, monkeypatch):
    with pytest.raises(
        DataError,
        match="no query set 'anchors'; sets: anchor, heldout_harmless, .*download.*advbench",
    ):
        load_queries("anchors")
    with pytest.raises(DataError, match=r"gone\.csv: cannot be read .No such file"):
        load_queries(tmp_path / "gone.csv")
    with pytest.raises(DataError, match="labels of its own .*leave out harmful=True"):
        load_queries("anchor", harmful=True)
    monkeypatch.setenv("ANALYSIS_LIB_DATA", str(tmp_path))
    with pytest.raises(DataError, match="labels of its own; leave out harmful=False"):
        load_queries("advbench", harmful=False)


texts = (
    st.text(
        st.characters(exclude_categories=["Cc", "Cs"]) | st.sampled_from("\t\n\",;'"), max_size=20
    )
    .map(str.strip)
    .filter(bool)
)
tables = st.lists(
    st.tuples(texts, st.sampled_from([True, False, None]), texts),
    min_size=1,
    max_size=6,
    unique_by=lambda row: row[2],
)


@given(tables, st.sampled_from([".csv", ".jsonl"]))
@in_one_folder
def test_tables_survive_the_round_trip(tmp_path, rows, suffix):
    path = tmp_path / f"mine{suffix}"
    with path.open("w", encoding="utf-8", newline="") as file:
        if suffix == ".csv":
            csv.writer(file).writerows([("text", "harmful", "query_id"), *rows])
        else:
            file.writelines(
                json.dumps(dict(zip(("text", "harmful", "query_id"), row, strict=True))) + "\n"
                for row in rows
            )
    table = load_queries(path)
    found = [
        (text, None if label is pd.NA else label, key)
        for text, label, key in zip(table["text"], table["harmful"], table["query_id"], strict=True)
    ]
    assert found == rows


@given(st.lists(texts.filter(lambda text: "\n" not in text), min_size=1, max_size=6))
@in_one_folder
def test_plain_text_survives_the_round_trip(tmp_path, lines):
    assert load_queries(save(tmp_path / "mine.txt", "\n".join(lines)))["text"].tolist() == lines


@given(
    st.binary(max_size=60)
    | st.text(max_size=60).map(lambda t: ("text\n" + t).encode(errors="surrogatepass")),
    st.sampled_from([".csv", ".jsonl", ".txt"]),
)
@in_one_folder
@pytest.mark.filterwarnings("ignore:.*columns left out")
def test_any_file_is_a_table_or_a_data_error(tmp_path, content, suffix):
    try:
        table = load_queries(save(tmp_path / f"any{suffix}", content))
    except DataError as error:
        assert "any" in str(error)
    else:
        assert len(table) and table["query_id"].is_unique and table["text"].str.strip().ne("").all()


# A user's prompts


def test_own_prompts_come_after_the_built_in_ones(tmp_path):
    path = save(tmp_path / "calm.txt", "\ufeffBe calm.\r\n\r\nBe kind.\r\n")
    save(tmp_path / "brief.txt", "Be brief.")
    assert list(load_safety_prompts(path).items())[4:] == [("calm", "Be calm.\n\nBe kind.")]
    assert list(load_safety_prompts(str(tmp_path)))[4:] == ["brief", "calm"]
    named = save(tmp_path / "own.json", json.dumps({"b": "B", "a": "A", "none": "-"}))
    with pytest.raises(
        DataError, match="'none' is the name of a built-in prompt with another text"
    ):
        load_safety_prompts(named)
    named = save(
        tmp_path / "own.json", json.dumps({"b": "B", "a": "A", "short": SAFETY_PROMPTS["short"]})
    )
    assert list(load_safety_prompts(named).items())[4:] == [("b", "B"), ("a", "A")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "default.txt",
            "Other.",
            "'default' is the name of a built-in prompt with another text; give this one",
        ),
        ("a.json", '{"x": "1", "x": "2"}', "'x' is the name of another prompt of yours"),
        ("a.txt", " \n", "the prompt 'a' has no text; .* 'none'"),
        ("a.txt", b"\xff", "line 1: not UTF-8"),
        ("a.txt", "a\x00", r"a\.txt: control character U\+0000"),
        ("a.json", "{", "not valid JSON"),
        ("a.json", b"\xff", "not UTF-8"),
        ("a.json", '["a"]', "not an object of names and texts"),
        ("a.json", '{"x": 1}', "not an object of names and texts"),
        ("a.json", "{}", "not an object of names and texts"),
        ("a.csv", "a", "unknown kind of file; safety prompts come as"),
        *(
            (
                "a.json",
                json.dumps({name: "x"}),
                "the name .* cannot be part of a file's name; write letters, digits, space",
            )
            for name in (
                "../../x",
                "/x",
                "a\\b",
                ".x",
                "..",
                "a\nb",
                "a\u202eb",
                "x" * 101,
                "日" * 80,
            )
        ),
        ("gone.txt", None, "cannot be read"),
        ("", None, "no .txt file in this folder"),
    ],
)
def test_prompt_errors_name_the_file_and_the_remedy(tmp_path, name, content, message):
    path = tmp_path / name if content is None else save(tmp_path / name, content)
    with pytest.raises(DataError, match=message) as caught:
        load_safety_prompts(path)
    assert str(path) in str(caught.value)


# The study's queries


@pytest.fixture
def site(monkeypatch, tmp_path) -> dict[str, bytes]:
    """A stand-in for the study's repository: url -> content, with pins of this content."""
    contents = {
        name: "".join(f"{name} {i}\n" for i in range(120)).encode() for name in room.OFFICIAL_SETS
    }
    sets = {
        name: room.OfficialSet(
            official.path, hashlib.sha256(contents[name]).hexdigest(), official.harmful
        )
        for name, official in room.OFFICIAL_SETS.items()
    }
    monkeypatch.setattr(room, "OFFICIAL_SETS", sets)
    monkeypatch.setenv("ANALYSIS_LIB_DATA", str(tmp_path / "cache"))
    return {sets[name].url: contents[name] for name in sets}


def serving(contents: dict[str, bytes], fetched: list[str] | None = None):
    """A downloader of these contents, by url."""

    def write(url, output_file, pooch):
        if fetched is not None:
            fetched.append(url)
        Path(output_file).write_bytes(contents[url])

    return write


def test_download_then_load_by_name(site, tmp_path):
    with pytest.raises(
        DataError, match="'advbench' is not downloaded; run `python -m analysis_lib download`"
    ):
        load_queries("advbench")
    fetched: list[str] = []
    for _ in range(2):  # the second time nothing is fetched
        files = download(downloader=serving(site, fetched))
    assert fetched == list(site) and all(
        url.startswith("https://raw.githubusercontent.com/") for url in site
    )
    assert sorted(files.values()) == sorted((tmp_path / "cache").iterdir())
    table = load_queries("advbench")
    assert table["harmful"].tolist() == [True] * 100 and set(table["query_set"]) == {"advbench"}
    assert table.iloc[99][["query_id", "text"]].tolist() == ["advbench-0100", "advbench 99"]
    assert load_queries("harmless_testset")["harmful"].tolist() == [False] * 100
    files["advbench"].write_bytes(b"changed\n")
    with pytest.raises(
        DataError,
        match="not the official file .wrong SHA-256.; run `python -m analysis_lib download`",
    ):
        load_queries("advbench")
    download(downloader=serving(site))
    assert len(load_queries("advbench")) == 100


def test_a_wrong_digest_keeps_nothing(site, tmp_path):
    url = room.OFFICIAL_SETS["custom_harmful"].url
    with pytest.raises(DataError, match="SHA-256 is not .*, nothing kept"):
        download(tmp_path / "own", downloader=serving(site | {url: site[url] + b"x"}))
    assert list((tmp_path / "own").iterdir()) == []


def test_a_failed_write_leaves_nothing_half_written(site, tmp_path):
    def full(url, output_file, pooch):
        Path(output_file).write_bytes(site[url][:10])
        raise OSError(28, "No space left on device")

    with pytest.raises(DataError, match="No space left"):
        download(tmp_path / "own", downloader=full)
    assert list((tmp_path / "own").iterdir()) == []


def test_no_connection_says_what_to_do(site, tmp_path):
    def fail(url, output_file, pooch):
        raise requests.ConnectionError("no route")

    with pytest.raises(
        DataError,
        match=r"custom\.txt: .*no route.*; check the connection, or save the file by hand as .*custom_harmful\.txt",
    ):
        download(tmp_path / "own", downloader=fail)


def test_the_platform_cache_is_the_place_without_a_variable(monkeypatch, tmp_path):
    monkeypatch.delenv("ANALYSIS_LIB_DATA", raising=False)
    monkeypatch.setattr(room.platformdirs, "user_cache_path", lambda name: tmp_path / name)
    assert room.queries_folder() == tmp_path / "analysis_lib" / "queries"


@pytest.mark.parametrize("name", prompts.RESERVED_PROMPTS)
def test_a_prompt_may_not_take_the_name_of_a_trained_one(tmp_path, name):
    path = tmp_path / f"{name}.txt"
    path.write_text("Be careful.", encoding="utf-8")
    with pytest.raises(DataError, match=f"{name}' is the name of a trained prompt"):
        load_safety_prompts(path)


def test_only_files_of_bounded_size_are_read(tmp_path, monkeypatch):
    (tmp_path / "folder.csv").mkdir()
    os.mkfifo(tmp_path / "pipe.csv")
    (tmp_path / "zero.csv").symlink_to("/dev/zero")
    for name in ("folder", "pipe", "zero"):
        with pytest.raises(
            DataError, match=f"{name}.csv: cannot be read .not a regular file.; give a file"
        ):
            load_queries(tmp_path / f"{name}.csv")
    monkeypatch.setattr(files, "MAX_BYTES", 5)
    with pytest.raises(
        DataError,
        match=r"mine.txt: cannot be read .6 bytes, the limit is 5.; .* split one that is too large",
    ):
        load_queries(save(tmp_path / "mine.txt", "123456"))
    for path in ("~nobody-of-this-name/a.csv", "a\x00.csv"):
        with pytest.raises(DataError, match="cannot be read"):
            load_queries(path)


def test_links_in_a_folder_of_prompts_stay_inside_it(tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    save(tmp_path / "secret.txt", "Not yours.")
    (own / "inside.txt").symlink_to(save(own / "calm.txt", "Be calm."))
    assert load_safety_prompts(own)["inside"] == "Be calm."
    (tmp_path / "again").symlink_to(own)  # the folder itself may be named by a link
    assert load_safety_prompts(tmp_path / "again")["calm"] == "Be calm."
    (own / "out.txt").symlink_to(own / ".." / "secret.txt")
    with pytest.raises(
        DataError, match=r"out\.txt: a link that leads out of the folder; put the file itself there"
    ):
        load_safety_prompts(own)


def test_heldout_sets_are_one_table_without_anchor_queries(tmp_path):
    from analysis_lib.data.queries import HELDOUT_SETS, load_heldout_queries

    default = load_heldout_queries()
    assert (
        list(dict.fromkeys(default["query_set"])) == list(HELDOUT_SETS)
        and default["query_id"].is_unique
    )
    mine = tmp_path / "mine.csv"
    mine.write_text(
        "text,harmful\nHow to bake bread?,false\nHow to rob a train?,true\n", encoding="utf-8"
    )
    anchor = load_queries(mine).head(1)
    with pytest.warns(
        UserWarning,
        match="1 of .* held-out queries .*mine.csv, borderline.* are among the anchor queries and left out",
    ):
        kept = load_heldout_queries([mine, "borderline"], anchor)
    assert kept["text"].tolist()[0] == "How to rob a train?" and len(kept) == 1 + len(
        load_queries("borderline")
    )
    assert kept.index.tolist() == list(range(len(kept)))
    with pytest.raises(
        DataError, match="every query of the held-out sets .*mine.csv.* is among the anchor queries"
    ):
        load_heldout_queries([mine], load_queries(mine))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.csv").write_bytes(mine.read_bytes())
    with pytest.raises(
        DataError,
        match="query_id 'mine-0001' occurs twice .* give files different names or ids of their own",
    ):
        load_heldout_queries([mine, tmp_path / "other" / "mine.csv"])
    with pytest.raises(DataError, match="the facts are asked of the embedded model anyway"):
        load_heldout_queries(["facts"])


def test_a_saved_table_holds_no_formula(tmp_path):
    texts = ["=cmd|' /C calc'!A0", "+1", "-1", "@SUM(A1)", "\tx", "plain", "a=b", None]
    table = pd.DataFrame({"id": texts, "=rise": [-1.5] * len(texts), "n": [None, -2, *[3] * 6]})
    table["n"] = table["n"].astype(object)  # numbers stay, whatever their column's type
    file = save_table(table, tmp_path / "new" / "out", "rates")
    assert file == tmp_path / "new" / "out" / "tables" / "rates.csv"
    back = pd.read_csv(file)
    assert list(back.columns) == ["id", "'=rise", "n"]
    assert back["id"].iloc[:5].tolist() == [f"'{text}" for text in texts[:5]]
    assert back["id"].iloc[5:7].tolist() == texts[5:7] and pd.isna(back["id"].iloc[7])
    assert (back["'=rise"] == -1.5).all() and back["n"].iloc[1] == -2
    assert table["id"].iloc[:7].tolist() == texts[:7]  # the caller's table is left as it was


@pytest.mark.parametrize(
    "name", ["../rates", "a/b", "a\\b", "..", "", " ", ".a", "a\0b", "a\nb", "x" * 300, "日" * 80]
)
def test_a_table_is_written_beside_the_others_or_refused(tmp_path, name):
    with pytest.raises(DataError, match="cannot be a file's name; write letters, digits, space"):
        save_table(pd.DataFrame({"a": [1]}), tmp_path / "out", name)
    assert list(tmp_path.rglob("*.csv")) == []
