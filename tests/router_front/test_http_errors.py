"""Every refusal: its status, OpenAI's body, and nothing of the server's insides."""

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from baton.core.errors import Overloaded, RequestFailed, Unavailable, WorkerLost
from tests.router_front.fake_backend import FakeBackend

COMPLETION = {"prompt": "hi"}
CHAT = {"messages": [{"role": "user", "content": "hi"}]}


def assert_error(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return error


BAD_COMPLETIONS = [
    ("prompt", {"prompt": None}),
    ("prompt", {"prompt": 5}),
    ("prompt", {"prompt": []}),
    ("prompt", {"prompt": ""}),
    ("prompt", {"prompt": [[]]}),
    ("prompt", {"prompt": ["a", 5]}),
    ("prompt", {"prompt": [1, True]}),
    ("prompt", {"prompt": [1, 10**6]}),
    ("prompt", {"prompt": [-1]}),
    ("prompt", {"prompt": ["a"] * 1025}),
    ("prompt", {"prompt": [1] * 256}),
    ("max_tokens", {"prompt": [1] * 200, "max_tokens": 57}),
    ("max_tokens", {"max_tokens": 0}),
    ("max_tokens", {"max_tokens": -5}),
    ("max_tokens", {"max_tokens": "5"}),
    ("max_tokens", {"max_tokens": 5.5}),
    ("min_tokens", {"min_tokens": 17}),
    ("temperature", {"temperature": -1}),
    ("temperature", {"temperature": "hot"}),
    ("temperature", {"temperature": True}),
    ("top_p", {"top_p": -0.1}),
    ("top_k", {"top_k": -2}),
    ("min_p", {"min_p": 2}),
    ("presence_penalty", {"presence_penalty": 3}),
    ("frequency_penalty", {"frequency_penalty": -3}),
    ("repetition_penalty", {"repetition_penalty": 0}),
    ("n", {"n": 0}),
    ("n", {"n": 129}),
    ("logprobs", {"logprobs": 21}),
    ("logprobs", {"logprobs": True}),
    ("seed", {"seed": "x"}),
    ("stop", {"stop": ["x"] * 17}),
    ("stop", {"stop": [""]}),
    ("stop", {"stop": [1]}),
    ("stop", {"stop": {}}),
    ("stop_token_ids", {"stop_token_ids": [10**6]}),
    ("stop_token_ids", {"stop_token_ids": "1"}),
    ("logit_bias", {"logit_bias": {"x": 1}}),
    ("logit_bias", {"logit_bias": {"1": "x"}}),
    ("logit_bias", {"logit_bias": {"1": 101}}),
    ("logit_bias", {"logit_bias": {"1000000": 1}}),
    ("logit_bias", {"logit_bias": [1]}),
    ("logit_bias", {"logit_bias": {"1": 10**400}}),
    ("logit_bias", {"logit_bias": {"1" * 5000: 1}}),
    ("logit_bias", {"logit_bias": {f"{id:0{width}}": 1 for id in range(300) for width in range(3, 7)}}),
    ("temperature", {"temperature": 10**400}),
    ("priority", {"priority": 2**31}),
    ("cache_salt", {"cache_salt": "x" * 1025}),
    ("stream", {"stream": "yes"}),
    ("stream_options", {"stream_options": {"include_usage": True}}),
    ("stream_options.include_usage", {"stream": True, "stream_options": {"include_usage": 1}}),
    ("best_of", {"best_of": 2, "n": 3}),
    ("best_of", {"best_of": 129}),
    ("length_penalty", {"length_penalty": 0.5}),
    ("thinking_token_budget", {"thinking_token_budget": 5}),
    ("suffix", {"suffix": "x"}),
    ("max_tokens", {"max_tokens": 0, "echo": False}),
    ("min_tokens", {"max_tokens": 0, "echo": True, "min_tokens": 1}),
    ("prompt", {"max_tokens": 0, "echo": True, "prompt": [5] * 257}),
    ("prompt", {"prompt": None}),
    ("prompt_embeds", {"prompt_embeds": "abc"}),
    ("stop", {"use_beam_search": True, "stop": "x"}),
    ("structured_outputs", {"use_beam_search": True, "structured_outputs": {"regex": "a"}}),
    ("response_format.type", {"response_format": {"type": "yaml"}}),
    ("guided_json", {"guided_json": {}}),
    ("prompt_logprobs", {"prompt_logprobs": 21}),
    ("length_penalty", {"length_penalty": 2}),
    ("model", {"model": 5}),
]
BAD_CHATS = [
    ("messages", {"messages": []}),
    ("messages", {"messages": "hi"}),
    ("messages", {"messages": [{}] * 4097}),
    ("messages", {"messages": [{"role": "user", "name": "bad", "content": "x"}]}),
    ("messages[0].content", {"messages": [{"role": "user", "content": 5}]}),
    ("messages[0].content", {"messages": [{"role": "user", "content": {"type": "text", "text": "x"}}]}),
    ("messages[0].content[0]", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
    ("messages[0].content[0]", {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}),
    ("messages[0].content[0]", {"messages": [{"role": "user", "content": ["x"]}]}),
    ("messages[0].content[0].text", {"messages": [{"role": "user", "content": [{"type": "text"}]}]}),
    ("messages[1].role", {"messages": [*CHAT["messages"], {"role": "bad", "content": "x"}]}),
    ("messages[0].role", {"messages": [{"role": "User", "content": "x"}]}),
    ("messages[0].role", {"messages": [{"role": "", "content": "x"}]}),
    ("messages[0].tool_calls", {"messages": [{"role": "assistant", "tool_calls": {"a": 1}}]}),
    ("messages[0].tool_calls[0].function", {"messages": [{"role": "assistant", "tool_calls": [{}]}]}),
    ("messages[0].tool_calls[0].function", {"messages": [{"role": "assistant", "tool_calls": [5]}]}),
    ("messages[0].role", {"messages": [{"content": "x"}]}),
    ("messages[0].role", {"messages": [{"role": 5, "content": "x"}]}),
    ("max_tokens", {"max_tokens": 256}),
    ("max_completion_tokens", {"max_completion_tokens": 256}),
    ("max_completion_tokens", {"max_completion_tokens": 0}),
    ("top_logprobs", {"top_logprobs": 1}),
    ("top_logprobs", {"logprobs": True, "top_logprobs": 21}),
    ("logprobs", {"logprobs": 1}),
    ("tools[0].function", {"tools": [{"type": "function"}]}),
    ("tool_choice", {"tool_choice": "auto"}),
    ("functions", {"functions": [{}]}),
    ("response_format.json_schema", {"response_format": {"type": "json_schema"}}),
    ("audio", {"audio": {}}),
    ("modalities", {"modalities": ["text", "audio"]}),
    ("best_of", {"best_of": 1, "n": 2}),
    ("chat_template", {"chat_template": "x"}),
    ("reasoning_effort", {"reasoning_effort": "great"}),
    ("documents[0]", {"documents": ["x"]}),
    ("continue_final_message", {"continue_final_message": True}),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("param", "fields"), BAD_COMPLETIONS, ids=lambda value: str(value)[:40])
async def test_bad_completions(
    client: httpx.AsyncClient, backend: FakeBackend, param: str, fields: dict[str, Any], stream: bool
):
    response = await client.post(
        "/v1/completions",
        json={"stream": stream} | COMPLETION | fields
        if "stream_options" not in fields
        else COMPLETION | fields,
    )
    error = assert_error(response, 400)
    assert error["param"] == param
    assert param.split(".")[0] in error["message"] or "context" in error["message"]
    assert error["type"] == "invalid_request_error"
    assert not backend.requests


@pytest.mark.parametrize(("param", "fields"), BAD_CHATS, ids=lambda value: str(value)[:40])
async def test_bad_chats(client: httpx.AsyncClient, backend: FakeBackend, param: str, fields: dict[str, Any]):
    error = assert_error(await client.post("/v1/chat/completions", json=CHAT | fields), 400)
    assert error["param"] == param
    assert not backend.requests


async def test_context_length_error_has_the_numbers(client: httpx.AsyncClient):
    error = assert_error(
        await client.post("/v1/completions", json={"prompt": [1] * 200, "max_tokens": 57}), 400
    )
    assert error["code"] == "context_length_exceeded"
    for number in ("256", "257", "200", "57"):
        assert number in error["message"]


async def test_far_too_long_prompt_is_refused_by_what_was_counted(client: httpx.AsyncClient):
    error = assert_error(await client.post("/v1/completions", json={"prompt": "hello wörld " * 1000}), 400)
    assert error["code"] == "context_length_exceeded"
    for number in ("12000", "512", "256"):
        assert number in error["message"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[1]",
        b"\xff",
        b'"text"',
        b"{'a': 1}",
        b"[" * 15_000,
        b'{"prompt": NaN}',
        b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}",
    ],
)
async def test_malformed_bodies(client: httpx.AsyncClient, content: bytes):
    response = await client.post(
        "/v1/completions", content=content, headers={"Content-Type": "application/json"}
    )
    assert_error(response, 400)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"prompt": "\xff"}', "not valid UTF-8 (at byte 12)"),
        (b'{"prompt": "x", "y": ' + b"[" * 15_000, "nested too deeply"),
        (b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}", "a number of too many digits"),
    ],
    ids=["bytes", "depth", "digits"],
)
async def test_what_can_not_be_read_is_told(client: httpx.AsyncClient, content: bytes, reason: str):
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize"):
        assert reason in assert_error(await client.post(path, content=content), 400)["message"]


