"""The checkpoint of a training: whole, bit for bit, replaced by the next one, damage named."""

from __future__ import annotations

import json
import os
import time
import warnings

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors import safe_open
from stores import ABOUT, files, flip, keys

from analysis_lib.store import checkpoints, upkeep
from analysis_lib.store import files as writing
from analysis_lib.store.batches import StoreDamage, StoreError, row_key
from analysis_lib.store.store import Store
from analysis_lib.store.upkeep import compact, info, ls, prune, verify

KEY = row_key(training="a")
TENSORS = {
    "soft": np.arange(12, dtype=np.float32).reshape(3, 4),
    "moments": np.linspace(-1, 1, 24).reshape(2, 3, 4),
    "step": np.array(7.0),
}


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


@pytest.fixture
def kept(store):
    store.write_checkpoint(KEY, TENSORS, ABOUT | {"layer": "checkpoint", "epoch": 3})
    return store


def the_file(store):
    (path,) = files(store, "checkpoints")
    return path


def same(one, other):
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype
        and one[name].shape == other[name].shape
        and one[name].tobytes() == other[name].tobytes()
        for name in one
    )


arrays = st.sampled_from([np.float32, np.float64]).flatmap(
    lambda dtype: hnp.array_shapes(min_dims=0, min_side=0, max_dims=3).flatmap(
        lambda shape: hnp.arrays(f"u{np.dtype(dtype).itemsize}", shape).map(
            lambda bits: bits.view(dtype)
        )
    )
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(
    st.dictionaries(st.text().filter(lambda name: name != "__metadata__"), arrays, max_size=4),
    st.dictionaries(st.text(), json_values, max_size=4),
)
def test_tensors_and_about_come_back_bit_by_bit(tmp_path, tensors, about):
    folder = tmp_path / str(time.monotonic_ns())
    Store(folder).write_checkpoint(KEY, tensors, about)
    found = Store(folder).read_checkpoint(KEY)
    assert same(found[0], tensors) and found[1] == about


def test_arrays_in_another_order_come_back_as_they_read(store):
    tensors = {"a": np.arange(6.0).reshape(2, 3).T, "b": np.arange(9.0, dtype=np.float32)[::2]}
    store.write_checkpoint(KEY, tensors, {})
    found, _ = store.read_checkpoint(KEY)
    assert same(found, tensors)
    found["a"][0] = 5  # the caller's own
    assert same(store.read_checkpoint(KEY)[0], tensors)


def test_the_next_one_takes_its_place_and_others_keep_theirs(kept):
    other = row_key(training="b")
    kept.write_checkpoint(other, {"soft": np.zeros(2, np.float32)}, {"n": 1})
    again = {"soft": np.ones((5, 4), np.float32)}
    Store(kept.folder).write_checkpoint(KEY, again, {"epoch": 4})
    found = kept.read_checkpoint(KEY)
    assert same(found[0], again) and found[1] == {"epoch": 4}
    assert kept.read_checkpoint(other)[1] == {"n": 1}
    assert {path.name for path in files(kept, "checkpoints")} == {
        f"{key}.safetensors" for key in (KEY, other)
    }


def test_without_one_there_is_none(store):
    assert store.read_checkpoint(KEY) is None
    store.drop_checkpoint(KEY)
    assert not store.folder.exists()


def test_a_dropped_one_is_gone(kept):
    kept.drop_checkpoint(KEY)
    assert kept.read_checkpoint(KEY) is None and files(kept, "checkpoints") == []


def test_the_file_is_plain_and_other_programs_read_it(kept):
    with safe_open(the_file(kept), framework="np") as file:
        assert same({name: file.get_tensor(name) for name in file.keys()}, TENSORS)  # noqa: SIM118
        meta = json.loads(file.metadata()["analysis_lib.store.v1"])
    assert meta["about"]["epoch"] == 3 and meta["key"] == KEY and len(meta["sha256"]) == 64


@pytest.mark.parametrize(
    ("tensors", "about", "message"),
    [
        ({"a": np.zeros(2, np.float16)}, {}, "'a' is float16; give float32 or float64"),
        ({"a": np.zeros(2, ">f4")}, {}, "'a' is >f4; give float32 or float64"),
        ({"a": [1.0]}, {}, "'a' is list; give float32 or float64 arrays"),
        ({"__metadata__": np.zeros(2)}, {}, "cannot name a tensor"),
        ({1: np.zeros(2)}, {}, "cannot name a tensor"),
        ({}, {"a": (1,)}, "changes in JSON"),
        ({}, {"a": float("nan")}, "must be JSON"),
        ({}, {"a": np.float32(1)}, "must be JSON"),
    ],
)
def test_what_would_not_come_back_is_refused_and_the_last_one_stays(kept, tensors, about, message):
    with pytest.raises(ValueError, match=message):
        kept.write_checkpoint(KEY, tensors, about)
    assert same(kept.read_checkpoint(KEY)[0], TENSORS)


def test_what_is_no_key_is_refused(store):
    for act in (
        lambda key: store.write_checkpoint(key, TENSORS, {}),
        store.read_checkpoint,
        store.drop_checkpoint,
    ):
        for key in ("../../states/x", "a" * 63, "A" * 64, 7):
            with pytest.raises(ValueError, match="make keys with row_key"):
                act(key)
    assert not store.folder.exists()


def test_a_full_disk_is_told_and_the_last_one_stays(kept, monkeypatch):
    def full(*paths):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing.os, "replace", full)
    with pytest.raises(StoreError, match="no space is left"):
        kept.write_checkpoint(KEY, {}, {})
    assert same(kept.read_checkpoint(KEY)[0], TENSORS) and info(kept)["unfinished_files"] == 0


