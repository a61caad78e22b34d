"""One answer to a completion of either kind, streamed or whole; what it looks like is the shape's."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from fastapi.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from baton_router.answer_choice import check_streamed
from baton_router.backend import GenerationRequest
from baton_router.http.errors import ANSWER_ID, error_body, log_unless_expected
from baton_router.http.event_stream import EventStream
from baton_router.http.generation import GenerationBody
from baton_router.http.guarded_work import ClientDisconnected, GuardedResponse
from baton_router.prompt_runs import Run, run_prompts
from baton_router.served_model import ServedModel
from baton_router.text_delta import TextDelta, joined


class Shape(Protocol):
    """OpenAI's objects for completions or for chat; remembers what it has told about each choice."""

    whole_object: str
    chunk_object: str

    def opening(self, num_choices: int) -> list[dict[str, Any]]:
        """Choices of the chunks that come before the first token."""
        ...

    def chunk_choice(self, index: int, delta: TextDelta) -> dict[str, Any]:
        """A choice of a chunk."""
        ...

    def whole_choice(self, index: int, delta: TextDelta) -> dict[str, Any]:
        """A choice of a whole answer; the delta is all of it."""
        ...

    def top_level(self) -> dict[str, Any]:
        """What the first chunk, or the whole answer, holds beside its choices."""
        ...


@dataclass(slots=True)
class _Usage:
    prompt_tokens: int
    completion_tokens: int = 0
    cached_tokens: int = 0

    def count(self, delta: TextDelta) -> None:
        self.completion_tokens += len(delta.tokens) + delta.num_unseen_tokens
        self.cached_tokens += delta.num_cached_prompt_tokens

    def as_json(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


class Answer:
    """The answer to one call, which may have several prompts."""

    def __init__(
        self,
        served: ServedModel,
        body: GenerationBody,
        requests: Sequence[GenerationRequest],
        answer_id: str,
        shape: Shape,
        run: Run = run_prompts,
    ) -> None:
        """`run` gives the requests' deltas. Raises InvalidRequest for what can't be streamed."""
        self._served = served
        self._requests = requests
        self._shape = shape
        self._run = run
        self._num_choices_each = requests[0].sampling.n
        self._num_choices = self._num_choices_each * len(requests)
        self._usage = _Usage(sum(len(request.token_ids) for request in requests))
        self._is_streamed = bool(body.stream)
        if self._is_streamed:
            check_streamed(requests[0])
        stream_options = body.stream_options
        self._usage_at_end = bool(stream_options and stream_options.include_usage)
        self._usage_always = bool(
            stream_options and stream_options.include_usage and stream_options.continuous_usage_stats
        )
        self._head = {"id": answer_id, "created": int(time.time()), "model": served.model}

    def response(self) -> GuardedResponse:
        """What runs the requests, and sends their answer in the way that the body asks for."""
        return GuardedResponse(self._streamed if self._is_streamed else self._whole)

    async def _whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send one JSON object when all is generated."""
        scope[ANSWER_ID] = self._head["id"]
        deltas: list[list[TextDelta]] = [[] for _ in range(self._num_choices)]

        async def collect(request: int, delta: TextDelta) -> None:
            self._usage.count(delta)
            deltas[self._index(request, delta)].append(delta)

        await self._run(self._served, self._requests, collect)
        content = {
            **self._head,
            "object": self._shape.whole_object,
            **self._shape.top_level(),
            "choices": [self._shape.whole_choice(index, joined(parts)) for index, parts in enumerate(deltas)],
            "usage": self._usage.as_json(),
        }
        await JSONResponse(content)(scope, receive, send)

    async def _streamed(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send server-sent events; an error before the first token is raised, a later one is an event.

        Tokens whose text is held back, or that have none, are an event too: clients time tokens by them.
        """
        scope[ANSWER_ID] = self._head["id"]
        stream = EventStream(send)

        async def forward(request: int, delta: TextDelta) -> None:
            if not stream.is_started:
                await self._open(stream)
            self._usage.count(delta)
            await stream.event(self._chunk([self._shape.chunk_choice(self._index(request, delta), delta)]))

        try:
            await self._run(self._served, self._requests, forward)
            if self._usage_at_end:
                await stream.event({**self._chunk([]), "usage": self._usage.as_json()})
            await stream.done()
        except Exception as error:
            if not stream.is_started or isinstance(error, ClientDisconnected):
                raise
            log_unless_expected(error, scope)
            await stream.event(error_body(error))
        await stream.end()

    async def _open(self, stream: EventStream) -> None:
        await stream.start()
        top_level = self._shape.top_level()
        for choice in self._shape.opening(self._num_choices):
            await stream.event({**self._chunk([choice]), **top_level})
            top_level = {}

    def _index(self, request: int, delta: TextDelta) -> int:
        return request * self._num_choices_each + delta.choice

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        chunk: dict[str, Any] = {**self._head, "object": self._shape.chunk_object, "choices": choices}
        if self._usage_always:
            chunk["usage"] = self._usage.as_json()
        elif self._usage_at_end:
            chunk["usage"] = None
        return chunk
