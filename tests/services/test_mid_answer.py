"""Workers that die in mid-answer, where there is another one: the answer goes on, token for token."""

import asyncio
import random
from collections import Counter
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import pytest

from baton.core.commands import EngineOutput
from baton.core.errors import WorkerLost
from baton.core.sampling import SampledToken
from baton.core.stopping import FinishReason
from baton_router.workers import pool
from baton_router.workers.policy import Placement
from tests.services.cluster import DEADLINE_S, Answer, Cluster, Limits, Worker, cluster, until
from tests.services.fake_engine import expected, fake_layout
from tests.services.prompts import prompt_of
from tests.services.test_failover import die_without_a_word, num_lost

TWO: dict[str, dict[str, Any]] = {
    "decode": {"num_decodes": 2},
    "both": {"num_prefills": 0, "num_decodes": 0, "num_boths": 2},
}


def silent_after(worker: Worker, num_tokens: int) -> None:
    """Let nobody hear of its tokens after so many of each choice."""
    receive, counts = worker.host._on_output, Counter[tuple[str, int]]()
    assert receive is not None

    def receive_some(output: EngineOutput) -> None:
        counts.update((event.request_id, event.choice) for event in output.tokens)
        heard = [e for e in output.tokens if counts[e.request_id, e.choice] <= num_tokens]
        receive(replace(output, tokens=heard))

    worker.host._on_output = receive_some


class Client:
    """Reads an answer in a task of its own."""

    def __init__(self, running: Cluster, request: Any) -> None:
        self.request = request
        self.answer = Answer([[] for _ in range(request.sampling.n)], [None] * request.sampling.n)
        self._running = running
        self._task = asyncio.create_task(self._read())

    async def has(self, num_tokens: int, choices: tuple[int, ...] | None = None) -> None:
        """Wait until it has exactly so many tokens of each of these choices."""
        those = range(self.request.sampling.n) if choices is None else choices
        await until(lambda: all(len(self.answer.tokens[choice]) == num_tokens for choice in those))

    async def ends(self) -> Answer:
        """Wait for the end of it."""
        await asyncio.wait_for(self._task, DEADLINE_S)
        return self.answer

    async def ends_right(self) -> None:
        """With the tokens of an answer that nothing happened to."""
        answer = await self.ends()
        assert answer.outcomes == expected(self.request.token_ids, self.request.sampling)

    async def _read(self) -> None:
        async with aclosing(self._running.backend.generate(self.request)) as deltas:
            async for delta in deltas:
                self.answer.add(delta)


def candidates(running: Cluster) -> list[Worker]:
    """Those that decode, in the order in which requests come to them."""
    return running.decodes or running.boths


def num_recomputed(running: Cluster) -> float:
    return running.metrics.registry.get_sample_value("baton_recomputed_tokens_total") or 0


async def back_and_clean(running: Cluster, *lost: Worker) -> None:
    """The lost ones come back, and nothing is left of any request anywhere."""
    for worker in lost:
        await worker.start()
    await running.connected()
    await running.all_clean()


def tokens_of_prefill(running: Cluster) -> int:
    """The first token does not come from decode where prefill is apart."""
    return 1 if running.prefills else 0


# --- the answer goes on ------------------------------------------------------------------------------


@pytest.mark.parametrize("num_answered", [2, 3, 7, 11])
@pytest.mark.parametrize("num_choices", [1, 3])
@pytest.mark.parametrize("role", TWO)
async def test_no_token_is_lost_or_repeated(role: str, num_choices: int, num_answered: int) -> None:
    async with cluster(**TWO[role]) as running:
        lost = candidates(running)[0]
        silent_after(lost, num_answered - tokens_of_prefill(running))
        request = running.request(prompt_of(18), n=num_choices, max_tokens=12, seed=3)
        client = Client(running, request)
        await client.has(num_answered)
        await die_without_a_word(lost)
        await client.ends_right()
        assert num_lost(running) == 1
        assert num_recomputed(running) == num_choices * num_answered
        await back_and_clean(running, lost)


async def test_the_last_token_alone_moves_no_page() -> None:
    async with cluster(num_decodes=2) as running:
        silent_after(running.decodes[0], 6)
        client = Client(running, running.request(prompt_of(18), n=2, max_tokens=8))
        await client.has(7)
        await die_without_a_word(running.decodes[0])
        await client.ends_right()
        assert running.decodes[1].host.load.prefix_cache_queries == 0
        await back_and_clean(running, running.decodes[0])


