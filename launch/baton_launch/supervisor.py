"""Keeps a set of processes alive together: starts them, restarts what crashes, stops all at the end."""

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Mapping, Sequence
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
    finishes: bool = False  # at SIGTERM it ends what it has begun, for which the others have to be there


@dataclass(frozen=True, slots=True)
class Timing:
    """How long the supervisor waits, in seconds."""

    startup_deadline: float = 900.0
    poll_interval: float = 0.1
    finish_grace: float = 35.0  # for children that finish what they have begun
    stop_grace: float = 10.0  # between the signal to end and SIGKILL
    first_backoff: float = 1.0  # before the first restart; each one doubles it
    longest_backoff: float = 30.0
    steady_after: float = 60.0  # a process that ran so long starts again with the first backoff


DEFAULT_TIMING = Timing()


class Reporter(Protocol):
    """Where the supervisor says what happens."""

    def child_line(self, name: str, line: str) -> None:
        """A process wrote this line."""
        ...

    def notice(self, text: str) -> None:
        """Something happened that a person should know."""
        ...

    def warning(self, text: str) -> None:
        """Something happened that a person should look at."""
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
        timing: Timing = DEFAULT_TIMING,
    ) -> None:
        self._children = children
        self._is_ready = is_ready
        self._reporter = reporter
        self._timing = timing
        self._processes: dict[str, asyncio.subprocess.Process] = {}
        self._started = False
        self._failure: str | None = None
        self._stopping = asyncio.Event()
        self._hurrying = asyncio.Event()  # what has begun need not be finished
        self._killing = asyncio.Event()  # set when there is nothing left to wait for

    def stop(self) -> None:
        """Stop all children when they have finished; asked again, at once; asked a third time, kill them."""
        if self._hurrying.is_set():
            self._killing.set()
        elif self._stopping.is_set():
            self._hurrying.set()
        self._stopping.set()

    async def run(self) -> None:
        """Return when all children have ended after `stop`; StartupError if they did not become ready."""
        try:
            async with asyncio.TaskGroup() as tasks:
                keepers = {
                    child.name: tasks.create_task(self._keep_running(child)) for child in self._children
                }
                tasks.create_task(self._await_ready())
                await self._stopping.wait()
                if self._started:
                    await self._let_finish(keepers)
                self._signal_all(self._stop_signal)
                await self._wait_for_end(keepers.values())
        finally:
            self._signal_all(signal.SIGKILL)
        if self._failure is not None:
            raise StartupError(self._failure)

    async def _let_finish(self, keepers: Mapping[str, asyncio.Task[None]]) -> None:
        """Wait for the children that finish what they have begun, unless somebody is in a hurry."""
        self._reporter.notice(
            "stopping: running requests have 30 s to end; a second Ctrl-C or SIGTERM cuts them off, a third "
            "kills the processes"
        )
        names = {child.name for child in self._children if child.finishes}
        self._signal_all(signal.SIGTERM, names)
        ended = asyncio.gather(*(keepers[name] for name in names))
        hurry = asyncio.ensure_future(self._hurrying.wait())
        await asyncio.wait(
            (ended, hurry), timeout=self._timing.finish_grace, return_when=asyncio.FIRST_COMPLETED
        )
        hurry.cancel()
        self._hurrying.set()

    @property
    def _stop_signal(self) -> signal.Signals:
        """What ends children soonest: SIGTERM would have workers that serve finish their requests first, and
        Python may lose SIGINT, or hear it late, while it imports and loads."""
        return signal.SIGINT if self._started else signal.SIGTERM

    async def _wait_for_end(self, keepers: Iterable[asyncio.Task[None]]) -> None:
        """Wait until all children have ended, the grace period is over, or somebody is in a hurry."""
        ended = asyncio.gather(*keepers)
        ended.add_done_callback(lambda _: self._killing.set())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._timing.stop_grace):
                await self._killing.wait()
        self._signal_all(signal.SIGKILL)
        await ended

    async def _await_ready(self) -> None:
        deadline = time.monotonic() + self._timing.startup_deadline
        while not self._stopping.is_set():
            if await self._is_ready():
                self._started = True
                self._reporter.ready()
                return
            if time.monotonic() > deadline:
                self._fail(f"not ready after {self._timing.startup_deadline:g} seconds")
            self._reporter.waiting()
            await self._pause(self._timing.poll_interval)

    async def _keep_running(self, child: ChildSpec) -> None:
        backoff = self._timing.first_backoff
        while not self._stopping.is_set():
            begun = time.monotonic()
            ending = await self._run_once(child)
            if self._stopping.is_set():
                return
            if not self._started:
                self._fail(ending)
                return
            if time.monotonic() - begun >= self._timing.steady_after:
                backoff = self._timing.first_backoff
            self._reporter.warning(f"{ending}; starting it again in {backoff:g} s")
            await self._pause(backoff)
            backoff = min(2 * backoff, self._timing.longest_backoff)

    async def _run_once(self, child: ChildSpec) -> str:
        """Run the process to its end, showing its lines, and say how it ended.

        It gets a session of its own, so that Ctrl-C in the terminal reaches the supervisor alone.
        """
        process = await asyncio.create_subprocess_exec(
            *child.arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=child.environment,
            start_new_session=True,
        )
        self._processes[child.name] = process
        if self._stopping.is_set():  # `stop` came while it was being made
            process.kill()
        assert process.stdout is not None
        last_words = ""
        async for line in _lines(process.stdout):
            if line.startswith(ERROR_PREFIX):
                last_words = line.removeprefix(ERROR_PREFIX)
            else:
                self._reporter.child_line(child.name, line)
        return _describe_end(child.name, await process.wait(), last_words)

    def _fail(self, reason: str) -> None:
        if not self._stopping.is_set():
            self._failure = reason
            self._stopping.set()

    async def _pause(self, seconds: float) -> None:
        """Sleep, but no longer than until `stop`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stopping.wait()

    def _signal_all(self, number: signal.Signals, names: Collection[str] | None = None) -> None:
        """Signal what still runs, or those of these names; SIGKILL also goes to what they have started."""
        for name, process in self._processes.items():
            if process.returncode is not None or (names is not None and name not in names):
                continue
            with contextlib.suppress(ProcessLookupError):
                if number == signal.SIGKILL:
                    os.killpg(process.pid, number)
                else:
                    process.send_signal(number)


async def _lines(stream: asyncio.StreamReader) -> AsyncIterator[str]:
    """Lines of any length; of a progress bar that returns to the line's start, its last state."""
    rest = b""
    while chunk := await stream.read(65536):
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            yield _text(line)
    if rest:
        yield _text(rest)


def _text(line: bytes) -> str:
    return line.decode(errors="replace").rstrip().rpartition("\r")[2]


def _describe_end(name: str, code: int, last_words: str) -> str:
    if last_words:
        return f"{name}: {last_words}"
    if code < 0:
        return f"{name} was killed by {signal.Signals(-code).name}"
    return f"{name} ended with exit code {code}"
