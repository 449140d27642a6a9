"""Small or damaged batches rewritten as few large ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .about import merge_about
from .batches import SUFFIX, Batch, Damaged, Group, digest, read_rows, responses_head, states_head
from .files import commit, remove_unchanged

COUNTS = ("files_before", "files_after", "rows", "dropped_rows", "bytes_before", "bytes_after")


@dataclass
class _Pile:
    """Batches that one file is to replace."""

    batches: list[Batch] = field(default_factory=list)
    rows: dict[str, bytes] = field(default_factory=dict)
    bytes: int = 0  # of the batches
    poor: int = 0  # rows that are damaged


def compact_group(
    root: Path, group: Group, batches: Sequence[Batch], max_bytes: int
) -> dict[str, int]:
    """Rewrite the batches of a group that are small or damaged; what came of it, by `COUNTS`."""
    counts = dict.fromkeys(COUNTS, 0)
    pile = _Pile()
    best: dict[str, tuple[str, str]] = {}  # key -> rank of its best copy so far
    for batch in batches:
        try:
            read = {row: data for row, data, _ in read_rows(batch, range(len(batch.keys)))}
        except (FileNotFoundError, Damaged):  # gone meanwhile, or the disk cannot give it now
            continue
        poor = sum(data is None for data in read.values())
        stays = not poor and batch.size > max_bytes / 2
        if not stays:
            if pile.batches and pile.bytes + batch.size > max_bytes:
                replace_pile(root, group, pile, counts)
                pile = _Pile()
            pile.batches.append(batch)
            pile.bytes += batch.size
            pile.poor += poor
        for row, data in read.items():
            key = batch.keys[row]
            if data is not None and (key not in best or batch.rank(key) < best[key]):
                best[key] = batch.rank(key)
                if not stays:
                    pile.rows[key] = data
    replace_pile(root, group, pile, counts)
    return counts


def replace_pile(root: Path, group: Group, pile: _Pile, counts: dict[str, int]) -> None:
    """Put one file in the place of a pile, where there is something to gain."""
    if len(pile.batches) < 2 and not pile.poor:
        return
    kind, _, dtype, _ = group
    name = ""
    if pile.rows:
        keys, rows = list(pile.rows), list(pile.rows.values())
        about = merge_about([batch.about for batch in pile.batches])
        states = kind == "states"
        head = (
            states_head(keys, rows, about, dtype) if states else responses_head(keys, rows, about)
        )
        name = digest(head) + SUFFIX[kind]
        # as young as its youngest row, so that nobody takes it for older and prunes it
        commit(root / kind / name, [head, *rows], max(batch.mtime_ns for batch in pile.batches))
        counts["files_after"] += 1
        counts["bytes_after"] += len(head) + sum(map(len, rows))
    for batch in pile.batches:
        if batch.path.name != name:
            remove_unchanged(batch.path, batch.stat)
    counts["files_before"] += len(pile.batches)
    counts["bytes_before"] += pile.bytes
    counts["rows"] += len(pile.rows)
    counts["dropped_rows"] += pile.poor
