"""The scheduler under random requests, transfers, aborts and failures, on pools that are too small."""

from typing import TypeVar

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from baton.core.errors import InvalidRequest
from baton.core.prefix import block_hashes, chain_seed
from baton.core.request import EngineRequest
from baton.core.sampling import SamplingParams
from baton.core.scheduler_limits import SchedulerConfig
from baton.core.steps_under_way import MAX_STEPS_UNDER_WAY
from tests.core.engine_requests import PROMPT_VOCABULARY_SIZE, alone, prompts, sampling_params
from tests.core.scheduler_world import Role, SchedulerWorld, Tracked

T = TypeVar("T")

MAX_MODEL_LEN = 20
anything = st.integers(min_value=0, max_value=2**16)
salts = st.sampled_from(["", "", "", "salt"])
priorities = st.sampled_from([0, 0, 0, -1, 1])
Asked = tuple[tuple[int, ...], SamplingParams, int, int]


def several() -> st.SearchStrategy[list[Asked]]:
    """Some requests at once, so that the pool gets full: prompt, sampling and priority of each, and how many
    tokens an earlier attempt has answered."""
    one = st.tuples(prompts(MAX_MODEL_LEN), sampling_params(), priorities, st.just(0) | st.integers(0, 12))
    return st.lists(one, min_size=1, max_size=2)


class SchedulerMachine(RuleBasedStateMachine):
    """Rules pick among what is there by a number; SchedulerWorld does and checks the rest."""

    @initialize(
        block_size=st.integers(1, 5),
        max_model_len=st.integers(8, MAX_MODEL_LEN),
        max_num_seqs=st.integers(1, 6),
        max_num_batched_tokens=st.integers(1, 6) | st.integers(1, 24),
        spare_blocks=st.integers(0, 3) | st.integers(0, 12),
        depth=st.integers(1, MAX_STEPS_UNDER_WAY),
    )
    def start(
        self,
        block_size: int,
        max_model_len: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        spare_blocks: int,
        depth: int,
    ) -> None:
        config = SchedulerConfig(
            block_size, max_model_len, max_num_seqs, max_num_batched_tokens, PROMPT_VOCABULARY_SIZE
        )
        # The smallest pool holds one sequence of the greatest length, as the engine makes sure.
        self.world = SchedulerWorld(config, -(-max_model_len // block_size) + spare_blocks, depth)
        self.num_requests = 0

    # --- requests -----------------------------------------------------------------------------------

    @rule(asked=several(), salt=salts)
    def add(self, asked: list[Asked], salt: str) -> None:
        for one in asked:
            request = self.make_request(one, salt)
            if self.is_servable(request, request.sampling.n):
                self.world.add(request)
            else:
                with pytest.raises(InvalidRequest):
                    self.world.scheduler.add(request)

    @rule(asked=several(), first=anything)
    def add_hand_over(self, asked: list[Asked], first: int) -> None:
        for one in asked:
            request = self.make_request(one, "")
            if self.is_servable(request, 1):
                self.world.add(request, export_from=first % (len(request.block_hashes) + 1))
            else:
                with pytest.raises(InvalidRequest):
                    self.world.scheduler.add(request, hands_over=True, export_from=0)

    @rule(asked=several(), salt=salts)
    def reserve(self, asked: list[Asked], salt: str) -> None:
        for one in asked:
            request = self.make_request(one, salt)
            if self.is_servable(request, request.sampling.n):
                self.world.reserve(request)
            else:
                with pytest.raises(InvalidRequest):
                    self.world.scheduler.reserve(request)

    @precondition(lambda self: self.world.live)
    @rule(what=st.sampled_from(["abort", "choice", "choice", "fail", "fail submission"]), which=anything)
    def lose_something(self, what: str, which: int) -> None:
        """One rule for all of these, so that most requests live long enough to meet one another."""
        if what == "choice":
            if self.open_choices():
                self.world.abort_choice(*_pick(self.open_choices(), which))
        elif what == "fail":
            self.world.fail_steps(after_running=bool(which % 2))
        elif what == "fail submission":
            self.world.fail_submission(after_running=bool(which % 2))
        else:
            self.world.abort(_pick(sorted(self.world.live), which))

    # --- transfers ----------------------------------------------------------------------------------

    @precondition(lambda self: self.world.exports)
    @rule(which=anything)
    def release_export(self, which: int) -> None:
        self.world.release_export(which % len(self.world.exports))

    @precondition(lambda self: any(tracked.missing_blocks for tracked in self.granted()))
    @rule(which=anything, block=anything)
    def receive_block(self, which: int, block: int) -> None:
        tracked = _pick([tracked for tracked in self.granted() if tracked.missing_blocks], which)
        self.world.receive_block(tracked, _pick(sorted(tracked.missing_blocks), block))

    @precondition(lambda self: self.granted())
    @rule(which=anything)
    def finish_transfer(self, which: int) -> None:
        tracked = _pick(self.granted(), which)
        for index in sorted(tracked.missing_blocks):
            self.world.receive_block(tracked, index)
        self.world.commit(tracked)

    # --- steps --------------------------------------------------------------------------------------

    @rule()
    def take_a_step(self) -> None:
        self.world.step()

    @precondition(lambda self: self.world.under_way)
    @rule()
    def get_on_with_the_steps_under_way(self) -> None:
        self.world.compute()

    @rule()
    def reset_the_prefix_cache(self) -> None:
        self.world.scheduler.pool.forget_all()

    @rule(count=st.integers(1, 8))
    def run_engine_loop(self, count: int) -> None:
        for _ in range(count):
            self.world.admit_reservations()
            if not self.world.step():
                assert not self.world.admit_reservations(), "the loop would sleep on a free reservation"
                return
            self.world.check()

    @invariant()
    def holds(self) -> None:
        self.world.check()

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.drain()

    # --- what there is ------------------------------------------------------------------------------

    def granted(self) -> list[Tracked]:
        return [tracked for tracked in self.world.live.values() if tracked.reserved is not None]

    def open_choices(self) -> list[tuple[Tracked, int]]:
        """Choices that clients may want no more of."""
        return [
            (tracked, choice)
            for tracked in self.world.live.values()
            if tracked.is_computed_here and tracked.role is not Role.PREFILL
            for choice in sorted(tracked.open_choices)
        ]

    def is_servable(self, request: EngineRequest, num_slots: int) -> bool:
        config = self.world.config
        return request.num_tokens < config.max_model_len and num_slots <= config.max_num_seqs

    def make_request(self, asked: Asked, salt: str) -> EngineRequest:
        prompt, sampling, priority, num_answered = asked
        self.num_requests += 1
        config = self.world.config
        answered: tuple[int, ...] = ()
        if num_answered and sampling.n == 1 and len(prompt) < config.max_model_len:
            [(tokens, _)] = alone(prompt, sampling, config.max_model_len)
            answered = tokens[: min(num_answered, len(tokens) - 1)]
        seed = chain_seed(b"fake model", salt)
        hashes = tuple(block_hashes(seed, (*prompt, *answered), config.block_size))
        return EngineRequest(f"r{self.num_requests:03}", prompt, seed, hashes, sampling, priority, answered)


def _pick(things: list[T], which: int) -> T:
    return things[which % len(things)]


TestScheduler = SchedulerMachine.TestCase
