"""ls, info, prune and compact; what is younger than a day stays."""

from __future__ import annotations

import contextlib
import os
import signal
import time

import numpy as np
import pytest
from stores import ABOUT, files, filled_store, flip, keys, needs_fork, states

from analysis_lib.store import batches, index, upkeep
from analysis_lib.store import files as writing
from analysis_lib.store.batches import StoreDamage, StoreError
from analysis_lib.store.store import Store
from analysis_lib.store.upkeep import compact, info, ls, parse_bytes, parse_days, prune, verify
from faults import injection


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


@pytest.fixture
def filled(tmp_path):
    return filled_store(tmp_path / "store")


def test_ls_and_info_tell_what_is_kept(filled):
    filled.write_responses(
        keys(3), [{"n": i} for i in range(3)], about={"model": "b" * 64, "model_name": "B"}
    )
    table = ls(filled).set_index("kind")
    assert list(table["rows"]) == [3, 20] and list(table["files"]) == [1, 5]
    assert (
        table.loc["states", "prompts"].split(", ")[0] == "none"
        and table.loc["states", "prompts"].count("prompt ") == 5
    )
    assert table.loc["states", "dtype"] == "bfloat16"
    assert table["bytes"].sum() == sum(
        path.stat().st_size for path in filled.folder.glob("v1/[rs]*/*")
    )
    told = info(filled)
    assert told["states_rows"] == 20 and told["responses_rows"] == 3
    assert set(told["models"]) == {"a" * 64, "b" * 64}
    assert told["damaged_headers"] == told["unfinished_files"] == 0


def test_ls_and_info_sum_up_the_certificates_of_a_model(filled):
    """Those of another program are left out, and the layers of one batch share theirs."""
    assert ls(filled)["certificates"].item() == "" and info(filled)["certificates"] == []
    for i in range(30):
        certificate = {
            "way": "tree" if i % 2 else "plain",
            "checked": 2,
            "max_abs": i / 1000,
            "max_rel": (30 - i) / 7,
        }
        for layer in (0, 1):
            about = ABOUT | {"layer": layer, "certificate": certificate}
            filled.write_states(
                keys(1, batch=i, layer=layer), states(1, seed=i), dtype="bfloat16", about=about
            )
    bad = {"way": "tree", "checked": "many", "max_abs": None, "max_rel": []}
    filled.write_states(
        keys(1, other=1), states(1), dtype="bfloat16", about={"model": "b", "certificate": bad}
    )
    expected = {"checked": 60, "max_abs": 0.029, "max_rel": 30 / 7}
    for _ in range(2):
        cells = ls(filled).set_index("model")["certificates"]
        assert (
            cells["a" * 64].partition(":")[2] == " 60 checked, max_abs 0.029, max_rel 4.29"
            and cells["b"] == ""
        )
        (found,) = info(filled)["certificates"]
        assert found["model"] == "a" * 64 and found["certificate"].items() >= expected.items()
        assert sorted(found["certificate"]["way"].split(", ")) == ["plain", "tree"]
        compact(filled, spare=0)


def test_ls_shows_dates_that_nanoseconds_cannot_count(filled):
    os.utime(files(filled)[0], (10**10,) * 2)
    if files(filled)[0].stat().st_mtime != 10**10:
        pytest.skip("nor can this file system")
    assert ls(filled)["last_written"].item().year == 2286


def test_compact_merges_small_batches_and_loses_nothing(filled):
    names = [key for part in range(5) for key in keys(4, part=part)]
    before, reader, dates = (
        filled.read_states(names),
        Store(filled.folder),
        [p.stat().st_mtime_ns for p in files(filled)],
    )
    reader.read_states(names[:1])  # a reader that knows the old files
    report = compact(filled, spare=0).iloc[0]
    assert (
        report["files_before"],
        report["files_after"],
        report["rows"],
        report["dropped_rows"],
    ) == (5, 1, 20, 0)
    assert [path.stat().st_mtime_ns for path in files(filled)] == [max(dates)]
    for store in (reader, Store(filled.folder)):
        after = store.read_states(names)
        assert all(np.array_equal(after[key], before[key]) for key in names)
    assert "prompt 4" in ls(filled).loc[0, "prompts"] and ls(filled).loc[0, "model"] == "a" * 64
    assert compact(filled, spare=0).empty and len(files(filled)) == 1


