"""The scheduler's order and arithmetic, case by case; test_scheduler_stateful.py has the random ones."""

from typing import Any

import pytest
from hypothesis import given

from baton.core.block_pool import BlockPool
from baton.core.errors import InvalidRequest
from baton.core.prefix import chain_seed
from baton.core.request import TokenEvent
from baton.core.sampling import SamplingParams, choice_seed
from baton.core.scheduler import Scheduler
from baton.core.scheduler_limits import SchedulerConfig
from baton.core.stopping import FinishReason, finish_reason
from tests.core.engine_requests import PROMPT_VOCABULARY_SIZE, alone, make_request, prompts, sampling_params
from tests.core.fake_runner import VOCABULARY_SIZE, FakeRunner, prefix_identity
from tests.core.scheduler_world import SchedulerWorld

BLOCK_SIZE = 4


class Engine:
    """A scheduler and its runner, without the checks of SchedulerWorld."""

    def __init__(
        self, *, num_blocks: int = 64, max_model_len: int = 60, max_num_seqs: int = 8, budget: int = 64
    ) -> None:
        config = SchedulerConfig(BLOCK_SIZE, max_model_len, max_num_seqs, budget, PROMPT_VOCABULARY_SIZE)
        self.pool = BlockPool(num_blocks)
        self.scheduler = Scheduler(config, self.pool)
        self.runner = FakeRunner(num_blocks, BLOCK_SIZE)
        self.rows: list[tuple[str, int, int]] = []  # request, start, tokens of the last step

    def add(
        self,
        request_id: str,
        prompt: tuple[int, ...],
        *,
        priority: int = 0,
        answered: tuple[int, ...] = (),
        **sampling: Any,
    ) -> None:
        request = make_request(
            request_id, prompt, BLOCK_SIZE, priority=priority, answered=answered, **sampling
        )
        self.scheduler.add(request)

    def step(self) -> list[TokenEvent]:
        step = self.scheduler.schedule()
        if step is None:
            self.rows = []
            return []
        self.rows = [
            (sequence.request.request_id, row.start, len(row.token_ids))
            for sequence, row in zip(step.sequences, step.plan.rows, strict=True)
        ]
        return self.scheduler.apply(step, self.runner.run(step.plan)).tokens


def tokens_of(length: int, first: int = 0) -> tuple[int, ...]:
    """A prompt of `length` tokens that shares no prefix with one of another `first`."""
    return tuple((first + i) % VOCABULARY_SIZE for i in range(length))


@given(prompts(20), sampling_params())
def test_a_request_alone_yields_what_a_plain_loop_yields(
    prompt: tuple[int, ...], sampling: SamplingParams
) -> None:
    """`alone` is the yardstick of the other tests; this one measures it without a scheduler."""
    for choice, outcome in enumerate(alone(prompt, sampling, max_model_len=24)):
        assert outcome == _plain_loop(prompt, sampling, choice, max_model_len=24)


def test_first_come_first_served() -> None:
    engine = Engine(max_num_seqs=2)
    for request_id in ("a", "b", "c", "d"):
        engine.add(request_id, tokens_of(3, ord(request_id)), max_tokens=2)
    engine.step()
    assert [row[0] for row in engine.rows] == ["a", "b"]
    engine.step()
    engine.step()
    assert [row[0] for row in engine.rows] == ["c", "d"]


def test_lower_priority_numbers_go_first() -> None:
    engine = Engine(max_num_seqs=2)
    for request_id, priority in (("late", 5), ("middle", 0), ("urgent", -3), ("middle too", 0)):
        engine.add(request_id, tokens_of(3), priority=priority, max_tokens=1)
    engine.step()
    assert [row[0] for row in engine.rows] == ["urgent", "middle"]
    engine.step()
    assert [row[0] for row in engine.rows] == ["middle too", "late"]


