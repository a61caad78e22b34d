"""`baton serve` as a whole, with services that only pretend."""

import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

# Takes the place of baton_router.main and of every worker's main.
FAKE_SERVICE = """
import http.server, os, pathlib, signal, threading

from baton.core.errors import StartupError

def run(config):
    name = getattr(config, "worker_id", "router")
    if pathlib.Path(f"fail-{name}").exists():
        raise StartupError(f"{name} has no luck")
    print(name, "has pid", os.getpid(), flush=True)
    if name != "router":
        pathlib.Path(config.listen_address.removeprefix("unix:")).touch()
    else:
        workers = config.prefill_addresses + config.decode_addresses + config.worker_addresses
        sockets = [address.removeprefix("unix:") for address in workers]

        class Health(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(200 if all(os.path.exists(socket) for socket in sockets) else 503)
                self.end_headers()

            def log_message(self, *_):
                pass

        server = http.server.HTTPServer((config.host, config.http_port), Health)
        threading.Thread(target=server.serve_forever, daemon=True).start()
    signal.sigwait({signal.SIGINT})
"""


class Serve:
    """A running `baton serve`."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self._passed_over: list[str] = []

    def wait_for(self, text: str) -> str:
        """The next line that contains `text`, in whichever order they come; fails if there is none."""
        for line in self._passed_over:
            if text in line:
                self._passed_over.remove(line)
                return line
        for line in self.process.stdout:
            if text in line:
                return line
            self._passed_over.append(line)
        pytest.fail(f"'{text}' never came:\n{''.join(self._passed_over)}")

    def pid_of(self, child: str) -> int:
        """Process id of a child that has started since the last call."""
        return int(self.wait_for(f"{child} has pid").split()[-1])

    def pids(self) -> list[int]:
        """Of the three children that it starts with."""
        return [self.pid_of(child) for child in ("router", "prefill-0", "decode-0")]


@pytest.fixture
def start(tmp_path: Path, model_dir: Path, free_ports: tuple[int, int]) -> Iterator[Callable[..., Serve]]:
    """Start `baton serve` where Python finds the pretended services before the true ones."""
    services = tmp_path / "services"
    for package in ("baton_router", "baton_prefill_service", "baton_decode_service", "baton_both_service"):
        (services / package).mkdir(parents=True)
        (services / package / "__init__.py").touch()
        (services / package / "main.py").write_text(FAKE_SERVICE)
    python_path = os.pathsep.join(filter(None, (str(services), os.environ.get("PYTHONPATH"))))
    ports = [f"--port={free_ports[0]}", f"--grpc-port={free_ports[1]}"]
    # -P: like the installed command, it does not look for modules where it is started.
    command = [sys.executable, "-P", "-m", "baton_launch.main", "serve", str(model_dir), *ports]
    started: list[subprocess.Popen[str]] = []

    def start(*options: str, prefix: Sequence[str] = ()) -> Serve:
        process = subprocess.Popen(
            [*prefix, *command, *options],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": python_path},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        started.append(process)
        return Serve(process)

    yield start
    for process in started:
        process.kill()
        process.wait()


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_serves_until_it_is_asked_to_stop(start: Callable[[], Serve], number: signal.Signals) -> None:
    serve = start()
    pids = serve.pids()
    serve.wait_for("curl http://127.0.0.1:")
    serve.process.send_signal(number)
    assert serve.process.wait(timeout=30) == 0
    assert not any(is_running(pid) for pid in pids)
    assert "Traceback" not in serve.process.stdout.read()


def test_outlives_its_terminal_where_it_is_told_to(start: Callable[..., Serve]) -> None:
    serve = start(prefix=("nohup",))
    pid = serve.pid_of("prefill-0")
    serve.wait_for("curl http://127.0.0.1:")
    serve.process.send_signal(signal.SIGHUP)
    os.kill(pid, signal.SIGKILL)
    serve.wait_for("starting it again")


def test_files_where_it_is_started_are_not_taken_for_batons(
    start: Callable[[], Serve], tmp_path: Path
) -> None:
    for name in ("baton", "baton_router", "kernels", "launch", "router"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('somebody else wrote this')")
    start().wait_for("curl http://127.0.0.1:")


def test_workers_of_both_roles(start: Callable[..., Serve]) -> None:
    serve = start("--role=both", "--workers=2")
    pids = [serve.pid_of(child) for child in ("router", "worker-0", "worker-1")]
    serve.wait_for("curl http://127.0.0.1:")
    serve.process.send_signal(signal.SIGTERM)
    assert serve.process.wait(timeout=30) == 0
    assert not any(is_running(pid) for pid in pids)


def test_a_failure_at_start_is_shown_once(start: Callable[[], Serve], tmp_path: Path) -> None:
    (tmp_path / "fail-decode-0").touch()
    serve = start()
    output, _ = serve.process.communicate(timeout=60)
    assert serve.process.returncode == 2
    assert output.count("no luck") == 1
    assert output.splitlines()[-1] == "baton: decode-0: decode-0 has no luck"


def test_a_worker_that_is_killed_is_started_again(start: Callable[[], Serve]) -> None:
    serve = start()
    first_pid = serve.pid_of("prefill-0")
    serve.wait_for("curl")
    os.kill(first_pid, signal.SIGKILL)
    serve.wait_for("prefill-0 was killed by SIGKILL; starting it again in 1 s")
    assert serve.pid_of("prefill-0") != first_pid


@pytest.mark.skipif(sys.platform != "linux", reason="prctl and pidfd are Linux's")
def test_children_do_not_outlive_a_killed_supervisor(start: Callable[[], Serve]) -> None:
    serve = start()
    children = [os.pidfd_open(pid) for pid in serve.pids()]
    serve.process.kill()
    for child in children:
        ended, _, _ = select.select([child], [], [], 30)
        os.close(child)
        assert ended


def test_goes_on_where_nobody_reads_what_it_says() -> None:
    """As with `| tee log` when tee is killed."""
    program = (
        "from baton_launch.console import ConsoleReporter as Reporter; reporter = Reporter({}, 'banner');"
        "reporter.notice('a'); reporter.waiting(); reporter.ready(); reporter.child_line('b', 'c');"
        "reporter.close()"
    )
    reader, writer = os.pipe()
    os.close(reader)
    try:
        ended = subprocess.run([sys.executable, "-c", program], stdout=writer, stderr=writer, timeout=30)
    finally:
        os.close(writer)
    assert ended.returncode == 0
