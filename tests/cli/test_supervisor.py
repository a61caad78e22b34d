"""The supervisor with small scripts for children, waiting on what it reports instead of on the clock."""

import asyncio
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from baton.core.errors import StartupError
from baton_launch.supervisor import ChildSpec, Supervisor, Timing

QUICK = Timing(startup_deadline=30, poll_interval=0.01, stop_grace=10, first_backoff=0.01)

ON_SIGINT = "import signal, time; signal.signal(signal.SIGINT, signal.{}); "
SAY_AND_SLEEP = "print('up', flush=True); time.sleep(600)"
SAY_AND_WAIT = ON_SIGINT.format("SIG_DFL") + SAY_AND_SLEEP
IGNORE_SIGINT = ON_SIGINT.format("SIG_IGN") + SAY_AND_SLEEP
FAIL = "import sys; print('noise'); print('baton: no such model', file=sys.stderr); sys.exit(2)"


class RecordingReporter:
    """Keeps all it is told, and lets tests wait for a part of it."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._news = asyncio.Condition()
        self._tasks: set[asyncio.Task[None]] = set()

    def child_line(self, name: str, line: str) -> None:
        self._add(f"[{name}] {line}")

    def notice(self, text: str) -> None:
        self._add(text)

    def warning(self, text: str) -> None:
        self._add(text)

    def waiting(self) -> None:
        pass

    def ready(self) -> None:
        self._add("ready")

    async def seen(self, text: str, times: int = 1) -> None:
        """Wait until `times` lines contain `text`."""
        async with self._news:
            await self._news.wait_for(lambda: sum(text in line for line in self.lines) >= times)

    def _add(self, line: str) -> None:
        self.lines.append(line)
        task = asyncio.create_task(self._announce())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _announce(self) -> None:
        async with self._news:
            self._news.notify_all()


def script(name: str, source: str) -> ChildSpec:
    return ChildSpec(name, (sys.executable, "-c", source), dict(os.environ))


async def yes() -> bool:
    return True


async def no() -> bool:
    return False


def when_up(reporter: RecordingReporter, children: int) -> Callable[[], Awaitable[bool]]:
    """Ready once every child has said so."""

    async def is_ready() -> bool:
        await reporter.seen("] up", children)
        return True

    return is_ready


async def test_stop_ends_all_children() -> None:
    reporter = RecordingReporter()
    children = [script("a", SAY_AND_WAIT), script("b", SAY_AND_WAIT)]
    supervisor = Supervisor(children, when_up(reporter, 2), reporter, QUICK)
    running = asyncio.create_task(supervisor.run())
    await reporter.seen("ready")
    supervisor.stop()
    await running
    assert sorted(reporter.lines[:3]) == ["[a] up", "[b] up", "ready"]
    assert len(reporter.lines) == 4
    assert reporter.lines[3].startswith("stopping")


async def test_a_child_that_can_not_start_ends_all_and_its_words_are_the_error() -> None:
    reporter = RecordingReporter()
    children = [script("good", SAY_AND_WAIT), script("bad", FAIL), script("worse", FAIL)]
    with pytest.raises(StartupError, match=r"^(bad|worse): no such model$"):
        await Supervisor(children, no, reporter, QUICK).run()
    assert not any("no such model" in line for line in reporter.lines)
    assert any("noise" in line for line in reporter.lines)


async def test_a_child_that_crashes_at_start_ends_all() -> None:
    child = script("a", "import os; os.abort()")
    with pytest.raises(StartupError, match="a was killed by SIGABRT"):
        await Supervisor([child], no, RecordingReporter(), QUICK).run()


async def test_never_ready() -> None:
    hurried = Timing(startup_deadline=0.05, poll_interval=0.01)
    with pytest.raises(StartupError, match=r"not ready after 0\.05 seconds"):
        await Supervisor([script("a", SAY_AND_WAIT)], no, RecordingReporter(), hurried).run()


async def test_a_child_that_crashes_later_is_restarted_with_growing_pauses(tmp_path: Path) -> None:
    reporter = RecordingReporter()
    crash = f"""
import pathlib, time
print('up', flush=True)
while not pathlib.Path({str(tmp_path / "go")!r}).exists():
    time.sleep(0.01)
