"""Damage is named, and what is sound is used: flipped bytes, files of other programs, odd files."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import shutil
import signal
import socket
import warnings
from pathlib import Path

import numpy as np
import pytest
from stores import ABOUT, files, filled_store, flip, keys, needs_fork, needs_proc, states

from analysis_lib.store.batches import StoreDamage, row_key
from analysis_lib.store.store import Store
from analysis_lib.store.upkeep import compact, info, ls, prune, verify


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


@pytest.fixture
def filled(tmp_path):
    return filled_store(tmp_path / "store")


def test_a_flipped_row_is_named_computed_again_and_then_used(filled):
    path = next(path for path in files(filled) if keys(1, part=2)[0].encode() in path.read_bytes())
    flip(path, -1)
    names = keys(4, part=2)
    with pytest.warns(StoreDamage, match=f"{path.name}.*checksum.*{names[3]}"):
        found = filled.read_states(names)
    assert list(found) == names[:3]
    report = verify(filled).set_index("file").loc[path.name]
    assert report["status"].startswith("rows fail their checksum") and report["bad_keys"] == [
        names[3]
    ]
    filled.write_states(names[3:], states(4, seed=2)[3:], dtype="bfloat16", about=ABOUT)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(
            Store(filled.folder).read_states(names)[names[3]], states(4, seed=2)[3]
        )


def test_a_flipped_header_is_named_and_the_same_batch_written_again_heals_it(filled):
    path = files(filled)[0]
    whole = path.read_bytes()
    meta = json.loads(
        json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])["__metadata__"][
            "analysis_lib.store.v1"
        ]
    )
    flip(path, whole.index(b"prompt"))
    reader = Store(filled.folder)
    with pytest.warns(
        StoreDamage, match=f"{path.name}.*header.*{meta['keys'][0]}.*{meta['keys'][3]}"
    ):
        assert reader.read_states(meta["keys"]) == {}
        assert info(reader)["damaged_headers"] == 1
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
        found = Store(filled.folder).read_states(
            [key for part in range(5) for key in keys(4, part=part)]
        )
    assert 16 <= len(found) < 20
    assert (verify(filled)["status"] != "ok").sum() == 1


def checksum(row):
    return hashlib.sha256(
        json.dumps({"key": keys(1)[0], "row": row}, separators=(",", ":")).encode() + b"\n"
    ).hexdigest()


RIVALS = sorted(({"response": value} for value in (1, 2, 3)), key=checksum)


@pytest.mark.parametrize("large", range(3))
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_of_several_copies_everybody_uses_the_one_with_the_smallest_checksum(store, order, large):
    """Whatever their times, what is written again, and which lie in files that compaction leaves.

    And after it.
    """

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
        assert store.read_responses(keys(1)) == {
            keys(1)[0]: RIVALS[min(order[: order.index(i) + 1])]
        }
    for i in order:
        if i != large:
            store.write_responses(keys(1), [RIVALS[i]], about=ABOUT)
        assert used() == RIVALS[0]
    compact(store, spare=0, max_file_bytes=60_000)
    assert used() == RIVALS[0]
    compact(store, spare=0)
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
            path = next(
                p
                for p in files(store, "responses")
                if f'"response":{RIVALS[damaged]["response"]}' in p.read_text()
            )
            flip(path, -2)
            assert Store(store.folder).read_responses(keys(1)) == {keys(1)[0]: RIVALS[damaged + 1]}
    compact(store, spare=0)
    assert store.read_responses(keys(1)) == {keys(1)[0]: RIVALS[2]} and list(
        verify(store)["status"]
    ) == ["ok"]


@pytest.mark.parametrize("order", [("bfloat16", "float16"), ("float16", "bfloat16")])
def test_copies_with_the_same_bytes_in_two_dtypes_are_told_apart(store, order):
    bits = np.array([[0x3C00, 0x4000]], np.uint16)
    copies = {
        "float16": bits.view(np.float16).astype(np.float32),
        "bfloat16": (bits.astype(np.uint32) << 16).view(np.float32),
    }
    for dtype in order:
        store.write_states(keys(1), copies[dtype], dtype=dtype, about=ABOUT)
        first = store.read_states(keys(1))[keys(1)[0]]
        assert np.array_equal(first, copies[min(order[: order.index(dtype) + 1])][0])
    compact(store, spare=0)
    assert np.array_equal(
        Store(store.folder).read_states(keys(1))[keys(1)[0]], copies["bfloat16"][0]
    )


def forged(folder, kind, head, body=b""):
    """A file as another program may have made it: its name fits its header."""
    path = (
        folder
        / "v1"
        / kind
        / (
            hashlib.sha256(head).hexdigest()
            + {"states": ".safetensors", "responses": ".jsonl"}[kind]
        )
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(head + body)
    return path


def responses_head(**changed):
    meta = {
        "keys": keys(1),
        "sha256": [hashlib.sha256(b"abcde").hexdigest()],
        "sizes": [5],
        "about": {},
    } | changed
    return json.dumps({"analysis_lib.store.v1": meta}).encode() + b"\n"


def states_head(tensor=(), **changed):
    meta = {
        "keys": keys(1),
        "sha256": [hashlib.sha256(b"a" * 12).hexdigest()],
        "about": {},
    } | changed
    tensor = {"dtype": "F32", "shape": [1, 3], "data_offsets": [0, 12]} | dict(tensor)
    head = json.dumps(
        {"__metadata__": {"analysis_lib.store.v1": json.dumps(meta)}, "states": tensor}
    ).encode()
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
    "two keys in one": (
        "responses",
        responses_head(keys=[" ".join(keys(2)), keys(3)[2]], sha256=["0" * 64] * 2, sizes=[5] * 2),
    ),
    "a key twice": (
        "responses",
        responses_head(keys=keys(1) * 2, sha256=["0" * 64] * 2, sizes=[5] * 2),
    ),
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
    assert sorted(ls(Store(folder))["kind"].unique()) == ["responses", "states"]
    assert prune(Store(folder), spare=0, max_bytes=10**9).empty
    assert info(Store(folder))["states_files"] > 0
    compact(Store(folder), spare=0)
    return verify(Store(folder)).set_index("file")["status"]


@pytest.mark.parametrize("case", MALFORMED)
@pytest.mark.filterwarnings("ignore::analysis_lib.store.batches.StoreDamage")
def test_a_header_of_another_program_stops_nothing_and_compact_drops_it(two_rows, case):
    kind, head = MALFORMED[case]
    path = forged(two_rows.folder, kind, head, b"abcde" if kind == "responses" else b"a" * 12)
    with pytest.warns(
        StoreDamage, match=f"{path.name}: not a batch of this store.*cache compact` drops"
    ):
        info(Store(two_rows.folder))
    assert (
        verify(Store(two_rows.folder))
        .set_index("file")
        .loc[path.name, "status"]
        .startswith("not a batch of this store")
    )
    assert list(everything_goes_on(two_rows.folder)) == ["ok", "ok"] and not path.exists()


SOUND = {"key": keys(1)[0], "row": {}}


@pytest.mark.parametrize(
    "body",
    [
        b"abcde",
        b"[" * 100_000,
        json.dumps([SOUND]).encode(),
        json.dumps(SOUND | {"row": []}).encode(),
        b'{"row":{}}',
    ]
    + [json.dumps(SOUND | {"key": "another"}).encode(), b""],
    ids=[
        "not JSON",
        "nested without end",
        "a list",
        "row a list",
        "no key",
        "another key",
        "cut off",
    ],
)
@pytest.mark.filterwarnings("ignore::analysis_lib.store.batches.StoreDamage")
def test_a_response_that_is_none_is_a_damaged_row(two_rows, body):
    """Though its checksum fits; a sound copy is used instead."""
    head = responses_head(sha256=[hashlib.sha256(body).hexdigest()], sizes=[max(1, len(body))])
    path = forged(two_rows.folder, "responses", head, body)
    content = path.read_bytes()
    with pytest.warns(
        StoreDamage, match=f"{path.name}: rows fail.*none of this store.*{keys(1)[0]}"
    ):
        assert two_rows.read_responses(keys(1)) == {}
    assert list(everything_goes_on(two_rows.folder)) == ["ok", "ok"] and not path.exists()
    path.write_bytes(content)
    two_rows.write_responses(keys(1), [{"sound": True}], about=ABOUT)
    assert Store(two_rows.folder).read_responses(keys(1)) == {keys(1)[0]: {"sound": True}}


def test_a_well_formed_header_of_another_program_is_taken(store):
    """What the malformed ones above differ from."""
    forged(store.folder, "states", states_head(), b"a" * 12)
    forged(store.folder, "responses", responses_head(), b"abcde")
    assert info(store)["states_rows"] == info(store)["responses_rows"] == 1
    assert store.read_states(keys(1))[keys(1)[0]].tobytes() == b"a" * 12


def test_a_header_that_promises_more_than_there_is_takes_no_memory(two_rows):
    forged(two_rows.folder, "responses", responses_head(sizes=[10**15]), b"abcde")
    width = 10**14
    forged(
        two_rows.folder,
        "states",
        states_head({"shape": [1, width], "data_offsets": [0, 4 * width]}),
        b"a" * 12,
    )
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
    before = signal.signal(
        signal.SIGALRM, lambda *_: pytest.fail(f"still waiting after {seconds} s")
    )
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@needs_fork
@needs_proc
@pytest.mark.filterwarnings("ignore::analysis_lib.store.batches.StoreDamage")
@pytest.mark.parametrize(
    "make",
    [
        make_fifo,
        make_socket,
        Path.mkdir,
        lambda path: path.symlink_to("/dev/zero"),
        lambda path: path.symlink_to("/nowhere/x"),
    ],
    ids=["pipe", "socket", "folder", "device", "dangling link"],
)
@pytest.mark.parametrize("kind", ["states", "responses"])
def test_what_is_no_file_is_told_of_and_left_alone(two_rows, kind, make):
    path = (
        two_rows.folder
        / "v1"
        / kind
        / ("f" * 64 + {"states": ".safetensors", "responses": ".jsonl"}[kind])
    )
    make(path)
    make_fifo(two_rows.folder / "v1" / "writing" / "host.1.journal")
    with at_most(20):
        with pytest.warns(
            StoreDamage, match=f"{path.name}: is (no regular file|a link to nothing).*move it out"
        ) as warned:
            assert info(Store(two_rows.folder))["damaged_headers"] == 1
        assert "drops" not in str(warned[0].message)  # compact cannot
        left = everything_goes_on(two_rows.folder)
        assert len(left) == 3 and left[path.name] in ("is no regular file", "is a link to nothing")
        reader = Store(two_rows.folder)
        reader.read_states(keys(1)), reader.read_responses(keys(1))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            reader.read_states(keys(1)), reader.read_responses(keys(1))  # is told of once
