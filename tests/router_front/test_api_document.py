"""Answers are what the API's document says, and its page needs nobody else."""

import json
import re
from dataclasses import replace
from typing import Any

import httpx
import jsonschema
import pytest

from baton.core.errors import Unavailable
from baton_router.chat_output.formats import REASONING_FORMATS, TOOL_FORMATS
from baton_router.http.app import create_app
from baton_router.served_model import ChatFormats, ServedModel
from tests.router_front.fake_backend import MODEL, FakeBackend

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MESSAGES = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "weather"}}
# path, body or None for GET, status
CALLS: list[tuple[str, dict[str, Any] | None, int]] = [
    ("/v1/models", None, 200),
    (f"/v1/models/{MODEL}", None, 200),
    ("/v1/models/gpt-9", None, 404),
    ("/version", None, 200),
    ("/load", None, 200),
    ("/tokenize", {"prompt": "hi", "return_token_strs": True}, 200),
    ("/tokenize", {"messages": MESSAGES}, 200),
    ("/tokenize", {}, 400),
    ("/detokenize", {"tokens": [5, 6]}, 200),
    ("/detokenize", {"tokens": "x"}, 400),
    (COMPLETIONS, {"prompt": ["hi", "there"], "n": 2, "max_tokens": 3}, 200),
    (COMPLETIONS, {"prompt": "hi there", "logprobs": 2, "echo": True, "return_token_ids": True}, 200),
    (COMPLETIONS, {"prompt": "hi", "stop": "w"}, 200),
    (COMPLETIONS, {"prompt": "hi", "temperature": -1}, 400),
    (COMPLETIONS, {"prompt": "hi", "model": "gpt-9"}, 404),
    (COMPLETIONS, {"prompt": "x" * 30_000}, 413),
    (CHAT, {"messages": MESSAGES, "max_tokens": 5}, 200),
    (CHAT, {"messages": MESSAGES, "logprobs": True, "top_logprobs": 2, "prompt_logprobs": 1}, 200),
    (CHAT, {"messages": []}, 400),
    ("/v1/messages", {"messages": MESSAGES, "max_tokens": 5}, 200),
    ("/v1/messages", {"messages": MESSAGES}, 400),
    ("/v1/messages", {"messages": MESSAGES, "max_tokens": 5, "model": "gpt-9"}, 404),
    ("/v1/messages/count_tokens", {"messages": MESSAGES}, 200),
]


@pytest.fixture
def thinking(served: ServedModel, backend: FakeBackend) -> ServedModel:
    """A model that thinks and then calls a tool."""
    text = '<think>Hm.</think>Well.<tool_call>{"name": "weather", "arguments": {"a": 1}}</tool_call>'
    backend.reply = [*served.tokenizer.encode_now(text, add_special_tokens=False), *served.eos_token_ids]
    return replace(served, chat=ChatFormats(TOOL_FORMATS["hermes"], REASONING_FORMATS["qwen3"]))


async def check(client: httpx.AsyncClient, path: str, body: dict[str, Any] | None, status: int) -> None:
    """The answer, or each event of its stream, against its schema."""
    document = (await client.get("/openapi.json")).json()
    response = await (client.get(path) if body is None else client.post(path, json=body))
    assert response.status_code == status, response.text
    route = path if path in document["paths"] else "/v1/models/{name}"
    operation = document["paths"][route]["get" if body is None else "post"]
    kind = response.headers["content-type"].partition(";")[0]
    schema = operation["responses"][str(status)]["content"][kind]["schema"]
    if kind == "application/json":
        contents = [response.json()]
    else:
        lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
        contents = [json.loads(line) for line in lines if line != "[DONE]"]
        assert ("error" in contents[-1]) == (lines[-1] != "[DONE]")
    assert contents
    for content in contents:
        jsonschema.validate(content, {**schema, "components": document["components"]})


@pytest.mark.parametrize(("path", "body", "status"), CALLS, ids=str)
async def test_answers_are_what_it_says(
    client: httpx.AsyncClient, path: str, body: dict[str, Any] | None, status: int
) -> None:
    await check(client, path, body, status)
    if body is not None and status == 200 and path in (CHAT, COMPLETIONS):
        await check(client, path, {**body, "stream": True, "stream_options": {}}, status)


@pytest.mark.parametrize("stream", [False, True])
async def test_messages_with_everything(thinking: ServedModel, stream: bool) -> None:
    transport = httpx.ASGITransport(create_app(thinking), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://baton") as client:
        body = {"messages": MESSAGES, "tools": [TOOL], "n": 2, "return_token_ids": True, "stream": stream}
        await check(client, CHAT, body, 200)


async def test_errors_of_the_server(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    backend.error = Unavailable("No worker is connected.")
    for path, body in ((COMPLETIONS, {"prompt": "hi"}), (CHAT, {"messages": MESSAGES})):
        backend.error_after = 0
        await check(client, path, body, 503)
        backend.error_after = 2
        await check(client, path, {**body, "stream": True}, 200)


async def test_every_route_types_its_answer_and_its_errors(client: httpx.AsyncClient) -> None:
    document = (await client.get("/openapi.json")).json()
    for path, operations in document["paths"].items():
        for operation in operations.values():
            responses = operation["responses"]
            content = responses["200"].get("content", {})
            assert all(typed["schema"] for typed in content.values()), path
            if not content:  # those of probes are empty
                assert (await client.get(path)).content == b"", path
            error = responses["default"]["content"]["application/json"]["schema"]
            model = "AnthropicError" if path.startswith("/v1/messages") else "ErrorBody"
            assert error == {"$ref": f"#/components/schemas/{model}"}
    metrics = (await client.get("/metrics")).headers["content-type"].partition(";")[0]
    assert metrics in document["paths"]["/metrics"]["get"]["responses"]["200"]["content"]


async def test_no_error_is_promised_that_never_comes(client: httpx.AsyncClient) -> None:
    document = (await client.get("/openapi.json")).text
    assert "422" not in json.loads(document)["paths"][CHAT]["post"]["responses"]
    assert "HTTPValidationError" not in document


async def test_its_page_loads_nothing(client: httpx.AsyncClient) -> None:
    page = (await client.get("/docs")).text
    assert CHAT in page
    assert "max_completion_tokens" in page
    assert not re.search(r"<script|<link|<img|https?://|@import|url\(", page)
