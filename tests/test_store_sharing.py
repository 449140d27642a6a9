"""Who may read and write a store: the umask, a group's folder, a private store, a closed one."""

from __future__ import annotations

import errno
import os
import stat
import warnings

import numpy as np
import pytest
from stores import ABOUT, keys, needs_fork, states
from tiny_models import PROMPTS, QUERIES, chat

from analysis_lib.collect.responses import sample_responses
from analysis_lib.collect.states import hidden_states
from analysis_lib.judge.likelihood import refusal_probability
from analysis_lib.store import files as writing
from analysis_lib.store.batches import StoreError
from analysis_lib.store.store import Store
from analysis_lib.store.upkeep import compact
from faults import injection

GROUP, OTHER = 65533, 65534  # of no one


@pytest.fixture
def umask():
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


def fill(store, first=0):
    for i in range(first, first + 3):
        store.write_states(keys(1, batch=i), states(1, seed=i), dtype="bfloat16", about=ABOUT)
    store.write_checkpoint("a" * 64, {"soft": np.zeros((2, 3))}, {"step": first})


def modes(store):
    """{"files" or "folders": the modes that occur}."""
    found = {"files": set(), "folders": set()}
    for path in (store.folder, *store.folder.rglob("*")):
        kind = "folders" if path.is_dir() else "files"
        found[kind].add(stat.S_IMODE(path.stat().st_mode))
    return found


@pytest.mark.parametrize("mask, files, folders", [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700)])
def test_the_umask_decides_in_a_usual_folder(tmp_path, umask, mask, files, folders):
    umask(mask)
    fill(store := Store(tmp_path / "new" / "store"))
    compact(store, spare=0)
    assert modes(store) == {"files": {files}, "folders": {folders}}


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_a_store_in_a_groups_folder_is_the_groups(tmp_path, umask, mask):
    umask(mask)
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o2775)
    fill(store := Store(tmp_path / "shared" / "new" / "store"))
    compact(store, spare=0)
    fill(store, 3)
    other = 0o777 & ~mask & 0o005
    assert modes(store) == {"files": {0o660 | other & 0o004}, "folders": {0o2770 | other}}


@needs_fork
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
def test_the_second_user_of_a_group_writes_replaces_and_compacts(tmp_path, umask):
    def work(report):
        os.setgroups([GROUP])
        os.setgid(OTHER)
        os.setuid(OTHER)
        store = Store(folder / "store")
        report(len(store.read_states(keys(1, batch=0))))
        fill(store, 3)
        report(store.read_checkpoint("a" * 64)[1]["step"])
        report(int(compact(store, spare=0)["files_before"].sum()))

    for parent in reversed((tmp_path, *tmp_path.parents)):
        if not parent.stat().st_mode & stat.S_IXOTH:
            parent.chmod(stat.S_IMODE(parent.stat().st_mode) | stat.S_IXOTH)
    folder = tmp_path / "shared"
    folder.mkdir()
    os.chown(folder, -1, GROUP)
    folder.chmod(0o2770)
    fill(Store(folder / "store"))
    with injection.fork(work) as (child, read):
        heard = injection.reported(read)
        os.waitpid(child, 0)
    assert heard == [1, 3, 6]
    assert len(Store(folder / "store").read_states([keys(1, batch=i)[0] for i in range(6)])) == 6
    fill(Store(folder / "store"), 6)  # and the first user goes on


@pytest.mark.parametrize("how", ["argument", "environment"])
def test_a_private_store_is_closed_to_others(tmp_path, umask, monkeypatch, how):
    monkeypatch.setenv("ANALYSIS_LIB_PRIVATE", "1" if how == "environment" else "0")
    private = True if how == "argument" else None
    fill(store := Store(tmp_path / "store", private=private))
    fill(Store(tmp_path / "store", private=False), 3)  # what is in a closed folder stays closed
    compact(store, spare=0)
    assert modes(store) == {"files": {0o600}, "folders": {0o700}}


def test_a_store_that_was_open_is_closed_by_the_first_private_write(tmp_path, umask):
    fill(Store(tmp_path / "store"))
    fill(store := Store(tmp_path / "store", private=True), 3)
    assert stat.S_IMODE(store.root.stat().st_mode) == 0o700
    assert len(store.read_states([keys(1, batch=i)[0] for i in range(6)])) == 6


def test_a_store_of_another_user_cannot_be_made_private(tmp_path, umask, monkeypatch):
    def refused(path, mode):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    fill(Store(tmp_path / "store"))
    monkeypatch.setattr(writing.Path, "chmod", refused)
    with pytest.raises(StoreError, match="belongs to another user.*folder of your own"):
        fill(Store(tmp_path / "store", private=True))


def test_another_value_of_the_variable_is_refused(monkeypatch):
    monkeypatch.setenv("ANALYSIS_LIB_PRIVATE", "yes")
    with pytest.raises(StoreError, match="is 'yes'; set it to 1"):
        Store()


@pytest.mark.parametrize("reason", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_what_a_store_cannot_keep_is_returned_with_one_warning(tmp_path, monkeypatch, reason):
    def closed(root, private):
        raise OSError(reason, os.strerror(reason))

    model, queries = chat("llama"), QUERIES.head(3)
    prompts = {"none": "", **PROMPTS}
    calls = {
        hidden_states: {"layers": (0, -1)},
        sample_responses: {"n_samples": 2, "max_new_tokens": 2},
        refusal_probability: {},
    }
    for call, options in calls.items():
        right = call(model, queries, prompts, **options)
        monkeypatch.setattr(writing, "_make_folders", closed)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            got = call(model, queries, prompts, store=Store(tmp_path / "store"), **options)
        monkeypatch.undo()
        kept = [str(w.message) for w in told if "nothing is kept" in str(w.message)]
        assert len(kept) == 1 and "is returned" in kept[0] and "choose another folder" in kept[0]
        if call is hidden_states:
            assert np.array_equal(got.states, right.states)
        else:
            assert got.equals(right)
