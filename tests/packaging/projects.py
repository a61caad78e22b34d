"""The two projects of the checkout, each with a pyproject.toml."""

import tomllib
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
CLIENT = Path("clients/python")  # in ROOT

Build = Callable[[Path], Path]


def project(directory: Path) -> dict:
    """What the project in that directory says of itself."""
    return tomllib.loads((directory / "pyproject.toml").read_text())
