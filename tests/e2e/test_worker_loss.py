"""kill -9 of a worker: clear errors at once, and service again when it is back."""

import time

import httpx
import pytest

from tests.e2e.processes import Cluster, running_cluster, wait_until

PROMPT = {"model": "demo", "prompt": "import", "max_tokens": 1800, "ignore_eos": True}


@pytest.mark.parametrize("role", ["decode", "prefill"])
def test_kill_and_return(role: str) -> None:
    with running_cluster() as cluster:
        if role == "decode":
            _kill_in_mid_stream(cluster)
        else:
            cluster.kill(role)
        wait_until(lambda: not cluster.is_ready(), "the router has noticed", 2)
        refused = httpx.post(f"{cluster.url}/v1/completions", json={**PROMPT, "max_tokens": 4})
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) > 0
        assert role in refused.json()["error"]["message"]
        cluster.start_worker(role)
        cluster.wait_ready()
        answer = httpx.post(f"{cluster.url}/v1/completions", json={**PROMPT, "max_tokens": 4}, timeout=30)
        assert answer.json()["usage"]["completion_tokens"] == 4
        wait_until(cluster.pages_are_free, "all pages are free", 5)


def _kill_in_mid_stream(cluster: Cluster) -> None:
    url = f"{cluster.url}/v1/completions"
    with httpx.stream("POST", url, json={**PROMPT, "stream": True}, timeout=30) as response:
        assert response.status_code == 200
        lines = response.iter_lines()
        for _ in range(5):
            next(lines)
        cluster.kill("decode")
        killed_at = time.monotonic()
        rest = [line for line in lines if line]
    # A bound of the protocol, not a speed: the session breaks with the process.
    assert time.monotonic() - killed_at < 2.0
    assert any('"error"' in line and "was lost" in line for line in rest)
