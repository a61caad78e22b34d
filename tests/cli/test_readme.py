"""What README.md and docs/ tell people to type."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from baton.config import DEFAULT_KV_CACHE_BYTES
from baton.core.kv_layout import KVLayout
from baton.engine.pages.memory import PoolSize, num_blocks_for
from baton_launch.main import app

ROOT = Path(__file__).parents[2]
COMMAND = re.compile(r"(?:^|`)(?:\.venv/bin/)?baton (\w+)((?: [^`\n]*)?)(?:`|$)", re.MULTILINE)
COMMANDS = sorted(
    {
        match.groups()
        for file in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md"))
        for match in COMMAND.finditer(file.read_text())
        if " | " not in match[0]
    }
)


def test_there_are_commands() -> None:
    assert {"serve", "chat", "prefill", "decode", "router", "worker"} <= {name for name, _ in COMMANDS}


@pytest.mark.parametrize(("name", "arguments"), COMMANDS)
def test_options_are_known(name: str, arguments: str) -> None:
    command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    parser = command.make_parser(typer.Context(command))
    parser.parse_args(shlex.split(arguments, comments=True))  # raises for an option that is not there


def test_the_model_of_the_readme_fits() -> None:
    """Qwen3-0.6B's 40,960 tokens need 4.4 GiB: more than a start without options has."""
    [arguments] = [arguments for _, arguments in COMMANDS if "Qwen/Qwen3-0.6B" in arguments]
    [longest] = re.findall(r"--max-model-len (\d+)", arguments) or ["40960"]
    layout = KVLayout(block_size=16, num_layers=28, num_kv_heads=8, head_dim=128, dtype="bfloat16")
    num_blocks_for(layout, PoolSize(DEFAULT_KV_CACHE_BYTES), int(longest))
