"""One engine of this process as the back of the front doors: what the router has workers for."""

import asyncio
from collections.abc import AsyncGenerator

from baton.core.commands import (
    AbortRequest,
    AddRequest,
    EngineOutput,
    FailureReason,
    RequestFailure,
    ResetPrefixCache,
)
from baton.core.errors import BatonError, InvalidRequest, RequestFailed
from baton.core.request import EngineRequest, TokenEvent
from baton.engine.async_engine import AsyncEngine
from baton_router.backend import GenerationRequest, TokenDelta
from baton_router.requests.prompt_hashes import PromptHashes
from baton_router.requests.prompt_tokens import PromptTokens


class EngineBackend:
    """Implements `baton_router.backend.Backend`. Use it on the event loop that the engine was started on."""

    is_ready = True

    def __init__(self, engine: AsyncEngine, tokens_at_once: int = 1) -> None:
        """`tokens_at_once`: a request's tokens are passed on when so many have come, or it ends."""
        self._engine = engine
        self._tokens_at_once = tokens_at_once
        self._requests: dict[str, _Request] = {}
        self._end: BatonError | None = None

    @property
    def max_model_len(self) -> int:
        """See Backend."""
        return self._engine.max_model_len

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenDelta]:
        """See Backend."""
        hashes = PromptHashes(self._engine.fingerprint, request.cache_salt, request.token_ids)
        block_hashes = await hashes.of(self._engine.scheduler_config.block_size)
        if self._end is not None:
            raise self._end
        running = _Request(request, self._tokens_at_once)
        self._requests[request.request_id] = running
        self._engine.submit(
            AddRequest(
                EngineRequest(
                    request.request_id,
                    request.token_ids,
                    hashes.seed,
                    block_hashes,
                    request.sampling,
                    request.priority,
                )
            )
        )
        try:
            while running.num_open:
                for delta in await running.next_deltas():
                    yield delta
        finally:
            del self._requests[request.request_id]
            if running.num_open:
                self._engine.submit(AbortRequest(request.request_id))

    def end_all(self, error: BatonError) -> None:
        """See Backend."""
        self._end = error
        for running in self._requests.values():
            running.fail(error)

    def reset_prefix_cache(self) -> None:
        """See Backend."""
        self._engine.submit(ResetPrefixCache())

    def abort_choice(self, request_id: str, choice: int) -> None:
        """See Backend."""
        if (running := self._requests.get(request_id)) is not None:
            running.close(choice)
            self._engine.submit(AbortRequest(request_id, choice))

    def on_output(self, output: EngineOutput) -> None:
        """Everything that the engine did since the last call."""
        for prompt in output.prompts:
            if (running := self._requests.get(prompt.request_id)) is not None:
                running.prompt.add(prompt)
        for event in output.tokens:
            if (running := self._requests.get(event.request_id)) is not None:
                running.take(event)
        for failure in output.failures:
            if (running := self._requests.get(failure.request_id)) is not None:
                running.fail(_error(failure))


class _Request:
    """What has come of a request and has not been passed on."""

    def __init__(self, request: GenerationRequest, tokens_at_once: int) -> None:
        self.prompt = PromptTokens(request)
        self._open = set(range(request.sampling.n))
        self._tokens_at_once = tokens_at_once
        self._events: list[TokenEvent] = []
        self._error: BatonError | None = None
        self._news = asyncio.Event()

    @property
    def num_open(self) -> int:
        """Choices that have not ended."""
        return len(self._open)

    def take(self, event: TokenEvent) -> None:
        """A choice's next token."""
        self._events.append(event)
        if event.finish_reason is not None or len(self._events) >= self._tokens_at_once:
            self._news.set()

    def close(self, choice: int) -> None:
        """Nobody wants more of this choice."""
        self._open.discard(choice)

    def fail(self, error: BatonError) -> None:
        """The request has come to nothing."""
        self._error = error
        self._news.set()

    async def next_deltas(self) -> list[TokenDelta]:
        """Wait for tokens. Raises what the request failed of."""
        await self._news.wait()
        self._news.clear()
        if self._error is not None:
            self._open.clear()
            raise self._error
        events, self._events = self._events, []
        by_choice: dict[int, list[TokenEvent]] = {}
        for event in events:
            by_choice.setdefault(event.choice, []).append(event)
        return [self._delta(choice, found) for choice, found in by_choice.items()]

    def _delta(self, choice: int, events: list[TokenEvent]) -> TokenDelta:
        reason = events[-1].finish_reason
        if reason is not None:
            self._open.discard(choice)
        num_cached = sum(event.num_cached_prompt_tokens for event in events)
        tokens = tuple(event.token for event in events)
        return TokenDelta(choice, tokens, reason, num_cached, self.prompt.take(choice))


def _error(failure: RequestFailure) -> BatonError:
    return (InvalidRequest if failure.reason is FailureReason.INVALID else RequestFailed)(failure.message)
