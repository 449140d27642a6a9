from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import itertools
import json
import os
import shlex
import shutil
import signal
import socket
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

from analysis_lib.store import store as room
from analysis_lib.store.store import Store, StoreDamage, StoreError, StoreFormatError, parse_bytes, parse_days, row_key

spec = importlib.util.spec_from_file_location("faults", Path(__file__).parents[1] / "bench" / "faults.py")
faults = importlib.util.module_from_spec(spec)
spec.loader.exec_module(faults)

ABOUT = {"model": "a" * 64, "model_name": "A", "prompts": ["none"], "layer": -1, "certificate": {"max_difference": 0.001}}
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
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


def test_the_place_does_not_move_with_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ANALYSIS_LIB_STORE", "from/variable")
    here = Store("here"), Store()
    for store in here:
        store.write_responses(keys(1), [{}], about=ABOUT)
    monkeypatch.chdir("/")
    assert [len(store.read_responses(keys(1))) for store in here] == [1, 1]
    assert {str(store.folder.relative_to(tmp_path)) for store in here} == {"here", "from/variable"}


@pytest.mark.parametrize("place", ["~nobody-of-this-name/x", "a\0b", "a\ud800b", "/tmp/" + "x" * 300, "x/" * 5000])
@pytest.mark.parametrize(
    "act",
    [
        lambda store: store.read_states(keys(1)),
        lambda store: store.write_responses(keys(1), [{}], about=ABOUT),
        Store.ls,
        lambda store: store.prune(max_bytes=0),
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


def test_the_command_that_clears_an_earlier_format_is_quoted_and_clears_nothing_else(store, tmp_path):
    place = Store(tmp_path / "my store; $(x)")
    place.write_responses(keys(1), [{}], about=ABOUT)
    (place.folder / "v0").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").write_text("")
    with pytest.raises(StoreFormatError) as refused:
        place.ls()
    command = shlex.split(str(refused.value).partition("`")[2].partition("`")[0])
    assert command[-2:] == ["--store", str(place.folder)]
    for more in ({"older_than": 30}, {"model": "A"}, {"max_bytes": 0}):
        with pytest.raises(ValueError, match="without another condition"):
            place.prune(older_formats=True, **more)
    place.prune(older_formats=True)
    assert (tmp_path / "elsewhere" / "file").exists() and len(place.read_responses(keys(1))) == 1


def test_a_newer_format_is_told_of(filled):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        filled.ls()
    for name in ("v2", "v10"):
        (filled.folder / name).mkdir()
    (filled.folder / "v3").write_text("no folder")
    assert filled.info()["newer_formats"] == ["v2", "v10"]
    with pytest.warns(UserWarning, match="v2 is of a newer format.*update"):
        assert filled.ls()["rows"].item() == 20


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
    assert report["status"].startswith("rows fail their checksum") and report["bad_keys"] == [names[3]]
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


def checksum(row):
    return hashlib.sha256(json.dumps({"key": keys(1)[0], "row": row}, separators=(",", ":")).encode() + b"\n").hexdigest()


RIVALS = sorted(({"response": value} for value in (1, 2, 3)), key=checksum)


@pytest.mark.parametrize("large", range(3))
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_of_several_copies_everybody_uses_the_one_with_the_smallest_checksum(store, order, large):
    """Whatever their times, what is written again, which lie in files that compaction leaves alone, and after it."""

    def used():
        return Store(store.folder).read_responses(keys(1))[keys(1)[0]]

    for i in order:
        names, rows = keys(1), [RIVALS[i]]
        if i == large:
            names, rows = [*names, row_key(other=1)], [*rows, {"response": "x" * 50_000}]
        before = files(store, "responses") if store.folder.exists() else []
        store.write_responses(names, rows, about=ABOUT)
        (new,) = {*files(store, "responses")} - {*before}
        os.utime(new, ns=((order.index(i) + 1) * 10**18,) * 2)
        assert store.read_responses(keys(1)) == {keys(1)[0]: RIVALS[min(order[: order.index(i) + 1])]}
    for i in order:
        if i != large:
            store.write_responses(keys(1), [RIVALS[i]], about=ABOUT)
        assert used() == RIVALS[0]
    store.compact(max_file_bytes=60_000)
    assert used() == RIVALS[0]
    store.compact()
    assert used() == RIVALS[0] and len(files(store, "responses")) == 1


def test_stores_merged_in_any_order_and_without_their_times_hold_the_same(store, tmp_path):
    for i in (2, 0, 1):
        store.write_responses(keys(1), [RIVALS[i]], about=ABOUT)
    for order in itertools.permutations(files(store, "responses")):
        merged = Store(tmp_path / "".join(path.name[:3] for path in order))
        (merged.folder / "v1" / "responses").mkdir(parents=True)
        for path in order:
            shutil.copy(path, merged.folder / "v1" / "responses")  # with a new time
        assert merged.read_responses(keys(1)) == {keys(1)[0]: RIVALS[0]}


def test_a_damaged_copy_gives_way_to_the_next_smallest(store):
    for i in (1, 2, 0):
        store.write_responses(keys(1), [RIVALS[i]], about=ABOUT)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for damaged in range(2):
            path = next(p for p in files(store, "responses") if f'"response":{RIVALS[damaged]["response"]}' in p.read_text())
            flip(path, -2)
            assert Store(store.folder).read_responses(keys(1)) == {keys(1)[0]: RIVALS[damaged + 1]}
    store.compact()
    assert store.read_responses(keys(1)) == {keys(1)[0]: RIVALS[2]} and list(store.verify()["status"]) == ["ok"]


@pytest.mark.parametrize("order", [("bfloat16", "float16"), ("float16", "bfloat16")])
def test_copies_with_the_same_bytes_in_two_dtypes_are_told_apart(store, order):
    bits = np.array([[0x3C00, 0x4000]], np.uint16)
    copies = {"float16": bits.view(np.float16).astype(np.float32), "bfloat16": (bits.astype(np.uint32) << 16).view(np.float32)}
    for dtype in order:
        store.write_states(keys(1), copies[dtype], dtype=dtype, about=ABOUT)
        first = store.read_states(keys(1))[keys(1)[0]]
        assert np.array_equal(first, copies[min(order[: order.index(dtype) + 1])][0])
    store.compact()
    assert np.array_equal(Store(store.folder).read_states(keys(1))[keys(1)[0]], copies["bfloat16"][0])


def forged(folder, kind, head, body=b""):
    """A file as another program may have made it: its name fits its header."""
    path = folder / "v1" / kind / (hashlib.sha256(head).hexdigest() + {"states": ".safetensors", "responses": ".jsonl"}[kind])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(head + body)
    return path


def responses_head(**changed):
    meta = {"keys": keys(1), "sha256": [hashlib.sha256(b"abcde").hexdigest()], "sizes": [5], "about": {}} | changed
    return json.dumps({"analysis_lib.store.v1": meta}).encode() + b"\n"


def states_head(tensor=(), **changed):
    meta = {"keys": keys(1), "sha256": [hashlib.sha256(b"a" * 12).hexdigest()], "about": {}} | changed
    tensor = {"dtype": "F32", "shape": [1, 3], "data_offsets": [0, 12]} | dict(tensor)
    head = json.dumps({"__metadata__": {"analysis_lib.store.v1": json.dumps(meta)}, "states": tensor}).encode()
    return len(head).to_bytes(8, "little") + head


def nested(depth):
    return json.loads("[" * depth + "]" * depth)


MALFORMED = {
    "nested without end": ("responses", b"[" * 100_000 + b"\n"),
    "a list": ("responses", b"[1]\n"),
    "not JSON": ("responses", b"hello\n"),
    "a list in a list": ("responses", b'{"analysis_lib.store.v1": [[]]}\n'),
    "about a list": ("responses", responses_head(about=[])),
    "about too deep": ("responses", responses_head(about={"model": nested(300)})),
    "keys of lists": ("responses", responses_head(keys=[[1]])),
    "keys a dict": ("responses", responses_head(keys={keys(1)[0]: 0})),
    "keys of other letters": ("responses", responses_head(keys=["X" * 64])),
    "two keys in one": ("responses", responses_head(keys=[" ".join(keys(2)), keys(3)[2]], sha256=["0" * 64] * 2, sizes=[5] * 2)),
    "a key twice": ("responses", responses_head(keys=keys(1) * 2, sha256=["0" * 64] * 2, sizes=[5] * 2)),
    "no keys": ("responses", responses_head(keys=[], sha256=[], sizes=[])),
    "few checksums": ("responses", responses_head(sha256=[])),
    "checksums of numbers": ("responses", responses_head(sha256=[1])),
    "few sizes": ("responses", responses_head(sizes=[])),
    "sizes of strings": ("responses", responses_head(sizes=["a"])),
    "a negative size": ("responses", responses_head(sizes=[-5])),
    "a size of a fraction": ("responses", responses_head(sizes=[5.0])),
    "sizes a number": ("responses", responses_head(sizes=5)),
    "one dimension": ("states", states_head({"shape": [3]})),
    "three dimensions": ("states", states_head({"shape": [1, 3, 1]})),
    "a shape of strings": ("states", states_head({"shape": [1, "3"]})),
    "a negative width": ("states", states_head({"shape": [1, -4], "data_offsets": [0, -16]})),
    "no width": ("states", states_head({"shape": [1, 0], "data_offsets": [0, 0]})),
    "a width of a fraction": ("states", states_head({"shape": [1, 3.0]})),
    "other rows than keys": ("states", states_head({"shape": [2, 3]})),
    "offsets of another tensor": ("states", states_head({"data_offsets": [12, 24]})),
    "another dtype": ("states", states_head({"dtype": ["F32"]})),
    "metadata a dict": ("states", (8).to_bytes(8, "little") + b'{"a": 1}'),
}


@pytest.fixture
def two_rows(store):
    store.write_responses(keys(1, sound=1), [{"n": 1}], about=ABOUT)
    store.write_states(keys(1, sound=1), states(1), dtype="bfloat16", about=ABOUT)
    return store


def everything_goes_on(folder):
    """Each command on a fresh store; what `compact` leaves to `verify`."""
    for read in (Store(folder).read_states, Store(folder).read_responses):
        assert list(read([*keys(1), *keys(1, sound=1)])) == keys(1, sound=1)
    assert sorted(Store(folder).ls()["kind"].unique()) == ["responses", "states"]
    assert Store(folder).prune(max_bytes=10**9).empty
    assert Store(folder).info()["states_files"] > 0
    Store(folder).compact()
    return Store(folder).verify().set_index("file")["status"]


@pytest.mark.parametrize("case", MALFORMED)
@pytest.mark.filterwarnings("ignore::analysis_lib.store.StoreDamage")
def test_a_header_of_another_program_stops_nothing_and_compact_drops_it(two_rows, case):
    kind, head = MALFORMED[case]
    path = forged(two_rows.folder, kind, head, b"abcde" if kind == "responses" else b"a" * 12)
    with pytest.warns(StoreDamage, match=f"{path.name}: not a batch of this store.*cache compact` drops"):
        Store(two_rows.folder).info()
    assert Store(two_rows.folder).verify().set_index("file").loc[path.name, "status"].startswith("not a batch of this store")
    assert list(everything_goes_on(two_rows.folder)) == ["ok", "ok"] and not path.exists()


SOUND = {"key": keys(1)[0], "row": {}}


@pytest.mark.parametrize(
    "body",
    [b"abcde", b"[" * 100_000, json.dumps([SOUND]).encode(), json.dumps(SOUND | {"row": []}).encode(), b'{"row":{}}']
    + [json.dumps(SOUND | {"key": "another"}).encode(), b""],
    ids=["not JSON", "nested without end", "a list", "row a list", "no key", "another key", "cut off"],
)
@pytest.mark.filterwarnings("ignore::analysis_lib.store.StoreDamage")
def test_a_response_that_is_none_is_a_damaged_row(two_rows, body):
    """Though its checksum fits; a sound copy is used instead."""
    head = responses_head(sha256=[hashlib.sha256(body).hexdigest()], sizes=[max(1, len(body))])
    path = forged(two_rows.folder, "responses", head, body)
    content = path.read_bytes()
    with pytest.warns(StoreDamage, match=f"{path.name}: rows fail.*none of this store.*{keys(1)[0]}"):
        assert two_rows.read_responses(keys(1)) == {}
    assert list(everything_goes_on(two_rows.folder)) == ["ok", "ok"] and not path.exists()
    path.write_bytes(content)
    two_rows.write_responses(keys(1), [{"sound": True}], about=ABOUT)
    assert Store(two_rows.folder).read_responses(keys(1)) == {keys(1)[0]: {"sound": True}}


def test_a_well_formed_header_of_another_program_is_taken(store):
    """What the malformed ones above differ from."""
    forged(store.folder, "states", states_head(), b"a" * 12)
    forged(store.folder, "responses", responses_head(), b"abcde")
    assert store.info()["states_rows"] == store.info()["responses_rows"] == 1
    assert store.read_states(keys(1))[keys(1)[0]].tobytes() == b"a" * 12


def test_a_header_that_promises_more_than_there_is_takes_no_memory(two_rows):
    forged(two_rows.folder, "responses", responses_head(sizes=[10**15]), b"abcde")
    width = 10**14
    forged(two_rows.folder, "states", states_head({"shape": [1, width], "data_offsets": [0, 4 * width]}), b"a" * 12)
    with pytest.warns(StoreDamage, match="rows fail"):
        assert list(everything_goes_on(two_rows.folder)) == ["ok", "ok"]


def make_fifo(path):
    os.mkfifo(path)


def make_socket(path):
    at = os.open(path.parent, os.O_RDONLY)  # the names of sockets are short
    try:
        socket.socket(socket.AF_UNIX).bind(f"/proc/self/fd/{at}/{path.name}")
    finally:
        os.close(at)


@contextlib.contextmanager
def at_most(seconds):
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail(f"still waiting after {seconds} s"))
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@needs_fork
@needs_proc
@pytest.mark.filterwarnings("ignore::analysis_lib.store.StoreDamage")
@pytest.mark.parametrize(
    "make",
    [make_fifo, make_socket, Path.mkdir, lambda path: path.symlink_to("/dev/zero"), lambda path: path.symlink_to("/nowhere/x")],
    ids=["pipe", "socket", "folder", "device", "dangling link"],
)
@pytest.mark.parametrize("kind", ["states", "responses"])
def test_what_is_no_file_is_told_of_and_left_alone(two_rows, kind, make):
    path = two_rows.folder / "v1" / kind / ("f" * 64 + {"states": ".safetensors", "responses": ".jsonl"}[kind])
    make(path)
    make_fifo(two_rows.folder / "v1" / "writing" / "host.1.journal")
    with at_most(20):
        with pytest.warns(StoreDamage, match=f"{path.name}: is (no regular file|a link to nothing).*move it out") as warned:
            assert Store(two_rows.folder).info()["damaged_headers"] == 1
        assert "drops" not in str(warned[0].message)  # compact cannot
        left = everything_goes_on(two_rows.folder)
        assert len(left) == 3 and left[path.name] in ("is no regular file", "is a link to nothing")
        reader = Store(two_rows.folder)
        reader.read_states(keys(1)), reader.read_responses(keys(1))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            reader.read_states(keys(1)), reader.read_responses(keys(1))  # is told of once


# ---------------------------------------------------------------------------------------------- ls, info, prune, compact


def test_ls_and_info_tell_what_is_kept(filled):
    filled.write_responses(keys(3), [{"n": i} for i in range(3)], about={"model": "b" * 64, "model_name": "B"})
    table = filled.ls().set_index("kind")
    assert list(table["rows"]) == [3, 20] and list(table["files"]) == [1, 5]
    assert table.loc["states", "prompts"].split(", ")[0] == "none" and table.loc["states", "prompts"].count("prompt ") == 5
    assert table.loc["states", "dtype"] == "bfloat16"
    assert table["bytes"].sum() == sum(path.stat().st_size for path in filled.folder.glob("v1/[rs]*/*"))
    info = filled.info()
    assert info["states_rows"] == 20 and info["responses_rows"] == 3 and set(info["models"]) == {"a" * 64, "b" * 64}
    assert info["damaged_headers"] == info["unfinished_files"] == 0


def test_ls_and_info_sum_up_the_certificates_of_a_model(filled):
    """Those of another program are left out, and the layers of one batch share theirs."""
    assert filled.ls()["certificates"].item() == "" and filled.info()["certificates"] == []
    for i in range(30):
        certificate = {"way": "tree" if i % 2 else "plain", "checked": 2, "max_abs": i / 1000, "max_rel": (30 - i) / 7}
        for layer in (0, 1):
            about = ABOUT | {"layer": layer, "certificate": certificate}
            filled.write_states(keys(1, batch=i, layer=layer), states(1, seed=i), dtype="bfloat16", about=about)
    bad = {"way": "tree", "checked": "many", "max_abs": None, "max_rel": []}
    filled.write_states(keys(1, other=1), states(1), dtype="bfloat16", about={"model": "b", "certificate": bad})
    expected = {"checked": 60, "max_abs": 0.029, "max_rel": 30 / 7}
    for _ in range(2):
        cells = filled.ls().set_index("model")["certificates"]
        assert cells["a" * 64].partition(":")[2] == " 60 checked, max_abs 0.029, max_rel 4.29" and cells["b"] == ""
        (found,) = filled.info()["certificates"]
        assert found["model"] == "a" * 64 and found["certificate"].items() >= expected.items()
        assert sorted(found["certificate"]["way"].split(", ")) == ["plain", "tree"]
        filled.compact()


def test_ls_shows_dates_that_nanoseconds_cannot_count(filled):
    os.utime(files(filled)[0], (10**10,) * 2)
    if files(filled)[0].stat().st_mtime != 10**10:
        pytest.skip("nor can this file system")
    assert filled.ls()["last_written"].item().year == 2286


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


def test_prune_knows_a_model_by_each_of_its_names(filled):
    filled.write_states(keys(1, other=1), states(1), dtype="bfloat16", about=ABOUT | {"model_name": "another name"})
    filled.compact()
    for name in ("A", "another name", "aaaa"):
        assert list(filled.prune(model=name, dry_run=True)["rows"]) == [21]
    with pytest.raises(StoreError, match="nothing of a model 'a name'; it has A, another name$"):
        filled.prune(model="a name")


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


def test_discard_removes_batches_of_nothing_but_these_rows(store):
    store.write_states(keys(2), states(2), dtype="bfloat16", about=ABOUT)
    store.write_responses(keys(1), [{"a": 1}], about=ABOUT)
    store.write_states(keys(3, run=1), states(3), dtype="bfloat16", about=ABOUT)
    store.discard([*keys(2), *keys(2, run=1)])
    assert store.read_states([*keys(2), *keys(3, run=1)]).keys() == set(keys(3, run=1)) and not store.read_responses(keys(1))
    store.discard(keys(3, run=1))
    assert store.ls().empty


@needs_fork
def test_discard_leaves_what_another_process_has_committed(store):
    with run_in_progress(store.folder):
        store.discard(keys(4, run=1))
        assert len(store.read_states(keys(4, run=1))) == 4


@needs_fork
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


@contextlib.contextmanager
def process():
    """(process id, when it was started) of a process that does nothing."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        yield child.pid, room._started(child.pid)


def journal(store, host, process, days=0.0, content=None):
    """A journal that names every batch there is, as the process would have left it; the file."""
    path = store.folder / "v1" / "writing" / f"{host}.{process}.journal"
    path.write_bytes("\n".join(path.name for path in files(store)).encode() if content is None else content)
    os.utime(path, (time.time() - days * 86400,) * 2)
    return path


@needs_proc
def test_a_process_is_told_from_a_later_one_with_its_id_and_its_own_machine_from_its_namesake(filled):
    here, there = room._host(), room._host().replace(Path("/proc/sys/kernel/random/boot_id").read_text()[:8], "otherone")
    assert here != there and room._started(os.getpid()) >= room._started(1)
    with process() as (pid, start):
        for host, name, days, alive in [
            (here, f"{pid}-{start}", 0, True),
            (here, f"{pid}-{start}", 400, True),  # a long computation between two commits
            (here, f"{pid}-{start - 1}", 0, False),  # an earlier process had this id
            (here, f"{10**25}-1", 0, False),
            (there, f"{pid}-{start - 1}", 0.9, True),  # cannot be asked
            (there, f"{10**25}-1", 0.9, True),
            (there, f"{pid}-{start}", 1.1, False),
        ]:
            path = journal(filled, host, name, days)
            actions = {*filled.prune(max_bytes=0, dry_run=True).query("kind == 'states'")["action"]}
            kept = f"kept: in use by process {name.partition('-')[0]} on {host}"
            assert actions == ({kept} if alive else {"would remove"}), (host, name, days)
            path.unlink()
        path = journal(filled, here, f"{pid}-{start}", 400)
    assert "writing" in {*filled.prune(max_bytes=0)["kind"]} and not path.exists() and not files(filled)


@needs_proc
def test_without_proc_a_living_process_is_at_work(filled, monkeypatch):
    with process() as (pid, start):
        monkeypatch.setattr(room, "_started", lambda pid: 0)
        path = journal(filled, room._host(), f"{pid}-{start}", days=400)
        assert room._alive(path)
    assert not room._alive(path)


@needs_fork
@needs_proc
def test_a_killed_process_that_nobody_waited_for_is_dead(filled):
    with faults.fork(lambda report: (report(1), time.sleep(60))) as (child, read):
        os.read(read, 4)
        path = journal(filled, room._host(), f"{child}-{room._started(child)}")
        assert room._alive(path)
        os.kill(child, signal.SIGKILL)
        os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
        assert not room._alive(path)
        os.waitpid(child, 0)


@needs_fork
def test_a_line_that_a_full_disk_cut_off_spoils_no_later_one(store):
    def work(report):
        run = Store(store.folder)
        run.write_responses(keys(1), [{}], about=ABOUT)
        (path,) = (store.folder / "v1" / "writing").glob("*.journal")
        with open(path, "ab") as lines:
            lines.write(b"\xff" + b"0" * 30)
        run.write_states(keys(1), states(1), dtype="bfloat16", about=ABOUT)
        report(1)
        time.sleep(60)

    with faults.fork(work) as (child, read):
        try:
            os.read(read, 4)
            actions = store.prune(max_bytes=0)["action"]
            assert len(actions) == 2 and all(action.startswith(f"kept: in use by process {child}") for action in actions)
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    assert not store.prune(max_bytes=0).empty and store.info()["bytes"] == 0


def test_ages_and_sizes_are_read_from_the_command_line():
    assert [parse_days(text) for text in ("45m", "12h", "30d", "4w", "1.5")] == [1 / 32, 0.5, 30, 28, 1.5]
    assert [parse_bytes(text) for text in ("500MB", "2gb", "1.5G", "300K", "12")] == [500e6, 2e9, 1.5e9, 300e3, 12]
    for parse, text in ((parse_days, "soon"), (parse_bytes, "-1"), (parse_bytes, "2 potatoes")):
        with pytest.raises(ValueError, match=text):
            parse(text)
    with pytest.raises(ValueError, match="no store is that large; write 500MB"):
        parse_bytes("9" * 400)
