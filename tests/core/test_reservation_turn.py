"""Reservations and prompts on a worker of both roles: one order for pages and places."""

import pytest

from baton.core.block_pool import BlockPool
from baton.core.scheduler import Scheduler
from baton.core.scheduler_limits import SchedulerConfig
from tests.core.engine_requests import PROMPT_VOCABULARY_SIZE, make_request
from tests.core.fake_runner import FakeRunner

BLOCK_SIZE = 4


class BusyWorker:
    """As soon as one of its four prompts has its answer, the next one comes."""

    def __init__(self, num_blocks: int, num_prompt_tokens: int, max_tokens: int) -> None:
        config = SchedulerConfig(4, 60, 32, 16, PROMPT_VOCABULARY_SIZE)
        self.scheduler = Scheduler(config, BlockPool(num_blocks))
        self.runner = FakeRunner(num_blocks, BLOCK_SIZE)
        self._num_prompt_tokens = num_prompt_tokens
        self._max_tokens = max_tokens
        self._num_added = 0
        for _ in range(4):
            self.add_prompt()

    def add_prompt(self) -> None:
        self._num_added += 1
        prompt = tuple(self._num_added * (7 + index) % 5 for index in range(self._num_prompt_tokens))
        request = make_request(f"prompt-{self._num_added}", prompt, BLOCK_SIZE, max_tokens=self._max_tokens)
        self.scheduler.add(request)

    def step(self) -> None:
        step = self.scheduler.schedule()
        assert step is not None
        for event in self.scheduler.apply(step, self.runner.run(step.plan)).tokens:
            if event.finish_reason is not None:
                self.add_prompt()

    def steps_until_granted(self, at_most: int) -> int:
        for num_steps in range(at_most):
            if self.scheduler.admit_reservations():
                return num_steps
            self.step()
        pytest.fail(f"no grant in {at_most} steps")


def test_prompts_that_came_later_do_not_keep_a_reservation_waiting() -> None:
    """There are places and pages to spare."""
    worker = BusyWorker(num_blocks=500, num_prompt_tokens=40, max_tokens=2)
    worker.scheduler.reserve(make_request("reserved", (1,) * 20, BLOCK_SIZE))
    num_steps = worker.steps_until_granted(1000)
    assert 0 < num_steps < 20  # once the four that came before it have begun


def test_prompts_that_came_later_do_not_take_the_pages_that_a_reservation_waits_for() -> None:
    worker = BusyWorker(num_blocks=24, num_prompt_tokens=20, max_tokens=20)
    worker.step()
    worker.scheduler.reserve(make_request("reserved", (1,) * 59, BLOCK_SIZE))
    worker.steps_until_granted(2000)
