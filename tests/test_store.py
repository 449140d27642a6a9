from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import signal
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

from analysis_lib import store as room
from analysis_lib.store import Store, StoreDamage, StoreError, StoreFormatError, parse_bytes, parse_days, row_key

spec = importlib.util.spec_from_file_location("faults", Path(__file__).parents[1] / "bench" / "faults.py")
faults = importlib.util.module_from_spec(spec)
spec.loader.exec_module(faults)

ABOUT = {"model": "a" * 64, "model_name": "A", "prompts": ["none"], "layer": -1, "certificate": {"max_difference": 0.001}}
once_per_example = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50, deadline=None)


def keys(n, **parts):
    return [row_key(row=i, **parts) for i in range(n)]


def states(n, d=8, seed=0):
    bits = np.random.default_rng(seed).standard_normal((n, d)).astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)
    return bits.view(np.float32)


def files(store, kind="states"):
    return sorted((store.folder / "v1" / kind).iterdir())


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


@pytest.fixture
def filled(store):
    for part in range(5):
        about = ABOUT | {"prompts": ["none", f"prompt {part}"]}
        store.write_states(keys(4, part=part), states(4, seed=part), dtype="bfloat16", about=about)
    return store


# ---------------------------------------------------------------------------------------------------------------- keys

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
parts = st.dictionaries(st.text(min_size=1), st.recursive(scalars, lambda inner: st.lists(inner, max_size=4), max_leaves=8))


def typed(value):
    """The value with the types in it, so that 1, 1.0 and True differ."""
    if isinstance(value, list | tuple):
        return [typed(item) for item in value]
    return type(value).__name__, repr(value)


@given(parts, parts)
def test_keys_are_equal_exactly_when_their_parts_are(one, other):
    same = {name: typed(value) for name, value in one.items()} == {name: typed(value) for name, value in other.items()}
    assert (row_key(**one) == row_key(**other)) == same
    assert row_key(**dict(reversed(one.items()))) == row_key(**one)


def test_a_key_tells_apart_what_looks_alike():
    assert len({row_key(a=value) for value in (1, 1.0, True, "1", [1], [[1]], None, "None", [], 0, False, "")}) == 12
    assert row_key(ids=[1, 2]) == row_key(ids=(1, 2))
    assert row_key(a=1, b=2) != row_key(a=2, b=1)


def test_a_key_is_the_same_in_every_process_and_covers_the_format_version(monkeypatch):
    before = row_key(model="m", ids=[1, 2], layer=-1)
    assert (
        before == "0ceb6a685e44fcfa4f075a5133b0bd00a479ea4422dfaf71b33c7854468b32b4"
    )  # a change here orphans every store: raise FORMAT_VERSION
    monkeypatch.setattr(room, "FORMAT_VERSION", 2)
    assert row_key(model="m", ids=[1, 2], layer=-1) != before


@pytest.mark.parametrize("value", [np.int64(1), {"a": 1}, b"x", [1, np.float32(2)], {1}])
def test_a_key_refuses_what_has_no_canonical_form(value):
    with pytest.raises(TypeError, match="key part 'layer' holds a"):
        row_key(layer=value)


@pytest.mark.parametrize("value", [float("nan"), [float("inf")]])
def test_a_key_refuses_numbers_that_are_not_finite(value):
    with pytest.raises(ValueError, match="NaN or infinite"):
        row_key(layer=value)


# ---------------------------------------------------------------------------------------------------------- round trips


