"""Entry point of the `baton` command.

Commands import what they need when they run, so that `baton --help` is quick and only workers load torch.
"""

import functools
import sys
from typing import Annotated

import typer

from baton.core.errors import BatonError, StartupError
from baton_launch import config_command
from baton_launch.chat import chat
from baton_launch.doctor import doctor
from baton_launch.foreign_options import ForgivingCommand, with_dashes
from baton_launch.health import health
from baton_launch.router_command import router
from baton_launch.serve import serve
from baton_launch.top import top
from baton_launch.worker_command import worker_command

app = typer.Typer(
    help="Serves large language models with prefill and decode on separate servers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # whose tables cut the options' names on terminals of usual width
)
_command = functools.partial(
    app.command, cls=ForgivingCommand, context_settings={"token_normalize_func": with_dashes}
)
_command()(serve)
_command()(chat)
_command()(router)
_command()(health)
_command()(top)
_command()(doctor)
app.add_typer(config_command.app, name="config")
_command("prefill", help="Run one prefill server: it computes prompts.")(worker_command("prefill"))
_command("decode", help="Run one decode server: it continues prompts.")(worker_command("decode"))
_command("worker", help="Run one worker of both roles, or of the one that --role names.")(worker_command())


def _print_version(asked: bool) -> None:
    if asked:
        from baton import __version__

        typer.echo(f"baton {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    _: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line; an error of ours ends as one line on standard error (StartupError: code 2)."""
    try:
        app(prog_name="baton")
    except (BatonError, BaseExceptionGroup) as raised:
        error = _only_error(raised)
        if not isinstance(error, BatonError):
            raise
        print(f"baton: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2 if isinstance(error, StartupError) else 1)
    except KeyboardInterrupt:  # before a service has its own signal handlers, while it loads
        sys.exit(130)


def _only_error(error: BaseException) -> BaseException:
    """What task groups have wrapped, where it is one error alone."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


if __name__ == "__main__":
    main()
