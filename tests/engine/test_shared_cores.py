"""Cores that workers lend each other."""

import subprocess
import sys
from pathlib import Path

import pytest

from baton.core.errors import StartupError
from baton.engine.cpu.shared_cores import NUM_SLOTS, SharedCores


class Clock:
    """Nanoseconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 10**12

    def __call__(self) -> int:
        return self.now


_HOLDER = """
import sys, time
from pathlib import Path
from baton.engine.cpu.shared_cores import SharedCores
cores = SharedCores(Path(sys.argv[1]), 8, lambda threads: print(threads, flush=True), time.monotonic_ns)
for line in sys.stdin:
    getattr(cores, line.strip())()
    print("done", flush=True)
"""


class Worker:
    """Another process with a slot: locks are a process's, so that one process can't hold two."""

    def __init__(self, path: Path) -> None:
        command = [sys.executable, "-c", _HOLDER, str(path)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def does(self, what: str) -> int | None:
        """Lets it do something; returns the threads that it takes from now on, if that changes."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{what}\n")
        self.process.stdin.flush()
        taken = None
        while (line := self.process.stdout.readline().strip()) != "done":
            taken = int(line)
        return taken

    def end(self) -> None:
        """Kill it."""
        self.process.kill()
        self.process.communicate()


def test_cores_are_divided_among_those_that_compute(tmp_path: Path) -> None:
    first, second = (Worker(tmp_path / "cores") for _ in range(2))
    try:
        assert first.does("working") == 8
        assert second.does("working") == 4
        assert first.does("working") == 4
        second.does("waiting")
        assert first.does("working") == 8
        assert second.does("working") is None  # still the 4 that it had
        assert first.does("working") == 4
    finally:
        first.end()
        second.end()


def test_what_a_worker_held_that_died_goes_to_the_next(tmp_path: Path) -> None:
    dying = Worker(tmp_path / "cores")
    assert dying.does("working") == 8
    dying.end()
    survivor = Worker(tmp_path / "cores")
    try:
        assert survivor.does("working") == 8  # it took the dead one's slot, stamp and all
    finally:
        survivor.end()


def test_a_worker_that_stands_still_does_not_keep_its_part(tmp_path: Path) -> None:
    threads: list[int] = []
    clock = Clock()
    cores = SharedCores(tmp_path / "cores", 6, threads.append, clock)
    offset = cores._others[0]
    cores._page[offset : offset + 8] = clock.now.to_bytes(8, "little")
    cores.working()
    clock.now += 4 * 10**9
    cores.working()
    clock.now += 2 * 10**9
    cores.working()
    assert threads == [3, 6]
    cores.close()


def test_everybody_has_a_thread(tmp_path: Path) -> None:
    threads: list[int] = []
    clock = Clock()
    cores = SharedCores(tmp_path / "cores", 2, threads.append, clock)
    for offset in cores._others[: NUM_SLOTS // 2]:
        cores._page[offset : offset + 8] = clock.now.to_bytes(8, "little")
    cores.working()
    assert threads == [1]
    cores.close()


def test_a_file_that_cannot_be_shared(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="--share-cores"):
        SharedCores(tmp_path / "nowhere" / "cores", 2, lambda threads: None, Clock())