@once_per_example
@given(
    hnp.arrays(np.uint16, st.tuples(st.integers(1, 5), st.integers(1, 9))), st.sampled_from(["bfloat16", "float16", "float32"])
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
    assert np.array_equal(np.stack([found[key] for key in names]).view(np.uint32), values.view(np.uint32))


@pytest.mark.parametrize(("dtype", "value"), [("bfloat16", 1.001), ("float16", 1e-9), ("float16", 1e6)])
def test_values_that_the_dtype_cannot_hold_are_refused(store, dtype, value):
    values = states(3)
    values[1, 2] = value
    with pytest.raises(ValueError, match=rf"{dtype} cannot hold states\[1, 2\].*{keys(3)[1]}"):
        store.write_states(keys(3), values, dtype=dtype, about=ABOUT)
    assert not store.folder.exists()
    store.write_states(keys(3), values, dtype="torch.float32", about=ABOUT)
    assert store.read_states(keys(3))[keys(3)[1]][2] == np.float32(value)


json_rows = st.dictionaries(st.text(), st.recursive(scalars, lambda x: st.lists(x) | st.dictionaries(st.text(), x), max_leaves=6))


@once_per_example
@given(st.lists(json_rows, min_size=1, max_size=5))
def test_responses_come_back_as_they_were(tmp_path, rows):
    folder, names = tmp_path / str(time.monotonic_ns()), keys(len(rows))
    Store(folder).write_responses(names, rows, about=ABOUT)
    assert Store(folder).read_responses(names) == dict(zip(names, rows, strict=True))


@pytest.mark.parametrize("row", [{"a": (1,)}, {1: "a"}, {"a": float("nan")}, {"a": np.float32(1)}, {"a": {1}}])
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
    store.write_states([], np.empty((0, 4), np.float32), dtype="bfloat16", about=ABOUT)
    assert not store.folder.exists()


# --------------------------------------------------------------------------------------------------- files, place, size


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
        {"key": key, "row": {"response": text}} for key, text in zip(keys(2), ["one", "two"], strict=True)
    ]


def test_the_same_batch_is_the_same_file_whatever_it_was_called_before(store):
    for _ in range(2):
        store.write_states(keys(3), states(3), dtype="bfloat16", about=ABOUT)
    assert len(files(store)) == 1


def test_4000_rows_of_a_7b_model_stay_below_40_mb(store):
    for part in range(10):
        store.write_states(keys(20, part=part), states(20, 4096, part), dtype="bfloat16", about=ABOUT)
    assert store.info()["bytes"] * 4000 / 200 <= 40e6


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
    monkeypatch.setattr(room.platformdirs, "user_cache_path", lambda name: tmp_path / name)
    assert Store().folder == tmp_path / "analysis_lib" / "store"
    assert Store().read_states(keys(2)) == {} and Store().ls().empty and Store().verify().empty
    assert not any(tmp_path.iterdir())  # nothing is created before the first write


