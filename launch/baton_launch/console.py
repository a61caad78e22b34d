"""What `baton serve` shows on the terminal while its processes start and run."""

import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from rich.console import Console
from rich.text import Text

from baton_launch.logging_setup import TIME_FORMAT


class _LastingConsole(Console):
    """One whose reader may leave, as `tee` does when it is killed: that is no reason to stop serving."""

    def on_broken_pipe(self) -> None:
        """See Console, which would end the program."""
        _write_to_nobody(sys.stderr)


class ConsoleReporter:
    """Shows children's lines behind their names, a status line until all is ready, then the banner.

    All but the banner goes to standard error. `sockets` are the files that the workers make when they
    listen; a process that has none counts as ready with the whole.
    """

    def __init__(self, sockets: Mapping[str, Path | None], banner: str) -> None:
        self._console = _LastingConsole(stderr=True)
        self._status = self._console.status("starting")
        self._sockets = sockets
        self._banner = banner

    def child_line(self, name: str, line: str) -> None:
        """Show a line of a child as it is, however long."""
        self._console.print(Text.assemble((f"[{name}] ", "cyan"), line), soft_wrap=True)

    def notice(self, text: str) -> None:
        """Show a line of Baton's own."""
        self._say("INFO", text)

    def warning(self, text: str) -> None:
        """Show one that a person should look at."""
        self._say("WARNING", text)

    def _say(self, level: str, text: str) -> None:
        line = f"{time.strftime(TIME_FORMAT)} {level} baton: {text}"
        self._console.print(Text(line, style="yellow"), soft_wrap=True)

    def waiting(self) -> None:
        """Say who is ready and who is not."""
        words = [
            f"[green]{name} ✓[/]" if socket is not None and socket.exists() else f"[dim]{name} …[/]"
            for name, socket in self._sockets.items()
        ]
        self._status.update(f"starting: {'  '.join(words)}")
        self._status.start()

    def ready(self) -> None:
        """Replace the status line by the banner."""
        self._status.stop()
        try:
            print(self._banner, flush=True)
        except BrokenPipeError:
            _write_to_nobody(sys.stdout)

    def close(self) -> None:
        """Leave the terminal as it was."""
        self._status.stop()


def _write_to_nobody(stream: IO[str]) -> None:
    """From now on; what waits to be written would else be an error at the program's end."""
    nobody = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nobody, stream.fileno())
    os.close(nobody)
