"""Tokens to text, for both front doors: detokenises, applies stop strings and counts, per choice."""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from baton.core.errors import RequestFailed
from baton.core.sampling import SampledToken
from baton.core.stopping import FinishReason
from baton_router.backend import GenerationRequest, TokenDelta
from baton_router.served_model import ServedModel
from baton_router.text.stop_strings import StopMatcher

_MAX_CONCURRENT_PROMPTS = 64  # of one request; the others wait for a place


@dataclass(frozen=True, slots=True)
class TextDelta:
    """The next piece of one choice. `text` may lag behind `tokens`: it never ends within a character or
    within what could become a stop string. The text of a token that ended the choice is left out."""

    choice: int
    text: str
    tokens: tuple[SampledToken, ...]
    finish_reason: FinishReason | None = None
    num_cached_prompt_tokens: int = 0
    prompt_logprobs: tuple[SampledToken, ...] = ()  # see TokenDelta


def joined(deltas: Sequence[TextDelta]) -> TextDelta:
    """All that has come of one choice, as one delta."""
    text = "".join(delta.text for delta in deltas)
    tokens = tuple(token for delta in deltas for token in delta.tokens)
    prompt = tuple(token for delta in deltas for token in delta.prompt_logprobs)
    return TextDelta(deltas[-1].choice, text, tokens, deltas[-1].finish_reason, prompt_logprobs=prompt)


class _ChoiceText:
    """The text of one choice so far.

    Special tokens that are no part of it count for stop strings that name them. A stop string may begin, but
    not end, within the first `min_tokens`.
    """

    def __init__(self, served: ServedModel, request: GenerationRequest) -> None:
        self._detokenizer = served.tokenizer.detokenizer(
            skip_special_tokens=request.text.skip_special_tokens, after=request.token_ids
        )
        self._hides_special_tokens = request.text.skip_special_tokens
        self._special_text = served.tokenizer.special_text
        self._stop_strings = request.text.stop_strings
        self._matcher = StopMatcher(self._stop_strings)
        self._min_tokens = request.sampling.min_tokens
        self._stop_token_ids = request.sampling.stop_token_ids
        self._num_tokens = 0
        self.is_finished = False
        self.last_delta_s: float | None = None

    def push(self, delta: TokenDelta) -> TextDelta:
        """The text of the choice's next tokens; tokens after a complete stop string are dropped."""
        pieces = []
        for index, token in enumerate(delta.tokens):
            self._num_tokens += 1
            is_last = delta.finish_reason is not None and index == len(delta.tokens) - 1
            if (
                is_last
                and delta.finish_reason is FinishReason.STOP
                and token.token_id in self._stop_token_ids
            ):
                pieces.append(self._read_unseen(token.token_id))
                break
            pieces.append(self._text_of(token.token_id))
            if self._matcher.is_matched:
                return self._ended(delta, "".join(pieces), delta.tokens[: index + 1], FinishReason.STOP)
        if delta.finish_reason is not None:
            pieces.append(self._rest())
            reason = FinishReason.STOP if self._matcher.is_matched else delta.finish_reason
            return self._ended(delta, "".join(pieces), delta.tokens, reason)
        return TextDelta(
            delta.choice,
            "".join(pieces),
            delta.tokens,
            num_cached_prompt_tokens=delta.num_cached_prompt_tokens,
            prompt_logprobs=delta.prompt_logprobs,
        )

    def _text_of(self, token_id: int) -> str:
        text = self._matcher.push(self._detokenizer.push(token_id), may_match=self._may_match)
        return text + self._read_unseen(token_id) if self._hides_special_tokens else text

    def _read_unseen(self, token_id: int) -> str:
        """What a token that is no part of the text makes certain of it: a stop string may name the token."""
        special = self._special_text(token_id)
        if special is None or not self._stop_strings.names(special):
            return ""
        return self._matcher.push(special, may_match=self._may_match, is_hidden=True)

    @property
    def _may_match(self) -> bool:
        return self._num_tokens > self._min_tokens

    def _rest(self) -> str:
        text = self._matcher.push(self._detokenizer.flush(), may_match=self._may_match)
        return text + self._matcher.flush()

    def _ended(
        self, delta: TokenDelta, text: str, tokens: tuple[SampledToken, ...], reason: FinishReason
    ) -> TextDelta:
        self.is_finished = True
        return TextDelta(
            delta.choice, text, tokens, reason, delta.num_cached_prompt_tokens, delta.prompt_logprobs
        )


