"""The router's queue: who is let in when, and who is refused."""

import asyncio

import pytest

from baton.core.errors import Overloaded, Unavailable
from baton_router.requests import admission
from baton_router.requests.admission import Admission
from baton_router.requests.drain_rate import MAX_RETRY_AFTER_S


class Gate:
    """An Admission, and the order in which it lets requests in."""

    def __init__(self, capacity: int, max_queue: int = 10) -> None:
        self.capacity = capacity
        self.now = 0.0
        self.admission = Admission(max_queue, lambda: self.capacity, lambda: self.now)
        self.entered: list[str] = []

    async def enter(self, name: str, num_slots: int = 1, priority: int = 0, num_tokens: int = 1) -> None:
        await self.admission.enter(num_slots, priority, num_tokens)
        self.entered.append(name)

    async def queue(
        self, name: str, num_slots: int = 1, priority: int = 0, num_tokens: int = 1
    ) -> asyncio.Task[None]:
        """Let a request ask, as far as it comes."""
        task = asyncio.create_task(self.enter(name, num_slots, priority, num_tokens))
        await settle()
        return task


async def settle() -> None:
    """Let every task that can go on do so."""
    for _ in range(5):
        await asyncio.sleep(0)


async def test_by_priority_then_arrival() -> None:
    gate = Gate(1)
    await gate.enter("first")
    for name, priority in (("b", 0), ("d", 5), ("c", 0), ("a", -1)):
        await gate.queue(name, priority=priority)
    assert gate.admission.num_waiting == 4
    for _ in range(4):
        gate.admission.leave(1)
        await settle()
    assert gate.entered == ["first", "a", "b", "c", "d"]


async def test_nobody_overtakes_a_large_request_at_the_head() -> None:
    gate = Gate(3)
    await gate.enter("two", 2)
    await gate.queue("three", 3)
    await gate.queue("one", 1)
    assert gate.entered == ["two"]
    gate.admission.leave(2)
    await settle()
    assert gate.entered == ["two", "three"]
    gate.admission.leave(3)
    await settle()
    assert gate.entered == ["two", "three", "one"]


async def test_more_choices_than_places_go_alone() -> None:
    gate = Gate(2)
    await gate.enter("one")
    await gate.queue("five", 5)
    assert gate.entered == ["one"]
    gate.admission.leave(1)
    await settle()
    assert gate.entered == ["one", "five"]
    await gate.queue("next")
    assert gate.entered == ["one", "five"]
    gate.admission.leave(5)
    await settle()
    assert gate.entered == ["one", "five", "next"]


async def test_a_full_queue_refuses_at_once() -> None:
    gate = Gate(1, max_queue=2)
    await gate.enter("first")
    tasks = [await gate.queue("second"), await gate.queue("third")]
    with pytest.raises(Overloaded, match="2 requests wait"):
        await gate.enter("fourth")
    tasks[0].cancel()
    await settle()
    await gate.queue("fifth")
    assert gate.admission.num_waiting == 2


async def test_prompts_that_wait_have_a_bound_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "MAX_QUEUED_TOKENS", 100)
    gate = Gate(1)
    await gate.enter("first")
    huge = await gate.queue("alone it may wait", num_tokens=500)
    with pytest.raises(Overloaded):
        await gate.enter("one more", num_tokens=1)
    huge.cancel()
    await settle()
    for name in ("a", "b"):
        await gate.queue(name, num_tokens=50)
    with pytest.raises(Overloaded):
        await gate.enter("c", num_tokens=1)
    gate.admission.leave(1)  # "a" goes
    await settle()
    await gate.queue("c", num_tokens=50)
    assert gate.admission.num_waiting == 2
    assert gate.admission.num_refused == 2


async def test_refusals_are_logged_now_and_then(caplog: pytest.LogCaptureFixture) -> None:
    gate = Gate(1, max_queue=1)
    await gate.enter("first")
    await gate.queue("second")
    for _ in range(100):
        with pytest.raises(Overloaded):
            await gate.enter("refused")
    [record] = [record for record in caplog.records if "the queue is full" in record.getMessage()]
    assert "--max-queue 1" in record.getMessage()
    assert gate.admission.num_refused == 100


async def test_who_is_refused_is_told_when_the_queue_will_have_emptied() -> None:
    gate = Gate(1, max_queue=10)
    await gate.enter("first")
    for number in range(10):
        await gate.queue(str(number))

    async def retry_after_s() -> int:
        with pytest.raises(Overloaded) as caught:
            await gate.enter("refused")
        return caught.value.retry_after_s

    assert await retry_after_s() == 1  # nobody knows
    for number in range(8):  # each 1.5 s after the one before
        gate.now += 1.5
        gate.admission.leave(1)
        await settle()
        await gate.queue(f"again {number}")
    assert 10 <= await retry_after_s() <= 15
    gate.now += 3600
    assert await retry_after_s() == MAX_RETRY_AFTER_S


async def test_one_that_leaves_the_queue_makes_room_for_those_behind_it() -> None:
    gate = Gate(2)
    await gate.enter("one")
    large = await gate.queue("two", 2)
    await gate.queue("three", 1)
    assert gate.entered == ["one"]
    large.cancel()
    await settle()
    assert gate.entered == ["one", "three"]


@pytest.mark.parametrize("leave_first", [True, False])
async def test_let_in_and_cancelled_in_the_same_instant(leave_first: bool) -> None:
    gate = Gate(1)
    await gate.enter("first")
    task = await gate.queue("second")
    if leave_first:
        gate.admission.leave(1)
        task.cancel()
    else:
        task.cancel()
        gate.admission.leave(1)
    await settle()
    assert task.cancelled()
    assert gate.admission._num_slots_taken == 0
    await asyncio.wait_for(gate.enter("third"), 1)


async def test_all_who_wait_are_told_that_the_workers_went_away() -> None:
    gate = Gate(1)
    await gate.enter("first")
    tasks = [await gate.queue("second"), await gate.queue("third")]
    gate.capacity = 0
    gate.admission.update()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(result) for result in results] == [Unavailable, Unavailable]
    gate.admission.leave(1)
    assert gate.admission._num_slots_taken == 0


async def test_new_workers_let_more_in() -> None:
    gate = Gate(1)
    await gate.enter("first")
    await gate.queue("second")
    await gate.queue("third")
    gate.capacity = 2
    gate.admission.update()
    await settle()
    assert gate.entered == ["first", "second"]
    gate.capacity = 1  # nobody is thrown out; nobody comes in either until both have left
    gate.admission.leave(1)
    await settle()
    assert gate.entered == ["first", "second"]
    gate.admission.leave(1)
    await settle()
    assert gate.entered == ["first", "second", "third"]


async def test_no_place_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "QUEUE_TIMEOUT_S", 0.01)
    gate = Gate(1)
    await gate.enter("first")
    with pytest.raises(Overloaded, match="No worker had room"):
        await gate.enter("second")
    assert gate.admission.num_waiting == 0
