"""Widgets of a study, one call per notebook cell.

`explore` shows layers, components and single queries. `inspect_directions` turns directions.
`probe` places a query and a safety prompt of your own. `dro_console` trains a soft prompt and shows
it while it learns.

Each has labelled controls (set their `.value` from code), one `.figure`, a `.message` area for
errors and warnings, and a `.table` of what it shows. Queries, prompts and replies are untrusted
text, and escaped wherever they are rendered. In JupyterLab, another run of the cell keeps what was
chosen.
"""

from __future__ import annotations

from .console import Console, dro_console
from .explorer import Explorer, explore
from .inspector import Inspector, inspect_directions
from .probe import Probe, probe

__all__ = [
    "Console",
    "Explorer",
    "Inspector",
    "Probe",
    "dro_console",
    "explore",
    "inspect_directions",
    "probe",
]
