"""Keeps a set of processes alive together: starts them, restarts what crashes, stops all at the end."""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from baton.core.errors import StartupError

ERROR_PREFIX = "baton: "  # how a process of ours begins the one line that says why it could not start


@dataclass(frozen=True, slots=True)
class ChildSpec:
    """How to start one process."""

    name: str
    arguments: Sequence[str]  # the program first
    environment: dict[str, str]


@dataclass(frozen=True, slots=True)
class Timing:
    """How long the supervisor waits, in seconds."""

    startup_deadline: float = 900.0
    poll_interval: float = 0.1
    stop_grace: float = 10.0  # between SIGTERM and SIGKILL
    first_backoff: float = 1.0  # before the first restart; each one doubles it
    longest_backoff: float = 30.0
    steady_after: float = 60.0  # a process that ran so long starts again with the first backoff


class Reporter(Protocol):
    """Where the supervisor says what happens."""

    def child_line(self, name: str, line: str) -> None:
        """A process wrote this line."""
        ...

    def notice(self, text: str) -> None:
        """Something happened that a person should know."""
        ...

    def waiting(self) -> None:
        """Not everything is ready yet; called every poll interval."""
        ...

    def ready(self) -> None:
        """Everything is ready; called once."""
        ...


class Supervisor:
    """Runs its children until it is asked to stop.

    Before everything is ready the end of any child ends all; from then on a child that ends is restarted.
    """

    def __init__(
        self,
        children: Sequence[ChildSpec],
        is_ready: Callable[[], Awaitable[bool]],
        reporter: Reporter,
        timing: Timing = Timing(),  # noqa: B008  (frozen)
    ) -> None:
        self._children = children
        self._is_ready = is_ready
        self._reporter = reporter
        self._timing = timing
        self._processes: dict[str, asyncio.subprocess.Process] = {}
        self._started = False
        self._failure: str | None = None
        self._stopping = asyncio.Event()
        self._killing = asyncio.Event()

    def stop(self) -> None:
        """Stop all children; asked a second time, kill them."""
        if self._stopping.is_set():
            self._killing.set()
        self._stopping.set()

    async def run(self) -> None:
        """Return when all children have ended after `stop`; StartupError if they did not become ready."""
        try:
            async with asyncio.TaskGroup() as tasks:
                keepers = [tasks.create_task(self._keep_running(child)) for child in self._children]
                tasks.create_task(self._await_ready())
                await self._stopping.wait()
                self._signal_all(signal.SIGTERM)
                killing = tasks.create_task(self._killing.wait())
                await self._wait_for_end(keepers, killing)
                self._signal_all(signal.SIGKILL)
        finally:
            self._signal_all(signal.SIGKILL)
        if self._failure is not None:
            raise StartupError(self._failure)
