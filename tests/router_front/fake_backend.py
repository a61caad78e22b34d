"""A backend without workers: every choice says the same tokens, in the order that the tests expect."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace

from baton.core.errors import BatonError
from baton.core.sampling import SampledToken, SamplingParams
from baton.core.stopping import finish_reason
from baton_router.backend import GenerationRequest, TokenDelta
from baton_router.chat_output.formats import REASONING_FORMATS, TOOL_FORMATS
from baton_router.served_model import ChatFormats, ServedModel

MODEL = "tiny"
NUM_CACHED = 2


class FakeBackend:
    """Replays `reply`; fails with `error` after `error_after` steps, or waits for `may_go_on` after
    `hang_after`."""

    def __init__(self, reply: Sequence[int]) -> None:
        self.reply = list(reply)
        self.max_model_len = 256
        self.is_ready = True
        self.error: Exception | None = None
        self.error_after = 0
        self.ended: BatonError | None = None
        self.hang_after: int | None = None
        self.ends_early = False
        self.tokens_per_delta = 1
        self.requests: list[GenerationRequest] = []
        self.aborted: list[tuple[str, int]] = []
        self.num_resets = 0
        self.num_running = 0
        self.most_running = 0
        self.is_hanging = asyncio.Event()
        self.may_go_on = asyncio.Event()
        self.is_closed = asyncio.Event()

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenDelta]:
        self.requests.append(request)
        self.num_running += 1
        self.most_running = max(self.most_running, self.num_running)
        try:
            async for delta in self._replay(request):
                yield delta
        finally:
            self.num_running -= 1
            if not self.num_running:
                self.is_closed.set()

    def end_all(self, error: BatonError) -> None:
        self.ended = error
        self.may_go_on.set()

    def abort_choice(self, request_id: str, choice: int) -> None:
        self.aborted.append((request_id, choice))

    def reset_prefix_cache(self) -> None:
        self.num_resets += 1

    async def _replay(self, request: GenerationRequest) -> AsyncGenerator[TokenDelta]:
        params = request.sampling
        is_done = [False] * params.n
        for step in range(0, 10**6, self.tokens_per_delta):
            await asyncio.sleep(0)  # lets other requests run, as a real backend does
            if self.error is not None and step >= self.error_after:
                raise self.error
            if self.hang_after is not None and step >= self.hang_after:
                self.is_hanging.set()
                await self.may_go_on.wait()
            if self.ended is not None:
                raise self.ended
            if all(is_done) or self.ends_early:
                return
            for choice in range(params.n):
                if not is_done[choice]:
                    delta = self._delta(request, choice, step)
                    is_done[choice] = delta.finish_reason is not None
                    yield delta

    def _delta(self, request: GenerationRequest, choice: int, step: int) -> TokenDelta:
        params, tokens, reason = request.sampling, [], None
        for position in range(step, step + self.tokens_per_delta):
            token_id = self.reply[position % len(self.reply)]
            tokens.append(_sampled(params, token_id))
            num_tokens = len(request.token_ids) + position + 1
            reason = finish_reason(params, token_id, position + 1, num_tokens, self.max_model_len)
            if reason is not None:
                break
        num_cached = NUM_CACHED if choice == 0 and step == 0 else 0
        prompt = _prompt(request) if step == 0 else ()
        return TokenDelta(choice, tuple(tokens), reason, num_cached, prompt)


def _prompt(request: GenerationRequest) -> tuple[SampledToken, ...]:
    """All but the first token, each less likely than the one before, and the likeliest in its place."""
    count = request.sampling.num_prompt_logprobs
    if count is None:
        return ()
    return tuple(
        SampledToken(
            token_id, -1.0 - place, tuple((token_id + 1 + rank, -0.25 - rank) for rank in range(count))
        )
        for place, token_id in enumerate(request.token_ids[1:])
    )


def _sampled(params: SamplingParams, token_id: int) -> SampledToken:
    if params.num_logprobs is None:
        return SampledToken(token_id)
    top = tuple((token_id + rank, -0.5 - rank) for rank in range(params.num_logprobs))
    return SampledToken(token_id, -0.5, top)


def says(served: ServedModel, backend: FakeBackend, text: str) -> None:
    """Answers are this text from now on, and the model's own end."""
    backend.reply = [*served.tokenizer.encode_now(text, add_special_tokens=False), *served.eos_token_ids]


def like_qwen3(served: ServedModel) -> ServedModel:
    """The model, if it thought and called tools as Qwen3 does."""
    return replace(served, chat=ChatFormats(TOOL_FORMATS["hermes"], REASONING_FORMATS["qwen3"]))
