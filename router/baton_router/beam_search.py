"""Beam search over the workers: each step asks them for one token of every beam.

A step's prompts are the beams so far, which the workers' prefix caches have but for the last block.
"""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace

from baton.core.errors import RequestFailed, first_error
from baton.core.stopping import FinishReason
from baton_router.answer_choice import as_asked
from baton_router.backend import Backend, GenerationRequest, TokenDelta
from baton_router.beams import Beam, Beams
from baton_router.request_ids import unique_id


async def search_beams(backend: Backend, request: GenerationRequest) -> AsyncGenerator[TokenDelta]:
    """The best beams of a request, the best first, each as one delta when the search is over.

    Raises what `Backend.generate` raises; closing it aborts what the workers compute.
    """
    assert request.beams is not None
    sampling = request.sampling
    beams = Beams(
        request.beams,
        end_token_ids=frozenset(sampling.stop_token_ids),
        max_tokens=sampling.max_tokens,
        num_logprobs=sampling.num_logprobs or 0,
    )
    step = replace(
        request,
        beams=None,
        sampling=replace(
            sampling,
            n=1,
            temperature=0.0,
            max_tokens=1,
            stop_token_ids=(),
            num_logprobs=beams.num_candidates,
        ),
    )
    [first] = await _next_tokens(backend, step, beams.running)
    step = replace(step, sampling=replace(step.sampling, num_prompt_logprobs=None))
    deltas = [first]
    while True:
        beams.advance([delta.tokens[0].top_logprobs for delta in deltas])
        if not beams.running:
            break
        deltas = await _next_tokens(backend, step, beams.running)
    for choice, beam in enumerate(beams.best(sampling.n)):
        yield TokenDelta(
            choice,
            as_asked(beam.tokens, sampling),
            FinishReason.STOP if beam.is_ended else FinishReason.LENGTH,
            num_cached_prompt_tokens=0 if choice else first.num_cached_prompt_tokens,
            prompt_logprobs=() if choice else first.prompt_logprobs,
        )


async def _next_tokens(backend: Backend, step: GenerationRequest, running: list[Beam]) -> list[TokenDelta]:
    """One token of each beam, all at the same time."""

    async def one(index: int, beam: Beam) -> TokenDelta:
        request = replace(
            step,
            request_id=unique_id(step.answer_id, index),
            token_ids=(*step.token_ids, *beam.token_ids),
        )
        async with aclosing(backend.generate(request)) as deltas:
            async for delta in deltas:
                return delta
        raise RequestFailed("A beam's request ended before its token came.")

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(index, beam)) for index, beam in enumerate(running)]
    except BaseExceptionGroup as errors:
        raise first_error(errors) from None
    return [task.result() for task in tasks]