def test_a_path_that_is_no_folder_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    for act in (lambda store: store.read_states(keys(1)), lambda store: store.write_responses(keys(1), [{}], about=ABOUT)):
        with pytest.raises(StoreError, match=r"the store at .*file.*--store or ANALYSIS_LIB_STORE"):
            act(Store(tmp_path / "file"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_read_only_folder_is_a_clear_error_and_its_rows_are_readable():
    def work(report):
        if os.geteuid() == 0:  # who may write anywhere
            os.setuid(65534)
        report(len(Store(folder).read_states(keys(4))))
        with pytest.raises(StoreError, match="read-only for this user.*choose another folder with --store"):
            Store(folder).write_states(keys(5), states(5), dtype="bfloat16", about=ABOUT)
        report(5)

    with tempfile.TemporaryDirectory() as folder:
        Store(folder).write_states(keys(4), states(4), dtype="bfloat16", about=ABOUT)
        closed = [Path(folder), *(path for path in Path(folder).rglob("*") if path.is_dir())]
        for path in closed:
            path.chmod(0o555)
        with faults.fork(work) as (child, read):
            heard = faults.reported(read)
            os.waitpid(child, 0)
        for path in closed:
            path.chmod(0o755)
    assert heard == [4, 5]


def test_an_earlier_format_is_refused_with_the_command_that_clears_it(filled, monkeypatch):
    monkeypatch.setattr(room, "FORMAT_VERSION", 2)
    later = Store(filled.folder)
    for act in (
        lambda: later.read_states(keys(1)),
        lambda: later.write_states(keys(1), states(1), dtype="bfloat16", about=ABOUT),
        later.ls,
        later.info,
        later.verify,
        later.compact,
        lambda: later.prune(max_bytes=0),
    ):
        with pytest.raises(StoreFormatError, match="cache prune --older-formats --store"):
            act()
    assert list(later.prune(older_formats=True, dry_run=True)["action"]) == ["would remove"]
    assert len(files(filled)) == 5
    later.prune(older_formats=True)
    later.write_states(keys(1), states(1), dtype="bfloat16", about=ABOUT)
    assert len(later.read_states(keys(1))) == 1


def test_neither_torch_nor_plotly_is_imported():
    script = "import sys, analysis_lib.store; print(sorted({'torch', 'transformers', 'plotly'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout.strip() == "[]"


# -------------------------------------------------------------------------------------------------------------- damage


def test_a_flipped_row_is_named_computed_again_and_then_used(filled):
    path = next(path for path in files(filled) if keys(1, part=2)[0].encode() in path.read_bytes())
    flip(path, -1)
    names = keys(4, part=2)
    with pytest.warns(StoreDamage, match=f"{path.name}.*checksum.*{names[3]}"):
        found = filled.read_states(names)
    assert list(found) == names[:3]
    report = filled.verify().set_index("file").loc[path.name]
    assert report["status"] == "rows fail their checksum" and report["bad_keys"] == [names[3]]
    filled.write_states(names[3:], states(4, seed=2)[3:], dtype="bfloat16", about=ABOUT)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(Store(filled.folder).read_states(names)[names[3]], states(4, seed=2)[3])


def test_a_flipped_header_is_named_and_the_same_batch_written_again_heals_it(filled):
    path = files(filled)[0]
    whole = path.read_bytes()
    meta = json.loads(json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])["__metadata__"]["analysis_lib.store.v1"])
    flip(path, whole.index(b"prompt"))
    reader = Store(filled.folder)
    with pytest.warns(StoreDamage, match=f"{path.name}.*header.*{meta['keys'][0]}.*{meta['keys'][3]}"):
        assert reader.read_states(meta["keys"]) == {}
        assert reader.info()["damaged_headers"] == 1
    seed = next(part for part in range(5) if keys(4, part=part) == meta["keys"])
    reader.write_states(meta["keys"], states(4, seed=seed), dtype="bfloat16", about=meta["about"])
    assert path.read_bytes() == whole
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(reader.read_states(meta["keys"])) == 4


@pytest.mark.parametrize("length", [0, 5, 100, -1])
def test_a_file_cut_short_is_detected(filled, length):
    path = files(filled)[0]
    path.write_bytes(path.read_bytes()[:length])
    with pytest.warns(StoreDamage, match=path.name):
        found = Store(filled.folder).read_states([key for part in range(5) for key in keys(4, part=part)])
    assert 16 <= len(found) < 20
    assert (filled.verify()["status"] != "ok").sum() == 1


def test_of_two_copies_the_first_committed_is_used_by_everybody(store):
    for value in (1, 2, 3):
        store.write_responses(keys(1), [{"response": value}], about=ABOUT)
        newest = max(files(store, "responses"), key=lambda path: path.stat().st_mtime_ns)
        os.utime(newest, ns=(value * 10**18, value * 10**18))
    assert Store(store.folder).read_responses(keys(1)) == {keys(1)[0]: {"response": 1}}
    store.compact()
    assert Store(store.folder).read_responses(keys(1)) == {keys(1)[0]: {"response": 1}}
    assert len(files(store, "responses")) == 1


# ---------------------------------------------------------------------------------------------- ls, info, prune, compact


