"""What requests are called, what of them is ignored, and the headers that say so."""

import asyncio
import json
import logging
from dataclasses import replace
from typing import Any

import httpx
import pytest

from baton.core.errors import InvalidRequest
from baton.v1 import inference_pb2 as pb
from baton_router.grpc_front import InferenceServicer
from baton_router.served_model import ServedModel
from tests.router_front.fake_backend import FakeBackend

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
BODIES: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"prompt": "hi", "max_tokens": 2},
    CHAT: {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2},
}
IGNORED = "X-Baton-Ignored-Fields"


async def post(
    client: httpx.AsyncClient, path: str, header: str | None = None, **fields: Any
) -> httpx.Response:
    headers = {} if header is None else {"x-request-id": header}
    return await client.post(path, json=BODIES.get(path, {}) | fields, headers=headers)


def answer_id(response: httpx.Response) -> str:
    text = response.text.partition("\n")[0].removeprefix("data: ")
    return str(json.loads(text)["id"])


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "prefix"), [(COMPLETIONS, "cmpl-"), (CHAT, "chatcmpl-")])
async def test_ids_of_clients(
    client: httpx.AsyncClient, backend: FakeBackend, path: str, prefix: str, stream: bool
):
    for header, body, expected in (("a", None, "a"), (None, "b", "b"), ("a b/c", "d", "a b/c")):
        response = await post(client, path, header, request_id=body, stream=stream)
        assert response.headers["x-request-id"] == expected
        assert answer_id(response) == prefix + expected
        assert backend.requests[-1].request_id.startswith(prefix + expected)
    made = await post(client, path, stream=stream)
    assert answer_id(made) == prefix + made.headers["x-request-id"]
    assert len(made.headers["x-request-id"]) == 32


@pytest.mark.parametrize("bad", ["x" * 129, "a\nb", "é", "\x7f"])
async def test_ids_that_no_log_could_hold(
    client: httpx.AsyncClient, served: ServedModel, backend: FakeBackend, bad: str
):
    for path in (COMPLETIONS, CHAT):
        response = await post(client, path, request_id=bad)
        assert (response.status_code, response.json()["error"]["param"]) == (400, "request_id")
        assert len(response.headers["x-request-id"]) == 32
    if "\n" not in bad:
        sent = await client.post(
            COMPLETIONS, json=BODIES[COMPLETIONS], headers={b"x-request-id": bad.encode()}
        )
        assert (sent.status_code, sent.json()["error"]["param"]) == (400, "X-Request-Id")
    with pytest.raises(InvalidRequest):
        await InferenceServicer(served)._generation(pb.GenerateRequest(text="x", request_id=bad))
    assert not backend.requests


async def test_every_response_has_an_id(client: httpx.AsyncClient, backend: FakeBackend):
    for path in ("/health", "/nothing", "/v1/models"):
        assert len((await client.get(path)).headers["x-request-id"]) == 32
    refused = await post(client, COMPLETIONS, "mine", prompt=5)
    assert (refused.status_code, refused.headers["x-request-id"]) == (400, "mine")
    backend.error = ZeroDivisionError()
    failed = await post(client, COMPLETIONS, "mine")
    assert (failed.status_code, failed.headers["x-request-id"]) == (500, "mine")


async def test_running_requests_may_share_an_id(client: httpx.AsyncClient, backend: FakeBackend):
    """They are two inside: a stop string of one is not the other's."""
    several = [post(client, COMPLETIONS, "same", prompt=["a", "b"], stop="zz") for _ in range(3)]
    answers = await asyncio.gather(*several)
    assert {answer.json()["id"] for answer in answers} == {"cmpl-same"}
    assert len({request.request_id for request in backend.requests}) == 6


async def test_ids_of_grpc(served: ServedModel):
    servicer = InferenceServicer(served)
    two = [(await servicer._generation(pb.GenerateRequest(text="x", request_id="mine")))[0] for _ in range(2)]
    assert [request.answer_id for request in two] == ["gen-mine"] * 2
    assert replace(two[0], request_id="") != two[0] != two[1]


async def test_unknown_fields_are_named(client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    unknown = {"user": "me", "zebra": 1, "ha\r\nck é": 2, "absent": None}
    for path in (COMPLETIONS, CHAT, CHAT, "/tokenize"):
        fields: dict[str, Any] = unknown | ({"prompt": "x"} if path == "/tokenize" else {})
        response = await post(client, path, **fields)
        assert response.status_code == 200, response.text
        assert response.headers[IGNORED] == "user, zebra, ha%0D%0Ack%20%C3%A9"
    streamed = await post(client, COMPLETIONS, zebra=1, stream=True)
    assert streamed.headers[IGNORED] == "zebra"
    assert [record.message.count("zebra") for record in caplog.records].count(1) == 1
    known = await post(client, CHAT, tools=[], tool_choice="none", seed=1, absent=None)
    assert IGNORED not in known.headers


async def test_many_unknown_fields_are_bounded(client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    many: dict[str, Any] = {f"{number}{'x' * 30}": 1 for number in range(300)}
    response = await post(client, COMPLETIONS, **many)
    assert response.headers[IGNORED].endswith(", ...")
    assert len(response.headers[IGNORED]) <= 1024 + 5
    assert sum(record.name.endswith("request_note") for record in caplog.records) == 256
    longest: dict[str, Any] = {"y" * 5000: 1}
    long = await post(client, COMPLETIONS, **longest)
    assert long.headers[IGNORED] == "y" * 64