async def test_what_the_prefix_cache_held_is_told_once() -> None:
    async with cluster(num_decodes=2) as running:
        await running.ask(running.request(prompt_of(18), max_tokens=2))
        silent_after(running.decodes[0], 3)
        client = Client(running, running.request(prompt_of(18), max_tokens=12))
        await client.has(4)
        await die_without_a_word(running.decodes[0])
        assert (await client.ends()).num_cached == 16


@pytest.mark.parametrize("role", TWO)
async def test_min_tokens_counts_all_of_the_answer(role: str) -> None:
    """A stop token ends it where it would have, neither earlier nor later."""
    async with cluster(**TWO[role]) as running:
        lost, prompt = candidates(running)[0], prompt_of(18)
        [(tokens, _)] = expected(prompt, running.request(prompt, max_tokens=12).sampling)
        silent_after(lost, 4 - tokens_of_prefill(running))
        request = running.request(
            prompt, max_tokens=12, min_tokens=6, stop_token_ids=(tokens[2], tokens[4], tokens[8])
        )
        client = Client(running, request)
        await client.has(4)
        await die_without_a_word(lost)
        await client.ends_right()
        assert client.answer.outcomes == [(tokens[:9], FinishReason.STOP)]


@pytest.mark.parametrize("ended", [0, 1, 2])
@pytest.mark.parametrize("role", TWO)
async def test_a_choice_that_has_finished_stays_finished(role: str, ended: int) -> None:
    async with cluster(**TWO[role]) as running:
        lost, prompt = candidates(running)[0], prompt_of(18)
        stop = expected(prompt, running.request(prompt, n=3, seed=3).sampling)[ended][0][1]
        silent_after(lost, 5 - tokens_of_prefill(running))
        request = running.request(prompt, n=3, seed=3, max_tokens=12, stop_token_ids=(stop,))
        client = Client(running, request)
        await client.has(5, tuple({0, 1, 2} - {ended}))
        await die_without_a_word(lost)
        await client.ends_right()
        assert client.answer.outcomes[ended][1] is FinishReason.STOP
        assert num_recomputed(running) == 10
        await back_and_clean(running, lost)


@pytest.mark.parametrize("role", TWO)
async def test_a_choice_that_was_dropped_stays_dropped(role: str) -> None:
    async with cluster(**TWO[role]) as running:
        lost = candidates(running)[0]
        silent_after(lost, 5 - tokens_of_prefill(running))
        client = Client(running, running.request(prompt_of(18), n=3, max_tokens=12))
        await client.has(5)
        running.backend.abort_choice(client.request.request_id, 1)
        await die_without_a_word(lost)
        answer = await client.ends()
        right = expected(client.request.token_ids, client.request.sampling)
        assert [answer.outcomes[choice] for choice in (0, 2)] == [right[0], right[2]]
        assert answer.outcomes[1] == (right[1][0][:5], None)
        assert num_recomputed(running) == 10
        await back_and_clean(running, lost)


async def test_a_choice_that_is_dropped_when_the_others_go_on_alone() -> None:
    async with cluster(num_decodes=2) as running:
        lost, other = running.decodes
        silent_after(lost, 4)
        client = Client(running, running.request(prompt_of(18), n=3, max_tokens=400))
        await client.has(5)
        other.hold()
        await die_without_a_word(lost)
        await other.is_held()
        requests = other.sessions._requests
        await until(lambda: len(requests) == 3)
        running.backend.abort_choice(client.request.request_id, 1)
        await until(lambda: len(requests) == 2)
        other.let_go()
        answer = await client.ends()
        right = expected(client.request.token_ids, client.request.sampling)
        assert [answer.outcomes[choice] for choice in (0, 2)] == [right[0], right[2]]
        await back_and_clean(running, lost)


async def test_tokens_that_came_too_early_are_nothing_to_go_on_from() -> None:
    """Decode's tokens overtake prefill's first one, and decode dies before that has come. Another server need
    not say the same again: floating point may differ."""
    async with cluster(num_decodes=2) as running:
        lost, runner = running.decodes[0], running.decodes[0].engine.runner
        runner._sample = lambda row: [SampledToken(1) for _ in row.samples]  # type: ignore
        prefill = running.prefill.service._worker
        send_step, prefill.send_step = prefill.send_step, lambda output: None
        silent_after(lost, 3)
        client = Client(running, running.request(prompt_of(18), n=2, max_tokens=12))
        flights = running.backend._flights
        await until(lambda: any(len(choice._early) == 3 for f in flights.values() for choice in f._choices))
        assert client.answer.tokens == [[], []]
        prefill.send_step = send_step
        await die_without_a_word(lost)
        await client.ends_right()
        assert num_recomputed(running) == 0
        await back_and_clean(running, lost)


