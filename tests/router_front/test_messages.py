"""Anthropic's API: by hand, for what is sent on and what comes, and by Anthropic's own client."""

import json
import re
from collections.abc import AsyncIterator
from typing import Any

import anthropic
import httpx
import pytest

from baton.core.errors import Overloaded
from baton.grammars import formats
from baton_router.messages_api.blocks import blocks_of
from baton_router.messages_api.conversation import read_messages, read_tool_choice
from baton_router.served_model import ServedModel
from tests.router_front.fake_backend import MODEL, FakeBackend, like_qwen3, says

PATH = "/v1/messages"
USER: dict[str, Any] = {"role": "user", "content": "Weather?"}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL = {"name": "weather", "description": "Now", "input_schema": SCHEMA}
BODY: dict[str, Any] = {"model": MODEL, "max_tokens": 200, "messages": [USER]}
THINKS = {"thinking": {"type": "enabled", "budget_tokens": 50}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
EVERYTHING = f"<think>Well.</think>\n\nLet me look.{CALL}{CALL}"


@pytest.fixture
def served(served: ServedModel) -> ServedModel:
    return like_qwen3(served)


@pytest.fixture
async def claude(base_url: str) -> AsyncIterator[anthropic.AsyncAnthropic]:
    async with anthropic.AsyncAnthropic(base_url=base_url, api_key="none", max_retries=0, timeout=10) as made:
        yield made


async def events_of(client: httpx.AsyncClient, **fields: Any) -> list[dict[str, Any]]:
    response = await client.post(PATH, json={**BODY, **fields, "stream": True})
    assert response.status_code == 200, response.text
    events = []
    for block in response.text.strip().split("\n\n"):
        name, data = block.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events


async def test_a_stream_adds_up_to_the_message(
    client: httpx.AsyncClient, served: ServedModel, backend: FakeBackend
) -> None:
    for text in (EVERYTHING, "plain", f"  {CALL}", "<think>a</think>b", f"x{CALL}y"):
        says(served, backend, text)
        fields = {"tools": [TOOL], **THINKS}
        whole = (await client.post(PATH, json={**BODY, **fields})).raise_for_status().json()
        start, *blocks, delta, stop = await events_of(client, **fields)
        assert (start["type"], delta["type"], stop) == (
            "message_start",
            "message_delta",
            {"type": "message_stop"},
        )
        assert [{**block, "id": ""} for block in blocks_of(blocks)] == [
            {**block, "id": ""} for block in whole["content"]
        ]
        assert delta["delta"] == {key: whole[key] for key in ("stop_reason", "stop_sequence")}
        assert delta["usage"] == whole["usage"]
        starts = [event["index"] for event in blocks if event["type"] == "content_block_start"]
        stops = [event["index"] for event in blocks if event["type"] == "content_block_stop"]
        assert starts == stops == list(range(len(whole["content"])))


async def test_an_answer_with_everything(
    client: httpx.AsyncClient, served: ServedModel, backend: FakeBackend
) -> None:
    says(served, backend, EVERYTHING)
    message = (await client.post(PATH, json={**BODY, "tools": [TOOL], **THINKS})).json()
    thinking, text, *calls = message["content"]
    assert thinking == {"type": "thinking", "thinking": "Well.", "signature": ""}
    assert text == {"type": "text", "text": "Let me look."}
    for call in calls:
        assert (call["type"], call["name"], call["input"]) == ("tool_use", "weather", {"city": "Oslo"})
        assert call["id"].startswith("toolu_")
    assert len(calls) == 2
    assert (message["stop_reason"], message["role"], message["id"][:4]) == ("tool_use", "assistant", "msg_")
    usage = message["usage"]
    [request] = backend.requests
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == len(request.token_ids)
    assert formats.from_text(request.sampling.grammar)["max_tokens"] == 50


@pytest.mark.parametrize(
    ("fields", "kinds"),
    [({}, ["text"]), ({"thinking": {"type": "disabled"}}, ["text"]), (THINKS, ["thinking", "text"]),
     ({"thinking": {"type": "adaptive"}}, ["thinking", "text"]),
     ({"thinking": {"type": "adaptive", "display": "omitted"}}, ["text"])],
)  # fmt: skip
async def test_thinking_is_shown_where_it_is_asked_for(
    client: httpx.AsyncClient, served: ServedModel, backend: FakeBackend, fields: Any, kinds: list[str]
) -> None:
    says(served, backend, "<think>Well.</think>Yes.")
    message = (await client.post(PATH, json={**BODY, **fields})).json()
    assert [block["type"] for block in message["content"]] == kinds


async def test_why_it_ended(client: httpx.AsyncClient, served: ServedModel, backend: FakeBackend) -> None:
    async def ending(**fields: Any) -> tuple[Any, ...]:
        message = (await client.post(PATH, json={**BODY, **fields})).json()
        return message["stop_reason"], message["stop_sequence"]

    says(served, backend, "one two three")
    assert await ending() == ("end_turn", None)
    assert await ending(stop_sequences=["two"]) == ("stop_sequence", "two")
    assert await ending(max_tokens=1) == ("max_tokens", None)


def test_histories_become_chats() -> None:
    """Of every kind of block; results of tools are messages of their own."""
    history = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Hm.", "signature": "x"},
                {"type": "redacted_thinking", "data": "x"},
                {"type": "text", "text": "Wait."},
                {"type": "tool_use", "id": "t1", "name": "f", "input": {"k": "é"}},
                {"type": "tool_use", "id": "t2", "name": "g", "input": {}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "r"}]},
                {"type": "tool_result", "tool_use_id": "t2", "content": "no", "is_error": True},
                {"type": "text", "text": "And?"},
            ],
        },
        {"role": "system", "content": "It is late."},
    ]
    calls = [("t1", "f", '{"k": "é"}'), ("t2", "g", "{}")]
    assert read_messages(history, [{"type": "text", "text": "Be brief."}]) == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "a\nb"},
        {
            "role": "assistant",
            "content": "Wait.",
            "reasoning_content": "Hm.",
            "tool_calls": [
                {"id": name, "type": "function", "function": {"name": function, "arguments": arguments}}
                for name, function, arguments in calls
            ],
        },
        {"role": "tool", "tool_call_id": "t1", "content": "r"},
        {"role": "tool", "tool_call_id": "t2", "content": "Error: no"},
        {"role": "user", "content": "And?"},
        {"role": "system", "content": "It is late."},
    ]


