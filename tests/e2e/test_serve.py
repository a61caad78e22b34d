"""`baton serve` as a person uses it: wait for the curl line, paste it, press Ctrl-C."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.free_ports import free_port


@pytest.fixture
def served(request: pytest.FixtureRequest) -> Iterator[subprocess.Popen[str]]:
    ports = [f"--port={free_port()}", f"--grpc-port={free_port()}"]
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "baton_launch.main",
            "serve",
            *request.param,
            *ports,
            "--kv-cache-memory=64MiB",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "TMPDIR": "/tmp"},
    )
    yield process
    process.kill()
    process.wait()


@pytest.mark.parametrize(
    ("served", "num_children"), [((), 3), (("--role=both",), 2)], indirect=["served"], ids=["apart", "both"]
)
def test_the_printed_curl_line_works_and_ctrl_c_stops_everything(
    served: subprocess.Popen[str], num_children: int
) -> None:
    assert served.stdout is not None
    curl = next(line for line in served.stdout if line.startswith("curl "))
    answer = json.loads(subprocess.check_output(["bash", "-c", f"{curl.strip()} --silent"], timeout=60))
    assert answer["choices"][0]["text"]
    children = Path(f"/proc/{served.pid}/task/{served.pid}/children").read_text().split()
    assert len(children) == num_children
    served.send_signal(signal.SIGINT)
    rest, _ = served.communicate(timeout=20)
    assert served.returncode == 0, rest
    assert "Traceback" not in rest
    assert not any(Path(f"/proc/{child}").exists() for child in children)