def test_ls_and_info_tell_what_is_kept(filled):
    filled.write_responses(keys(3), [{"n": i} for i in range(3)], about={"model": "b" * 64, "model_name": "B"})
    table = filled.ls().set_index("kind")
    assert list(table["rows"]) == [3, 20] and list(table["files"]) == [1, 5]
    assert table.loc["states", "prompts"].split(", ")[0] == "none" and table.loc["states", "prompts"].count("prompt ") == 5
    assert table.loc["states", "certificates"] == '{"max_difference":0.001}' and table.loc["states", "dtype"] == "bfloat16"
    assert table["bytes"].sum() == sum(path.stat().st_size for path in filled.folder.glob("v1/[rs]*/*"))
    info = filled.info()
    assert info["states_rows"] == 20 and info["responses_rows"] == 3 and set(info["models"]) == {"a" * 64, "b" * 64}
    assert info["certificates"] == [{"model": "a" * 64, "certificate": ABOUT["certificate"]}]
    assert info["damaged_headers"] == info["unfinished_files"] == 0


def test_compact_merges_small_batches_and_loses_nothing(filled):
    names = [key for part in range(5) for key in keys(4, part=part)]
    before, reader, dates = filled.read_states(names), Store(filled.folder), [p.stat().st_mtime_ns for p in files(filled)]
    reader.read_states(names[:1])  # a reader that knows the old files
    report = filled.compact().iloc[0]
    assert (report["files_before"], report["files_after"], report["rows"], report["dropped_rows"]) == (5, 1, 20, 0)
    assert [path.stat().st_mtime_ns for path in files(filled)] == [max(dates)]
    for store in (reader, Store(filled.folder)):
        after = store.read_states(names)
        assert all(np.array_equal(after[key], before[key]) for key in names)
    assert "prompt 4" in filled.ls().loc[0, "prompts"] and filled.ls().loc[0, "model"] == "a" * 64
    assert filled.compact().empty and len(files(filled)) == 1


@pytest.mark.parametrize("moment", ["after the listing", "during the listing"])
def test_a_reader_finds_rows_that_are_compacted_under_its_hands(filled, monkeypatch, moment):
    names = [key for part in range(5) for key in keys(4, part=part)]
    time.sleep(0.02)  # longer than a tick of the file system's clock
    calls = []

    def compact_once():
        first = not calls
        calls.append(1)
        if first:
            Store(filled.folder).compact()
        return first

    read_rows, listing = room._read_rows, Store._files
    if moment == "after the listing":
        monkeypatch.setattr(room, "_read_rows", lambda *args: (compact_once(), read_rows(*args))[1])
    else:  # the old files are gone, the new one came too late to be listed
        monkeypatch.setattr(Store, "_files", lambda *args: [] if compact_once() else listing(*args))
    assert len(Store(filled.folder).read_states(names)) == 20
    assert len(files(filled)) == 1


def test_a_reader_forgets_what_another_process_pruned(filled, monkeypatch):
    names = keys(4, part=0)
    assert len(filled.read_states(names)) == 4
    Store(filled.folder).prune(max_bytes=0)
    monkeypatch.setattr(room, "_read_rows", lambda *args: pytest.fail("a file that is gone was opened"))
    assert filled.read_states(names) == {}


def test_compact_keeps_one_copy_of_a_row(store):
    store.write_states(keys(20), states(20), dtype="bfloat16", about=ABOUT)
    largest = files(store)[0].stat().st_size
    store.write_states(keys(2), states(2), dtype="bfloat16", about=ABOUT)
    store.write_states(keys(1, other=1), states(1), dtype="bfloat16", about=ABOUT)
    store.compact(max_file_bytes=int(1.5 * largest))
    assert sorted(store.verify()["rows"]) == [1, 20]


