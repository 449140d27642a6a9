"""The folders that travel with the package."""

from __future__ import annotations

from importlib import resources
from pathlib import Path


def shipped(name: str) -> Path:
    """The folder `name` ("data" or "notebooks") that travels with the package.

    It lies inside the package where this is installed, beside it in a checkout.
    """
    package = Path(str(resources.files("analysis_lib")))
    inside = package / "shipped" / name
    return inside if inside.is_dir() else package.parent / name


ROOT = shipped("data")