def test_choices_of_tools() -> None:
    assert read_tool_choice({"type": "any"}) == ("required", True)
    assert read_tool_choice({"type": "auto", "disable_parallel_tool_use": True}) == ("auto", False)
    named = {"type": "function", "function": {"name": "f"}}
    assert read_tool_choice({"type": "tool", "name": "f"}) == (named, True)


async def test_a_schema_for_the_answer(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    form = {"type": "json_schema", "schema": SCHEMA}
    for fields in ({"output_format": form}, {"output_config": {"format": form}}):
        await client.post(PATH, json={**BODY, **fields})
        assert json.dumps(SCHEMA, separators=(",", ":")) in backend.requests[-1].sampling.grammar


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": None}, "max_tokens"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "tool", "content": "x"}]}, r"messages\[0\].role"),
    ({"messages": [{"role": "system", "content": [{"type": "image"}]}]}, r"content\[0\] has the type"),
    ({"messages": [{"role": "user", "content": 5}]}, r"messages\[0\].content"),
    ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "'image'.*text alone"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, r"messages\[0\].content\[0\].text"),
    ({"system": [{"type": "image"}]}, r"system\[0\]"),
    ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, r"tools\[0\].*no tools of its own"),
    ({"tools": [TOOL, TOOL]}, r"tools\[1\]"),
    ({"tool_choice": {"type": "some"}, "tools": [TOOL]}, "tool_choice"),
    ({"thinking": {"type": "on"}}, "thinking.type"),
    ({"thinking": {"type": "enabled", "budget_tokens": 200}}, "thinking.budget_tokens"),
    ({"temperature": -1}, "temperature"),
    ({"mcp_servers": [{"url": "x"}]}, "mcp_servers"),
    ({"output_format": {"type": "xml"}}, "output_config.format"),
    ({"stop_sequences": ["a"] * 20}, "stop"),
]