async def generate_text(served: ServedModel, request: GenerationRequest) -> AsyncGenerator[TextDelta]:
    """Stream the text of every choice, interleaved; closing it aborts the request on the workers.

    Raises what Backend.generate raises, and RequestFailed if that ends before every choice has.
    """
    choices = [_ChoiceText(served, request) for _ in range(request.sampling.n)]
    num_running = len(choices)
    observer = _Observer(served, request)
    async with aclosing(served.backend.generate(request)) as deltas:
        async for delta in deltas:
            choice = choices[delta.choice]
            if choice.is_finished:
                continue
            text_delta = choice.push(delta)
            observer.observe(choice, text_delta)
            if choice.is_finished:
                num_running -= 1
                if delta.finish_reason is None:
                    served.backend.abort_choice(request.request_id, delta.choice)
            yield text_delta
            if not num_running:
                break
    if num_running:
        raise RequestFailed("The request's tokens ended before its text was complete.")
    observer.finished()


class _Observer:
    """Feeds the metrics of one request."""

    def __init__(self, served: ServedModel, request: GenerationRequest) -> None:
        self._metrics = served.metrics
        self._request = request
        self._is_first = True

    def observe(self, choice: _ChoiceText, delta: TextDelta) -> None:
        """Count one delta."""
        now = time.monotonic()
        if self._is_first:
            self._is_first = False
            self._metrics.time_to_first_token.observe(now - self._request.arrived_s)
            self._metrics.prompt_tokens.inc(len(self._request.token_ids))
        if delta.num_cached_prompt_tokens:
            self._metrics.cached_prompt_tokens.inc(delta.num_cached_prompt_tokens)
        self._metrics.generation_tokens.inc(len(delta.tokens))
        if choice.last_delta_s is not None and delta.tokens:
            self._metrics.inter_token_latency.observe((now - choice.last_delta_s) / len(delta.tokens))
        choice.last_delta_s = now

    def finished(self) -> None:
        """Time the whole request."""
        self._metrics.request_duration.observe(time.monotonic() - self._request.arrived_s)


Sink = Callable[[int, TextDelta], Awaitable[None]]
Run = Callable[[ServedModel, Sequence[GenerationRequest], Sink], Awaitable[None]]


async def run_prompts(served: ServedModel, requests: Sequence[GenerationRequest], sink: Sink) -> None:
    """Run requests at the same time and give their deltas to `sink(request's index, delta)`, one at a time.

    Returns when all are complete. The first error cancels the others and is raised, as is the sink's own.
    """
    if len(requests) == 1:
        async with aclosing(generate_text(served, requests[0])) as deltas:
            async for delta in deltas:
                await sink(0, delta)
        return
    places = asyncio.Semaphore(_MAX_CONCURRENT_PROMPTS)
    turn = asyncio.Lock()

    async def run(index: int, request: GenerationRequest) -> None:
        async with places, aclosing(generate_text(served, request)) as deltas:
            async for delta in deltas:
                async with turn:
                    await sink(index, delta)

    try:
        async with asyncio.TaskGroup() as group:
            for index, request in enumerate(requests):
                group.create_task(run(index, request))
    except BaseExceptionGroup as errors:
        raise first_error(errors) from None


async def answer_nothing(served: ServedModel, requests: Sequence[GenerationRequest], sink: Sink) -> None:
    """As `run_prompts`, for answers of no tokens: the workers are not asked."""
    for index, request in enumerate(requests):
        for choice in range(request.sampling.n):
            await sink(index, TextDelta(choice, "", (), FinishReason.LENGTH))


async def answer_prompts_alone(
    served: ServedModel, requests: Sequence[GenerationRequest], sink: Sink
) -> None:
    """As `run_prompts`, for requests of one token of which nobody wants more than their prompt."""

    async def without_the_token(index: int, delta: TextDelta) -> None:
        prompt = delta.prompt_logprobs
        await sink(index, TextDelta(delta.choice, "", (), FinishReason.LENGTH, prompt_logprobs=prompt))

    await run_prompts(served, requests, without_the_token)


def first_error(group: BaseExceptionGroup) -> BaseException:
    """The error that made a task group fail; the others only followed it."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