@pytest.mark.parametrize("moment", ["after the listing", "during the listing"])
def test_a_reader_finds_rows_that_are_compacted_under_its_hands(filled, monkeypatch, moment):
    names = [key for part in range(5) for key in keys(4, part=part)]
    time.sleep(0.02)  # longer than a tick of the file system's clock
    calls = []

    def compact_once():
        first = not calls
        calls.append(1)
        if first:
            compact(Store(filled.folder), spare=0)
        return first

    read_rows, names_of = index.read_rows, index.batch_files
    if moment == "after the listing":
        late = lambda *args: (compact_once(), read_rows(*args))[1]  # noqa: E731
        monkeypatch.setattr(index, "read_rows", late)
    else:  # the old files are gone, the new one came too late to be listed
        early = lambda *args: [] if compact_once() else names_of(*args)  # noqa: E731
        monkeypatch.setattr(index, "batch_files", early)
    assert len(Store(filled.folder).read_states(names)) == 20
    assert len(files(filled)) == 1


def test_a_reader_forgets_what_another_process_pruned(filled, monkeypatch):
    names = keys(4, part=0)
    assert len(filled.read_states(names)) == 4
    prune(Store(filled.folder), spare=0, max_bytes=0)
    gone = lambda *args: pytest.fail("a file that is gone was opened")  # noqa: E731
    monkeypatch.setattr(index, "read_rows", gone)
    assert filled.read_states(names) == {}


def test_compact_keeps_one_copy_of_a_row(store):
    store.write_states(keys(20), states(20), dtype="bfloat16", about=ABOUT)
    largest = files(store)[0].stat().st_size
    store.write_states(keys(2), states(2), dtype="bfloat16", about=ABOUT)
    store.write_states(keys(1, other=1), states(1), dtype="bfloat16", about=ABOUT)
    compact(store, spare=0, max_file_bytes=int(1.5 * largest))
    assert sorted(verify(store)["rows"]) == [1, 20]


