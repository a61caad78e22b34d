"""Drives an engine with hand-made plans: no scheduler, pages in random order."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from baton.core.plan import SampleTask, ScheduledRow, StepPlan
from baton.core.sampling import SampledToken, SamplingParams
from baton.engine.factory import Engine

GREEDY = SamplingParams(temperature=0.0)
GREEDY_LOGPROBS = SamplingParams(temperature=0.0, num_logprobs=3)


@dataclass
class Request:
    """A sequence that is being computed."""

    prompt: list[int]
    params: SamplingParams = GREEDY
    output: list[int] = field(default_factory=list)
    sampled: list[SampledToken] = field(default_factory=list)
    num_computed: int = 0
    block_table: list[int] = field(default_factory=list)

    @property
    def token_ids(self) -> list[int]:
        return self.prompt + self.output

    @property
    def num_remaining(self) -> int:
        return len(self.prompt) + len(self.output) - self.num_computed


class Driver:
    """Gives requests pages and computes some of their tokens a step."""

    def __init__(self, engine: Engine, seed: int = 0) -> None:
        self.engine = engine
        self.free = list(range(engine.page_store.num_blocks))
        random.Random(seed).shuffle(self.free)

    def step(self, work: Sequence[tuple[Request, int]]) -> None:
        """Compute that many tokens of each request; one whose last token is reached gets one more token."""
        rows = tuple(self._row(request, count) for request, count in work)
        result = self.engine.runner.submit(StepPlan(rows)).collect()
        for (request, count), tokens in zip(work, result.samples, strict=True):
            request.num_computed += count
            for token in tokens:
                request.output.append(token.token_id)
                request.sampled.append(token)

    def generate(self, requests: Sequence[Request], num_tokens: int, chunk: int | None = None) -> None:
        """Until every request has `num_tokens` of output; prompts in chunks, beside others' decode."""
        while unfinished := [request for request in requests if len(request.output) < num_tokens]:
            self.step([(r, min(r.num_remaining, chunk or r.num_remaining)) for r in unfinished])

    def _row(self, request: Request, count: int) -> ScheduledRow:
        start, end = request.num_computed, request.num_computed + count
        while len(request.block_table) * self.engine.page_store.layout.block_size < end:
            request.block_table.append(self.free.pop())
        samples: tuple[SampleTask, ...] = ()
        if end == len(request.token_ids):
            params = request.params
            samples = (SampleTask(params, params.seed, end, request.prompt, request.output),)
        return ScheduledRow(request.token_ids[start:end], start, request.block_table, samples)


def make_prompt(length: int, seed: int = 0, vocab_size: int = 160) -> list[int]:
    """Random token ids."""
    return random.Random(seed * 1000 + length).choices(range(vocab_size), k=length)
