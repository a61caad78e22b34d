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


def ratios(heading: str) -> list[str]:
    """Of vLLM's tokens a second, by one worker: what the tables of a part of docs/performance.md have."""
    page = (ROOT / "docs" / "performance.md").read_text()
    part = page.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    found: list[str] = []
    column: int | None = None
    for line in part.splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if "vLLM" in cells and "Baton, one worker" in cells:
            column = cells.index("Baton, one worker")
        elif column is not None and len(cells) > column:
            found += re.findall(r"\((\d+\.\d\d) x\)", cells[column])
        else:
            column = None
    return sorted(found, key=float)


def test_the_readme_says_of_both_machines_what_the_tables_say() -> None:
    """One of them alone would promise what the other does not hold."""
    readme = " ".join((ROOT / "README.md").read_text().split())
    without, with_amx = ratios("Beside vLLM"), ratios("With AMX")
    assert len(without) >= 8
    assert len(with_amx) >= 8
    assert (
        f"{without[0]} to {without[-1]} times the tokens a second of vLLM's CPU build, with a seventh of its "
        "memory, where the CPU has no bfloat16 instructions" in readme
    )
    assert f"{with_amx[0]} to {with_amx[-1]} times with AMX" in readme


def test_the_readme_says_what_its_programs_need() -> None:
    text = (ROOT / "README.md").read_text()
    assert text.index("pip install openai") < text.index("from openai import OpenAI")
    assert text.index("C compiler (Debian: `apt install build-essential`)") < text.index("make run")
