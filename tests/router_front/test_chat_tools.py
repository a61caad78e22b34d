"""Tools and thinking in chats: what the workers are asked, and the message that comes of an answer."""

import json
from dataclasses import replace
from typing import Any

import httpx
import pytest

from baton.core.errors import InvalidRequest
from baton.grammars import formats
from baton.grammars.guidance import check
from baton.v1 import inference_pb2 as pb
from baton_router.chat_output.formats import REASONING_FORMATS
from baton_router.grpc_front import InferenceServicer
from baton_router.http.app import create_app
from baton_router.served_model import ChatFormats, ServedModel
from tests.router_front.fake_backend import FakeBackend, like_qwen3, says

CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "Weather?"}]
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
FUNCTION: dict[str, Any] = {"name": "weather", "description": "Now", "parameters": SCHEMA}
TOOL: dict[str, Any] = {"type": "function", "function": FUNCTION}
OTHER = {"type": "function", "function": {"name": "news"}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'


@pytest.fixture
def served(served: ServedModel) -> ServedModel:
    return like_qwen3(served)


async def messages_of(client: httpx.AsyncClient, **fields: Any) -> list[dict[str, Any]]:
    """The message of each choice and why it ended; of a stream, what its deltas add up to."""
    body = {"messages": MESSAGES, "max_tokens": 200, **fields}
    response = await client.post(CHAT, json=body)
    assert response.status_code == 200, response.text
    if not fields.get("stream"):
        return [
            {**choice["message"], "reason": choice["finish_reason"]} for choice in response.json()["choices"]
        ]
    found: dict[int, dict[str, Any]] = {}
    for line in response.text.splitlines():
        if not line.startswith("data: {"):
            continue
        for choice in json.loads(line.removeprefix("data: "))["choices"]:
            message = found.setdefault(choice["index"], {"content": "", "reasoning": "", "calls": {}})
            delta = choice["delta"]
            message["content"] += delta.get("content", "")
            message["reasoning"] += delta.get("reasoning", "")
            assert delta.get("reasoning") == delta.get("reasoning_content")
            for call in delta.get("tool_calls", ()):
                whole = message["calls"].setdefault(call["index"], {"id": call.get("id"), "arguments": ""})
                whole["name"] = call["function"].get("name", whole.get("name"))
                whole["arguments"] += call["function"]["arguments"]
            message["reason"] = choice["finish_reason"] or message.get("reason")
    return [found[index] for index in sorted(found)]


@pytest.mark.parametrize("tokens_per_delta", [1, 7])
async def test_an_answer_with_everything(
    client: httpx.AsyncClient, served: ServedModel, backend: FakeBackend, tokens_per_delta: int
) -> None:
    backend.tokens_per_delta = tokens_per_delta
    says(served, backend, f"<think>\nWell.\n</think>\n\nLet me look.\n{CALL}\n{CALL}")
    for message in await messages_of(client, tools=[TOOL], n=2):
        assert message["reasoning"] == message["reasoning_content"] == "Well."
        assert message["content"] == "Let me look."
        assert message["reason"] == "tool_calls"
        first, second = message["tool_calls"]
        assert first["type"] == "function"
        assert first["id"] != second["id"]
        assert first["function"]["name"] == second["function"]["name"] == "weather"
        assert json.loads(first["function"]["arguments"]) == {"city": "Oslo"}
    for message in await messages_of(client, tools=[TOOL], n=2, stream=True):
        assert (message["reasoning"], message["content"]) == ("Well.", "Let me look.")
        assert message["reason"] == "tool_calls"
        assert [call["name"] for call in message["calls"].values()] == ["weather", "weather"]
        assert all(json.loads(call["arguments"]) == {"city": "Oslo"} for call in message["calls"].values())
        assert len({call["id"] for call in message["calls"].values()}) == 2


async def test_a_call_alone_has_no_content(
    client: httpx.AsyncClient, served: ServedModel, backend: FakeBackend
) -> None:
    says(served, backend, CALL)
    [message] = await messages_of(client, tools=[TOOL])
    assert message["content"] is None
    assert "reasoning" not in message


@pytest.mark.parametrize("stream", [False, True])
async def test_thinking_may_be_left_out(
    client: httpx.AsyncClient, served: ServedModel, backend: FakeBackend, stream: bool
) -> None:
    says(served, backend, "<think>Well.</think>Yes.")
    [message] = await messages_of(client, include_reasoning=False, stream=stream)
    assert (message["content"], message.get("reasoning", ""), message["reason"]) == ("Yes.", "", "stop")


@pytest.mark.parametrize("fields", [{}, {"tools": [TOOL], "tool_choice": "none"}, {"tools": []}])
async def test_without_tools_calls_are_text(
    client: httpx.AsyncClient, served: ServedModel, backend: FakeBackend, fields: dict[str, Any]
) -> None:
    says(served, backend, CALL)
    [message] = await messages_of(client, **fields)
    assert message["content"] == CALL
    assert (message["reason"], "tool_calls" in message) == ("stop", False)
    assert backend.requests[-1].sampling.grammar == ""


async def test_an_answer_that_is_cut_is_not_a_call_that_ended(
    client: httpx.AsyncClient, served: ServedModel, backend: FakeBackend
) -> None:
    says(served, backend, CALL)
    [message] = await messages_of(client, tools=[TOOL], max_tokens=len(backend.reply) - 12)
    assert message["reason"] == "length"


CONSTRAINED: list[tuple[dict[str, Any], bool]] = [
    ({"tools": [TOOL, OTHER]}, False),
    ({"tools": [TOOL, OTHER], "tool_choice": "auto"}, False),
    ({"tools": [TOOL, OTHER], "tool_choice": "auto", "parallel_tool_calls": False}, True),
    ({"tools": [TOOL], "tool_choice": "required"}, True),
    ({"tools": [TOOL, OTHER], "tool_choice": {"type": "function", "function": {"name": "news"}}}, True),
    ({"tools": [{**TOOL, "function": {**TOOL["function"], "strict": True}}]}, True),
    ({"tools": [TOOL], "response_format": {"type": "json_object"}}, True),
    ({"response_format": {"type": "json_object"}}, True),
]


@pytest.mark.parametrize(("fields", "is_constrained"), CONSTRAINED, ids=str)
async def test_what_answers_have_to_look_like(
    client: httpx.AsyncClient, backend: FakeBackend, fields: dict[str, Any], is_constrained: bool
) -> None:
    await messages_of(client, **fields)
    [request] = backend.requests
    assert bool(request.sampling.grammar) == is_constrained
    if is_constrained:
        check(formats.from_text(request.sampling.grammar))
    assert not request.text.skip_special_tokens


BUDGET = {"thinking_token_budget": 5}


@pytest.mark.parametrize(
    "fields", [{}, {"tools": [TOOL], "tool_choice": "required"}, {"response_format": {"type": "json_object"}}]
)
async def test_a_limit_on_thinking(
    client: httpx.AsyncClient, backend: FakeBackend, fields: dict[str, Any]
) -> None:
    """It stands around what the answer has to look like without it."""
    await messages_of(client, **fields)
    await messages_of(client, **fields, **BUDGET, ignore_eos=True)
    without, limited = (request.sampling for request in backend.requests)
    form = formats.from_text(limited.grammar)
    assert (form["type"], form["max_tokens"], form["is_open"]) == ("thinking_budget", 5, False)
    assert form["content"] == (formats.from_text(without.grammar) if without.grammar else None)
    assert bool(limited.stop_token_ids) == bool(fields)  # ignore_eos holds where any text is an answer


async def test_a_limit_on_thinking_over_grpc(served: ServedModel) -> None:
    chat = pb.ChatMessages(messages=[pb.ChatMessage(role="user", content="Hi")])
    request = pb.GenerateRequest(chat=chat, sampling=pb.Sampling(thinking_token_budget=0))
    built, _ = await InferenceServicer(served)._generation(request)
    assert formats.from_text(built.sampling.grammar)["max_tokens"] == 0


@pytest.mark.parametrize("name", [None, "harmony"])
async def test_no_limit_where_thinking_can_not_be_told(served: ServedModel, name: str | None) -> None:
    form = None if name is None else REASONING_FORMATS[name]
    transport = httpx.ASGITransport(create_app(replace(served, chat=ChatFormats(None, form))))
    async with httpx.AsyncClient(transport=transport, base_url="http://baton") as client:
        refused = await client.post(CHAT, json={"messages": MESSAGES, **BUDGET})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "thinking_token_budget")


