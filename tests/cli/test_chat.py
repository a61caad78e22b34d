"""`baton chat` against a small server of server-sent events."""

import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest


class FakeRouter(http.server.ThreadingHTTPServer):
    """Answers what it was asked, word by word; 'fail' and 'break' make it do so."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.requests: list[dict[str, Any]] = []


class _Handler(http.server.BaseHTTPRequestHandler):
    server: FakeRouter

    def do_GET(self) -> None:
        self._send(200, json.dumps({"data": [{"id": "tiny"}]}))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(body)
        text = body["messages"][-1]["content"]
        if text == "fail":
            self._send(400, json.dumps({"error": {"message": "the prompt is too long"}}))
            return
        pieces = ["You said: ", text, "\u2028\t[bold]end"]
        events = [{"choices": [{"delta": {"content": piece}}]} for piece in pieces]
        lines = [f"data: {json.dumps(event, ensure_ascii=False)}\n\n" for event in events]
        self._send(200, "".join(lines) + ("" if text == "break" else "data: [DONE]\n\n"))

    def _send(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def router() -> Iterator[FakeRouter]:
    with FakeRouter() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def chat(url: str, typed: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "baton_launch.main", "chat", "--url", url, *options]
    return subprocess.run(command, input=typed, capture_output=True, text=True, timeout=60)


def test_a_script_gets_the_answers_alone(router: FakeRouter) -> None:
    done = chat(router.url, "hello\n\nagain\n/exit\nnever\n")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "You said: hello\u2028\t[bold]end\nYou said: again\u2028\t[bold]end\n"


def test_the_conversation_and_the_settings_are_sent(router: FakeRouter) -> None:
    chat(router.url, "a\nb\n/reset\nc\n", "--system=Be kind.", "--max-tokens=9", "--temperature=0")
    system = {"role": "system", "content": "Be kind."}
    answer = {"role": "assistant", "content": "You said: a\u2028\t[bold]end"}
    first, second, third = router.requests
    assert first == {
        "model": "tiny",
        "messages": [system, {"role": "user", "content": "a"}],
        "stream": True,
        "max_tokens": 9,
        "temperature": 0.0,
    }
    assert second["messages"] == [*first["messages"], answer, {"role": "user", "content": "b"}]
    assert third["messages"] == [system, {"role": "user", "content": "c"}]


def test_commands_are_listed(router: FakeRouter) -> None:
    done = chat(router.url, "/help\n/quit\nnever\n")
    assert (done.returncode, done.stderr, router.requests) == (0, "", [])
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["/help", "/reset", "/exit", "/quit"]


def test_a_command_that_is_none_is_not_asked(router: FakeRouter) -> None:
    done = chat(router.url, "/usr/bin is what?\n/rest\nnever\n")
    assert done.returncode == 1
    assert done.stderr == "baton: there is no /rest: the commands are /help, /reset, /exit, /quit\n"
    assert [request["messages"][-1]["content"] for request in router.requests] == ["/usr/bin is what?"]


def test_a_refused_request_is_one_line(router: FakeRouter) -> None:
    done = chat(router.url, "fail\n", "--model=other")
    assert (done.returncode, done.stderr) == (1, "baton: the prompt is too long\n")
    assert router.requests[0]["model"] == "other"


def test_an_answer_that_breaks_off_is_an_error(router: FakeRouter) -> None:
    done = chat(router.url, "break\n")
    assert (done.returncode, done.stderr) == (1, "baton: the answer broke off\n")


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_what_can_not_be_read_or_shown_does_not_end_it(router: FakeRouter, encoding: str) -> None:
    command = [sys.executable, "-m", "baton_launch.main", "chat", "--url", router.url]
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run(command, input=b"caf\xe9\n", capture_output=True, timeout=60, env=environment)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.decode(encoding).startswith("You said: caf")
    assert router.requests[0]["messages"][-1]["content"] == "caf\ufffd"


def test_an_endless_temperature_is_refused(router: FakeRouter) -> None:
    done = chat(router.url, "hello\n", "--temperature=inf")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_no_router() -> None:
    done = chat("http://127.0.0.1:1", "hello\n")
    assert done.returncode == 2
    assert done.stderr.startswith(
        "baton: no router answers at http://127.0.0.1:1: start one with `baton serve`"
    )
    assert done.stderr.count("\n") == 1
