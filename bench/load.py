"""A load client for OpenAI-compatible servers: completions of random prompts, streamed, so many at a time."""

import asyncio
import json
import random
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast
from urllib.parse import urlsplit

import httptools

from bench.report import percentile

REQUEST_TIMEOUT_S = 300.0
# Ids that every tokenizer with 4,096 tokens has, and that are not its special ones.
TOKEN_IDS = range(16, 4000)


@dataclass(frozen=True, slots=True)
class Workload:
    """What is asked."""

    num_input_tokens: int
    num_output_tokens: int
    concurrency: int
    num_requests: int
    more_fields: Mapping[str, Any] = field(default_factory=dict)  # of each request

    def prompts(self, seed: int) -> list[list[int]]:
        """The same ones for the same seed; no two begin alike, so that no prefix cache helps."""
        rng = random.Random(seed)
        return [rng.choices(TOKEN_IDS, k=self.num_input_tokens) for _ in range(self.num_requests)]


@dataclass(slots=True)
class Answer:
    """When one request's tokens came, in seconds of one clock."""

    asked: float
    events: list[float] = field(default_factory=list)  # with tokens
    num_tokens: int = 0


class RequestRefused(Exception):
    """The server answered with something else than tokens."""


class _Stream(asyncio.Protocol):
    """One request on one connection: a client library would cost more of the cores that are measured."""

    def __init__(self) -> None:
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.answer = Answer(0.0)
        self._parser = httptools.HttpResponseParser(self)
        self._rest = b""
        self._transport: asyncio.Transport | None = None

    def ask(self, head: bytes, body: bytes) -> None:
        """Send the request."""
        assert self._transport is not None
        self.answer.asked = time.perf_counter()
        self._transport.write(head + body)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio.Protocol."""
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        self._parser.feed_data(data)

    def connection_lost(self, error: Exception | None) -> None:
        """See asyncio.Protocol."""
        self._end(error or ConnectionError("the server hung up"))

    def on_body(self, body: bytes) -> None:
        """See httptools: what has arrived of the answer."""
        if self._parser.get_status_code() != 200:
            self._rest += body
            return
        now = time.perf_counter()
        *events, self._rest = (self._rest + body).replace(b"\r\n", b"\n").split(b"\n\n")
        for event in events:
            self._take(event, now)

    def on_message_complete(self) -> None:
        """See httptools."""
        if self._parser.get_status_code() != 200:
            self._end(RequestRefused(f"{self._parser.get_status_code()}: {self._rest[:500]!r}"))
        self._end(None)
        assert self._transport is not None
        self._transport.close()

    def _take(self, event: bytes, now: float) -> None:
        if event in (b"", b"data: [DONE]"):
            return
        chunk = json.loads(event.removeprefix(b"data: "))
        if chunk.get("usage"):
            self.answer.num_tokens = chunk["usage"]["completion_tokens"]
        if chunk.get("choices"):
            self.answer.events.append(now)

    def _end(self, error: Exception | None) -> None:
        if self.done.done():
            return
        if error is None:
            self.done.set_result(None)
        else:
            self.done.set_exception(error)


async def complete(
    url: str, model: str, prompt: list[int], max_tokens: int, more_fields: Mapping[str, Any]
) -> Answer:
    """One request. Raises RequestRefused, ConnectionError or TimeoutError."""
    request = {
        "model": model,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        **more_fields,
    }
    parts = urlsplit(url)
    assert parts.hostname is not None
    body = json.dumps(request).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nhost: {parts.netloc}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
    )
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(REQUEST_TIMEOUT_S):
        _, stream = await loop.create_connection(_Stream, parts.hostname, parts.port or 80)
        stream.ask(head.encode(), body)
        await stream.done
    if stream.answer.num_tokens != max_tokens:
        raise RequestRefused(f"{stream.answer.num_tokens} tokens where {max_tokens} were asked for")
    return stream.answer


async def run(url: str, model: str, workload: Workload, seed: int) -> dict[str, float]:
    """All requests of a workload, and what came of them. Raises what `complete` raises."""
    places = asyncio.Semaphore(workload.concurrency)

    async def ask(prompt: list[int]) -> Answer:
        async with places:
            return await complete(url, model, prompt, workload.num_output_tokens, workload.more_fields)

    started = time.perf_counter()
    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(ask(prompt)) for prompt in workload.prompts(seed)]
    return figures([task.result() for task in running], time.perf_counter() - started)


def figures(answers: list[Answer], seconds: float) -> dict[str, float]:
    """Throughput, and latencies in milliseconds as vLLM's client defines them."""
    gaps = [
        later - sooner
        for answer in answers
        for sooner, later in zip(answer.events, answer.events[1:], strict=False)
    ]
    per_token = [(a.events[-1] - a.events[0]) / max(1, a.num_tokens - 1) for a in answers]
    return {
        "output tok/s": sum(answer.num_tokens for answer in answers) / seconds,
        "median TTFT ms": 1e3 * statistics.median(answer.events[0] - answer.asked for answer in answers),
        "median TPOT ms": 1e3 * statistics.median(per_token),
        "p99 ITL ms": 1e3 * percentile(gaps, 0.99),
    }


def median_of(runs: list[dict[str, float]]) -> dict[str, Any]:
    """The median of each figure over runs."""
    return {name: round(statistics.median(run[name] for run in runs), 1) for name in runs[0]}
