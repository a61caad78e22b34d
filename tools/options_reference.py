"""Writes docs/options.md, the options of every command, from the commands themselves.

python -m tools.options_reference
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from baton_launch.main import app

PAGE = Path(__file__).parents[1] / "docs" / "options.md"
INTRODUCTION = """\
# Options

All options of each command, as its `--help` tells them; `python -m tools.options_reference` writes this page.
Names may have underscores for dashes. Options that vLLM has and Baton has not are answered with a line that
says what holds instead (`launch/baton_launch/foreign_options.py`).
Each may also stand in a file, `baton.toml` or the one that `--config` names, and in the environment, as
`BATON_PORT` for `--port`: [how](how-to/configure.md). The secret that the router and its workers share comes
from the environment alone, as `BATON_CLUSTER_TOKEN`.
"""


def reference() -> str:
    """The page's text."""
    group: Any = typer.main.get_command(app)
    return "\n".join([INTRODUCTION, *_sections("", group)])


def _sections(before: str, group: Any) -> Iterator[str]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _sections(f"{before}{name} ", command)
        else:
            yield _section(f"{before}{name}", command)


def _section(name: str, command: Any) -> str:
    return "\n".join([f"## `baton {name}`", "", command.help, "", *_table(command), ""])


def _table(command: Any) -> Iterator[str]:
    yield "| option | default | what it does |"
    yield "| --- | --- | --- |"
    for parameter in command.params:
        if not parameter.hidden:
            flag = parameter.metavar if parameter.param_type_name == "argument" else parameter.opts[0]
            yield f"| `{flag}` | {_default(parameter)} | {parameter.help} |"


def _default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    if isinstance(parameter.show_default, str):
        return parameter.show_default
    return f"`{parameter.default}`" if parameter.default not in (None, False, []) else ""


if __name__ == "__main__":
    PAGE.write_text(reference())
