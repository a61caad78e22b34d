"""From a server's command to its first token, and the memory that all its processes take at most.

    python -m bench.first_token http://127.0.0.1:8000 [--runs 3] [--save NAME] -- baton serve MODEL

Starts the command, asks for one token until it is there, runs a load on it, and ends it. Memory is the sum
over the command's processes of what each has to itself and its share of what several have (PSS), looked at
twice a second from the command on: peaks that are shorter are missed. Figures are medians over the runs.
"""

import argparse
import asyncio
import os
import signal
import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path

import httpx

from bench.load import Workload, median_of, run
from bench.report import print_table, save

START_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 30.0
LOAD = Workload(256, 64, 8, 16)
LOOK_EVERY_S = 0.5


def first_token_s(url: str, process: "subprocess.Popen[bytes]", started: float) -> tuple[float, str]:
    """Seconds from the start to an answer, and the model's name."""
    while time.monotonic() - started < START_TIMEOUT_S:
        if process.poll() is not None:
            raise SystemExit(f"the server ended with status {process.returncode}")
        try:
            model = httpx.get(f"{url}/v1/models").raise_for_status().json()["data"][0]["id"]
            request = {"model": model, "prompt": "Hello", "max_tokens": 1}
            httpx.post(f"{url}/v1/completions", json=request, timeout=60).raise_for_status()
            return time.monotonic() - started, str(model)
        except (httpx.HTTPError, IndexError, KeyError):
            time.sleep(0.02)
    raise SystemExit(f"the server did not answer within {START_TIMEOUT_S:.0f} s")


def family_of(root: int) -> set[int]:
    """A process and all that descend from it (Linux)."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with suppress(OSError):  # it has just ended
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    family = {root}
    while children := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= children
    return family


def memory_mib(root: int) -> float:
    """Proportional set size of a process and all that descend from it (Linux)."""
    return sum(_pss_kib(pid) for pid in family_of(root)) / 1024


def _pss_kib(pid: int) -> int:
    with suppress(OSError):
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return 0


class PeakMemory:
    """The most memory that a process and its descendants have had since this was made, in MiB."""

    def __init__(self, root: int) -> None:
        self.mib = 0.0
        self._root = root
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self._ended.wait(LOOK_EVERY_S):
            self.mib = max(self.mib, memory_mib(self._root))

    def end(self) -> None:
        """Look no more."""
        self._ended.set()
        self._thread.join()


def measure(url: str, command: list[str]) -> dict[str, float]:
    """One start."""
    started = time.monotonic()
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)
    memory = PeakMemory(process.pid)
    try:
        seconds, model = first_token_s(url, process, started)
        figures = asyncio.run(run(url, model, LOAD, seed=1))
    finally:
        memory.end()
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
    return {
        "first token s": round(seconds, 1),
        "peak memory MiB": round(memory.mib),
        "output tok/s": round(figures["output tok/s"], 1),
    }


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("url")
    parser.add_argument("command", nargs="+")
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--save", metavar="NAME", help="bench/results/DATE-first-token-NAME.json")
    arguments = parser.parse_args()
    runs = [measure(arguments.url.rstrip("/"), arguments.command) for _ in range(arguments.runs)]
    row = {"command": " ".join(arguments.command)[-60:], **median_of(runs)}
    print_table("Start and memory", [row])
    if arguments.save:
        print(save(f"first-token-{arguments.save}", [row]))


if __name__ == "__main__":
    main()
