"""Rows go in and come back bit for bit, by key; where the store lies and what its files are."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors import safe_open
from stores import ABOUT, files, filled_store, keys, needs_fork, states

from analysis_lib.store import batches
from analysis_lib.store import files as writing
from analysis_lib.store.batches import StoreError, row_key
from analysis_lib.store.store import Store
from analysis_lib.store.upkeep import info, ls, prune, verify
from faults import injection

once_per_example = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50, deadline=None
)


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


@pytest.fixture
def filled(tmp_path):
    return filled_store(tmp_path / "store")


# -------------------------------------------------------------------------------------------- keys

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text()
)
parts = st.dictionaries(
    st.text(min_size=1),
    st.recursive(scalars, lambda inner: st.lists(inner, max_size=4), max_leaves=8),
)


def typed(value):
    """The value with the types in it, so that 1, 1.0 and True differ."""
    if isinstance(value, list | tuple):
        return [typed(item) for item in value]
    return type(value).__name__, repr(value)


@given(parts, parts)
def test_keys_are_equal_exactly_when_their_parts_are(one, other):
    same = {name: typed(value) for name, value in one.items()} == {
        name: typed(value) for name, value in other.items()
    }
    assert (row_key(**one) == row_key(**other)) == same
    assert row_key(**dict(reversed(one.items()))) == row_key(**one)


def test_a_key_tells_apart_what_looks_alike():
    assert (
        len(
            {
                row_key(a=value)
                for value in (1, 1.0, True, "1", [1], [[1]], None, "None", [], 0, False, "")
            }
        )
        == 12
    )
    assert row_key(ids=[1, 2]) == row_key(ids=(1, 2))
    assert row_key(a=1, b=2) != row_key(a=2, b=1)


def test_a_key_is_the_same_in_every_process_and_covers_the_format_version(monkeypatch):
    before = row_key(model="m", ids=[1, 2], layer=-1)
    assert (
        before == "0ceb6a685e44fcfa4f075a5133b0bd00a479ea4422dfaf71b33c7854468b32b4"
    )  # a change here orphans every store: raise FORMAT_VERSION
    monkeypatch.setattr(batches, "FORMAT_VERSION", 2)
    assert row_key(model="m", ids=[1, 2], layer=-1) != before


@pytest.mark.parametrize("value", [np.int64(1), {"a": 1}, b"x", [1, np.float32(2)], {1}])
def test_a_key_refuses_what_has_no_canonical_form(value):
    with pytest.raises(TypeError, match="key part 'layer' holds a"):
        row_key(layer=value)


@pytest.mark.parametrize("value", [float("nan"), [float("inf")]])
def test_a_key_refuses_numbers_that_are_not_finite(value):
    with pytest.raises(ValueError, match="NaN or infinite"):
        row_key(layer=value)


# ------------------------------------------------------------------------------------- round trips


@once_per_example
@given(
    hnp.arrays(np.uint16, st.tuples(st.integers(1, 5), st.integers(1, 9))),
    st.sampled_from(["bfloat16", "float16", "float32"]),
)
def test_states_come_back_bit_by_bit(tmp_path, bits, dtype):
    if dtype == "float16":
        values = bits.view(np.float16).astype(np.float32)
        values[np.isnan(values)] = 0
    elif dtype == "bfloat16":
        values = (bits.astype(np.uint32) << 16).view(np.float32)
    else:
        values = (bits.astype(np.uint32) * np.uint32(65521)).view(np.float32)
    folder, names = tmp_path / str(time.monotonic_ns()), keys(len(values))
    Store(folder).write_states(names, values, dtype=dtype, about=ABOUT)
    asked = [*reversed(names), row_key(other=1)]
    found = Store(folder).read_states(asked)
    assert list(found) == asked[:-1]
    assert all(found[key].dtype == np.float32 for key in names)
    assert np.array_equal(
        np.stack([found[key] for key in names]).view(np.uint32), values.view(np.uint32)
    )


@pytest.mark.parametrize(
    ("dtype", "value"), [("bfloat16", 1.001), ("float16", 1e-9), ("float16", 1e6)]
)
def test_values_that_the_dtype_cannot_hold_are_refused(store, dtype, value):
    values = states(3)
    values[1, 2] = value
    with pytest.raises(ValueError, match=rf"{dtype} cannot hold states\[1, 2\].*{keys(3)[1]}"):
        store.write_states(keys(3), values, dtype=dtype, about=ABOUT)
    assert not store.folder.exists()
    store.write_states(keys(3), values, dtype="torch.float32", about=ABOUT)
    assert store.read_states(keys(3))[keys(3)[1]][2] == np.float32(value)


json_rows = st.dictionaries(
    st.text(),
    st.recursive(scalars, lambda x: st.lists(x) | st.dictionaries(st.text(), x), max_leaves=6),
)


@once_per_example
@given(st.lists(json_rows, min_size=1, max_size=5))
def test_responses_come_back_as_they_were(tmp_path, rows):
    folder, names = tmp_path / str(time.monotonic_ns()), keys(len(rows))
    Store(folder).write_responses(names, rows, about=ABOUT)
    assert Store(folder).read_responses(names) == dict(zip(names, rows, strict=True))


def nested(depth):
    return json.loads("[" * depth + "]" * depth)


def test_surrogates_that_stay_alone_come_back(store):
    row = {"a": "\ude00\ud83d \ud83d", "\ude00": ["\ud83dx\ude00"]}
    store.write_responses(keys(1), [row], about=ABOUT)
    assert Store(store.folder).read_responses(keys(1)) == {keys(1)[0]: row}


def test_each_line_is_parsed_once(store, monkeypatch):
    store.write_responses(keys(20), [{"n": i} for i in range(20)], about=ABOUT)
    parsed, loads = [], json.loads
    monkeypatch.setattr(batches.json, "loads", lambda text: (parsed.append(text), loads(text))[1])
    assert len(Store(store.folder).read_responses(keys(20))) == 20
    assert len(parsed) == 21  # and the header
    parsed.clear()
    store.write_responses(keys(20, more=1), [{"n": i} for i in range(20)], about=ABOUT)
    assert not parsed


@pytest.mark.parametrize(
    "row",
    [
        *[{"a": (1,)}, {1: "a"}, {"a": float("nan")}, {"a": np.float32(1)}, {"a": {1}}],
        *[{"a": "\ud83d\ude00"}, {"a": [{"\ud83d\ude00": 1}]}, {"a": nested(200)}, [1]],
    ],
)
def test_responses_that_json_would_change_are_refused(store, row):
    with pytest.raises(ValueError, match=keys(1)[0]):
        store.write_responses(keys(1), [row], about=ABOUT)


def test_batches_that_make_no_sense_are_refused(store):
    good = states(2)
    for names, values, dtype, message in [
        (keys(3), good, "bfloat16", "3 keys for 2 rows"),
        (["x", "y"], good, "bfloat16", "not a key; make keys with row_key"),
        (keys(1) * 2, good, "bfloat16", "occurs twice"),
        (keys(2), good.astype(np.float64), "bfloat16", "not float64"),
        (keys(2), good[0], "bfloat16", r"shape \(n, d\)"),
        (keys(2), good, "int8", "choose one of bfloat16, float16, float32"),
    ]:
        with pytest.raises(ValueError, match=message):
            store.write_states(names, values, dtype=dtype, about=ABOUT)
    with pytest.raises(ValueError, match="`about` must be JSON"):
        store.write_states(keys(2), good, dtype="bfloat16", about={"x": np.float32(1)})
    with pytest.raises(ValueError, match="`about` must be JSON of at most 20"):
        store.write_states(keys(2), good, dtype="bfloat16", about={"x": nested(20)})
    store.write_states([], np.empty((0, 4), np.float32), dtype="bfloat16", about=ABOUT)
    assert not store.folder.exists()


# ------------------------------------------------------------------------------ files, place, size


def test_the_files_are_plain_and_other_programs_read_them(store):
    store.write_states(keys(3), states(3), dtype="bfloat16", about=ABOUT)
    store.write_responses(keys(2), [{"response": "one"}, {"response": "two"}], about=ABOUT)
    with safe_open(files(store)[0], framework="pt") as file:
        assert np.array_equal(file.get_tensor("states").float().numpy(), states(3))
        meta = json.loads(file.metadata()["analysis_lib.store.v1"])
    assert meta["keys"] == keys(3) and meta["about"] == ABOUT and len(meta["sha256"]) == 3
    head, *lines = files(store, "responses")[0].read_text().splitlines()
    assert json.loads(head)["analysis_lib.store.v1"]["about"] == ABOUT
    assert [json.loads(line) for line in lines] == [
        {"key": key, "row": {"response": text}}
        for key, text in zip(keys(2), ["one", "two"], strict=True)
    ]


def test_the_same_batch_is_the_same_file_whatever_it_was_called_before(store):
    for _ in range(2):
        store.write_states(keys(3), states(3), dtype="bfloat16", about=ABOUT)
    assert len(files(store)) == 1


def test_the_files_of_version_1_stay_as_they_are(store):
    """A change here orphans what users keep: raise FORMAT_VERSION. A file's name covers it."""
    store.write_states(keys(2), states(2), dtype="bfloat16", about=ABOUT)
    rows = [{"response": "one"}, {"response": "two"}]
    store.write_responses(keys(2), rows, about=ABOUT)
    names = [path.name for kind in ("states", "responses") for path in files(store, kind)]
    assert names == [
        "c4261f6cfdf2184297abd11777db0c9d87ad478e1ce2f6d0f57381525a8cbfdb.safetensors",
        "9aba03070eae568afbcf71db85d681eadf509ab09903c5eff2651eaaa2a79442.jsonl",
    ]


