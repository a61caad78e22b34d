"""`baton top`: a router and its workers, live, in a terminal."""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from baton.core.errors import StartupError

if TYPE_CHECKING:
    import httpx
    from rich.console import Group

    from baton_launch.top_figures import Figures, Reading

_TIMEOUT_S = 5.0
_SHOWN_QUANTILES = "50 / 95 / 99 %"


def top(
    url: Annotated[str, typer.Option("--url", help="The router.")] = "http://127.0.0.1:8000",
    interval: Annotated[
        float, typer.Option("--interval", min=0.1, metavar="SECONDS", help="Time between looks.")
    ] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Look for one interval, print that, and end.")] = False,
) -> None:
    """Show a router and its workers until Ctrl-C: tokens a second, latencies, the queue, KV pages."""
    import httpx
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    from baton_launch.top_figures import figures

    console = Console()
    with httpx.Client(timeout=_TIMEOUT_S, trust_env=False) as http:

        def read() -> "Reading":
            return _read(http, url)

        before = read()
        if once or not console.is_terminal:
            time.sleep(interval)
            console.print(_shown(url, figures(before, read())))
            return
        with Live(console=console, screen=True, auto_refresh=False) as live:
            while True:
                time.sleep(interval)
                try:
                    now = read()
                except StartupError as error:  # it may come back
                    live.update(Text(str(error), style="red"), refresh=True)
                    continue
                live.update(_shown(url, figures(before, now)), refresh=True)
                before = now


def _read(http: "httpx.Client", url: str) -> "Reading":
    """Raises StartupError where no router answers."""
    import httpx

    from baton_launch.top_figures import Reading

    address = f"{url.rstrip('/')}/metrics"
    try:
        response = http.get(address).raise_for_status()
        return Reading.of(response.text, time.monotonic())
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        raise StartupError(f"no router answers at {address}: {error}") from error


def _shown(url: str, found: "Figures") -> "Group":
    from rich.console import Group
    from rich.markup import escape
    from rich.table import Table

    router = Table(title=f"Router at {escape(url)}", title_justify="left", show_header=False)
    tokens = f"{found.generated_tokens_s:.0f} generated, {found.prompt_tokens_s:.0f} of prompts"
    router.add_row("tokens a second", tokens)
    answers = f"{found.requests_s:.1f}, and {found.failures_s:.1f} that failed or were left"
    router.add_row("answers a second", answers)
    router.add_row("requests", f"{found.num_running} run, {found.num_waiting} wait")
    router.add_row(f"first token, {_SHOWN_QUANTILES}", _milliseconds(found.first_token_s))
    router.add_row(f"between tokens, {_SHOWN_QUANTILES}", _milliseconds(found.between_tokens_s))
    workers = Table(title="Workers", title_justify="left")
    for column in ("role", "name", "state", "run", "wait", "KV held", "KV MB/s"):
        workers.add_column(column, justify="left" if column in ("role", "name", "state") else "right")
    for worker in found.workers:
        workers.add_row(
            worker.role,
            escape(worker.name),
            "[green]connected[/]" if worker.is_connected else "[red]away[/]",
            str(worker.num_running),
            str(worker.num_waiting),
            f"{worker.share_held:.0%}",
            f"{worker.kv_bytes_s / 1e6:.1f}",
        )
    return Group(router, workers)


def _milliseconds(quantiles: "Sequence[float | None]") -> str:
    return " / ".join("-" if value is None else f"{value * 1e3:.1f}" for value in quantiles) + " ms"
