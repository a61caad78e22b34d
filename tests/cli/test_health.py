"""`baton health` of servers that serve, that don't, and that are not there."""

import http.server
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from typer.testing import CliRunner

from baton.core.errors import StartupError
from baton_launch.main import app


class _Router(http.server.BaseHTTPRequestHandler):
    status = 200

    def do_GET(self) -> None:
        self.send_response(self.status if self.path == "/health" else 404)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def router() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Router) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def ask(address: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["health", address])
    if isinstance(result.exception, StartupError):
        raise result.exception
    return result.exit_code, result.output


STATES = [(200, 0, "serves"), (503, 1, "no workers"), (500, 1, "500")]


@pytest.mark.parametrize(("status", "code", "word"), STATES)
def test_a_router(router: str, monkeypatch: pytest.MonkeyPatch, status: int, code: int, word: str) -> None:
    monkeypatch.setattr(_Router, "status", status)
    found, said = ask(f"{router}/")
    assert found == code
    assert word in said


@pytest.mark.parametrize("is_serving", [True, False])
def test_a_worker(is_serving: bool) -> None:
    server = grpc.server(ThreadPoolExecutor(1))
    servicer = health.HealthServicer()
    states = health_pb2.HealthCheckResponse
    servicer.set("", states.SERVING if is_serving else states.NOT_SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        code, said = ask(f"127.0.0.1:{port}")
    finally:
        server.stop(0).wait()
    assert code == (0 if is_serving else 1)
    assert ("NOT_SERVING" in said) == (not is_serving)


def test_nobody(router: str) -> None:
    port = router.rpartition(":")[2]
    assert ask("http://127.0.0.1:1")[0] == 1
    assert ask("127.0.0.1:1")[0] == 1
    assert ask(f"http://127.0.0.1:{port}/elsewhere")[0] == 1
    with pytest.raises(StartupError, match="no-address"):
        ask("no-address")