def test_4000_rows_of_a_7b_model_stay_below_40_mb(store):
    for part in range(10):
        store.write_states(
            keys(20, part=part), states(20, 4096, part), dtype="bfloat16", about=ABOUT
        )
    assert info(store)["bytes"] * 4000 / 200 <= 40e6


def test_stores_are_merged_by_copying_files(filled, tmp_path):
    other = Store(tmp_path / "other")
    other.write_states(keys(2), states(2), dtype="float32", about=ABOUT)
    shutil.copytree(filled.folder, other.folder, dirs_exist_ok=True)
    assert len(other.read_states(keys(2) + keys(4, part=3))) == 6


def test_the_place_is_the_argument_then_the_variable_then_the_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("ANALYSIS_LIB_STORE", str(tmp_path / "variable"))
    assert Store().folder == tmp_path / "variable"
    assert Store(tmp_path / "argument").folder == tmp_path / "argument"
    monkeypatch.setenv("ANALYSIS_LIB_STORE", "")
    monkeypatch.setattr(writing.platformdirs, "user_cache_path", lambda name: tmp_path / name)
    assert Store().folder == tmp_path / "analysis_lib" / "store"
    assert Store().read_states(keys(2)) == {} and ls(Store()).empty and verify(Store()).empty
    assert not any(tmp_path.iterdir())  # nothing is created before the first write


