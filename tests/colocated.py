"""One engine without services: the production scheduler and runner, driven step by step."""

from collections import deque
from collections.abc import Iterator
from pathlib import Path

from baton.config import EngineConfig
from baton.core.block_pool import BlockPool
from baton.core.ports import SubmittedStep
from baton.core.prefix import block_hashes, chain_seed
from baton.core.request import EngineRequest, TokenEvent
from baton.core.sampling import SampledToken, SamplingParams
from baton.core.scheduler import ScheduledStep, Scheduler
from baton.core.scheduler_limits import SchedulerConfig
from baton.engine.factory import load_engine

GREEDY = SamplingParams(temperature=0.0, max_tokens=64)


class ColocatedEngine:
    """Prefill and decode in one place; the reference for what two servers must say."""

    def __init__(self, model_dir: Path, config: EngineConfig, *, num_blocks: int | None = None) -> None:
        """`num_blocks` makes the pool smaller than the memory that was asked for."""
        self.engine = load_engine(model_dir, config)
        self.pool = BlockPool(num_blocks or self.engine.page_store.num_blocks)
        self.scheduler = Scheduler(
            SchedulerConfig(
                block_size=config.block_size,
                max_model_len=self.engine.max_model_len,
                max_num_seqs=config.max_num_seqs,
                max_num_batched_tokens=config.max_num_batched_tokens,
                vocab_size=self.engine.vocab_size,
            ),
            self.pool,
        )
        self.block_size = config.block_size
        self.num_steps = 0
        self._num_requests = 0

    def generate(
        self, prompts: list[list[int]], params: SamplingParams = GREEDY
    ) -> list[list[list[SampledToken]]]:
        """The tokens of every choice of every prompt, all prompts at once."""
        return self.generate_each([(prompt, params) for prompt in prompts])

    def generate_each(
        self, requests: list[tuple[list[int], SamplingParams]]
    ) -> list[list[list[SampledToken]]]:
        """The tokens of every choice of every prompt and its settings, all at once."""
        ids = [self._add(prompt, params) for prompt, params in requests]
        answers: dict[tuple[str, int], list[SampledToken]] = {}
        for event in self._events():
            answers.setdefault((event.request_id, event.choice), []).append(event.token)
        self.pool.check_integrity()
        assert self.pool.num_free == self.pool.num_blocks, "pages leaked"
        return [
            [answers[request_id, choice] for choice in range(params.n)]
            for request_id, (_, params) in zip(ids, requests, strict=True)
        ]

    def _events(self) -> Iterator[TokenEvent]:
        """Of all steps until there are none, as many under way as the runner takes."""
        runner = self.engine.runner
        under_way: deque[tuple[ScheduledStep, SubmittedStep]] = deque()
        while True:
            while len(under_way) < runner.depth and (step := self.scheduler.schedule()) is not None:
                self.num_steps += 1
                under_way.append((step, runner.submit(step.plan)))
            if not under_way:
                return
            step, submitted = under_way.popleft()
            yield from self.scheduler.apply(step, submitted.collect()).tokens

    def token_ids(self, prompts: list[list[int]], params: SamplingParams = GREEDY) -> list[list[int]]:
        """The token ids of every prompt's first choice."""
        return [[token.token_id for token in choices[0]] for choices in self.generate(prompts, params)]

    def _add(self, prompt: list[int], params: SamplingParams) -> str:
        self._num_requests += 1
        seed = chain_seed(self.engine.fingerprint)
        request = EngineRequest(
            request_id=f"request-{self._num_requests}",
            prompt_token_ids=tuple(prompt),
            hash_seed=seed,
            block_hashes=tuple(block_hashes(seed, prompt, self.block_size)),
            sampling=params,
            grammar=self.engine.grammars.compile(params.grammar) if params.grammar else None,
        )
        self.scheduler.add(request)
        return request.request_id
