"""Token rows laid out as a prefix tree, so that each distinct token is computed once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

LONG = 1024  # tokens: from here on a row's own mask costs more than its share of a prefix saves


@dataclass(frozen=True)
class Pack:
    """Part of a prefix tree, laid out as b lines of t tokens, short lines padded at their end.

    tokens, depths  (b, t) ids and true positions
    sees            (b, t, t) bool: a token (second axis) sees a token of its line (third axis): its
                    ancestors and itself. None where the lines are whole rows, to be run plainly
    rows, paths     the rows that end here and, for each, the flat positions (line x t + place) of
                    its tokens after the prefix
    """

    tokens: NDArray[np.int64]
    depths: NDArray[np.int64]
    sees: NDArray[np.bool_] | None
    rows: list[int]
    paths: list[list[int]]

    @property
    def alone(self) -> bool:
        """Whether it is one long row, which is run plainly, prefix and all: it needs no mask."""
        return len(self.rows) == 1 and self.tokens.size > LONG


@dataclass(frozen=True)
class Plan:
    """Rows as a common prefix and packs.

    `n_tokens` distinct tokens are computed for `n_row_tokens` in the rows.
    """

    prefix: tuple[int, ...]
    packs: list[Pack]
    n_tokens: int
    n_row_tokens: int

    @property
    def width(self) -> int:
        """The most tokens that one token could see: the prefix and a line behind it."""
        lines = [p.tokens.shape[1] for p in self.packs if p.sees is not None and not p.alone]
        return len(self.prefix) + max(lines, default=0)


class _Line:
    """Rows that follow each other in sorted order, as one sequence."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.depths: list[int] = []
        self.rows: list[int] = []
        self.paths: list[list[int]] = []
        self.last: Sequence[int] = ()

    def add(self, i: int, row: Sequence[int], depth: int) -> None:
        common = common_length(self.last, row)
        start = len(self.tokens)
        self.paths.append(
            [*(self.paths[-1][:common] if common else ()), *range(start, start + len(row) - common)]
        )
        self.tokens.extend(row[common:])
        self.depths.extend(range(depth + common, depth + len(row)))
        self.rows.append(i)
        self.last = row

    def fill_mask(self, sees: NDArray[np.bool_]) -> None:
        known = 0
        for path in self.paths:
            new = slice(known, path[-1] + 1)
            common = len(path) - (new.stop - known)
            sees[new, path[:common]] = True
            sees[new, new] = np.tri(new.stop - known, dtype=bool)
            known = new.stop


def plan_rows(
    rows: Sequence[Sequence[int]],
    pack_tokens: int,
    *,
    most: int | None = None,
    line_tokens: int | None = None,
    reach: float = np.inf,
) -> Plan:
    """Lays token rows out as a prefix tree.

    A pack has at most pack_tokens, a line at most line_tokens, and each at least one row.
    Without line_tokens a pack is one line. The common prefix has at most `most` tokens, and never a
    row's last one. A line with its prefix has at most `reach` tokens, where no row is longer.
    """
    if not rows or min(map(len, rows)) < 1:
        raise ValueError("rows of at least 1 token are needed")
    order = sorted(range(len(rows)), key=lambda i: tuple(rows[i]))
    first, last = rows[order[0]], rows[order[-1]]
    longest = min(map(len, rows)) - 1
    shared = min(common_length(first, last), longest if most is None else min(most, longest))
    widest = min(line_tokens or pack_tokens, pack_tokens, reach - shared)
    lines = [_Line()]
    for i in order:
        row = rows[i][shared:]
        if lines[-1].tokens and len(lines[-1].tokens) + len(row) > widest:
            lines.append(_Line())
        lines[-1].add(i, row, shared)
    groups: list[list[_Line]] = [[]]
    # Lines of like length stand together: little padding.
    for line in sorted(lines, key=lambda line: len(line.tokens)):
        if groups[-1] and (
            line_tokens is None or len(line.tokens) * (len(groups[-1]) + 1) > pack_tokens
        ):
            groups.append([])
        groups[-1].append(line)
    n_tokens = shared + sum(len(line.tokens) for line in lines)
    return Plan(
        tuple(first[:shared]), [_pack(group) for group in groups], n_tokens, sum(map(len, rows))
    )


def plain_plan(rows: Sequence[Sequence[int]], pack_tokens: int, *, most_rows: int = 32) -> Plan:
    """Whole rows in packs of equal length: nothing shared, nothing padded.

    A pack has at most pack_tokens and most_rows rows, and at least one row.
    """
    by_length: dict[int, list[int]] = {}
    for i, row in enumerate(rows):
        by_length.setdefault(len(row), []).append(i)
    packs = []
    for t, members in by_length.items():
        size = max(1, min(most_rows, pack_tokens // t))
        for at in range(0, len(members), size):
            part = members[at : at + size]
            tokens = np.array([list(rows[i]) for i in part], dtype=np.int64)
            paths = [list(range(j * t, (j + 1) * t)) for j in range(len(part))]
            depths = np.tile(np.arange(t), (len(part), 1))
            packs.append(Pack(tokens, depths, None, part, paths))
    n_tokens = sum(map(len, rows))
    return Plan((), packs, n_tokens, n_tokens)


def _pack(lines: Sequence[_Line]) -> Pack:
    b, t = len(lines), max(len(line.tokens) for line in lines)
    tokens, depths, sees = (
        np.zeros((b, t), np.int64),
        np.zeros((b, t), np.int64),
        np.zeros((b, t, t), bool),
    )
    paths = []
    for j, line in enumerate(lines):
        n = len(line.tokens)
        tokens[j, :n], depths[j, :n] = line.tokens, line.depths
        line.fill_mask(sees[j])
        paths += [[j * t + place for place in path] for path in line.paths] if j else line.paths
    return Pack(tokens, depths, sees, [i for line in lines for i in line.rows], paths)


def common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """Number of equal tokens at the beginning of both."""
    n = 0
    for x, y in zip(a, b):
        if x != y:
            break
        n += 1
    return n