def test_nobody_overtakes_the_first_in_the_queue() -> None:
    engine = Engine(num_blocks=5, max_model_len=20)
    engine.add("running", tokens_of(7), max_tokens=3)
    engine.step()
    engine.add("long", tokens_of(15, 1), max_tokens=1)
    engine.add("short", tokens_of(2, 2), max_tokens=1)
    engine.step()
    assert [row[0] for row in engine.rows] == ["running"]


def test_decodes_go_before_prefills_under_a_tight_budget() -> None:
    engine = Engine(budget=4)
    engine.add("short", tokens_of(1, 1), max_tokens=9)
    engine.step()
    engine.add("long", tokens_of(30), priority=-1, max_tokens=4)
    for start in (0, 3, 6):
        engine.step()
        assert engine.rows == [("short", 1 + start // 3, 1), ("long", start, 3)]


def test_a_prompt_is_chunked_by_the_budget() -> None:
    engine = Engine(budget=4)
    engine.add("a", tokens_of(10), max_tokens=2)
    seen = []
    for _ in range(4):
        seen.append((bool(engine.step()), engine.rows))
    assert seen == [
        (False, [("a", 0, 4)]),
        (False, [("a", 4, 4)]),
        (True, [("a", 8, 2)]),
        (True, [("a", 10, 1)]),
    ]


def test_cached_prefixes_are_found_and_counted() -> None:
    engine = Engine()
    engine.add("first", tokens_of(11), max_tokens=1)
    assert engine.step()[0].num_cached_prompt_tokens == 0
    engine.add("second", (*tokens_of(11), 5), max_tokens=1)
    assert engine.step()[0].num_cached_prompt_tokens == 8
    assert engine.rows == [("second", 8, 4)]
    load = engine.scheduler.load()
    assert (load.prefix_cache_queries, load.prefix_cache_hits) == (11 + 12, 8)  # tokens


def test_a_wholly_cached_prompt_computes_its_last_block_again() -> None:
    engine = Engine()
    for request_id in ("first", "second"):
        engine.add(request_id, tokens_of(8), max_tokens=1)
        engine.step()
    assert engine.rows == [("second", 4, 4)]


def test_salts_keep_prefixes_apart() -> None:
    engine = Engine()
    engine.add("a", tokens_of(9), max_tokens=1, hash_seed=chain_seed(b"m", "one"))
    engine.step()
    engine.add("b", tokens_of(9), max_tokens=1, hash_seed=chain_seed(b"m", "two"))
    assert engine.step()[0].num_cached_prompt_tokens == 0


@pytest.mark.parametrize("budget", [1, 2, 7, 64])
@pytest.mark.parametrize("n", [1, 3])
def test_a_lone_request_makes_progress_in_the_smallest_pool(budget: int, n: int) -> None:
    engine = Engine(num_blocks=5, max_model_len=20, max_num_seqs=3, budget=budget)
    engine.add("a", tokens_of(6), max_tokens=14, n=n)
    num_finished = 0
    for _ in range(400):
        events = engine.step()
        num_finished += sum(event.finish_reason is not None for event in events)
        if not engine.rows:
            break
    assert num_finished == n
    assert engine.pool.num_free == 5


def test_the_last_to_come_is_preempted_and_comes_back() -> None:
    engine = Engine(num_blocks=4, max_model_len=16)
    engine.add("a", tokens_of(7), max_tokens=8)
    engine.add("b", tokens_of(7, 1), max_tokens=8)
    order: list[str] = []
    while (events := engine.step()) or engine.rows:
        order += [event.request_id for event in events if event.finish_reason]
    assert order == ["a", "b"]
    assert engine.scheduler.load().num_preemptions == 1


def test_a_prompt_under_way_can_preempt_a_decode_of_the_same_step() -> None:
    engine = Engine(num_blocks=5, max_model_len=20, budget=4)
    engine.add("late", tokens_of(6, 1), max_tokens=12)
    engine.step()
    engine.step()
    engine.add("urgent", tokens_of(19), priority=-1, max_tokens=1)
    while engine.scheduler.load().num_preemptions == 0:
        engine.step()
    assert [row[0] for row in engine.rows] == ["urgent"], "the decode lost its pages, and its row with them"


def test_aborts_give_back_pages_that_wait_for_a_copy() -> None:
    """At once, and not after the next step: there may be none."""
    engine = Engine()
    engine.add("a", tokens_of(6), max_tokens=9, n=3)
    engine.step()
    engine.scheduler.abort_choice("a", 1)
    assert engine.pool.num_free == engine.pool.num_blocks - 3
    engine.scheduler.abort("a")
    assert engine.pool.num_free == engine.pool.num_blocks


@pytest.mark.parametrize("dropped", [(0,), (1,), (0, 2), (2, 1)])
def test_choices_that_are_dropped_before_their_first_token_are_not_computed(dropped: tuple[int, ...]) -> None:
    engine, prompt = Engine(budget=4), tokens_of(6)
    engine.add("a", prompt, max_tokens=5, n=3, seed=2)
    engine.step()
    for choice in dropped:
        engine.scheduler.abort_choice("a", choice)
    outputs: dict[int, list[int]] = {}
    while events := engine.step():
        for event in events:
            outputs.setdefault(event.choice, []).append(event.token.token_id)
    request = make_request("a", prompt, BLOCK_SIZE, max_tokens=5, n=3, seed=2)
    oracle = alone(prompt, request.sampling, 60)
    assert outputs == {choice: list(oracle[choice][0]) for choice in range(3) if choice not in dropped}
    assert engine.pool.num_free == engine.pool.num_blocks


def test_a_prompt_whose_choices_are_all_dropped_is_forgotten() -> None:
    engine = Engine(budget=4)
    engine.add("a", tokens_of(6), max_tokens=5, n=2)
    engine.step()
    for choice in (1, 1, 7, 0):
        assert engine.pool.num_free < engine.pool.num_blocks
        engine.scheduler.abort_choice("a", choice)
    assert engine.pool.num_free == engine.pool.num_blocks
    assert engine.step() == []


def test_received_pages_can_be_found_as_soon_as_they_are_committed() -> None:
    scheduler = Engine().scheduler
    num_cached = []
    for request_id in ("first", "second", "third"):
        scheduler.reserve(make_request(request_id, tokens_of(9), BLOCK_SIZE))
        num_cached += [reserved.num_cached_blocks for reserved in scheduler.admit_reservations()]
        if request_id == "second":
            scheduler.commit("second", {0: 1})
    assert num_cached == [0, 0, 2], "neither before the commit nor only after the next step"


def test_requests_that_wait_for_pages_come_before_reservations() -> None:
    engine = Engine(num_blocks=5, max_model_len=20)
    engine.add("running", tokens_of(10), max_tokens=3)
    engine.step()
    engine.add("waiting", tokens_of(15, 1), max_tokens=1)
    engine.scheduler.reserve(make_request("reserved", tokens_of(2, 2), BLOCK_SIZE))
    assert engine.scheduler.admit_reservations() == []
    while engine.step() or engine.rows:
        pass
    assert [reserved.request_id for reserved in engine.scheduler.admit_reservations()] == ["reserved"]


def test_choices_share_the_prompts_full_pages() -> None:
    engine = Engine()
    engine.add("a", tokens_of(9), max_tokens=3, n=4)
    events = engine.step()
    assert [event.choice for event in events] == [0, 1, 2, 3]
    assert engine.rows == [("a", 0, 9)]
    # Two full pages for all, one partial page each.
    assert engine.pool.num_blocks - engine.pool.num_free == 2 + 4
    engine.step()
    assert sorted(engine.rows) == [("a", 9, 1)] * 4


def test_a_request_whose_first_token_ends_it_exports_nothing() -> None:
    config = SchedulerConfig(BLOCK_SIZE, 60, 8, 64, PROMPT_VOCABULARY_SIZE)
    scheduler, runner = Scheduler(config, BlockPool(8)), FakeRunner(8, BLOCK_SIZE)
    scheduler.add(make_request("a", tokens_of(9), BLOCK_SIZE, max_tokens=1), hands_over=True, export_from=0)
    step = scheduler.schedule()
    assert step is not None
    events = scheduler.apply(step, runner.run(step.plan))
    assert events.pages == []
    assert events.tokens[0].finish_reason is FinishReason.LENGTH
    assert scheduler.pool.num_free == 8


@pytest.mark.parametrize("num_answered", [1, 3, 6])
@pytest.mark.parametrize("choice", [0, 2])
def test_a_request_goes_on_after_what_was_answered(num_answered: int, choice: int) -> None:
    sampling = SamplingParams(n=3, max_tokens=7, seed=5)
    tokens, _ = alone(tokens_of(9), sampling, max_model_len=60)[choice]
    engine = Engine()
    engine.add("a", tokens_of(9), answered=tokens[:num_answered], max_tokens=7, seed=choice_seed(5, choice))
    events = []
    while new := engine.step():
        events += new
    assert [event.token.token_id for event in events] == list(tokens[num_answered:])
    assert [event.position for event in events] == list(range(num_answered, 7))
    assert [event.finish_reason for event in events] == [None] * (6 - num_answered) + [FinishReason.LENGTH]
    assert engine.pool.num_free == engine.pool.num_blocks


def test_tokens_that_were_answered_count_as_output() -> None:
    """For `min_tokens` and for penalties, and not as tokens of the prompt that were found in the cache."""
    engine = Engine()
    engine.add("before", tokens_of(9), max_tokens=1)
    engine.step()
    engine.add("a", tokens_of(9), answered=(7, 7, 8), max_tokens=5, min_tokens=4, presence_penalty=1.0)
    step = engine.scheduler.schedule()
    assert step is not None
    [[task]] = [row.samples for row in step.plan.rows]
    assert (list(task.prompt_token_ids), list(task.output_token_ids)) == (list(tokens_of(9)), [7, 7, 8])
    assert (task.num_output_tokens, task.position) == (3, 12)
    [event] = engine.scheduler.apply(step, engine.runner.run(step.plan)).tokens
    assert (event.position, event.num_cached_prompt_tokens) == (3, 0)


def test_decode_computes_nothing_again_of_what_was_answered() -> None:
    tokens, prompt = (1, 2, 3, 4), tokens_of(9)
    engine = Engine()
    engine.scheduler.reserve(make_request("a", prompt, BLOCK_SIZE, answered=tokens[:3], max_tokens=9))
    [reserved] = engine.scheduler.admit_reservations()
    for index in range(3):
        engine.runner.fill_block(reserved.block_table, index, (*prompt, *tokens[:3]))
    engine.scheduler.commit("a", {0: tokens[3]})
    [event] = engine.step()
    assert engine.rows == [("a", 12, 1)]
    assert event.position == 4


def test_what_was_answered_counts_towards_the_models_length() -> None:
    engine = Engine(max_model_len=12)
    for answered in ((1, 2, 3), (1, 2, 3, 4)):
        with pytest.raises(InvalidRequest, match=f"The prompt has {9 + len(answered)} tokens"):
            engine.add("long", tokens_of(9), answered=answered)
    engine.add("fits", tokens_of(9), answered=(1, 2))
    [event] = engine.step()
    assert event.finish_reason is FinishReason.LENGTH


def test_copies_of_a_failed_step_are_made_by_the_next() -> None:
    """The choices of `forked` have no row in the step that fails, but its plan has their copies."""
    world = SchedulerWorld(SchedulerConfig(BLOCK_SIZE, 20, 6, 3, PROMPT_VOCABULARY_SIZE), num_blocks=20)
    for request_id, priority in (("x", 0), ("y", 0), ("z", 0)):
        world.add(
            make_request(request_id, (5, ord(request_id) % 5), BLOCK_SIZE, priority=priority, max_tokens=12)
        )
    for _ in range(3):
        world.step()
    forked = make_request("forked", tokens_of(5), BLOCK_SIZE, priority=1, max_tokens=8, n=2)
    world.reserve(forked)
    world.admit_reservations()
    tracked = world.live["forked"]
    for index in sorted(tracked.missing_blocks):
        world.receive_block(tracked, index)
    world.commit(tracked)
    world.fail_steps(after_running=False)
    assert list(world.live) == ["forked"]
    world.drain()


def test_a_none_from_schedule_means_that_only_the_outside_can_help() -> None:
    """The engine's loop sleeps after a None: whoever waits must not have been able to run."""
    engine = Engine(num_blocks=4, max_model_len=16)
    engine.add("long", tokens_of(4), max_tokens=9)
    engine.scheduler.reserve(make_request("reserved", tokens_of(7, 1), BLOCK_SIZE))
    engine.step()
    assert len(engine.scheduler.admit_reservations()) == 1
    engine.step()
    assert engine.pool.num_free == 0
    engine.add("urgent", tokens_of(1, 2), priority=-1, max_tokens=1)
    finished = []
    while (events := engine.step()) or engine.rows:
        finished += [event.request_id for event in events if event.finish_reason]
    # "long" had to give way, which left "urgent" enough.
    assert finished == ["urgent"]
    assert engine.scheduler.load().num_preemptions == 1


@pytest.mark.parametrize(("length", "n", "param"), [(0, 1, "prompt"), (60, 1, "prompt"), (3, 9, "n")])
def test_what_can_never_run_is_refused(length: int, n: int, param: str) -> None:
    engine = Engine()
    request = make_request("a", tokens_of(length), BLOCK_SIZE, n=n)
    for ask in (engine.scheduler.add, engine.scheduler.reserve):
        with pytest.raises(InvalidRequest) as refused:
            ask(request)
        assert refused.value.param == param
    assert engine.scheduler.load().num_waiting == 0
    assert engine.scheduler.schedule() is None


def test_unknown_requests_are_ignored() -> None:
    engine = Engine()
    engine.add("a", tokens_of(3), max_tokens=2)
    engine.scheduler.abort("nobody")
    engine.scheduler.abort_choice("nobody", 0)
    engine.scheduler.commit("nobody", {0: 1})
    assert engine.scheduler.load().num_waiting == 1
    assert engine.scheduler.load().num_running == 0


def test_the_fake_runner_sees_a_page_of_another_request() -> None:
    """The checks of this folder are only as good as the runner's."""
    engine = Engine()
    engine.add("a", tokens_of(6), max_tokens=9)
    engine.add("b", tokens_of(6, 1), max_tokens=9)
    engine.step()
    step = engine.scheduler.schedule()
    assert step is not None
    first, second = step.sequences
    first.block_table[0], second.block_table[0] = second.block_table[0], first.block_table[0]
    with pytest.raises(AssertionError):
        engine.runner.run(step.plan)


def _plain_loop(
    prompt: tuple[int, ...], sampling: SamplingParams, choice: int, max_model_len: int
) -> tuple[tuple[int, ...], FinishReason]:
    seed, output = choice_seed(sampling.seed, choice), []
    while True:
        position = len(prompt) + len(output)
        token = hash((prefix_identity((*prompt, *output)), seed, position)) % VOCABULARY_SIZE
        while len(output) < sampling.min_tokens and token in sampling.stop_token_ids:
            token = (token + 1) % VOCABULARY_SIZE
        output.append(token)
        reason = finish_reason(sampling, token, len(output), position + 1, max_model_len)
        if reason is not None:
            return tuple(output), reason


def test_a_token_outside_the_vocabulary_is_refused_before_it_costs_a_step() -> None:
    world = SchedulerWorld(SchedulerConfig(BLOCK_SIZE, 60, 8, 64, vocab_size=4), num_blocks=20)
    with pytest.raises(InvalidRequest, match="above 3"):
        world.scheduler.add(make_request("wrong", (1, 4), BLOCK_SIZE))
    world.scheduler.add(make_request("right", (1, 3), BLOCK_SIZE))
