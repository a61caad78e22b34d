"""`baton chat`: a conversation with a running router, in the terminal."""

import contextlib
import io
import itertools
import re
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from baton.core.errors import RequestFailed

if TYPE_CHECKING:
    from rich.console import Console

    from baton_launch.chat_client import ChatClient

Url = Annotated[str, typer.Option(help="Where the router is.")]
Model = Annotated[str | None, typer.Option(help="Model to ask for.", show_default="the one that is served")]
System = Annotated[str | None, typer.Option(help="System message to begin with.")]
MaxTokens = Annotated[int | None, typer.Option(min=1, help="Most tokens of an answer.")]
Temperature = Annotated[
    float | None, typer.Option(min=0, max=100, help="0 always takes the likeliest token.")
]

COMMANDS = {
    "/help": "lists these",
    "/reset": "starts a new conversation",
    "/exit": "leaves, as Ctrl-D does",
    "/quit": "the same",
}
_COMMAND = re.compile(r"/[a-z]+")  # what else begins so, such as a path, is a message


def chat(
    url: Url = "http://127.0.0.1:8000",
    model: Model = None,
    system: System = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
) -> None:
    """Talk to a running router. Without a terminal each line of standard input is one message."""
    from rich.console import Console

    from baton_launch.chat_client import ChatClient

    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):  # a file may hold, and a terminal show, less than UTF-8 does
            stream.reconfigure(errors="replace")
    with ChatClient(url, model, max_tokens, temperature) as client:
        conversation = Conversation(client, system, Console(highlight=False))
        if sys.stdin.isatty():
            conversation.run_in_terminal()
        else:
            conversation.run_script()


class Conversation:
    """What was said so far, and the two ways of going on."""

    def __init__(self, client: "ChatClient", system: str | None, console: "Console") -> None:
        self._client = client
        self._system = system
        self._console = console
        self._messages: list[dict[str, str]] = []
        self._reset()

    def run_in_terminal(self) -> None:
        """Ask and answer until /exit, /quit or Ctrl-D; Ctrl-C stops the current answer."""
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (gives `input` line editing and a history)
        self._console.print(
            f"[dim]{self._client.model}: /help lists the commands, Ctrl-C stops an answer, /exit leaves[/]"
        )
        while True:
            try:
                if not self._take(input("> ").strip()):
                    return
            except EOFError:
                self._console.print()
                return
            except KeyboardInterrupt:
                self._console.print()
            except RequestFailed as failure:
                self._console.print(str(failure), style="red", markup=False)

    def run_script(self) -> None:
        """Answer each line of standard input; RequestFailed at the first request that fails."""
        for line in sys.stdin:
            if not self._take(line.strip()):
                return

    def _reset(self) -> None:
        self._messages = [{"role": "system", "content": self._system}] if self._system else []

    def _take(self, text: str) -> bool:
        """Do what a line says; returns whether the conversation goes on. Raises RequestFailed."""
        if text in ("/exit", "/quit"):
            return False
        if text == "/reset":
            self._reset()
        elif text == "/help":
            print("\n".join(f"{name:<8}{what}" for name, what in COMMANDS.items()))
        elif _COMMAND.fullmatch(text):
            raise RequestFailed(f"there is no {text}: the commands are {', '.join(COMMANDS)}")
        elif text:
            self._answer(text)
        return True

    def _answer(self, text: str) -> None:
        """Ask, show the answer as it comes, and keep what came of it, though it be stopped half-way."""
        self._messages.append({"role": "user", "content": text})
        pieces: list[str] = []
        try:
            self._show(pieces)
        finally:
            if pieces:
                self._messages.append({"role": "assistant", "content": "".join(pieces)})
            else:
                self._messages.pop()

    def _show(self, pieces: list[str]) -> None:
        """Print the pieces of the answer, and put them into `pieces`."""
        with contextlib.closing(self._client.answer(self._messages)) as answer:
            with self._console.status("thinking"):
                first = next(answer, "")
            for piece in itertools.chain([first], answer):
                print(piece, end="", flush=True)
                pieces.append(piece)
        print(flush=True)