async def test_not_a_number_and_lone_surrogates(client: httpx.AsyncClient):
    headers = {"Content-Type": "application/json"}
    nan = await client.post("/v1/completions", content=b'{"prompt":"x","temperature":NaN}', headers=headers)
    assert assert_error(nan, 400)["param"] == "temperature"
    surrogate = b'{"prompt":"x","KEY":"\\ud800"}'
    for path, body, status in (
        ("/v1/completions", surrogate.replace(b"KEY", b"prompt"), 400),
        ("/v1/completions", surrogate.replace(b"KEY", b"cache_salt"), 400),
        ("/v1/completions", surrogate.replace(b"KEY", b"model"), 404),
        ("/v1/chat/completions", b'{"messages":[{"role":"user","content":"\\ud800"}]}', 400),
        ("/tokenize", surrogate.replace(b"KEY", b"prompt"), 400),
    ):
        assert_error(await client.post(path, content=body, headers=headers), status)


async def test_json_without_content_type_is_taken(client: httpx.AsyncClient):
    response = await client.post("/v1/completions", content=json.dumps(COMPLETION))
    assert response.status_code == 200
    form = await client.post("/v1/completions", data=COMPLETION)
    assert "application/json" in assert_error(form, 400)["message"]


async def test_unknown_model_route_and_method(client: httpx.AsyncClient):
    for path, body in (("/v1/completions", COMPLETION), ("/v1/chat/completions", CHAT)):
        error = assert_error(await client.post(path, json=body | {"model": "gpt-x"}), 404)
        assert (error["param"], error["code"]) == ("model", "model_not_found")
        assert "gpt-x" in error["message"]
    assert "/v1/nothing" in assert_error(await client.get("/v1/nothing"), 404)["message"]
    response = await client.get("/v1/completions")
    assert "GET" in assert_error(response, 405)["message"]
    assert response.headers["allow"] == "POST"