def test_compact_goes_on_where_a_killed_one_stopped(filled):
    left, names = files(filled)[0], [key for part in range(5) for key in keys(4, part=part)]
    content, stat = left.read_bytes(), left.stat()
    compact(filled, spare=0)
    left.write_bytes(content)  # not yet removed
    os.utime(left, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    compact(filled, spare=0)
    assert len(files(filled)) == 1 and len(filled.read_states(names)) == 20


def test_compact_keeps_models_and_dtypes_apart_and_files_below_the_limit(filled):
    filled.write_states(keys(4, other=1), states(4), dtype="float32", about=ABOUT)
    filled.write_states(
        keys(4, other=2), states(4), dtype="bfloat16", about=ABOUT | {"model": "b" * 64}
    )
    largest = 2 * max(path.stat().st_size for path in files(filled))
    compact(filled, spare=0, max_file_bytes=largest)
    assert len(files(filled)) == 5 and max(path.stat().st_size for path in files(filled)) <= largest
    assert info(filled)["states_rows"] == 28


def test_compact_drops_what_is_damaged_and_keeps_the_rest(filled):
    first, second = files(filled)[:2]
    flip(first, -1)
    flip(second, 20)
    with pytest.warns(StoreDamage, match=second.name):
        report = compact(Store(filled.folder), spare=0)
    assert report["dropped_rows"].sum() == 1 and list(report["files_before"]) == [4, 1]
    assert (
        list(verify(Store(filled.folder))["status"]) == ["ok"]
        and info(Store(filled.folder))["states_rows"] == 15
    )


def test_prune_removes_what_meets_every_condition(filled):
    old, *young = files(filled)
    os.utime(old, (time.time() - 3 * 86400,) * 2)
    filled.write_responses(keys(1), [{}], about={"model": "b" * 64, "model_name": "B"})
    filled = Store(filled.folder)
    assert prune(filled, spare=0, older_than=2, model="B").empty
    dry = prune(filled, spare=0, older_than=2, dry_run=True)
    assert (
        list(dry["file"]) == [old.name] and list(dry["action"]) == ["would remove"] and old.exists()
    )
    assert dry["age_days"].iloc[0] == pytest.approx(3, abs=0.01)
    assert list(prune(filled, spare=0, older_than=2, model="aaaa")["action"]) == ["removed"]
    assert files(filled) == young
    assert list(prune(filled, spare=0, model="B")["kind"]) == ["responses"]
    prune(filled, spare=0, max_bytes=2 * young[0].stat().st_size)
    assert len(files(filled)) == 2
    assert len(filled.read_states([key for part in range(5) for key in keys(4, part=part)])) == 8
    for nothing in ({}, {"model": ""}):
        with pytest.raises(ValueError, match="say what to prune"):
            prune(filled, spare=0, **nothing)


def test_prune_knows_a_model_by_each_of_its_names(filled):
    filled.write_states(
        keys(1, other=1), states(1), dtype="bfloat16", about=ABOUT | {"model_name": "another name"}
    )
    compact(filled, spare=0)
    for name in ("A", "another name", "aaaa"):
        assert list(prune(filled, spare=0, model=name, dry_run=True)["rows"]) == [21]
    with pytest.raises(StoreError, match="nothing of a model 'a name'; it has A, another name$"):
        prune(filled, spare=0, model="a name")


@contextlib.contextmanager
def run_in_progress(folder):
    """Another process that has committed a batch, has a second one half-written, and is at work."""

    def work(report):
        store = Store(folder)
        store.write_states(keys(4, run=1), states(4), dtype="bfloat16", about=ABOUT)
        writing.os.replace = lambda *paths: (report(1), time.sleep(60))
        store.write_states(keys(4, run=2), states(4), dtype="bfloat16", about=ABOUT)

    with injection.fork(work) as (child, read):
        try:
            os.read(read, 4)
            yield
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


# ----------------------------------------------------------------------------- younger than a day


def age(path, days):
    os.utime(path, (time.time() - days * upkeep.DAY,) * 2)


def every_row(store):
    return store.read_states([key for part in range(5) for key in keys(4, part=part)])


def test_prune_spares_what_is_younger_than_a_day_and_says_so(filled):
    old, older, *young = files(filled)
    age(old, 1.1)
    age(older, 3)
    age(young[0], 0.9)
    for dry_run in (True, False):
        report = prune(filled, max_bytes=0, dry_run=dry_run)
        done = "would remove" if dry_run else "removed"
        assert list(report["action"]) == [done] * 2 + ["kept: younger than a day"] * 3
        assert list(report["file"][:3]) == [older.name, old.name, young[0].name]
    assert files(filled) == young
    assert set(prune(filled, model="A")["action"]) == {"kept: younger than a day"}
    assert set(prune(filled, older_than=0)["action"]) == {"kept: younger than a day"}
    assert len(prune(filled, older_than=0.8)) == 1  # asked for by its age, and spared too
    assert files(filled) == young
    assert (
        prune(filled, max_bytes=0, spare=0.95 * upkeep.DAY)["action"].tolist()
        == ["kept: younger than 82080 seconds"] * 3
    )
    assert list(prune(filled, older_than=0.8, spare=0)["action"]) == ["removed"]
    assert set(prune(filled, max_bytes=0, spare=0)["action"]) == {"removed"} and not files(filled)


def test_a_file_whose_time_lies_ahead_is_spared_until_told_otherwise(filled):
    age(files(filled)[0], -400)
    assert len(prune(filled, max_bytes=0, spare=1)) == 5
    assert files(filled)
    prune(filled, max_bytes=0, spare=0)
    assert not files(filled)


def test_a_batch_written_again_is_young_again(filled):
    for path in files(filled):
        age(path, 2)
    filled.write_states(keys(4), states(4), dtype="bfloat16", about=ABOUT)
    filled.write_states(
        keys(4, part=0),
        states(4, seed=0),
        dtype="bfloat16",
        about=ABOUT | {"prompts": ["none", "prompt 0"]},
    )
    assert len(files(filled)) == 6
    assert list(prune(filled, max_bytes=0)["action"]).count("removed") == 4
    assert len(filled.read_states(keys(4, part=0) + keys(4))) == 8


def test_a_file_that_comes_back_between_listing_and_removal_stays(filled, monkeypatch):
    for path in files(filled):
        age(path, 2)
    before = {path: path.read_bytes() for path in files(filled)}
    too_young = upkeep.too_young

    def written_again(*arguments):
        for path, content in before.items():
            path.unlink()
            path.write_bytes(content)
        return too_young(*arguments)

    monkeypatch.setattr(upkeep, "too_young", written_again)
    assert set(prune(filled, max_bytes=0)["action"]) == {"kept: just written again"}
    assert len(every_row(filled)) == 20


def test_compact_spares_what_is_younger_than_a_day_and_counts_it(filled):
    report = compact(filled)
    assert list(report["spared"]) == [5] and report["files_before"].sum() == 0
    assert len(files(filled)) == 5
    *old, young = files(filled)
    for i, path in enumerate(old):
        age(path, 2 + i)
    dates = sorted(path.stat().st_mtime_ns for path in old)
    report = compact(filled).iloc[0]
    assert tuple(report[["files_before", "files_after", "rows", "spared"]]) == (4, 1, 16, 1)
    (new,) = {*files(filled)} - {young}
    assert young.exists() and len(files(filled)) == 2
    assert new.stat().st_mtime_ns == dates[-1]  # as old as its youngest row
    assert len(every_row(Store(filled.folder))) == 20


@pytest.mark.filterwarnings("ignore::analysis_lib.store.batches.StoreDamage")
def test_compact_spares_what_is_damaged_and_young(filled):
    row, header = files(filled)[:2]
    flip(row, -1)
    flip(header, 20)
    compact(filled)
    assert row.exists() and header.exists()
    age(row, 2)
    age(header, 2)
    compact(filled)
    assert not row.exists() and not header.exists() and set(verify(filled)["status"]) == {"ok"}


@needs_fork
def test_what_a_run_wrote_today_is_not_removed(filled):
    with run_in_progress(filled.folder):
        assert info(filled)["unfinished_files"] == 1
        actions = prune(filled, max_bytes=0)["action"]
        assert set(actions) == {"kept: younger than a day"} and len(files(filled)) == 6
        compact(filled, spare=0)  # the run's rows move to another file
        assert len(files(filled)) == 1
        prune(filled, max_bytes=0)
        assert len(filled.read_states(keys(4, run=1))) == 4
        assert info(filled)["unfinished_files"] == 1
    swept = prune(filled, max_bytes=0, spare=0)  # the run is dead
    assert sorted(swept["kind"].unique()) == ["states", "writing"] and not files(filled)
    assert info(filled)["unfinished_files"] == 0


def test_what_was_left_unfinished_goes_after_a_day(filled, monkeypatch):
    writing = filled.folder / "v1" / "writing"
    left = [writing / "0123.tmp", writing / "host-1-2.34-56.journal"]  # of an earlier version
    for path in left:
        path.write_bytes(b"half")
    age(left[0], 30)  # `compact` gives a new file an old time just before it is put in place
    assert not (prune(filled, older_than=1)["kind"] == "writing").any()
    assert info(filled)["unfinished_files"] == 1
    now = time.time()
    monkeypatch.setattr(upkeep.time, "time", lambda: now + 1.01 * upkeep.DAY)
    dry = prune(filled, older_than=9, dry_run=True)
    assert sorted(dry["file"]) == sorted(path.name for path in left)
    assert set(dry["action"]) == {"would remove"} and all(path.exists() for path in left)
    assert set(prune(filled, older_than=9)["action"]) == {"removed"}
    assert not any(path.exists() for path in left) and len(files(filled)) == 5


def test_compact_reads_each_batch_once(store, monkeypatch):
    for i in range(40):
        store.write_states(keys(1, i=i), states(1, seed=i), dtype="bfloat16", about=ABOUT)
    read, opened = [], batches.opened
    monkeypatch.setattr(batches, "opened", lambda path: (read.append(path.name), opened(path))[1])
    compact(store, spare=0)
    assert len(read) == 80 and len(set(read)) == 40  # the header, then the rows


def test_ages_and_sizes_are_read_from_the_command_line():
    assert [parse_days(text) for text in ("45m", "12h", "30d", "4w", "1.5")] == [
        1 / 32,
        0.5,
        30,
        28,
        1.5,
    ]
    assert [parse_bytes(text) for text in ("500MB", "2gb", "1.5G", "300K", "12")] == [
        500e6,
        2e9,
        1.5e9,
        300e3,
        12,
    ]
    for parse, text in ((parse_days, "soon"), (parse_bytes, "-1"), (parse_bytes, "2 potatoes")):
        with pytest.raises(ValueError, match=text):
            parse(text)
    with pytest.raises(ValueError, match="no store is that large; write 500MB"):
        parse_bytes("9" * 400)
