"""`baton serve` as a person uses it: wait for the curl line, paste it, press Ctrl-C."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.free_ports import free_port


@pytest.fixture
def served(request: pytest.FixtureRequest) -> Iterator[subprocess.Popen[str]]:
    ports = [f"--port={free_port()}", f"--grpc-port={free_port()}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "baton", "serve", *request.param, *ports, "--kv-cache-memory=64MiB"],
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


@pytest.mark.parametrize("served", [()], indirect=True, ids=["apart"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_stream_that_runs_is_finished(served: subprocess.Popen[str], number: signal.Signals) -> None:
    assert served.stdout is not None
    curl = next(line for line in served.stdout if line.startswith("curl "))
    [url] = re.findall(r"http://\S+/completions", curl)
    body = {"prompt": "import", "max_tokens": 1500, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", url, json=body, timeout=60) as answer:
        lines = answer.iter_lines()
        next(lines)
        served.send_signal(number)
        received = [line for line in lines if line]
    assert received[-1] == "data: [DONE]"
    assert json.loads(received[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
    rest, _ = served.communicate(timeout=20)
    assert served.returncode == 0, rest
    assert "Traceback" not in rest
