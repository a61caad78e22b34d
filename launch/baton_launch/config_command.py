"""`baton config`: where each setting comes from, and a schema of the file for editors."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from baton.config import RouterConfig, WorkerConfig
from baton.core.errors import StartupError
from baton.option import settings_of
from baton_launch.config_file import chosen_file, read_file, settable, settings_of_command

app = typer.Typer(
    help="Show what settings hold, and where they come from.", no_args_is_help=True, rich_markup_mode=None
)
_TYPES = {
    setting.option.name: setting.type for setting in (*settings_of(RouterConfig), *settings_of(WorkerConfig))
}
_JSON_TYPES: dict[Any, Any] = {int: "integer", float: "number", bool: "boolean"}
_ANY_SCALAR = ["string", "integer", "number", "array", "object"]  # sizes, and what is JSON in a text
_ORIGINS = {"DEFAULT_MAP": "file", "ENVIRONMENT": "environment", "DEFAULT": "default"}


@app.command()
def show(
    context: typer.Context,
    command: Annotated[str, typer.Argument(help="serve, router, prefill, decode or worker.")] = "serve",
    config: Annotated[Path | None, typer.Option("--config", envvar="BATON_CONFIG", metavar="FILE")] = None,
) -> None:
    """Print the settings that a command would start with, and the origin of each."""
    commands = _commands(context)
    if command not in commands:
        raise StartupError(f"there is no command '{command}' with settings; there are {', '.join(commands)}")
    asked = commands[command]
    file = chosen_file(config)
    inner = asked.context_class(asked, info_name=command)
    inner.default_map = {} if file is None else read_file(file, command, commands)
    for name, parameter in settings_of_command(asked).items():
        value, source = parameter.consume_value(inner, {})
        origin = _ORIGINS.get(source.name, source.name.lower())
        shown = f"{file}" if origin == "file" else origin
        typer.echo(f"{name} = {_shown(value, parameter)}  # {shown}")


@app.command()
def schema(context: typer.Context) -> None:
    """Print a JSON schema of baton.toml, for editors."""
    typer.echo(json.dumps(schema_of(_commands(context)), indent=2))


def schema_of(commands: dict[str, Any]) -> dict[str, Any]:
    """The schema: every option for all commands, and a table for each command."""
    tables = {
        name: {key: _property(key, parameter) for key, parameter in settings_of_command(command).items()}
        for name, command in commands.items()
    }
    shared: dict[str, Any] = {}
    for properties in tables.values():
        for key, value in properties.items():
            if key not in tables:  # such as `router`'s list `prefill`, whose table has the name
                shared.setdefault(key, value)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "baton.toml",
        "type": "object",
        "additionalProperties": False,
        "properties": shared
        | {
            name: {"type": "object", "additionalProperties": False, "properties": properties}
            for name, properties in tables.items()
        },
    }


def _commands(context: typer.Context) -> dict[str, Any]:
    return settable(context.find_root().command)


def _property(name: str, parameter: Any) -> dict[str, Any]:
    described = {"description": parameter.help} if getattr(parameter, "help", None) else {}
    if getattr(parameter, "multiple", False):
        return {"type": "array", "items": {"type": "string"}, **described}
    return {"type": _JSON_TYPES.get(_TYPES.get(name), _ANY_SCALAR), **described}


def _shown(value: Any, parameter: Any) -> str:
    """As TOML has it; in words where nothing is set."""
    if value is None or value in ([], ()):
        words = getattr(parameter, "show_default", None)
        return f"({words})" if isinstance(words, str) else "(not set)"
    return json.dumps(list(value) if isinstance(value, tuple) else value, default=str)