# ----------------------------------------------------------------------------------------- damage


def test_every_flipped_byte_is_detected(store):
    store.write_checkpoint(KEY, {"a": np.ones(3, np.float32)}, {"b": 1})
    path = the_file(store)
    whole = path.read_bytes()
    for at in range(len(whole)):
        flip(path, at)
        with pytest.warns(StoreDamage, match=f"{path.name}: content does not match.*{KEY}"):
            assert store.read_checkpoint(KEY) is None
        path.write_bytes(whole)
    assert store.read_checkpoint(KEY)[1] == {"b": 1}


@pytest.mark.parametrize("length", [0, 5, 100, 150, -1])
def test_one_cut_short_is_detected_and_replaced(kept, length):
    path = the_file(kept)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.warns(StoreDamage, match=path.name):
        assert kept.read_checkpoint(KEY) is None
    kept.write_checkpoint(KEY, TENSORS, ABOUT)
    assert same(kept.read_checkpoint(KEY)[0], TENSORS)


def test_one_with_bytes_too_many_is_detected(kept):
    with open(the_file(kept), "ab") as file:
        file.write(b"\0")
    with pytest.warns(StoreDamage, match="content does not match"):
        assert kept.read_checkpoint(KEY) is None


def test_one_under_another_trainings_name_is_refused(kept):
    the_file(kept).rename(checkpoints.path_of(kept.root, keys(1)[0]))
    with pytest.warns(StoreDamage, match="not a checkpoint of this store.*another training's name"):
        assert kept.read_checkpoint(keys(1)[0]) is None


def test_what_is_no_file_is_told_of(kept):
    path = the_file(kept)
    path.unlink()
    os.mkfifo(path)
    with pytest.warns(StoreDamage, match="is no regular file.*move it out"):
        assert kept.read_checkpoint(KEY) is None


# ----------------------------------------------------------------------------------------- upkeep


def test_upkeep_knows_them(kept):
    kept.write_responses(keys(1), [{}], about=ABOUT)
    row = ls(kept).set_index("kind").loc["checkpoints"]
    assert (row["rows"], row["files"], row["layers"]) == (1, 1, "checkpoint")
    assert row["dtype"] == "float32, float64" and row["model_name"] == "A"
    told = info(kept)
    assert told["checkpoints_files"] == told["checkpoints_rows"] == 1
    assert told["checkpoints_bytes"] == the_file(kept).stat().st_size
    assert told["bytes"] == told["checkpoints_bytes"] + told["responses_bytes"]
    assert list(verify(kept)["status"]) == ["ok", "ok"]
    assert "checkpoints" not in set(compact(kept, spare=0)["kind"])


def test_upkeep_tells_of_a_damaged_one_and_compact_drops_it_after_a_day(kept):
    flip(path := the_file(kept), -1)
    report = verify(kept).iloc[0]
    assert report["kind"] == "checkpoints" and report["status"].startswith("content does not match")
    with pytest.warns(StoreDamage, match=f"{path.name}.*{KEY}"):
        assert ls(kept).empty
    with pytest.warns(StoreDamage):
        assert info(kept)["damaged_headers"] == 1
    with pytest.warns(StoreDamage):
        assert compact(kept).empty and path.exists()
    os.utime(path, (time.time() - 2 * upkeep.DAY,) * 2)
    with pytest.warns(StoreDamage):
        assert list(compact(kept)["kind"]) == ["checkpoints"] and not path.exists()


def test_prune_removes_them_by_age_and_model(kept):
    path = the_file(kept)
    assert list(prune(kept, model="A")["action"]) == ["kept: younger than a day"]
    os.utime(path, (time.time() - 40 * upkeep.DAY,) * 2)
    assert prune(kept, older_than=41).empty
    report = prune(kept, older_than=30, model="A").iloc[0]
    assert (report["kind"], report["rows"], report["action"]) == ("checkpoints", 1, "removed")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kept.read_checkpoint(KEY) is None
