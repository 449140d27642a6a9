"""Which file holds which row: what one process knows of the batches of one kind."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .batches import (
    BAD_ROWS,
    KEY,
    SUFFIX,
    Batch,
    Damaged,
    Stat,
    Unreadable,
    keys_in_damaged_head,
    read_batch,
    read_rows,
    stat_of,
    warn,
)
from .files import listing


def batch_files(root: Path, kind: str) -> list[str]:
    """Names of the committed batches of a kind. Raises StoreError."""
    end = SUFFIX[kind]
    names = [name for name in listing(root / kind) if name.endswith(end)]
    return [name for name in names if KEY.fullmatch(name.removesuffix(end))]


class Index:
    """Rows of one kind, by key. Nothing is read before the first `scan`."""

    def __init__(self, root: Path, kind: str) -> None:
        self.folder, self._root, self._kind = root / kind, root, kind
        self.batches: dict[str, Batch] = {}  # by file name
        self.damaged: dict[str, Stat] = {}  # file name -> its stat, when its header was bad
        self.where: dict[str, Batch] = {}  # key -> a batch that holds it
        self._several: dict[str, list[Batch]] = {}  # key -> all of them, where there are more

    def copies(self, key: str) -> list[Batch]:
        """The batches that hold a kept row, the one to use first."""
        if key not in self._several:
            return [self.where[key]]
        return sorted(self._several[key], key=lambda batch: batch.rank(key))

    def scan(self) -> None:
        """Learn what is there now. Warns of headers that are damaged. Raises StoreError."""
        for _ in range(3):
            before = self._changed()
            names = set(batch_files(self._root, self._kind))
            if gone := self.batches.keys() - names:
                kept = [batch for name, batch in self.batches.items() if name not in gone]
                self.batches, self.where, self._several = {}, {}, {}
                for batch in kept:
                    self._enter(batch)
            self.damaged = {name: seen for name, seen in self.damaged.items() if name in names}
            for name in sorted(names - self.batches.keys()):
                self._learn(name)
            if self._changed() == before:  # else a file may have slipped past the listing
                return

    def _changed(self) -> int:
        try:
            return self.folder.stat().st_mtime_ns
        except OSError:
            return 0

    def _learn(self, name: str) -> None:
        path = self.folder / name
        try:
            if name in self.damaged and self.damaged[name] == stat_of(path.lstat()):
                return
            self._enter(read_batch(self._kind, path))
        except FileNotFoundError:
            return
        except Damaged as reason:
            with contextlib.suppress(FileNotFoundError):
                self.damaged[name] = stat_of(path.lstat())
            lost = [] if isinstance(reason, Unreadable) else keys_in_damaged_head(path)
            warn(path, reason, lost)

    def _enter(self, batch: Batch) -> None:
        self.batches[batch.path.name] = batch
        for key in batch.row.keys() & self.where.keys():
            self._several.setdefault(key, [self.where[key]]).append(batch)
        self.where.update(dict.fromkeys(batch.keys, batch))

    def fetch(self, keys: Sequence[str]) -> dict[str, tuple[Batch, Any]]:
        """{key: (its batch, its value as in `read_rows`)} of the rows that are kept.

        Warns of rows that are damaged in every copy. Raises StoreError.
        """
        found: dict[str, tuple[Batch, Any]] = {}
        bad: dict[str, tuple[Batch, Damaged]] = {}
        for _ in range(3):
            self.scan()
            todo = [key for key in dict.fromkeys(keys) if key not in found and key in self.where]
            bad, vanished = self._read(todo, found)
            if not vanished:  # else compacted or pruned since the listing: look again
                break
        failed: dict[tuple[Batch, Damaged], list[str]] = defaultdict(list)
        for key, reason in bad.items():
            if key not in found:
                failed[reason].append(key)
        for (batch, why), lost in failed.items():
            warn(batch.path, why, lost)
        return found

    def _read(
        self, todo: list[str], found: dict[str, tuple[Batch, Any]]
    ) -> tuple[dict[str, tuple[Batch, Damaged]], bool]:
        """Adds to `found`: at the first turn the copy to use, where that is damaged the next one.

        Returns what was damaged, and whether a file had vanished.
        """
        bad: dict[str, tuple[Batch, Damaged]] = {}
        vanished, turn = False, 0
        while todo:
            wanted: dict[Batch, dict[int, str]] = defaultdict(dict)
            for key in todo:
                copies = self.copies(key)
                if turn < len(copies):
                    wanted[copies[turn]][copies[turn].row[key]] = key
            for batch, names in wanted.items():
                try:
                    for row, _, value in read_rows(batch, names):
                        if value is None:
                            bad[names[row]] = batch, BAD_ROWS
                        else:
                            found[names[row]] = batch, value
                except FileNotFoundError:
                    vanished = True
                except Damaged as reason:
                    lost = [key for key in names.values() if key not in found]
                    bad.update(dict.fromkeys(lost, (batch, reason)))
            tried: list[Mapping[int, str]] = list(wanted.values())
            todo = [key for names in tried for key in names.values() if key not in found]
            turn += 1
        return bad, vanished
