"""`baton top`: figures over the time between two readings, and what a terminal shows of them."""

import http.server
import threading
from collections.abc import Iterator

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from typer.testing import CliRunner

from baton.core.errors import StartupError
from baton_launch.main import app
from baton_launch.top_figures import Reading, figures

LABELS = ("role", "worker")


class Router:
    """What a router counts, as far as it is shown."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.generated = Counter("baton_generation_tokens", "", registry=self.registry)
        self.finished = Counter("baton_finished_choices", "", ["finished_reason"], registry=self.registry)
        self.http = Counter("baton_http_requests", "", ["endpoint", "status"], registry=self.registry)
        self.first = Histogram(
            "baton_time_to_first_token_seconds", "", buckets=(0.1, 0.2, 0.4), registry=self.registry
        )
        names = ("up", "num_running", "num_waiting", "num_blocks", "num_free_blocks")
        self.workers = {
            name: Gauge(f"baton_worker_{name}", "", LABELS, registry=self.registry) for name in names
        }
        self.sent = Counter("baton_worker_transfer_bytes", "", LABELS, registry=self.registry)

    def worker(self, role: str, name: str, **values: float) -> None:
        for key, value in values.items():
            self.workers[key].labels(role, name).set(value)

    def read(self, at_s: float) -> Reading:
        return Reading.of(generate_latest(self.registry).decode(), at_s)


@pytest.fixture
def router() -> Router:
    made = Router()
    made.worker("prefill", "p", up=1, num_running=1, num_waiting=3, num_blocks=10, num_free_blocks=4)
    made.worker("decode", "[::1]:80", up=0)
    return made


def test_figures_are_of_the_time_between(router: Router) -> None:
    router.generated.inc(1000)
    router.first.observe(5)
    before = router.read(10.0)
    router.generated.inc(30)
    router.finished.labels("stop").inc(4)
    router.finished.labels("abort").inc(2)
    router.http.labels("/v1/completions", "503").inc(6)
    router.http.labels("/v1/completions", "200").inc(4)
    router.sent.labels("prefill", "p").inc(4e6)
    for _ in range(4):
        router.first.observe(0.15)
    found = figures(before, router.read(12.0))
    assert (found.generated_tokens_s, found.requests_s, found.failures_s) == (15, 3, 4)
    assert found.first_token_s == pytest.approx([0.15, 0.195, 0.199])
    assert found.between_tokens_s == [None] * 3
    away, prefill = found.workers
    assert (away.role, away.name, away.is_connected, away.share_held) == ("decode", "[::1]:80", False, 0.0)
    assert (prefill.num_running, prefill.num_waiting, prefill.kv_bytes_s) == (1, 3, 2e6)
    assert prefill.share_held == pytest.approx(0.6)


def test_a_router_that_was_started_anew(router: Router) -> None:
    router.generated.inc(1000)
    assert figures(router.read(1.0), Router().read(2.0)).generated_tokens_s == 0


def test_what_takes_longer_than_the_longest_bucket(router: Router) -> None:
    before = router.read(1.0)
    router.first.observe(100)
    assert list(figures(before, router.read(2.0)).first_token_s) == [0.4] * 3
    assert list(figures(before, before).first_token_s) == [None] * 3


@pytest.fixture
def url(router: Router) -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(generate_latest(router.registry))

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_it_is_printed_once_where_there_is_no_terminal(url: str) -> None:
    result = CliRunner().invoke(app, ["top", "--url", url, "--interval=0.1"], env={"COLUMNS": "120"})
    assert result.exit_code == 0, result.output
    for text in ("prefill", "connected", "[::1]:80", "away", "60%", "- / - / - ms"):
        assert text in result.output


def test_nobody_there() -> None:
    result = CliRunner().invoke(app, ["top", "--url", "http://127.0.0.1:1", "--once"])
    assert isinstance(result.exception, StartupError)
    assert "no router answers at http://127.0.0.1:1/metrics" in str(result.exception)
