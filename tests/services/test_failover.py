"""Workers that die before decode has begun, where there is another one: nobody notices."""

import asyncio
from typing import Any

import pytest

from baton.core.errors import WorkerLost
from baton_router.workers.worker_link import WorkerLink
from tests.services.cluster import DEADLINE_S, Cluster, Limits, Worker, cluster, until
from tests.services.fake_engine import expected
from tests.services.prompts import prompt_of


def num_lost(running: Cluster) -> float:
    return running.metrics.registry.get_sample_value("baton_retries_total", {"reason": "lost"}) or 0


async def held_at(workers: list[Worker]) -> Worker:
    """Wait until one of them computes, at the gate; says which, and lets the others go."""
    await until(lambda: any(worker.engine.runner.is_held.is_set() for worker in workers))
    [busy] = [worker for worker in workers if worker.engine.runner.is_held.is_set()]
    for worker in workers:
        if worker is not busy:
            worker.let_go()
    return busy


async def die_without_a_word(worker: Worker) -> None:
    """What it computes last reaches nobody."""
    worker.host._on_output = lambda output: None
    await worker.stop()


ONE_TOO_MANY: dict[str, dict[str, Any]] = {
    "prefill": {"num_prefills": 2},  # dies while it computes the prompt
    "decode": {"num_decodes": 2},  # dies when the client has the first tokens, which come once
    "both": {"num_prefills": 0, "num_decodes": 0, "num_boths": 2},
}


@pytest.mark.parametrize("num_choices", [1, 3])
@pytest.mark.parametrize("role", ONE_TOO_MANY)
async def test_another_worker_takes_over(role: str, num_choices: int) -> None:
    async with cluster(**ONE_TOO_MANY[role]) as running:
        workers = [worker for worker in running.workers if worker.config.role == role]
        for worker in workers:
            worker.hold()
        request = running.request(prompt_of(60), n=num_choices)
        task = asyncio.create_task(running.ask(request))
        lost = await held_at(workers)
        await die_without_a_word(lost)
        answer = await asyncio.wait_for(task, DEADLINE_S)
        assert answer.outcomes == expected(request.token_ids, request.sampling)
        assert num_lost(running) == 1
        await lost.start()
        await running.connected()
        await running.all_clean()


async def test_all_of_many_requests_survive_one_of_two_prefill_servers() -> None:
    async with cluster(Limits(max_num_batched_tokens=16), num_prefills=2) as running:
        requests = [running.request(prompt_of(40, salt)) for salt in range(16)]
        for worker in running.prefills:
            worker.hold()
        tasks = [asyncio.create_task(running.ask(request)) for request in requests]
        await until(lambda: all(link.worker and link.worker.num_in_flight for link in running.links[:2]))
        running.prefills[1].let_go()
        await running.prefills[0].stop()
        answers = await asyncio.wait_for(asyncio.gather(*tasks), DEADLINE_S)
        for request, answer in zip(requests, answers, strict=True):
            assert answer.outcomes == expected(request.token_ids, request.sampling)
        assert num_lost(running) == 8
        await running.prefills[0].start()
        await running.connected()
        await running.all_clean()


async def test_the_client_is_told_of_the_second_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be the request itself that ends the processes that compute it."""

    def begin_nothing(self: WorkerLink, inbox: Any, num_choices: int, num_tokens: int) -> int:
        inbox.put(WorkerLost("The server was lost while it worked on this request. Try again."))
        return begin(self, inbox, num_choices, num_tokens)

    begin = WorkerLink.begin
    async with cluster(num_prefills=2) as running:
        monkeypatch.setattr(WorkerLink, "begin", begin_nothing)
        with pytest.raises(WorkerLost, match="Try again"):
            await asyncio.wait_for(running.ask(running.request(prompt_of(9))), DEADLINE_S)
        assert num_lost(running) == 1
        await running.all_clean()