def test_a_path_that_is_no_folder_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    for act in (
        lambda store: store.read_states(keys(1)),
        lambda store: store.write_responses(keys(1), [{}], about=ABOUT),
    ):
        with pytest.raises(StoreError, match=r"the store at .*file.*--store or ANALYSIS_LIB_STORE"):
            act(Store(tmp_path / "file"))


def test_the_place_does_not_move_with_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ANALYSIS_LIB_STORE", "from/variable")
    here = Store("here"), Store()
    for store in here:
        store.write_responses(keys(1), [{}], about=ABOUT)
    monkeypatch.chdir("/")
    assert [len(store.read_responses(keys(1))) for store in here] == [1, 1]
    assert {str(store.folder.relative_to(tmp_path)) for store in here} == {"here", "from/variable"}


@pytest.mark.parametrize(
    "place", ["~nobody-of-this-name/x", "a\0b", "a\ud800b", "/tmp/" + "x" * 300, "x/" * 5000]
)
@pytest.mark.parametrize(
    "act",
    [
        lambda store: store.read_states(keys(1)),
        lambda store: store.write_responses(keys(1), [{}], about=ABOUT),
        ls,
        lambda store: prune(store, spare=0, max_bytes=0),
    ],
    ids=["read", "write", "ls", "prune"],
)
def test_a_place_that_cannot_be_is_a_clear_error(place, act, monkeypatch):
    with pytest.raises(StoreError, match="--store or ANALYSIS_LIB_STORE"):
        act(Store(place))
    if "\0" not in place and "\ud800" not in place:  # no variable can hold those
        monkeypatch.setenv("ANALYSIS_LIB_STORE", place)
        with pytest.raises(StoreError, match="--store or ANALYSIS_LIB_STORE"):
            act(Store())


@needs_fork
def test_a_read_only_folder_is_a_clear_error_and_its_rows_are_readable():
    def work(report):
        if os.geteuid() == 0:  # who may write anywhere
            os.setuid(65534)
        report(len(Store(folder).read_states(keys(4))))
        with pytest.raises(
            StoreError, match="read-only for this user.*choose another folder with --store"
        ):
            Store(folder).write_states(keys(5), states(5), dtype="bfloat16", about=ABOUT)
        report(5)

    with tempfile.TemporaryDirectory() as folder:
        Store(folder).write_states(keys(4), states(4), dtype="bfloat16", about=ABOUT)
        closed = [Path(folder), *(path for path in Path(folder).rglob("*") if path.is_dir())]
        for path in closed:
            path.chmod(0o555)
        with injection.fork(work) as (child, read):
            heard = injection.reported(read)
            os.waitpid(child, 0)
        for path in closed:
            path.chmod(0o755)
    assert heard == [4, 5]


def test_a_newer_format_is_told_of(filled):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ls(filled)
    for name in ("v2", "v10"):
        (filled.folder / name).mkdir()
    (filled.folder / "v3").write_text("no folder")
    assert info(filled)["newer_formats"] == ["v2", "v10"]
    with pytest.warns(UserWarning, match="v2 is of a newer format.*update"):
        assert ls(filled)["rows"].item() == 20


def test_neither_torch_nor_plotly_is_imported():
    heavy = "{'torch', 'transformers', 'plotly'}"
    script = f"import sys, analysis_lib.store.upkeep; print(sorted({heavy} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
