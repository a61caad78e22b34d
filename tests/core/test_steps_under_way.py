"""Planning while a step is under way, case by case; test_scheduler_stateful.py has the random ones."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.core.block_pool import BlockPool
from baton.core.request import TokenEvent
from baton.core.sampling import SamplingParams
from baton.core.scheduler import ScheduledStep, Scheduler
from baton.core.scheduler_limits import SchedulerConfig
from tests.core.engine_requests import PROMPT_VOCABULARY_SIZE, alone, make_request, prompts, sampling_params
from tests.core.fake_runner import FakeRunner, FakeStep

BLOCK_SIZE = 4
MAX_MODEL_LEN = 60
PROMPT = (1, 2, 3, 4, 5)

Row = tuple[str, int, bool]  # request, start, whether it follows


class Pipeline:
    """A scheduler and a runner of depth 2, step by step; rows are computed as late as can be."""

    def __init__(self, *, num_blocks: int = 64, max_num_seqs: int = 8, budget: int = 64) -> None:
        config = SchedulerConfig(BLOCK_SIZE, MAX_MODEL_LEN, max_num_seqs, budget, PROMPT_VOCABULARY_SIZE)
        self.pool = BlockPool(num_blocks)
        self.scheduler = Scheduler(config, self.pool)
        self.runner = FakeRunner(num_blocks, BLOCK_SIZE, depth=2)
        self.under_way: list[tuple[ScheduledStep, FakeStep]] = []
        self.tokens: dict[tuple[str, int], list[int]] = {}

    def add(self, request_id: str, prompt: tuple[int, ...] = PROMPT, **sampling: Any) -> None:
        self.scheduler.add(make_request(request_id, prompt, BLOCK_SIZE, **sampling))

    def submit(self) -> list[Row] | None:
        """The next step's rows, None where there is no step."""
        step = self.scheduler.schedule()
        if step is None:
            return None
        self.under_way.append((step, self.runner.submit(step.plan)))
        return [
            (sequence.request.request_id, row.start, row.follows is not None)
            for sequence, row in zip(step.sequences, step.plan.rows, strict=True)
        ]

    def collect(self) -> list[TokenEvent]:
        step, submitted = self.under_way.pop(0)
        events = self.scheduler.apply(step, submitted.collect()).tokens
        for event in events:
            self.tokens.setdefault((event.request_id, event.choice), []).append(event.token.token_id)
        return events

    def finish(self) -> None:
        """As the engine's loop does it."""
        while True:
            while len(self.under_way) < 2 and self.submit() is not None:
                pass
            if not self.under_way:
                break
            self.collect()
        assert self.pool.num_free == self.pool.num_blocks


def sampled_alone(**sampling: Any) -> list[int]:
    [(tokens, _)] = alone(PROMPT, SamplingParams(**sampling), MAX_MODEL_LEN)
    return list(tokens)


def test_a_row_follows_the_one_that_samples_its_token() -> None:
    engine = Pipeline()
    engine.add("a", max_tokens=4)
    assert engine.submit() == [("a", 0, False)]
    assert engine.submit() == [("a", 5, True)]
    engine.collect()
    assert engine.submit() == [("a", 6, True)]
    engine.finish()
    assert engine.tokens["a", 0] == sampled_alone(max_tokens=4)


def test_the_length_of_an_output_is_known_ahead() -> None:
    """The row that would sample a token too many is not planned."""
    engine = Pipeline()
    engine.add("a", max_tokens=2)
    engine.submit()
    engine.submit()
    assert engine.submit() is None
    engine.collect()
    assert engine.submit() is None
    assert [event.finish_reason is not None for event in engine.collect()] == [True]
    assert engine.pool.num_free == engine.pool.num_blocks


def test_a_row_after_a_stop_token_was_computed_in_vain() -> None:
    """Its token is dropped, and its pages come back when it has been collected and not sooner."""
    stop = sampled_alone(max_tokens=9)[1]
    engine = Pipeline()
    engine.add("a", max_tokens=9, stop_token_ids=(stop,))
    engine.submit()
    engine.submit()
    engine.collect()
    assert engine.submit() == [("a", 6, True)]
    [last] = engine.collect()
    assert last.finish_reason is not None
    assert engine.scheduler.load().num_running == 0
    assert engine.pool.num_blocks - engine.pool.num_free == 2, "the step under way writes them"
    assert engine.collect() == []
    assert engine.pool.num_free == engine.pool.num_blocks


def test_pages_of_an_aborted_request_wait_for_the_step_under_way() -> None:
    engine = Pipeline(num_blocks=15)
    engine.add("a", max_tokens=9)
    engine.submit()
    engine.scheduler.abort("a")
    engine.add("b", tuple(range(55)), max_tokens=1)  # needs 14 pages: two of them are still written
    assert engine.submit() is None
    assert engine.collect() == []
    assert engine.submit() == [("b", 0, False)]
    engine.finish()


