"""A model directory that is none, and free ports."""

import json
from pathlib import Path

import pytest

from tests.free_ports import free_port


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    """What the command line takes for a model; nothing here loads it."""
    directory = tmp_path / "a-model"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return directory


@pytest.fixture
def free_ports() -> tuple[int, int]:
    """Two ports that nothing listens on."""
    return free_port(), free_port()
