"""AlpacaEval: instructions in, answers out in the package's form, its annotations back as wins."""

from __future__ import annotations

import json
import os

import numpy as np
import pandas as pd
import pytest

from analysis_lib.analysis.benchmark import metric_table
from analysis_lib.data import user_files as files
from analysis_lib.data.alpaca import load_instructions, read_alpaca_eval, write_alpaca_eval
from analysis_lib.data.user_files import DataError


@pytest.fixture
def queries(tmp_path):
    entries = [
        {"instruction": f" Name {i} birds.\n", "output": "x", "dataset": "helpful_base"}
        for i in range(120)
    ]
    (tmp_path / "alpaca_eval.json").write_text(json.dumps(entries))
    return load_instructions(tmp_path / "alpaca_eval.json")


def test_instructions_are_queries(queries, tmp_path):
    assert (
        len(queries) == 100
        and queries["harmful"].eq(False).all()
        and queries["harmful"].dtype == "boolean"
    )
    assert queries.iloc[9].tolist() == ["alpaca-0010", "Name 9 birds.", False, "alpaca_eval"]
    assert len(load_instructions(tmp_path / "alpaca_eval.json", None)) == 120


def test_answers_take_the_form_of_the_package(queries, tmp_path):
    responses = pd.DataFrame(
        {
            "query_id": ["alpaca-0002", "alpaca-0001"],
            "prompt": "dro",
            "sample": 0,
            "response": ["Zwei Vögel", ""],
        }
    )
    write_alpaca_eval(
        responses, queries, tmp_path / "new" / "answers.json", generator="m under dro"
    )
    written = json.loads((tmp_path / "new" / "answers.json").read_text(encoding="utf-8"))
    assert written == [
        {
            "instruction": "Name 1 birds.",
            "output": "Zwei Vögel",
            "generator": "m under dro",
            "dataset": "alpaca_eval",
        },
        {
            "instruction": "Name 0 birds.",
            "output": "",
            "generator": "m under dro",
            "dataset": "alpaca_eval",
        },
    ]
    for wrong in (pd.concat([responses, responses]), responses.assign(prompt=["a", "b"])):
        with pytest.raises(ValueError, match="one answer a query under one prompt"):
            write_alpaca_eval(wrong, queries, tmp_path / "answers.json", generator="m")
    with pytest.raises(ValueError, match="query 'x' is not in the queries' table"):
        write_alpaca_eval(
            responses.assign(query_id=["x", "alpaca-0001"]),
            queries,
            tmp_path / "a.json",
            generator="m",
        )


def annotations(path, *preferences, **changes):
    entries = [
        {
            "instruction": f"Name {i} birds.",
            "generator_1": "text_davinci_003",
            "generator_2": "m",
            "preference": p,
            **changes,
        }
        for i, p in enumerate(preferences)
    ]
    path.write_text(json.dumps(entries))
    return path


def test_annotations_become_wins(queries, tmp_path):
    path = annotations(tmp_path / "annotations.json", 2, 1, 1.5, 0, None, 1.25)
    wins = read_alpaca_eval(path, queries, prompt="dro")
    np.testing.assert_array_equal(wins["value"], [1, 0, 0.5, 0.5, np.nan, 0.25])
    table = metric_table(wins, queries, model="m", metric="alpaca_win", judge="alpaca_eval")
    assert table["value"].item() == pytest.approx(2.25 / 5) and table["n_queries"].item() == 5
    assert table["low"].item() < 0.45 < table["high"].item()
    assert len(read_alpaca_eval(path, queries.tail(98), prompt="dro")) == 4


@pytest.mark.parametrize("preference", [3, 0.5, -1, "2", True])
def test_a_preference_out_of_range_is_named(queries, tmp_path, preference):
    with pytest.raises(DataError, match="entry 2: preference"):
        read_alpaca_eval(annotations(tmp_path / "a.json", 2, preference), queries, prompt="dro")


def test_wrong_files(queries, tmp_path, monkeypatch):
    with pytest.raises(DataError, match="several generators"):
        path = annotations(tmp_path / "a.json", 2, 1)
        path.write_text(path.read_text().replace('"m"', '"n"', 1))
        read_alpaca_eval(path, queries, prompt="dro")
    with pytest.raises(DataError, match="none of its instructions"):
        read_alpaca_eval(
            annotations(tmp_path / "a.json", 2, instruction="else"), queries, prompt="dro"
        )
    for content, message in [
        ("[", "cannot be read as JSON"),
        ("{}", "not a list"),
        ('[{"x": 1}]', "entry 1: no text in 'instruction'"),
    ]:
        (tmp_path / "b.json").write_text(content)
        with pytest.raises(DataError, match=message):
            load_instructions(tmp_path / "b.json")
    os.mkfifo(tmp_path / "pipe.json")
    monkeypatch.setattr(files, "MAX_BYTES", 1000)
    (tmp_path / "huge.json").write_text("[" + " " * 1000)
    for name, message in [
        ("huge", "1,001 bytes, the limit is 1,000"),
        ("pipe", "not a regular file"),
    ]:
        with pytest.raises(DataError, match=message):
            load_instructions(tmp_path / f"{name}.json")
