"""The engine's thread over a runner without tensors, with steps one at a time and with one ahead."""

import queue
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest

from baton.core.block_pool import BlockPool
from baton.core.commands import AbortRequest, AddRequest, EngineOutput, ReleasePages, ReserveBlocks
from baton.core.plan import StepPlan, StepResult
from baton.core.ports import LayersDone
from baton.core.sampling import SamplingParams
from baton.core.scheduler import Scheduler
from baton.core.scheduler_limits import SchedulerConfig
from baton.engine.loop import EngineLoop
from tests.core.engine_requests import PROMPT_VOCABULARY_SIZE, alone, make_request
from tests.core.fake_runner import FakeRunner, FakeStep

BLOCK_SIZE = 4
MAX_MODEL_LEN = 60
NUM_BLOCKS = 40
TIMEOUT_S = 20.0
PROMPTS = {"a": (1, 2, 3), "b": (4, 4, 4, 4, 4, 1), "c": (0, 5)}


class RecordedStep:
    def __init__(self, runner: "RecordedRunner", index: int, step: FakeStep) -> None:
        self._runner = runner
        self._index = index
        self._step = step

    def collect(self) -> StepResult:
        self._runner.calls.append(("collect", self._index))
        if self._index == self._runner.fails_to_collect:
            raise RuntimeError("no result")
        return self._step.collect()


class RecordedRunner:
    """A fake runner that can fail, and remembers what it was asked for; it tells of layers 1 and 2 of 3."""

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self.calls: list[tuple[str, int]] = []
        self.plans: list[StepPlan] = []
        self.fails_to_submit: int | None = None
        self.fails_to_collect: int | None = None
        self._runner = FakeRunner(NUM_BLOCKS, BLOCK_SIZE, depth)

    def submit(self, plan: StepPlan, layers_done: LayersDone | None = None) -> RecordedStep:
        index = len(self.plans)
        self.calls.append(("submit", index))
        self.plans.append(plan)
        if index == self.fails_to_submit:
            raise RuntimeError("not taken")
        if layers_done is not None:
            for end_layer in (1, 2):
                layers_done(end_layer)
        return RecordedStep(self, index, self._runner.submit(plan))

    def idle(self) -> None:
        self.calls.append(("idle", len(self.plans)))


class NumberedMark:
    """Implements `baton.core.page_ports.Mark`."""

    def __init__(self, number: int) -> None:
        self.number = number

    def wait(self) -> None:
        """See Mark."""


class Running:
    """A loop, and what it emits until all requests have ended."""

    def __init__(self, depth: int, max_num_batched_tokens: int) -> None:
        self.runner = RecordedRunner(depth)
        self.pool = BlockPool(NUM_BLOCKS)
        config = SchedulerConfig(BLOCK_SIZE, MAX_MODEL_LEN, 8, max_num_batched_tokens, PROMPT_VOCABULARY_SIZE)
        self.outputs: queue.SimpleQueue[EngineOutput | Exception] = queue.SimpleQueue()
        scheduler = Scheduler(config, self.pool)
        self.loop = EngineLoop(scheduler, self.runner, self._emit, self.outputs.put, self._mark)
        self.tokens: dict[str, list[int]] = {name: [] for name in PROMPTS}
        self.ended: dict[str, str] = {}
        self.emitted: list[EngineOutput] = []
        self.num_marks = 0

    def _emit(self, output: EngineOutput) -> None:
        self.runner.calls += [("reserved", len(reserved.block_table)) for reserved in output.reserved]
        self.outputs.put(output)

    def _mark(self) -> NumberedMark:
        self.runner.calls.append(("mark", self.num_marks))
        self.num_marks += 1
        return NumberedMark(self.num_marks - 1)

    def add(self, request_id: str, **sampling: Any) -> None:
        request = make_request(request_id, PROMPTS[request_id], BLOCK_SIZE, **sampling)
        self.loop.submit(AddRequest(request))

    def take_until(self, is_enough: Callable[[], bool]) -> None:
        while not is_enough():
            output = self.outputs.get(timeout=TIMEOUT_S)
            if isinstance(output, Exception):
                raise output
            self.emitted.append(output)
            for event in output.tokens:
                self.tokens[event.request_id].append(event.token.token_id)
                if event.finish_reason is not None:
                    self.ended[event.request_id] = event.finish_reason.value
            for failure in output.failures:
                self.ended[failure.request_id] = failure.message

    def is_empty(self) -> bool:
        """As the last output says."""
        load = self.emitted[-1].load
        return load.num_free_blocks == load.num_blocks and load.num_running == 0