# fields, the param of the error
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"tools": "weather"}, "tools"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ({"tools": [TOOL, TOOL]}, "tools[1].function.name"),
    ({"tools": [{**TOOL, "function": {"name": "a b"}}]}, "tools[0].function.name"),
    ({"tool_choice": "auto"}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": "some"}, "tool_choice"),
    (
        {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "x"}}},
        "tool_choice.function.name",
    ),
    ({"functions": [{"name": "x"}]}, "functions"),
    ({"thinking_token_budget": -1}, "thinking_token_budget"),
    ({"thinking_token_budget": "many"}, "thinking_token_budget"),
]


@pytest.mark.parametrize(("fields", "param"), WRONG, ids=str)
async def test_what_is_refused(
    client: httpx.AsyncClient, backend: FakeBackend, fields: dict[str, Any], param: str
) -> None:
    response = await client.post(CHAT, json={"messages": MESSAGES, **fields})
    assert (response.status_code, response.json()["error"]["param"]) == (400, param), response.text
    assert not backend.requests


class Context:
    """Collects what a call writes."""

    def __init__(self) -> None:
        self.responses: list[pb.GenerateResponse] = []

    async def write(self, response: pb.GenerateResponse) -> None:
        self.responses.append(response)


@pytest.mark.parametrize("stream", [False, True])
async def test_grpc_says_the_same(served: ServedModel, backend: FakeBackend, stream: bool) -> None:
    says(served, backend, f"<think>Well.</think>Look.{CALL}")
    tool = pb.Tool(name="weather", parameters=json.dumps(SCHEMA))
    earlier = pb.ChatMessage(
        role="assistant", reasoning="Hm.", tool_calls=[pb.ToolCall(id="1", name="weather", arguments="{}")]
    )
    messages = [pb.ChatMessage(role="user", content="Weather?"), earlier]
    messages.append(pb.ChatMessage(role="tool", tool_call_id="1", content="Rain"))
    chat = pb.ChatMessages(messages=messages, tools=[tool])
    sampling = pb.Sampling(max_tokens=200)
    context: Any = Context()
    request = pb.GenerateRequest(chat=chat, sampling=sampling, stream=stream)
    await InferenceServicer(served).Generate(request, context)
    responses = context.responses
    assert len(responses) > 5 if stream else len(responses) == 1
    assert "".join(response.reasoning for response in responses) == "Well."
    assert "".join(response.text for response in responses) == "Look."
    calls = [call for response in responses for call in response.tool_calls]
    assert [call.name for call in calls if call.name] == ["weather"]
    assert json.loads("".join(call.arguments for call in calls)) == {"city": "Oslo"}
    assert responses[-1].finish_reason == "tool_calls"


