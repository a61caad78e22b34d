"""A real uvicorn: the official client, and clients that go away."""

import asyncio
import json
from typing import Any

import httpx
import openai
import pytest

from baton_router.http import event_stream
from tests.router_front.fake_backend import MODEL, FakeBackend

DEADLINE_S = 10


def openai_client(url: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=DEADLINE_S)


MESSAGES: Any = [{"role": "user", "content": "hi"}]


async def test_official_client(base_url: str):
    async with openai_client(base_url) as client:
        whole = await client.chat.completions.create(
            model=MODEL, messages=MESSAGES, n=2, logprobs=True, top_logprobs=2, max_completion_tokens=12
        )
        assert len(whole.choices) == 2
        assert whole.choices[1].logprobs is not None
        assert len(whole.choices[1].logprobs.content or ()) == 12
        stream = await client.chat.completions.create(
            model=MODEL,
            messages=MESSAGES,
            n=2,
            max_completion_tokens=12,
            stream=True,
            stream_options={"include_usage": True},
        )
        texts, usage = ["", ""], None
        async for chunk in stream:
            usage = chunk.usage or usage
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
        assert texts == [choice.message.content for choice in whole.choices]
        assert usage == whole.usage
        legacy = await client.completions.create(model=MODEL, prompt=["a", "b"], logprobs=1, max_tokens=12)
        assert [choice.text for choice in legacy.choices] == texts
        assert [model.id async for model in client.models.list()] == [MODEL]


async def test_official_client_sees_errors(base_url: str, backend: FakeBackend):
    async with openai_client(base_url) as client:
        with pytest.raises(openai.NotFoundError, match="gpt-x"):
            await client.completions.create(model="gpt-x", prompt="x")
        with pytest.raises(openai.BadRequestError) as caught:
            await client.completions.create(model=MODEL, prompt="x", max_tokens=1000)
        assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "max_tokens")
        backend.error, backend.error_after = RuntimeError("secret"), 2
        stream = await client.completions.create(model=MODEL, prompt="x", stream=True)
        with pytest.raises(openai.APIError, match="Internal error"):
            [chunk async for chunk in stream]


@pytest.mark.parametrize("prompt", ["x", ["x", "y"]])
@pytest.mark.parametrize("hang_after", [0, 3])
@pytest.mark.parametrize("stream", [False, True])
async def test_disconnect_closes_the_backend(
    base_url: str, backend: FakeBackend, stream: bool, hang_after: int, prompt: Any
):
    backend.hang_after = hang_after
    async with asyncio.timeout(DEADLINE_S):
        url = httpx.URL(base_url)
        reader, writer = await asyncio.open_connection(url.host, url.port)
        body = json.dumps({"prompt": prompt, "stream": stream}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
        writer.write(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
        await backend.is_hanging.wait()
        if stream and hang_after:
            await reader.readuntil(b"data: ")
        writer.close()
        await backend.is_closed.wait()
    async with httpx.AsyncClient(base_url=base_url) as client:
        metrics = (await client.get("/metrics")).text
    status = 200 if stream and hang_after else 499
    assert f'baton_http_requests_total{{endpoint="/v1/completions",status="{status}"}} 1.0' in metrics


async def test_client_that_reads_nothing_loses_its_place(
    base_url: str, backend: FakeBackend, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(event_stream, "SEND_TIMEOUT_S", 0.2)
    backend.max_model_len = 10**7
    async with asyncio.timeout(DEADLINE_S * 3):
        url = httpx.URL(base_url)
        _, writer = await asyncio.open_connection(url.host, url.port, limit=1)
        body = json.dumps({"prompt": "x", "stream": True, "max_tokens": 10**6, "n": 100}).encode()
        writer.write(
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        )
        writer.write(body)
        await backend.is_closed.wait()
        writer.close()