@pytest.mark.parametrize(("fields", "reason"), WRONG, ids=str)
async def test_what_is_refused(
    client: httpx.AsyncClient, backend: FakeBackend, fields: dict[str, Any], reason: str
) -> None:
    response = await client.post(PATH, json={**BODY, **fields})
    error = response.json()
    assert (response.status_code, error["type"]) == (400, "error")
    assert error["error"]["type"] == "invalid_request_error"
    assert re.search(reason, error["error"]["message"])
    assert not backend.requests


async def test_other_errors(claude: anthropic.AsyncAnthropic, backend: FakeBackend) -> None:
    with pytest.raises(anthropic.NotFoundError, match="gpt-9"):
        await claude.messages.create(**{**BODY, "model": "gpt-9"})
    with pytest.raises(anthropic.BadRequestError, match="temperature"):
        await claude.messages.create(**BODY, extra_body={"temperature": -1})
    with pytest.raises(anthropic.BadRequestError, match="must be a JSON object"):
        await claude.post(PATH, cast_to=object, body=["x"])
    backend.error = Overloaded("full")
    with pytest.raises(anthropic.APIStatusError) as refused:
        await claude.messages.create(**BODY)
    kind = refused.value.body["error"]["type"]  # type: ignore[index]
    assert (refused.value.status_code, kind) == (503, "overloaded_error")


async def test_an_error_in_mid_stream_is_an_event(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    backend.error, backend.error_after = Overloaded("full"), 3
    *_, error = await events_of(client)
    assert error == {"type": "error", "error": {"type": "overloaded_error", "message": "full"}}


async def test_anthropics_client(
    claude: anthropic.AsyncAnthropic, served: ServedModel, backend: FakeBackend
) -> None:
    says(served, backend, EVERYTHING)
    asked: dict[str, Any] = {**BODY, "tools": [TOOL], **THINKS, "system": "Be brief."}
    message = await claude.messages.create(**asked)
    assert message._request_id == message.id.removeprefix("msg_")
    async with claude.messages.stream(**asked) as stream:
        texts = [text async for text in stream.text_stream]
        final = await stream.get_final_message()
    assert "".join(texts) == "Let me look."
    assert [_said(block) for block in final.content] == [_said(block) for block in message.content]
    assert (final.stop_reason, final.usage.output_tokens) == ("tool_use", message.usage.output_tokens)
    results = [
        {"type": "tool_result", "tool_use_id": block.id, "content": "Rain"}
        for block in message.content
        if block.type == "tool_use"
    ]
    history: Any = [
        USER,
        {"role": "assistant", "content": message.content},
        {"role": "user", "content": results},
    ]
    says(served, backend, "It rains.")
    answer = await claude.messages.create(**{**asked, "messages": history, "max_tokens": 60})
    assert [block.type for block in answer.content] == ["text"]
    fields: dict[str, Any] = {key: asked[key] for key in ("model", "tools", "system", "thinking")}
    counted = await claude.messages.count_tokens(**fields, messages=history)
    assert counted.input_tokens == len(backend.requests[-1].token_ids)


def _said(block: Any) -> Any:
    """What a block says, in whichever of the client's classes."""
    return (
        block.type,
        getattr(block, "text", None),
        getattr(block, "thinking", None),
        getattr(block, "input", None),
    )
