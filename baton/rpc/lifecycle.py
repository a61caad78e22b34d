"""How a service process lives: its event loop, signals, one owner for its tasks."""

import asyncio
import signal
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

# What a stopping worker gives its requests to end.
DRAIN_TIMEOUT_S = 30.0


class StopSignals:
    """SIGTERM asks for a drain, SIGINT (or a second SIGTERM) for an end at once.

    Made first of all in a service's main coroutine: until then asyncio answers SIGINT by cancelling it, which
    in the midst of gRPC's start leaves tracebacks.
    """

    def __init__(self) -> None:
        self.drain = asyncio.Event()
        self.stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGINT, self._on_interrupt)
        loop.add_signal_handler(signal.SIGTERM, self._on_terminate)

    async def drain_then_stop(self, drain: Callable[[], Awaitable[object]]) -> None:
        """Wait for a signal; on SIGTERM run `drain` until it ends or a second signal comes."""
        await self.drain.wait()
        if self.stop.is_set():
            return
        draining = asyncio.ensure_future(drain())
        stopping = asyncio.ensure_future(self.stop.wait())
        try:
            done, _ = await asyncio.wait((draining, stopping), return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                await task
        finally:
            draining.cancel()
            stopping.cancel()
            await asyncio.wait((draining, stopping))

    def _on_interrupt(self) -> None:
        self.drain.set()
        self.stop.set()

    def _on_terminate(self) -> None:
        if self.drain.is_set():
            self.stop.set()
        self.drain.set()


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run a service's main coroutine to its end, on uvloop where that is installed."""
    try:
        import uvloop
    except ImportError:  # faster, and no more than that
        return asyncio.run(main)
    return uvloop.run(main)