async def test_body_limit_with_and_without_length(client: httpx.AsyncClient):
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield b" " * 1000

    announced = await client.post("/v1/completions", content=b" " * 20_001)
    streamed = await client.post("/v1/completions", content=pieces())
    for response in (announced, streamed):
        assert "20000" in assert_error(response, 413)["message"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "retry_after"),
    [
        (Overloaded("The queue is full.", retry_after_s=7), 503, "7"),
        (Unavailable("No decode worker."), 503, "1"),
        (WorkerLost("The worker left."), 503, "1"),
        (RequestFailed("The worker gave up."), 500, None),
    ],
)
async def test_errors_before_the_first_token_are_statuses(
    client: httpx.AsyncClient,
    backend: FakeBackend,
    stream: bool,
    error: Exception,
    status: int,
    retry_after: str | None,
):
    backend.error = error
    for path, body in (
        ("/v1/completions", COMPLETION | {"prompt": ["a", "b"]}),
        ("/v1/chat/completions", CHAT),
    ):
        response = await client.post(path, json=body | {"stream": stream})
        assert assert_error(response, status)["message"] == str(error)
        assert response.headers.get("retry-after") == retry_after
    assert backend.num_running == 0


@pytest.mark.parametrize("prompt", ["a", ["a", "b"]])
async def test_errors_after_the_first_token_are_events(
    client: httpx.AsyncClient, backend: FakeBackend, prompt: Any
):
    backend.error, backend.error_after = WorkerLost("The worker left."), 2
    response = await client.post("/v1/completions", json={"prompt": prompt, "stream": True})
    assert response.status_code == 200
    *events, last, rest = response.text.split("\n\n")
    assert events
    assert json.loads(last.removeprefix("data: "))["error"]["message"] == "The worker left."
    assert rest == ""
    assert backend.num_running == 0


async def test_error_half_way_of_a_whole_answer_is_a_status(client: httpx.AsyncClient, backend: FakeBackend):
    backend.error, backend.error_after = WorkerLost("The worker left."), 2
    assert_error(await client.post("/v1/completions", json=COMPLETION), 503)


def answer_id(backend: FakeBackend) -> str:
    """What the client knows the request by, and the log."""
    [request] = backend.requests
    return request.answer_id


async def test_tokens_that_end_early_are_an_error(
    client: httpx.AsyncClient, backend: FakeBackend, caplog: pytest.LogCaptureFixture
):
    backend.ends_early = True
    assert_error(await client.post("/v1/completions", json=COMPLETION), 500)
    assert f"request {answer_id(backend)} failed" in caplog.text


@pytest.mark.parametrize("stream", [False, True])
async def test_unexpected_errors_are_logged_and_not_told(
    client: httpx.AsyncClient, backend: FakeBackend, caplog: pytest.LogCaptureFixture, stream: bool
):
    backend.error = KeyError("secret")
    response = await client.post("/v1/completions", json=COMPLETION | {"stream": stream})
    assert_error(response, 500)
    assert "secret" not in response.text
    assert "secret" in caplog.text
    assert f"request {answer_id(backend)} failed" in caplog.text
    metrics = (await client.get("/metrics")).text
    assert 'baton_http_requests_total{endpoint="/v1/completions",status="500"} 1.0' in metrics


async def test_unexpected_error_in_a_stream_is_not_told(
    client: httpx.AsyncClient, backend: FakeBackend, caplog: pytest.LogCaptureFixture
):
    backend.error, backend.error_after = KeyError("secret"), 1
    response = await client.post("/v1/completions", json=COMPLETION | {"stream": True})
    assert "internal_error" in response.text
    assert "secret" not in response.text
    assert "secret" in caplog.text
    assert f"request {answer_id(backend)} failed" in caplog.text