@contextmanager
def running(depth: int, max_num_batched_tokens: int = 64) -> Iterator[Running]:
    engine = Running(depth, max_num_batched_tokens)
    yield engine
    assert engine.loop.stop(TIMEOUT_S)
    engine.pool.check_integrity()


def tokens_alone(request_id: str, **sampling: Any) -> list[int]:
    params = SamplingParams(**sampling)
    [(tokens, _)] = alone(PROMPTS[request_id], params, MAX_MODEL_LEN)
    return list(tokens)


@pytest.mark.parametrize("depth", [1, 2])
def test_everybody_gets_the_tokens_of_a_run_alone(depth: int) -> None:
    sampling: dict[str, dict[str, object]] = {
        "a": {"max_tokens": 30},
        "b": {"max_tokens": 40, "stop_token_ids": (tokens_alone("b", max_tokens=20)[17],)},
        "c": {"max_tokens": 25, "presence_penalty": 1.0},
    }
    with running(depth) as engine:
        for request_id, params in sampling.items():
            engine.add(request_id, **params)
        engine.loop.start()
        engine.take_until(lambda: len(engine.ended) == 3)
        # The last step may have computed in vain: its pages come back when it is collected.
        engine.take_until(engine.is_empty)
    assert engine.tokens == {name: tokens_alone(name, **params) for name, params in sampling.items()}


@pytest.mark.parametrize(
    ("depth", "calls"),
    [
        (1, ["submit 0", "collect 0", "submit 1", "collect 1", "submit 2", "collect 2", "idle 3"]),
        (2, ["submit 0", "submit 1", "collect 0", "submit 2", "collect 1", "collect 2", "idle 3"]),
    ],
)
def test_the_next_step_is_submitted_before_the_one_under_way_is_collected(
    depth: int, calls: list[str]
) -> None:
    with running(depth) as engine:
        engine.add("a", max_tokens=3)
        engine.loop.start()
        engine.take_until(lambda: len(engine.ended) == 1)
    assert [f"{what} {index}" for what, index in engine.runner.calls] == calls
    times = [output.times for output in engine.emitted if output.times is not None]
    assert len(times) == 3
    for one, other in pairwise(times):
        assert one.started_ns <= one.ended_ns <= other.started_ns, "steps run one after the other"