def test_compact_goes_on_where_a_killed_one_stopped(filled):
    left, names = files(filled)[0], [key for part in range(5) for key in keys(4, part=part)]
    content, stat = left.read_bytes(), left.stat()
    filled.compact()
    left.write_bytes(content)  # not yet removed
    os.utime(left, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    filled.compact()
    assert len(files(filled)) == 1 and len(filled.read_states(names)) == 20


def test_compact_keeps_models_and_dtypes_apart_and_files_below_the_limit(filled):
    filled.write_states(keys(4, other=1), states(4), dtype="float32", about=ABOUT)
    filled.write_states(keys(4, other=2), states(4), dtype="bfloat16", about=ABOUT | {"model": "b" * 64})
    largest = 2 * max(path.stat().st_size for path in files(filled))
    filled.compact(max_file_bytes=largest)
    assert len(files(filled)) == 5 and max(path.stat().st_size for path in files(filled)) <= largest
    assert filled.info()["states_rows"] == 28


def test_compact_drops_what_is_damaged_and_keeps_the_rest(filled):
    first, second = files(filled)[:2]
    flip(first, -1)
    flip(second, 20)
    with pytest.warns(StoreDamage, match=second.name):
        report = Store(filled.folder).compact()
    assert report["dropped_rows"].sum() == 1 and list(report["files_before"]) == [4, 1]
    assert list(Store(filled.folder).verify()["status"]) == ["ok"] and Store(filled.folder).info()["states_rows"] == 15


def test_prune_removes_what_meets_every_condition(filled):
    old, *young = files(filled)
    os.utime(old, (time.time() - 3 * 86400,) * 2)
    filled.write_responses(keys(1), [{}], about={"model": "b" * 64, "model_name": "B"})
    filled = Store(filled.folder)
    assert filled.prune(older_than=2, model="B").empty
    dry = filled.prune(older_than=2, dry_run=True)
    assert list(dry["file"]) == [old.name] and list(dry["action"]) == ["would remove"] and old.exists()
    assert dry["age_days"].iloc[0] == pytest.approx(3, abs=0.01)
    assert list(filled.prune(older_than=2, model="aaaa")["action"]) == ["removed"]
    assert files(filled) == young
    assert list(filled.prune(model="B")["kind"]) == ["responses"]
    filled.prune(max_bytes=2 * young[0].stat().st_size)
    assert len(files(filled)) == 2
    assert len(filled.read_states([key for part in range(5) for key in keys(4, part=part)])) == 8
    for nothing in ({}, {"model": ""}):
        with pytest.raises(ValueError, match="say what to prune"):
            filled.prune(**nothing)


@contextlib.contextmanager
def run_in_progress(folder):
    """Another process that has committed a batch, has a second one half-written, and is at work."""

    def work(report):
        store = Store(folder)
        store.write_states(keys(4, run=1), states(4), dtype="bfloat16", about=ABOUT)
        room.os.replace = lambda *paths: (report(1), time.sleep(60))
        store.write_states(keys(4, run=2), states(4), dtype="bfloat16", about=ABOUT)

    with faults.fork(work) as (child, read):
        try:
            os.read(read, 4)
            yield
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_prune_never_removes_what_a_run_is_writing(filled):
    with run_in_progress(filled.folder):
        assert filled.info()["unfinished_files"] == 1 and filled.info()["live_writers"] == 2
        actions = filled.prune(max_bytes=0)["action"]
        assert sorted(actions)[0].startswith("kept: in use by process") and len(files(filled)) == 1
        filled.write_states(keys(4), states(4), dtype="bfloat16", about=ABOUT)
        filled.compact()  # the run's rows move to another file
        assert len(files(filled)) == 1
        filled.prune(max_bytes=0)
        assert len(filled.read_states(keys(4, run=1))) == 4
        assert filled.info()["unfinished_files"] == 1
    swept = filled.prune(max_bytes=0)  # the run is dead
    assert sorted(swept["kind"].unique()) == ["states", "writing"] and not files(filled)
    assert filled.info()["unfinished_files"] == 0 and filled.info()["live_writers"] == 1


def test_ages_and_sizes_are_read_from_the_command_line():
    assert [parse_days(text) for text in ("45m", "12h", "30d", "4w", "1.5")] == [1 / 32, 0.5, 30, 28, 1.5]
    assert [parse_bytes(text) for text in ("500MB", "2gb", "1.5G", "300K", "12")] == [500e6, 2e9, 1.5e9, 300e3, 12]
    for parse, text in ((parse_days, "soon"), (parse_bytes, "-1"), (parse_bytes, "2 potatoes")):
        with pytest.raises(ValueError, match=text):
            parse(text)
