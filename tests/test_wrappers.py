"""Wrapped queries: one line each, traceable to their base query, and files that are wrong are named."""

from __future__ import annotations

import json
import os

import pandas as pd
import pytest

from analysis_lib.data import user_files as files
from analysis_lib.data.queries import load_queries
from analysis_lib.data.user_files import DataError
from analysis_lib.data.wrappers import add_suffixes, load_wrappers, wrap_queries

QUERIES = load_queries("heldout_forms").head(3)


def test_built_in_wrappers():
    wrappers = load_wrappers()
    assert len(wrappers) == 10 and len(set(wrappers.values())) == 10
    for template in wrappers.values():
        assert template.count("{query}") == 1 and "\n" not in template and len(template) < 150


def test_wrapped_queries_keep_their_base():
    wrapped = wrap_queries(QUERIES)
    assert len(wrapped) == 30 and wrapped["query_id"].is_unique
    row = wrapped.iloc[4]  # second wrapper, second query
    name = list(load_wrappers())[1]
    base = QUERIES.iloc[1]
    assert row["query_id"] == f"{base['query_id']}+{name}" and row["wrapper"] == name
    assert (row["base_id"], row["base_text"]) == (base["query_id"], base["text"])
    assert row["text"] == load_wrappers()[name].replace("{query}", base["text"])
    assert row["query_set"] == "heldout_forms+wrapped" and row["harmful"] == base["harmful"]
    assert wrapped["harmful"].dtype == "boolean"


def test_braces_and_backslashes_of_a_query_are_kept():
    odd = QUERIES.head(1).assign(text=r"What is {x} in {query} \1 %s?")
    assert (
        wrap_queries(odd, {"w": "Say: {query}"})["text"].item()
        == r"Say: What is {x} in {query} \1 %s?"
    )


@pytest.mark.parametrize("shape", ["official", "plain", "csv"])
def test_suffixes_are_joined_without_a_line_break(tmp_path, shape):
    texts = [" ! one", "two\n", "three"]
    path = tmp_path / f"gcg.{'csv' if shape == 'csv' else 'json'}"
    if shape == "csv":
        table = pd.DataFrame({"query_id": QUERIES["query_id"], "suffix": texts})
        table.sample(frac=1, random_state=1).to_csv(path, index=False)
    else:
        entries = {
            str(i): {"final_suffix": t, "loss": 0.1} if shape == "official" else t
            for i, t in enumerate([*texts, "unused"])
        }
        path.write_text(json.dumps(entries))
    found = add_suffixes(QUERIES, path)
    assert found["text"].tolist() == [
        f"{q} {s.strip()}" for q, s in zip(QUERIES["text"], texts, strict=True)
    ]
    assert not found["text"].str.contains("\n").any()
    assert (
        set(found["wrapper"]) == {"gcg"}
        and found["base_id"].tolist() == QUERIES["query_id"].tolist()
    )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("s.json", '{"0": "a"}', "no suffix for 2 of 3 queries, the first"),
        ("s.json", '["a"]', "not an object of suffixes"),
        ("s.json", '{"0": {"suffix": "a"}}', "'0': write a position from 0"),
        ("s.json", '{"first": "a"}', "'first': write a position from 0"),
        ("s.json", "{", "cannot be read as JSON"),
        ("s.csv", "query_id,text\na,b\n", "no column 'suffix'"),
        ("s.csv", "", "no column 'query_id'"),
        (
            "s.json",
            '{"0": "a", "00": "b"}',
            "s.json, '00': a second suffix for the query 'forms-harmful-000'",
        ),
        ("s.json", '{"0": "a", "0": "b"}', "s.json, '0': a second suffix"),
        (
            "s.csv",
            "query_id,suffix\nq1,a\nq2,b\nq1,c\n",
            "s.csv, line 4: the query_id 'q1' occurs twice",
        ),
        ("s.csv", "query_id,suffix\nq1,a, b\n", "s.csv, line 2: 3 fields, but the header has 2"),
        ("s.csv", "query_id,suffix,suffix\nq1,a,b\n", "no column 'suffix', or several"),
        ("s.csv", 'query_id,suffix\nq1,"a\n', "not valid csv"),
        ("none.json", None, "No such file"),
    ],
)
def test_wrong_suffix_files(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        add_suffixes(QUERIES, tmp_path / name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("wrapper,template\na,no slot\n", "'a' holds {query} 0 times"),
        ("wrapper,template\na,{query} {query}\n", "'a' holds {query} 2 times"),
        ("wrapper,template\na,{query}\na,x {query}\n", "'a' occurs twice"),
        ("name,template\na,{query}\n", "no column 'wrapper'"),
        (
            "wrapper,template\nrole,Pretend, and then: {query}\n",
            "line 2: 3 fields, but the header has 2; .* in double quotes",
        ),
        ("wrapper,template\nrole\n", "line 2: 1 fields"),
    ],
)
def test_wrong_wrapper_files(tmp_path, content, message):
    (tmp_path / "w.csv").write_text(content)
    with pytest.raises(DataError, match=message):
        load_wrappers(tmp_path / "w.csv")
    with pytest.raises(DataError, match="'w' must hold {query} once"):
        wrap_queries(QUERIES, {"w": "x"})
    with pytest.raises(DataError, match="no wrappers given"):
        wrap_queries(QUERIES, {})


@pytest.mark.parametrize("column", ["query_id", "text", "query_set"])
def test_queries_that_lack_a_column(tmp_path, column):
    (tmp_path / "s.json").write_text('{"0": "a", "1": "b", "2": "c"}')
    for wrap in (wrap_queries, lambda queries: add_suffixes(queries, tmp_path / "s.json")):
        with pytest.raises(
            DataError, match=f"the queries have no column '{column}'.* load_queries"
        ):
            wrap(QUERIES.drop(columns=column))


@pytest.mark.parametrize("name", ["s.json", "s.csv"])
def test_a_pipe_and_a_huge_file_are_not_read(tmp_path, monkeypatch, name):
    (tmp_path / name).write_text("x" * 1001)
    monkeypatch.setattr(files, "MAX_BYTES", 1000)
    with pytest.raises(DataError, match="1,001 bytes, the limit is 1,000"):
        add_suffixes(QUERIES, tmp_path / name)
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    with pytest.raises(DataError, match="not a regular file"):
        add_suffixes(QUERIES, tmp_path / name)
