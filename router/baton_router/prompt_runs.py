"""The prompts of one request, at the same time."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing

from baton.core.errors import first_error
from baton.core.stopping import FinishReason
from baton_router.backend import GenerationRequest
from baton_router.served_model import ServedModel
from baton_router.text_delta import TextDelta
from baton_router.text_stream import generate_text

_MAX_CONCURRENT_PROMPTS = 64  # of one request; the others wait for a place

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