@pytest.mark.parametrize("depth", [1, 2])
def test_a_step_without_a_result_costs_the_requests_that_wait_for_it(
    depth: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Those of the step after it as well, which goes on from it; a request that comes later is served."""
    with running(depth) as engine:
        engine.runner.fails_to_collect = 3
        engine.add("a", max_tokens=30)
        engine.add("b", max_tokens=30)
        engine.loop.start()
        engine.take_until(lambda: len(engine.ended) == 2)
        engine.add("c", max_tokens=5)
        engine.take_until(lambda: len(engine.ended) == 3)
        engine.take_until(engine.is_empty)
    assert engine.ended["a"] == engine.ended["b"]
    assert "RuntimeError: no result" in engine.ended["a"]
    assert "a step of 2 rows failed, and with it a, b" in caplog.text
    assert engine.tokens["a"] == tokens_alone("a", max_tokens=30)[:3]
    assert engine.tokens["c"] == tokens_alone("c", max_tokens=5)


@pytest.mark.parametrize("depth", [1, 2])
def test_a_step_that_is_not_taken_costs_its_own_requests(depth: int) -> None:
    """What the step before it computed still comes out."""
    with running(depth) as engine:
        engine.runner.fails_to_submit = 3
        engine.add("a", max_tokens=30)
        engine.loop.start()
        engine.take_until(lambda: len(engine.ended) == 1)
        engine.add("c", max_tokens=5)
        engine.take_until(lambda: len(engine.ended) == 2)
        engine.take_until(engine.is_empty)
    assert "RuntimeError: not taken" in engine.ended["a"]
    assert engine.tokens["a"] == tokens_alone("a", max_tokens=30)[:3]
    assert engine.tokens["c"] == tokens_alone("c", max_tokens=5)


@pytest.mark.parametrize("depth", [1, 2])
def test_an_aborted_request_leaves_nothing(depth: int) -> None:
    with running(depth) as engine:
        engine.add("a", max_tokens=50)
        engine.add("b", max_tokens=20)
        engine.loop.start()
        engine.take_until(lambda: len(engine.tokens["a"]) > 2)
        engine.loop.submit(AbortRequest("a"))
        engine.take_until(lambda: len(engine.ended) == 1)
        engine.take_until(engine.is_empty)
    assert engine.tokens["b"] == tokens_alone("b", max_tokens=20)
    expected = tokens_alone("a", max_tokens=50)
    assert engine.tokens["a"] == expected[: len(engine.tokens["a"])]


@pytest.mark.parametrize(
    ("depth", "calls"),
    [
        (1, ["submit 0", "collect 0", "submit 1", "mark 0", "mark 1", "collect 1"]),
        (2, ["submit 0", "submit 1", "mark 0", "mark 1", "collect 0", "collect 1"]),
    ],
)
def test_a_steps_pages_are_told_of_before_layers_of_the_next_one(depth: int, calls: list[str]) -> None:
    """Whose marks are made when they are queued all the same, so that none lies behind a later step."""
    prompt = tuple(index % PROMPT_VOCABULARY_SIZE for index in range(14))
    with running(depth, max_num_batched_tokens=8) as engine:
        request = make_request("a", prompt, BLOCK_SIZE, max_tokens=9)
        engine.loop.submit(AddRequest(request, hands_over=True, export_from=0))
        engine.loop.start()
        engine.take_until(lambda: any(pages.is_last for output in engine.emitted for pages in output.pages))
        told = [(output, pages) for output in engine.emitted for pages in output.pages]
        for _, pages in told:
            engine.loop.submit(ReleasePages(pages.blocks))
        engine.take_until(engine.is_empty)
    assert [f"{what} {index}" for what, index in engine.runner.calls][: len(calls)] == calls
    assert [
        (pages.first_block, len(pages.blocks), pages.first_layer, pages.end_layer, output.is_within_step)
        for output, pages in told
    ] == [(0, 2, 0, None, False), (2, 2, 0, 1, True), (2, 2, 1, 2, True), (2, 2, 2, None, False)]
    marks = [output.mark for output, _ in told]
    assert [mark and mark.number for mark in marks] == [None, 0, 1, None]  # type: ignore[attr-defined]


def test_pages_of_a_step_in_vain_are_reserved_when_it_has_ended() -> None:
    """A transfer writes beside the device's steps: it must not have pages that one may still write."""
    stop = tokens_alone("a", max_tokens=20)[5]
    tokens = tokens_alone("a", max_tokens=20, stop_token_ids=(stop,))
    in_vain = len(tokens)
    lengths = {"x": 59, "y": 59, "z": 39}  # of prompts; 40 pages in all
    with running(depth=2) as engine:
        engine.add("a", max_tokens=20, stop_token_ids=(stop,))
        for name, length in lengths.items():
            engine.loop.submit(ReserveBlocks(make_request(name, tuple(range(length)), BLOCK_SIZE)))
        engine.loop.start()
        engine.take_until(lambda: sum(len(output.reserved) for output in engine.emitted) == len(lengths))
        for name in lengths:
            engine.loop.submit(AbortRequest(name))
        engine.take_until(engine.is_empty)
    calls = [f"{what} {index}" for what, index in engine.runner.calls]
    assert engine.tokens["a"] == tokens
    assert calls.index(f"submit {in_vain}") < calls.index(f"collect {in_vain - 1}")
    assert calls.index(f"collect {in_vain}") < calls.index("reserved 10")
