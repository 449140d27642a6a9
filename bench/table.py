"""The table of results: a row, its goals, and how it is printed and written."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

GOALS: dict[tuple[str, str], dict[str, float]] = {
    ("capture", "organism"): {"ratio": 12},
    ("capture", "110M"): {"ratio": 9, "floor": 1.3},
    ("DRO step", "organism"): {"ratio": 6},
    ("DRO step", "110M"): {"ratio": 9},
    ("sampling", "organism"): {"ratio": 12},
    ("sampling", "110M"): {"ratio": 3},
    ("bytes stored", "organism"): {"ratio": 500},
    ("bytes stored", "110M"): {"ratio": 500},
    ("import", "-"): {"seconds": 0.3},
}
"""What each row of a model is to reach."""

GOAL_TEXTS = {"ratio": "{:g}x", "floor": "{:g} of floor", "seconds": "{:g} s"}

COLUMNS = (
    "row",
    "model",
    "what",
    "plain",
    "ours",
    "ratio",
    "of floor",
    "goal",
    "peak MB plain/ours",
    "runs",
    "difference",
    "results",
    "note",
)


@dataclass(frozen=True)
class Row:
    """One measured line.

    Parameters
    ----------
    what, model : str
        Which figure of which model.
    plain, ours : list of float
        One value a run, in `unit`. Empty where nothing was measured.
    unit : str
        "s", "ms" or "bytes".
    detail : str
        How much was measured.
    difference : str
        How far the results differ.
    equal : bool or None
        Whether the results agree; None where there is nothing to compare.
    floor : float or None
        Seconds for the operations of the distinct tokens at the matrix rate of the same rounds.
    peak_bytes : tuple of (int or None)
        Plain and ours, above the memory held before.
    extra : dict of str to float
        Further figures, by name.
    note : str
        What else to know.

    Examples
    --------
    >>> row = Row("capture", "organism", [12.0], [0.5])
    >>> row.ratio, row.goals()
    (24.0, {'ratio': (12, True)})
    """

    what: str
    model: str
    plain: list[float]
    ours: list[float]
    unit: str = "s"
    detail: str = ""
    difference: str = ""
    equal: bool | None = None
    floor: float | None = None
    peak_bytes: tuple[int | None, int | None] = (None, None)
    extra: dict[str, float] = field(default_factory=dict)
    note: str = ""

    @property
    def ratio(self) -> float | None:
        """Median of plain over median of ours."""
        if not self.plain or not self.ours:
            return None
        return float(np.median(self.plain) / np.median(self.ours))

    @property
    def of_floor(self) -> float | None:
        """Median of ours over the floor."""
        return float(np.median(self.ours) / self.floor) if self.ours and self.floor else None

    def goals(self) -> dict[str, tuple[float, bool]]:
        """Each goal with whether it is met; empty where nothing was measured."""
        found = GOALS.get((self.what, self.model), {}) if self.ours else {}
        reached = {
            "ratio": self.ratio or 0.0,
            "floor": -(self.of_floor or np.inf),
            "seconds": -float(np.median(self.ours or [np.inf])),
        }
        return {
            kind: (goal, reached[kind] >= (goal if kind == "ratio" else -goal))
            for kind, goal in found.items()
        }


def head(*, timed: bool) -> str:
    """The two head lines of the table; without `timed` only the columns about the results."""
    names = COLUMNS if timed else (*COLUMNS[:3], *COLUMNS[-3:])
    return "| " + " | ".join(names) + " |\n" + "|---" * len(names) + "|"


def line(row: Row, *, timed: bool) -> str:
    """A row as one line of the table.

    Parameters
    ----------
    row : Row
        What was measured.
    timed : bool
        Whether times, memory and goals are shown; else only what the results say.

    Returns
    -------
    str
        A line of Markdown.

    Examples
    --------
    >>> line(Row("import", "-", [1.0], [0.1], equal=True), timed=False)
    '| import | - |  | - | equal | - |'
    """
    cells = [row.what, row.model, row.detail]
    if timed:
        cells += _timed_cells(row)
    cells += [row.difference or "-", {True: "equal", False: "DIFFERENT", None: "-"}[row.equal]]
    notes = [*(f"{k} {v:,.4g}" for k, v in row.extra.items() if timed), row.note]
    cells.append("; ".join(notes).strip("; ") or "-")
    return "| " + " | ".join(cells) + " |"


def _timed_cells(row: Row) -> list[str]:
    goals = [
        GOAL_TEXTS[kind].format(goal) + (" met" if met else " missed")
        for kind, (goal, met) in row.goals().items()
    ]
    return [
        _number(row.plain, row.unit),
        _number(row.ours, row.unit),
        f"{row.ratio:.1f}x" if row.ratio else "-",
        f"{row.of_floor:.2f}" if row.of_floor else "-",
        ", ".join(goals) or "-",
        "/".join("-" if b is None else f"{b / 1e6:.0f}" for b in row.peak_bytes),
        str(len(row.ours)),
    ]


def _number(values: Sequence[float], unit: str) -> str:
    """Median (range) in the unit."""
    if not values:
        return "-"
    if unit == "bytes":
        return f"{values[0]:,.0f} bytes"
    digits = max(0, 2 - int(np.floor(np.log10(max(1e-6, abs(np.median(values)))))))
    low, middle, high = (
        f"{x:.{digits}f}" for x in (min(values), float(np.median(values)), max(values))
    )
    return f"{middle} ({low}-{high}) {unit}"


def machine(device: str) -> dict[str, Any]:
    """What the figures depend on: date, processor, cores, threads, load, GPU, versions.

    Parameters
    ----------
    device : str
        "cpu" or a GPU such as "cuda".

    Returns
    -------
    dict
        Ready for JSON; it holds no path and no name of the machine.
    """
    gpu = device.startswith("cuda") and torch.cuda.is_available()
    packages = {name: version(name) for name in ("torch", "transformers", "numpy", "pandas")}
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": platform.machine(),
        "cpu": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": list(os.getloadavg()),
        "gpu": torch.cuda.get_device_name() if gpu else None,
        "versions": {"python": platform.python_version(), **packages},
    }


def _processor() -> str:
    try:
        about = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.split(":")[1].strip() for line in about if line.startswith("model name"))
    return next(names, platform.processor())


def as_json(rows: Sequence[Row], about: Mapping[str, Any], seconds: float) -> str:
    """The text of a result file.

    Parameters
    ----------
    rows : sequence of Row
        All rows, with every run.
    about : mapping
        What `machine` says, and more.
    seconds : float
        How long the bench took.

    Returns
    -------
    str
        JSON with a final line break.
    """
    table = [
        asdict(row) | {"ratio": row.ratio, "of_floor": row.of_floor, "goals": row.goals()}
        for row in rows
    ]
    return json.dumps({**about, "seconds": round(seconds, 1), "rows": table}, indent=1) + "\n"