def test_nobody_is_preempted_while_a_step_is_under_way() -> None:
    engine = Pipeline(num_blocks=15)
    engine.add("a", (1,) * 5, max_tokens=50)
    engine.add("b", (2,) * 5, max_tokens=50)
    while engine.submit() is not None:
        if len(engine.under_way) == 2:
            engine.collect()
    assert engine.under_way, "it waits for this one"
    assert engine.scheduler.num_preemptions == 0
    while engine.under_way:
        engine.collect()
    assert engine.submit() is not None
    assert engine.scheduler.num_preemptions == 1
    engine.finish()


@pytest.mark.parametrize(
    "sampling",
    [{"presence_penalty": 1.0}, {"frequency_penalty": 0.5}, {"repetition_penalty": 1.2}, {"n": 2}],
)
def test_what_needs_the_token_on_the_host_waits_for_it(sampling: dict[str, Any]) -> None:
    engine = Pipeline()
    engine.add("waits", max_tokens=5, **sampling)
    engine.add("other", (9, 9, 9), max_tokens=5)
    assert engine.submit() == [("waits", 0, False), ("other", 0, False)]
    assert engine.submit() == [("other", 3, True)]
    engine.collect()
    rows = engine.submit()
    assert rows is not None
    assert ("waits", 5, False) in rows
    engine.finish()
    outcomes = alone(PROMPT, SamplingParams(max_tokens=5, **sampling), MAX_MODEL_LEN)
    for choice, (tokens, _) in enumerate(outcomes):
        assert engine.tokens["waits", choice] == list(tokens)


def test_a_row_may_follow_the_first_after_what_was_answered() -> None:
    tokens = sampled_alone(max_tokens=5)
    engine = Pipeline()
    engine.scheduler.add(make_request("a", PROMPT, BLOCK_SIZE, answered=tuple(tokens[:2]), max_tokens=5))
    assert engine.submit() == [("a", 0, False)]
    assert engine.submit() == [("a", 7, True)]
    engine.finish()
    assert engine.tokens["a", 0] == tokens[2:]


def test_a_choice_can_be_dropped_while_its_first_token_is_sampled() -> None:
    engine = Pipeline()
    engine.add("a", max_tokens=5, n=3)
    engine.submit()
    engine.scheduler.abort_choice("a", 1)
    assert [event.choice for event in engine.collect()] == [0, 2]
    engine.finish()
    outcomes = alone(PROMPT, SamplingParams(max_tokens=5, n=3), MAX_MODEL_LEN)
    assert engine.tokens == {("a", choice): list(outcomes[choice][0]) for choice in (0, 2)}


def test_chunks_of_a_prompt_follow_one_another_without_waiting() -> None:
    engine = Pipeline(budget=32)
    engine.add("long", tuple(range(58)), max_tokens=1)
    assert engine.submit() == [("long", 0, False)]
    assert engine.submit() == [("long", 32, False)]
    engine.finish()


def test_a_failed_step_takes_no_request_that_had_ended() -> None:
    stop = sampled_alone(max_tokens=9)[0]
    engine = Pipeline()
    engine.add("ended", max_tokens=9, stop_token_ids=(stop,))
    engine.add("other", (9, 9, 9), max_tokens=9)
    engine.submit()
    engine.submit()
    engine.collect()
    [(step, _)] = engine.under_way
    assert [sequence.request.request_id for sequence in step.sequences] == ["ended", "other"]
    assert engine.scheduler.fail(step) == ["other"]
    assert engine.pool.num_free == engine.pool.num_blocks


@given(
    st.lists(st.tuples(prompts(20), sampling_params()), min_size=1, max_size=6),
    st.integers(6, 40),
    st.integers(3, 6),
)
def test_the_tokens_are_those_of_steps_one_at_a_time(
    asked: list[tuple[tuple[int, ...], SamplingParams]], num_blocks: int, max_num_seqs: int
) -> None:
    engine = Pipeline(num_blocks=max(num_blocks, MAX_MODEL_LEN // BLOCK_SIZE), max_num_seqs=max_num_seqs)
    for index, (prompt, sampling) in enumerate(asked):
        request = make_request(f"r{index}", prompt, BLOCK_SIZE)
        engine.scheduler.add(replace(request, sampling=sampling))
    engine.finish()
    for index, (prompt, sampling) in enumerate(asked):
        for choice, (tokens, _) in enumerate(alone(prompt, sampling, MAX_MODEL_LEN)):
            assert engine.tokens[f"r{index}", choice] == list(tokens)
