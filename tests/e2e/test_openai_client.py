"""The official openai client against real processes."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

import openai
import pytest
from pydantic import BaseModel, ConfigDict, Field

from tests.e2e.processes import Cluster, wait_until

QUESTION: Any = [{"role": "user", "content": "Add one and two."}]


@pytest.fixture
async def client(cluster: Cluster) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0) as made:
        yield made


async def test_models(client: openai.AsyncOpenAI) -> None:
    models = [model async for model in await client.models.list()]
    assert [model.id for model in models] == ["demo"]


async def test_completion_with_and_without_stream(client: openai.AsyncOpenAI) -> None:
    whole = await client.completions.create(
        model="demo", prompt="def __init__(self", max_tokens=40, temperature=0, logprobs=2
    )
    choice = whole.choices[0]
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 40
    assert choice.finish_reason == "length"
    assert choice.logprobs is not None
    assert choice.logprobs.tokens is not None
    assert "".join(choice.logprobs.tokens) == choice.text
    stream = await client.completions.create(
        model="demo",
        prompt="def __init__(self",
        max_tokens=40,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == choice.text
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 40
    assert sum(bool(chunk.choices and chunk.choices[0].text) for chunk in chunks) > 10, "it streams"


async def test_greedy_completion_looks_like_python(client: openai.AsyncOpenAI) -> None:
    answer = await client.completions.create(
        model="demo", prompt="def __init__(self", max_tokens=60, temperature=0
    )
    text = answer.choices[0].text
    assert re.match(r"(, \w+(=\w+)?)*\):\n +\S", text), "parameters, then an indented body"


async def test_chat_with_and_without_stream(client: openai.AsyncOpenAI) -> None:
    messages: Any = [{"role": "user", "content": "Write a function that adds two numbers."}]
    whole = await client.chat.completions.create(
        model="demo", messages=messages, max_tokens=24, seed=5, temperature=0.8
    )
    stream = await client.chat.completions.create(
        model="demo", messages=messages, max_tokens=24, seed=5, temperature=0.8, stream=True
    )
    text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])
    assert whole.choices[0].message.content == text


async def test_choices_differ_and_stop_strings_cut(client: openai.AsyncOpenAI) -> None:
    answer = await client.completions.create(
        model="demo", prompt="import os\n", max_tokens=24, n=3, seed=11, temperature=1.0
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({choice.text for choice in answer.choices}) > 1
    [choice] = [choice for choice in answer.choices if choice.index == 1]
    stop = choice.text[5:9]
    cut = await client.completions.create(
        model="demo", prompt="import os\n", max_tokens=24, n=3, seed=11, temperature=1.0, stop=[stop]
    )
    assert cut.choices[1].text == choice.text[: choice.text.index(stop)]
    assert cut.choices[1].finish_reason == "stop"


async def test_32_concurrent_requests_of_mixed_lengths(cluster: Cluster, client: openai.AsyncOpenAI) -> None:
    async def ask(index: int) -> tuple[str, list[int]]:
        answer = await client.completions.create(
            model="demo",
            prompt=[3 + (index * 37 + position) % 900 for position in range(1 + index * 23)],
            max_tokens=4 + index % 29,
            temperature=0,
            extra_body={"return_token_ids": True, "ignore_eos": True},
        )
        return answer.choices[0].finish_reason, (answer.choices[0].model_extra or {})["token_ids"]

    answers = await asyncio.gather(*(ask(index) for index in range(32)))
    assert [reason for reason, _ in answers] == ["length"] * 32
    assert [len(ids) for _, ids in answers] == [4 + index % 29 for index in range(32)]
    wait_until(cluster.pages_are_free, "all pages are free", 5)


async def test_disconnect_in_mid_stream_frees_the_pages(cluster: Cluster, client: openai.AsyncOpenAI) -> None:
    stream = await client.completions.create(
        model="demo", prompt="import", max_tokens=1800, stream=True, extra_body={"ignore_eos": True}
    )
    chunks = aiter(stream)
    for _ in range(3):
        await anext(chunks)
    assert not cluster.pages_are_free()
    await stream.close()
    wait_until(cluster.pages_are_free, "the pages are back in the pool", 5)
    assert cluster.worker_metric("num_running", "decode") == 0


async def test_errors_are_openais(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="temperature"):
        await client.completions.create(model="demo", prompt="x", temperature=-1)
    with pytest.raises(openai.NotFoundError, match="gpt-9"):
        await client.completions.create(model="gpt-9", prompt="x")
    with pytest.raises(openai.BadRequestError, match=r"\d+ tokens"):
        await client.completions.create(model="demo", prompt=[5] * 100_000)


class Person(BaseModel):
    """What an answer is parsed to."""

    model_config = ConfigDict(extra="forbid")

    name: Annotated[str, Field(max_length=12)]
    age: Annotated[int, Field(ge=0, le=120)]
    likes: Annotated[list[Literal["tea", "coffee"]], Field(max_length=2)]


async def test_an_answer_is_parsed_to_a_model_of_pydantic(client: openai.AsyncOpenAI) -> None:
    """The client makes the schema, and what is generated over two servers keeps it."""
    parsed = await client.chat.completions.parse(
        model="demo", messages=QUESTION, response_format=Person, max_tokens=300, n=3, seed=5
    )
    for choice in parsed.choices:
        assert choice.finish_reason == "stop"
        assert isinstance(choice.message.parsed, Person)


TOOL: Any = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            "required": ["a", "b"],
            "additionalProperties": False,
        },
    },
}
NAMED: Any = {"type": "function", "function": {"name": "add"}}


@pytest.mark.parametrize("tool_choice", ["required", NAMED], ids=["required", "named"])
async def test_a_tool_that_has_to_be_called(client: openai.AsyncOpenAI, tool_choice: Any) -> None:
    asked: Any = {
        "model": "demo",
        "messages": QUESTION,
        "tools": [TOOL],
        "tool_choice": tool_choice,
        "parallel_tool_calls": False,
        "max_tokens": 300,
        "seed": 7,
    }
    whole = (await client.chat.completions.create(**asked)).choices[0]
    assert whole.finish_reason == "tool_calls"
    [call] = whole.message.tool_calls or []
    assert call.type == "function"
    assert set(json.loads(call.function.arguments)) == {"a", "b"}
    chunks = [chunk async for chunk in await client.chat.completions.create(**asked, stream=True)]
    deltas = [d for chunk in chunks for choice in chunk.choices for d in choice.delta.tool_calls or []]
    assert len(deltas) > 2, "it streams"
    assert [delta.function.name for delta in deltas if delta.function and delta.function.name] == ["add"]
    arguments = "".join((delta.function and delta.function.arguments) or "" for delta in deltas)
    assert arguments == call.function.arguments
    # The call and its answer go back to the model.
    answered: Any = [
        *QUESTION,
        whole.message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "3"},
    ]
    after = await client.chat.completions.create(model="demo", messages=answered, max_tokens=5)
    assert after.choices[0].message.role == "assistant"