async def test_prefill_dies_when_the_client_has_its_first_tokens() -> None:
    async with cluster(num_prefills=2) as running:
        lost, receive = running.prefills[0], running.prefills[0].host._on_output
        assert receive is not None
        lost.host._on_output = lambda output: receive(replace(output, pages=[]))  # its pages never leave
        client = Client(running, running.request(prompt_of(18), n=2, max_tokens=12))
        await client.has(1)
        await die_without_a_word(lost)
        await client.ends_right()
        assert (num_lost(running), num_recomputed(running)) == (1, 2)
        await back_and_clean(running, lost)


async def test_many_answers_survive_one_of_two_decode_servers() -> None:
    chance = random.Random(4)
    async with cluster(num_decodes=2, num_prefills=2) as running:
        clients = [
            Client(
                running,
                running.request(
                    prompt_of(5 + 3 * salt, salt), n=1 + salt % 3, max_tokens=chance.randrange(20, 60)
                ),
            )
            for salt in range(16)
        ]
        await until(lambda: sum(len(tokens) for client in clients for tokens in client.answer.tokens) > 60)
        await running.decodes[0].stop()
        for client in clients:
            await client.ends_right()
        assert num_lost(running) > 0
        await back_and_clean(running, running.decodes[0])


# --- on other workers --------------------------------------------------------------------------------


@pytest.mark.parametrize("num_choices", [1, 2])
@pytest.mark.parametrize(
    ("before", "after"),
    [(Placement(0, 0), Placement(None, 1)), (Placement(None, 1), Placement(0, 0))],
    ids=["on two, then on one", "on one, then on two"],
)
async def test_the_answer_goes_on_at_workers_of_another_kind(
    before: Placement, after: Placement, num_choices: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    other_blocks = Limits(layout=fake_layout(block_size=16))
    async with cluster(both=other_blocks, num_boths=1) as running:
        lost = running.decode if before.prefill is not None else running.both
        monkeypatch.setattr(pool, "place", lambda *_: before)
        silent_after(lost, 5)
        client = Client(running, running.request(prompt_of(18), n=num_choices, max_tokens=30, seed=8))
        await client.has(5 if lost is running.both else 6)
        monkeypatch.setattr(pool, "place", lambda *_: after)
        await die_without_a_word(lost)
        await client.ends_right()
        await back_and_clean(running, lost)


# --- how often ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_choices", [1, 2])
async def test_two_servers_lost_in_one_answer(num_choices: int) -> None:
    async with cluster(num_decodes=3) as running:
        silent_after(running.decodes[0], 3)
        silent_after(running.decodes[1], 4)
        client = Client(running, running.request(prompt_of(18), n=num_choices, max_tokens=20))
        for lost, num_answered in ((running.decodes[0], 4), (running.decodes[1], 9)):  # one is prefill's
            await client.has(num_answered)
            await die_without_a_word(lost)
        await client.ends_right()
        assert num_lost(running) == 2
        assert num_recomputed(running) == num_choices * (4 + 9)
        await back_and_clean(running, *running.decodes[:2])


@pytest.mark.parametrize(
    "num_tokens_each",
    [(3, 0), (0, 0), (3, 3, 3)],
    ids=["two in a row", "two in a row from the beginning", "three in all"],
)
async def test_an_answer_does_not_end_all_the_workers(num_tokens_each: tuple[int, ...]) -> None:
    """It may be the answer itself that ends the processes that compute it."""
    async with cluster(num_decodes=4) as running:
        lost = running.decodes[: len(num_tokens_each)]
        for worker, num_tokens in zip(lost, num_tokens_each, strict=True):
            silent_after(worker, num_tokens)
        client = Client(running, running.request(prompt_of(18), max_tokens=40))
        num_heard = 0
        for worker, num_tokens in zip(lost, num_tokens_each, strict=True):
            num_heard += 1 + num_tokens  # prefill's and decode's
            await client.has(num_heard)
            await die_without_a_word(worker)
        with pytest.raises(WorkerLost, match="The decode server was lost"):
            await client.ends()
        assert num_lost(running) == len(lost) - 1
        [(right, _)] = expected(client.request.token_ids, client.request.sampling)
        assert client.answer.tokens == [right[:num_heard]]
        await back_and_clean(running, *lost)
