"""Makes the table of options (baton/config.py) a command's own."""

import functools
import inspect
import os
from collections.abc import Callable, Collection
from typing import Annotated, Any

import typer

from baton.core.errors import StartupError
from baton.option import REQUIRED, Setting
from baton_launch.config_file import ConfigFile, variable_of

Command = Callable[..., None]
ExitWithParent = Annotated[int | None, typer.Option("--exit-with-parent", hidden=True, metavar="PID")]


def takes_options(settings: Collection[Setting]) -> Callable[[Command], Command]:
    """Lets a command take these options: its `**values` are the fields' values, read and checked.

    What is neither given nor has a default is left out. The command raises StartupError for a value that an
    option does not take.
    """

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def run(**given: Any) -> None:
            given.pop("config")
            for setting in settings:
                written = given.pop(setting.field)
                if written is not None:
                    given[setting.field] = setting.read(written)
            command(**given)

        signature = inspect.signature(command)
        *own, _ = signature.parameters.values()
        config = inspect.Parameter(
            "config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=ConfigFile
        )
        parameters = [*own, *map(_parameter, settings), config]
        run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        return run

    return decorate


def cluster_token() -> str:
    """The secret that routers and workers share; empty if there is none. Raises StartupError.

    It comes by the environment because other users can read a process's arguments. White space around it is
    not of it: secrets that come from files often end in a line feed.
    """
    token = os.environ.get("BATON_CLUSTER_TOKEN", "").strip()
    if not (token.isascii() and token.isprintable()):  # all that a header of HTTP/2 may hold
        raise StartupError("BATON_CLUSTER_TOKEN may hold printable ASCII characters only")
    return token


def _parameter(setting: Setting) -> inspect.Parameter:
    """As Typer reads it from a command's signature."""
    option = setting.option
    least, greatest = option.values.ends or (None, None)
    info = typer.Option(
        ... if setting.default is REQUIRED else setting.default,
        option.flag,
        help=option.help,
        metavar=option.values.metavar,
        envvar=variable_of(option),
        show_envvar=False,
        min=least,
        max=greatest,
        show_default=option.unset or True,
    )
    annotation = setting.type if setting.default is not None else setting.type | None
    return inspect.Parameter(
        setting.field, inspect.Parameter.KEYWORD_ONLY, default=info, annotation=annotation
    )