@pytest.mark.parametrize(
    ("chat", "param"),
    [
        ({"tools": [pb.Tool(name="x", parameters="{")]}, "tools[0].function.parameters"),
        ({"tools": [pb.Tool(name="x")], "tool_name": "y"}, "tool_choice.function.name"),
        ({"tools": [pb.Tool(name="x")], "tool_choice": "some"}, "tool_choice"),
        ({"chat_template_kwargs": "[]"}, "chat_template_kwargs"),
    ],
)
async def test_what_grpc_refuses(served: ServedModel, chat: dict[str, Any], param: str) -> None:
    said = pb.ChatMessages(messages=[pb.ChatMessage(role="user", content="Hi")], **chat)
    context: Any = Context()
    with pytest.raises(InvalidRequest) as refused:
        await InferenceServicer(served).Generate(pb.GenerateRequest(chat=said), context)
    assert refused.value.param == param


async def test_a_model_without_tools_can_only_be_made_to_call(
    client: httpx.AsyncClient, served: ServedModel, backend: FakeBackend
) -> None:
    plain = replace(served, chat=ChatFormats())
    transport = httpx.ASGITransport(create_app(plain), raise_app_exceptions=False)
    says(served, backend, CALL)
    async with httpx.AsyncClient(transport=transport, base_url="http://baton") as client:
        response = await client.post(CHAT, json={"messages": MESSAGES, "tools": [TOOL]})
        assert (response.status_code, response.json()["error"]["param"]) == (400, "tools")
        [message] = await messages_of(client, tools=[TOOL], tool_choice="required")
    assert message["tool_calls"][0]["function"]["name"] == "weather"
