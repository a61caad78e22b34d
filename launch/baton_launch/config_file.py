"""Settings from elsewhere than the command line: a file, `baton.toml`, and variables of the environment.

What a command line says is stronger than the environment, and that is stronger than the file. Names are
those of the options, less their dashes: `port = 9000`, `BATON_PORT=9000`. In the file a table with a
command's name holds for that command, and what stands before the tables for each that has such an option.
"""

import difflib
import json
import os
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from baton.config import RouterConfig, WorkerConfig
from baton.core.errors import StartupError
from baton.option import Option, settings_of

DEFAULT_FILE = Path("baton.toml")
VARIABLE = "BATON_CONFIG"
_NOT_SETTINGS = frozenset({"help", "config", "exit_with_parent"})


def variable_of(option: Option) -> str:
    """The variable of the environment that sets an option."""
    return f"BATON_{option.name.upper().replace('-', '_')}"


def environment_of_children() -> dict[str, str]:
    """This process's, less what sets options: the children's command lines say all that holds for them."""
    settings = (*settings_of(RouterConfig), *settings_of(WorkerConfig))
    ours = {variable_of(setting.option) for setting in settings}
    return {name: value for name, value in os.environ.items() if name not in ours} | {VARIABLE: ""}


def settings_of_command(command: Any) -> dict[str, Any]:
    """The parameters of a command that a file may set, by their names there."""
    return {
        _written_name(parameter): parameter
        for parameter in command.params
        if parameter.name not in _NOT_SETTINGS and not getattr(parameter, "hidden", False)
    }


def chosen_file(path: Path | None) -> Path | None:
    """The file that holds: the one that is named, or `baton.toml` in the current directory if there is one.

    An empty variable BATON_CONFIG stands for none.
    """
    if path is not None:
        return path
    return DEFAULT_FILE if VARIABLE not in os.environ and DEFAULT_FILE.is_file() else None


def read_file(path: Path, name: str, commands: Mapping[str, Any]) -> dict[str, Any]:
    """What a file says for the command `name`, by the names of its parameters.

    Raises StartupError where it can't be read, or names what no command has.
    """
    try:
        content = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise StartupError(f"{path} can't be read: {error}") from error
    known = {command: settings_of_command(commands[command]) for command in commands}
    tables = {key: value for key, value in content.items() if key in known and isinstance(value, dict)}
    shared = {key: value for key, value in content.items() if key not in tables}
    for key in shared:
        everything = {other for settings in known.values() for other in settings}
        _require_known(path, key, everything, "", {*everything, *known})
    for command, table in tables.items():
        for key in table:
            _require_known(path, key, known[command], f"[{command}] ", known[command])
    said = {_dashed(key): value for key, value in shared.items() if _dashed(key) in known[name]}
    said |= {_dashed(key): value for key, value in tables.get(name, {}).items()}
    return {known[name][key].name: _written(known[name][key], value) for key, value in said.items()}


def _read(context: typer.Context, path: Path | None) -> Path | None:
    """Gives a command what the file says as its defaults."""
    file = chosen_file(path)
    if file is not None and context.parent is not None:
        commands = settable(context.parent.command)
        context.default_map = read_file(file, context.command.name or "", commands)
    return file


def settable(group: Any) -> dict[str, Any]:
    """The commands of a group that settings are for."""
    return {name: command for name, command in group.commands.items() if _takes_file(command)}


ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        callback=_read,
        is_eager=True,
        envvar=VARIABLE,
        show_envvar=False,
        metavar="FILE",
        help="Settings in TOML, by the names of these options.",
        show_default="baton.toml, if it is here",
    ),
]


def _takes_file(command: Any) -> bool:
    return any(parameter.name == "config" for parameter in getattr(command, "params", ()))


def _require_known(path: Path, key: str, known: Iterable[str], where: str, likely: Iterable[str]) -> None:
    if _dashed(key) in set(known):
        return
    close = difflib.get_close_matches(_dashed(key), list(likely), 1)
    hint = f"; '{close[0]}' is one" if close else ""
    raise StartupError(f"{path}: {where}{key} is no setting{hint}: see docs/options.md for all")


def _written_name(parameter: Any) -> str:
    return _dashed(
        parameter.name if parameter.param_type_name == "argument" else parameter.opts[0].lstrip("-")
    )


def _dashed(key: str) -> str:
    return key.replace("_", "-")


def _written(parameter: Any, value: Any) -> Any:
    """As a command line has it: what is JSON there may be TOML in a file."""
    is_list = bool(getattr(parameter, "multiple", False))
    if is_list:
        return value if isinstance(value, list) else [value]
    return json.dumps(value) if isinstance(value, list | dict) else value