raise SystemExit(3)
"""
    supervisor = Supervisor([script("a", crash)], when_up(reporter, 1), reporter, QUICK)
    running = asyncio.create_task(supervisor.run())
    await reporter.seen("ready")
    (tmp_path / "go").touch()
    await reporter.seen("starting it again", 3)
    supervisor.stop()
    await running
    notices = [line for line in reporter.lines if "again" in line]
    assert notices[:3] == [
        f"a ended with exit code 3; starting it again in {pause} s" for pause in ("0.01", "0.02", "0.04")
    ]


FINISH = """
import pathlib, signal, sys, time
def finish(number, frame):
    print("finishing" if number == signal.SIGTERM else "cut", flush=True)
    while number == signal.SIGTERM and not pathlib.Path({!r}).exists():
        time.sleep(0.01)
    raise SystemExit
signal.signal(signal.SIGTERM, finish)
signal.signal(signal.SIGINT, finish)
"""


def finishing(name: str, done: Path) -> ChildSpec:
    """One that ends when the file is there, or at SIGINT."""
    return replace(script(name, FINISH.format(str(done)) + SAY_AND_SLEEP), finishes=True)


async def test_others_stay_until_what_has_begun_is_finished(tmp_path: Path) -> None:
    reporter = RecordingReporter()
    children = [finishing("router", tmp_path / "done"), script("worker", SAY_AND_WAIT)]
    supervisor = Supervisor(children, when_up(reporter, 2), reporter, QUICK)
    running = asyncio.create_task(supervisor.run())
    await reporter.seen("ready")
    supervisor.stop()
    await reporter.seen("[router] finishing")
    assert supervisor._processes["worker"].returncode is None
    (tmp_path / "done").touch()
    async with asyncio.timeout(QUICK.stop_grace / 2):
        await running
    assert supervisor._processes["worker"].returncode == -signal.SIGINT


@pytest.mark.parametrize("asks", [True, False])
async def test_asked_again_or_after_a_while_what_has_begun_is_cut(tmp_path: Path, asks: bool) -> None:
    reporter = RecordingReporter()
    timing = replace(QUICK, finish_grace=60 if asks else 0.2)
    supervisor = Supervisor([finishing("router", tmp_path / "done")], when_up(reporter, 1), reporter, timing)
    running = asyncio.create_task(supervisor.run())
    await reporter.seen("ready")
    supervisor.stop()
    await reporter.seen("[router] finishing")
    if asks:
        supervisor.stop()
    async with asyncio.timeout(QUICK.stop_grace / 2):
        await running
    assert "[router] cut" in reporter.lines


async def test_the_last_stop_kills() -> None:
    reporter = RecordingReporter()
    supervisor = Supervisor([script("a", IGNORE_SIGINT)], when_up(reporter, 1), reporter, QUICK)
    running = asyncio.create_task(supervisor.run())
    await reporter.seen("ready")
    for _ in range(3):  # finish, end, and now
        supervisor.stop()
    async with asyncio.timeout(QUICK.stop_grace / 2):
        await running


async def test_what_is_not_ready_yet_ends_though_it_does_not_hear_sigint() -> None:
    reporter = RecordingReporter()
    supervisor = Supervisor([script("a", IGNORE_SIGINT)], no, reporter, QUICK)
    running = asyncio.create_task(supervisor.run())
    await reporter.seen("] up")
    supervisor.stop()
    async with asyncio.timeout(QUICK.stop_grace / 2):
        await running


async def test_what_ignores_sigint_is_killed_after_the_grace_period() -> None:
    reporter = RecordingReporter()
    timing = Timing(poll_interval=0.01, stop_grace=0.1)
    supervisor = Supervisor([script("a", IGNORE_SIGINT)], when_up(reporter, 1), reporter, timing)
    running = asyncio.create_task(supervisor.run())
    await reporter.seen("ready")
    supervisor.stop()
    async with asyncio.timeout(10):
        await running


async def test_lines_come_whole_however_long() -> None:
    reporter = RecordingReporter()
    source = "print('x' * 300_000); print('10%\\r100%'); print('end', end='', flush=True)"
    supervisor = Supervisor([script("a", source)], yes, reporter, QUICK)
    running = asyncio.create_task(supervisor.run())
    await reporter.seen("again")
    supervisor.stop()
    await running
    assert [line for line in reporter.lines if line.startswith("[a]")][:3] == [
        f"[a] {'x' * 300_000}",
        "[a] 100%",
        "[a] end",
    ]
