"""The habits of the house, measured: `python -m tools.measure` prints each with its limit and where it is broken."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import analysis_lib

ROOT = Path(__file__).resolve().parents[1]
MAX_FILE, MAX_FUNCTION, MAX_METHODS, MAX_LINE, MAX_README = 400, 60, 20, 100, 900


@dataclass(frozen=True)
class Habit:
    """One row of the table: `found` lists what breaks it, the worst at the front."""

    name: str
    limit: str
    measured: str
    found: tuple[str, ...]


def sources() -> list[Path]:
    return sorted((ROOT / "analysis_lib").rglob("*.py"))


def trees() -> Iterator[tuple[Path, ast.Module]]:
    for path in sources():
        yield path.relative_to(ROOT), ast.parse(path.read_text(encoding="utf-8"))


def long_files() -> Habit:
    counts = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in sources()}
    found = sorted(((n, path) for path, n in counts.items() if n > MAX_FILE), reverse=True)
    shown = tuple(f"{path.relative_to(ROOT)}: {n} lines" for n, path in found)
    return Habit("files over 400 lines", "0", f"{len(found)} of {len(counts)}", shown)


def long_functions() -> Habit:
    lengths = []
    for path, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lengths.append((_code_lines(node), f"{path}: {node.name}"))
    lengths.sort(reverse=True)
    found = tuple(f"{name} has {n} lines" for n, name in lengths if n > MAX_FUNCTION)
    return Habit(
        "longest function, without its docstring", "60 lines", f"{lengths[0][0]} lines", found
    )


def _code_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    lines = (node.end_lineno or node.lineno) - node.lineno + 1
    first = node.body[0]
    is_doc = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    if is_doc and isinstance(first.value.value, str):
        lines -= (first.end_lineno or first.lineno) - first.lineno + 1
    return lines


def large_classes() -> Habit:
    counts = []
    for path, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                n = sum(isinstance(item, ast.FunctionDef) for item in node.body)
                counts.append((n, f"{path}: {node.name}"))
    counts.sort(reverse=True)
    found = tuple(f"{name} has {n} methods" for n, name in counts if n > MAX_METHODS)
    return Habit("a class's methods, at most", "20", str(counts[0][0]), found)


def private_imports() -> Habit:
    found = []
    for path, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level:
                names = [alias.name for alias in node.names if re.match("_[^_]", alias.name)]
                found += [f"{path}: {name}" for name in names]
    return Habit("private names used across files", "0", str(len(found)), tuple(found))


def pokes() -> Habit:
    found = [
        f"{path}:{node.lineno}"
        for path, tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr == "__dict__"
    ]
    return Habit("uses of another object's __dict__", "0", str(len(found)), tuple(found))


def long_lines() -> Habit:
    lines = [
        (path.relative_to(ROOT), number, line)
        for path in sources()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
    ]
    found = [f"{path}:{number}" for path, number, line in lines if len(line) > MAX_LINE]
    share = len(found) / len(lines)
    return Habit(
        "lines over 100 characters", "3 %", f"{share:.1%}", tuple(found) if share > 0.03 else ()
    )


def readme_words() -> Habit:
    words = len((ROOT / "README.md").read_text(encoding="utf-8").split())
    found = (f"README.md has {words} words",) if words > MAX_README else ()
    return Habit("words of the README", "900", str(words), found)


def examples() -> Habit:
    """Public names whose docstring holds no example that runs."""
    lacking = []
    for name in analysis_lib.__all__:
        if ">>>" not in (getattr(analysis_lib, name).__doc__ or ""):
            lacking.append(name)
    measured = f"{len(analysis_lib.__all__) - len(lacking)} of {len(analysis_lib.__all__)}"
    return Habit("public names with an example that runs", "all", measured, tuple(lacking))


HABITS = (
    long_files,
    long_functions,
    large_classes,
    private_imports,
    pokes,
    long_lines,
    readme_words,
    examples,
)


def main() -> int:
    habits = [measure() for measure in HABITS]
    for habit in habits:
        print(f"{habit.name:<42} {habit.measured:>12}   (limit {habit.limit})")
        for place in habit.found[:20]:
            print(f"    {place}")
        if len(habit.found) > 20:
            print(f"    and {len(habit.found) - 20} more")
    return int(any(habit.found for habit in habits))


if __name__ == "__main__":
    sys.exit(main())
