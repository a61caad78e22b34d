"""Transfers that fail: the router tries again, and the client sees neither a token twice nor another one."""

import asyncio
import logging
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.core.errors import InvalidRequest, TransferFailed, TransferRefused, Unavailable
from baton.core.prefix import block_hashes
from baton.core.sampling import SampledToken
from baton.core.stopping import FinishReason
from baton.rpc.errors import status_code
from baton_router.requests import prompt_hashes
from baton_router.requests.prompt_hashes import PromptHashes
from baton_router.workers import pool
from baton_router.workers.policy import Placement
from tests.services.cluster import DEADLINE_S, Answer, Cluster, Limits, Worker, cluster, until
from tests.services.fake_engine import FINGERPRINT, expected, fake_layout
from tests.services.prompts import prompt_of

STOP_TOKEN = 29_998  # none of the oracle's tokens here
ALWAYS = 1_000
STAGES = {"open": "open", "write": "deliver", "commit": "commit"}  # and InboundTransfers' methods


def refuse(worker: Worker, stage: str, times: int = 1, and_then: Callable[[], None] = lambda: None) -> None:
    """Let a decode server refuse the next transfers at a stage: open, write or commit."""
    inbound, num_refused = worker.service._handover.inbound, 0
    accept = getattr(inbound, STAGES[stage])

    def refuse_or_accept(*args: Any, **named: Any) -> Any:
        nonlocal num_refused
        if num_refused == times:
            return accept(*args, **named)
        num_refused += 1
        and_then()
        raise TransferRefused("test", f"refused at {stage} by the test")

    setattr(inbound, STAGES[stage], refuse_or_accept)


def num_refused(worker: Worker) -> int:
    return int(worker.service._stats.outcomes["test"])


def num_retries(running: Cluster, reason: str = "transfer") -> float:
    return running.metrics.registry.get_sample_value("baton_retries_total", {"reason": reason}) or 0


def hold(worker: Worker) -> None:
    worker.engine.runner.gate.clear()


def let_go(worker: Worker) -> None:
    worker.engine.runner.gate.set()


def sample_other_first_tokens(runner: Any, token_id: int) -> None:
    """Let the first token of every answer be this one."""
    sample = runner._sample

    def sample_it(row: Any) -> tuple[SampledToken, ...]:
        return tuple(
            SampledToken(token_id) if task.num_output_tokens == 0 else token
            for task, token in zip(row.samples, sample(row), strict=True)
        )

    runner._sample = sample_it


async def answered(running: Cluster, request: Any) -> Answer:
    """`ask`, with a deadline."""
    return await asyncio.wait_for(running.ask(request), DEADLINE_S)


# --- once is no matter -------------------------------------------------------------------------------


@pytest.mark.parametrize("num_choices", [1, 3])
@pytest.mark.parametrize("stage", ["open", "write", "commit"])
async def test_a_transfer_that_fails_once_changes_no_token(
    stage: str, num_choices: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "baton_router")
    async with cluster() as running:
        refuse(running.decode, stage)
        request = running.request(prompt_of(21), n=num_choices, seed=7)
        assert (await answered(running, request)).outcomes == expected(request.token_ids, request.sampling)
        assert num_refused(running.decode) == num_retries(running) == 1
        await running.all_clean()
    retries = [record.getMessage() for record in caplog.records if "trying again" in record.getMessage()]
    assert len(retries) == 1
    assert f"request {request.request_id}: attempt 1 of 3 failed" in retries[0]


async def test_twice_is_no_matter_either() -> None:
    async with cluster() as running:
        refuse(running.decode, "commit", times=2)
        request = running.request(prompt_of(21), n=2)
        assert (await answered(running, request)).outcomes == expected(request.token_ids, request.sampling)
        assert num_retries(running) == 2
        await running.all_clean()


@pytest.mark.parametrize("num_choices", [1, 3])
async def test_a_ticket_that_decode_does_not_know(num_choices: int) -> None:
    async with cluster() as running:
        sender = running.prefill.service.sender
        begin = sender.begin

        def begin_with_a_broken_ticket(ticket: Any, release: Any) -> Any:
            sender.begin = begin
            return begin(replace(ticket, transfer_id=bytes(16)), release)

        sender.begin = begin_with_a_broken_ticket
        request = running.request(prompt_of(21), n=num_choices)
        assert (await answered(running, request)).outcomes == expected(request.token_ids, request.sampling)
        assert running.decode.service._stats.outcomes["ticket"] == num_retries(running) == 1
        await running.all_clean()


async def test_prefill_finds_the_pages_of_the_failed_attempt() -> None:
    async with cluster() as running:
        refuse(running.decode, "commit")
        request = running.request(prompt_of(41))
        await answered(running, request)
        assert running.prefill.host.load.prefix_cache_hits == 40
        await running.all_clean()


# --- what the client has got stands ------------------------------------------------------------------


@pytest.mark.parametrize("num_choices", [1, 3])
async def test_first_tokens_stand_though_prefill_would_sample_others(num_choices: int) -> None:
    """Floating point may differ between the prompt computed whole and from the prefix cache."""
    async with cluster() as running:
        runner = running.prefill.engine.runner
        sample = runner._sample

        def deviate() -> None:
            sample_other_first_tokens(runner, STOP_TOKEN)

        refuse(running.decode, "commit", and_then=deviate)
        request = running.request(prompt_of(21), n=num_choices, stop_token_ids=(STOP_TOKEN,))
        assert (await answered(running, request)).outcomes == expected(request.token_ids, request.sampling)
        await running.all_clean()
        runner._sample = sample  # type: ignore[method-assign]
        again = running.request(prompt_of(21), n=num_choices, stop_token_ids=(STOP_TOKEN,))
        assert (await answered(running, again)).outcomes == expected(again.token_ids, again.sampling)


@pytest.mark.parametrize("ended", [0, 1])
@pytest.mark.parametrize("deviates", [False, True])
async def test_a_choice_that_its_first_token_ended_stays_ended(ended: int, deviates: bool) -> None:
    async with cluster() as running:
        prompt, runner = prompt_of(11), running.prefill.engine.runner
        stop = expected(prompt, running.request(prompt, n=2, seed=3).sampling)[ended][0][0]

        def deviate() -> None:
            if deviates:
                sample_other_first_tokens(runner, 1)

        refuse(running.decode, "commit", and_then=deviate)
        computed = running.decode.record_choices()
        request = running.request(prompt, n=2, seed=3, stop_token_ids=(stop,))
        answer = await answered(running, request)
        assert answer.outcomes == expected(prompt, request.sampling)
        assert answer.outcomes[ended] == ([stop], FinishReason.STOP)
        assert computed == {0}  # of a request of one choice
        assert running.decode.service._stats.outcomes["committed"] == 1
        assert num_retries(running) == 1
        await running.all_clean()


# --- three times is an error -------------------------------------------------------------------------


@pytest.mark.parametrize("num_choices", [1, 3])
@pytest.mark.parametrize("stage", ["open", "write", "commit"])
async def test_after_three_attempts_the_client_is_told(stage: str, num_choices: int) -> None:
    async with cluster() as running:
        refuse(running.decode, stage, times=ALWAYS)
        with pytest.raises(Unavailable, match=r"KV transfer failed: .* Try again\.") as caught:
            await answered(running, running.request(prompt_of(21), n=num_choices))
        assert status_code(caught.value) is grpc.StatusCode.UNAVAILABLE
        # Each choice has a second and a third attempt of its own; the first of them to end is the end of all.
        assert 3 <= num_refused(running.decode) <= 1 + 2 * num_choices
        assert num_retries(running) == num_refused(running.decode) - 1 or num_choices > 1
        await running.all_clean()


async def test_tokens_before_the_error_come_once() -> None:
    """Each attempt's prompt yields one more."""
    async with cluster() as running:
        refuse(running.decode, "commit", times=ALWAYS)
        request = running.request(prompt_of(21), n=3)
        answer = Answer([[], [], []], [None] * 3)

        async def read() -> None:
            async for delta in running.backend.generate(request):
                answer.add(delta)

        with pytest.raises(TransferFailed):
            await asyncio.wait_for(read(), DEADLINE_S)
        for tokens, (right, _) in zip(
            answer.tokens, expected(request.token_ids, request.sampling), strict=True
        ):
            assert 2 <= len(tokens) <= 3
            assert tokens == right[: len(tokens)]
        await running.all_clean()


async def test_requests_do_not_share_their_attempts() -> None:
    async with cluster() as running:
        refuse(running.decode, "commit", times=3)
        requests = [running.request(prompt_of(12 + salt, salt)) for salt in range(4)]
        results = await asyncio.gather(*(answered(running, request) for request in requests))
        for request, answer in zip(requests, results, strict=True):
            assert answer.outcomes == expected(request.token_ids, request.sampling)
        assert num_retries(running) == 3
        await running.all_clean()


# --- what comes late from an attempt that was given up -----------------------------------------------


async def test_a_transfer_that_was_committed_before_it_failed() -> None:
    """Decode is in a step of the first attempt while the second one begins on the same workers."""
    async with cluster() as running:
        hold(running.decode)
        inbound = running.decode.service._handover.inbound
        commit = inbound.commit

        def commit_and_break(*args: Any, **named: Any) -> None:
            inbound.commit = commit
            commit(*args, **named)
            raise TransferRefused("test", "the acknowledgement is lost")

        inbound.commit = commit_and_break
        request = running.request(prompt_of(21), n=2)
        task = asyncio.create_task(answered(running, request))
        await until(running.decode.engine.runner.is_held.is_set)
        await until(lambda: num_retries(running) == 1)
        requests = running.decode.service.sessions._requests
        await until(lambda: list(requests) == [f"{request.request_id}/{number}" for number in (2, 3)])
        let_go(running.decode)
        assert (await task).outcomes == expected(request.token_ids, request.sampling)
        await running.all_clean()


@pytest.mark.parametrize("failure_is_first", [False, True])
async def test_a_transfer_that_decode_goes_on_from_has_not_failed(failure_is_first: bool) -> None:
    """Prefill's report and decode's token may reach the router in one turn of its loop."""
    async with cluster() as running:
        link = running.links[1]
        dispatch = link._dispatch

        def dispatch_and_fail(event: Any, on_change: Any) -> None:
            inboxes = [errand.inbox for errand in link._errands.values() if event.step_output.positions]
            if inboxes:
                link._dispatch = dispatch  # type: ignore[method-assign]
            for inbox in inboxes if failure_is_first else ():
                inbox.put(TransferFailed("too late to matter"))
            dispatch(event, on_change)
            for inbox in () if failure_is_first else inboxes:
                inbox.put(TransferFailed("too late to matter"))

        link._dispatch = dispatch_and_fail  # type: ignore[method-assign]
        request = running.request(prompt_of(21), max_tokens=30)
        hold(running.decode)  # until prefill's first token is there: else the failure may still matter
        deltas = running.backend.generate(request)
        tokens = [token.token_id for token in (await anext(deltas)).tokens]
        let_go(running.decode)
        async for delta in deltas:
            tokens += [token.token_id for token in delta.tokens]
        assert tokens == expected(request.token_ids, request.sampling)[0][0]
        assert num_retries(running) == 0
        await running.all_clean()


# --- clients that go during a retry ------------------------------------------------------------------


async def at_the_second_attempt(running: Cluster, request: Any) -> asyncio.Task[Answer]:
    """A request whose first attempt has failed; prefill holds the second one's step."""
    refuse(running.decode, "commit", and_then=lambda: hold(running.prefill))
    task = asyncio.create_task(answered(running, request))
    await until(running.prefill.engine.runner.is_held.is_set)
    assert num_retries(running) == 1
    return task


async def test_a_client_that_leaves() -> None:
    async with cluster() as running:
        task = await at_the_second_attempt(running, running.request(prompt_of(21), n=2))
        task.cancel()
        await asyncio.wait((task,))
        assert task.cancelled()
        let_go(running.prefill)
        await running.all_clean()
        request = running.request(prompt_of(50, salt=3))
        assert (await answered(running, request)).outcomes == expected(request.token_ids, request.sampling)


async def test_a_choice_dropped_during_the_second_attempt() -> None:
    async with cluster() as running:
        request = running.request(prompt_of(21), n=2)
        task = await at_the_second_attempt(running, request)
        requests = running.decode.service.sessions._requests
        assert len(requests) == 2
        running.backend.abort_choice(request.request_id, 0)
        await until(lambda: len(requests) == 1)
        let_go(running.prefill)
        answer = await task
        assert answer.outcomes[1] == expected(request.token_ids, request.sampling)[1]
        await running.all_clean()


async def test_a_choice_dropped_before_the_failure() -> None:
    async with cluster() as running:
        request = running.request(prompt_of(21), n=2)
        refuse(
            running.decode,
            "commit",
            and_then=lambda: running.backend.abort_choice(request.request_id, 0),
        )
        answer = await answered(running, request)
        assert answer.outcomes[1] == expected(request.token_ids, request.sampling)[1]
        assert running.decode.service._stats.outcomes["committed"] == 1
        assert num_retries(running) == 1
        await running.all_clean()


async def test_every_choice_dropped_during_the_second_attempt() -> None:
    async with cluster() as running:
        request = running.request(prompt_of(21), n=2)
        task = await at_the_second_attempt(running, request)
        for choice in range(2):
            running.backend.abort_choice(request.request_id, choice)
        answer = await task
        assert answer.reasons == [None, None]
        let_go(running.prefill)
        await running.all_clean()


@pytest.mark.parametrize("round_", range(4))
async def test_failures_and_aborts_at_random(round_: int) -> None:
    chance = random.Random(round_)
    small = Limits(num_blocks=40, max_num_seqs=8)
    async with cluster(decode=small, num_prefills=2, num_decodes=2) as running:
        for worker in running.decodes:
            for stage in ("open", "write", "commit"):
                refuse_at_random(worker, stage, chance)
        requests = [running.request(prompt_of(12 + salt, salt), n=1 + salt % 3) for salt in range(18)]
        tasks = [asyncio.create_task(answered(running, request)) for request in requests]
        for task in tasks[::3]:
            for _ in range(chance.randrange(40)):
                await asyncio.sleep(0)
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        for request, result in zip(requests, results, strict=True):
            if isinstance(result, Answer):
                assert result.outcomes == expected(request.token_ids, request.sampling)
            else:
                assert isinstance(result, asyncio.CancelledError | TransferFailed), result
        await running.all_clean()


def refuse_at_random(worker: Worker, stage: str, chance: random.Random) -> None:
    inbound = worker.service._handover.inbound
    accept = getattr(inbound, STAGES[stage])

    def refuse_or_accept(*args: Any, **named: Any) -> Any:
        if chance.random() < 0.2:
            raise TransferRefused("test", "bad luck")
        return accept(*args, **named)

    setattr(inbound, STAGES[stage], refuse_or_accept)


# --- other workers, other blocks ---------------------------------------------------------------------


async def test_the_retry_may_run_on_other_workers_with_other_blocks() -> None:
    async with cluster(num_prefills=2, num_decodes=2, start=False) as running:
        large = Limits(layout=fake_layout(block_size=16))
        for workers in (running.prefills, running.decodes):
            workers[1] = Worker(workers[1].config.role, workers[1].address, large)
        await asyncio.gather(*(worker.start() for worker in running.workers))
        await running.connected()

        def take_no_more() -> None:
            for link in (running.pool.prefills[0], running.pool.decodes[0]):
                assert link.worker is not None
                link.worker.is_draining = True

        refuse(running.decodes[0], "commit", and_then=take_no_more)
        request = running.request(prompt_of(37), n=2)
        assert (await answered(running, request)).outcomes == expected(request.token_ids, request.sampling)
        assert num_retries(running) == 1
        assert running.decodes[1].service._stats.outcomes == {"committed": 2}
        await running.all_clean()


async def test_without_workers_for_a_retry_the_client_is_told() -> None:
    async with cluster() as running:

        def take_no_more() -> None:
            assert running.links[1].worker is not None
            running.links[1].worker.is_draining = True

        refuse(running.decode, "commit", and_then=take_no_more)
        with pytest.raises(Unavailable, match="No decode server"):
            await answered(running, running.request(prompt_of(21)))
        await running.all_clean()


async def test_each_worker_gets_hashes_of_its_own_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "place", lambda *_: Placement(0, 0))
    async with cluster(decode=Limits(layout=fake_layout(block_size=16))) as running:
        num_hashes: dict[str, int] = {}
        reserve = running.decode.service.reserve

        def note_and_reserve(request: Any) -> None:
            num_hashes["decode"] = len(request.block_hashes)
            reserve(request)

        def note_and_refuse(request: Any, *_: Any) -> None:
            num_hashes["prefill"] = len(request.block_hashes)
            raise InvalidRequest("seen enough")

        running.decode.service.reserve, running.prefill.service.prefill = note_and_reserve, note_and_refuse
        with pytest.raises(InvalidRequest, match="seen enough"):
            await answered(running, running.request(prompt_of(50)))
        assert num_hashes == {"decode": 3, "prefill": 12}
        await running.all_clean()


async def test_a_prompt_is_hashed_once_a_block_size(monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[int] = []
    compute = block_hashes

    def note_and_compute(seed: bytes, token_ids: tuple[int, ...], block_size: int) -> list[bytes]:
        computed.append(block_size)
        return compute(seed, token_ids, block_size)

    monkeypatch.setattr(prompt_hashes, "block_hashes", note_and_compute)
    for length in (20, 20_000):  # on the loop, and on a thread
        hashes = PromptHashes(FINGERPRINT, "", prompt_of(length))
        assert [len(await hashes.of(block_size)) for block_size in (4, 16, 4, 16)] == [
            length // block_size for block_size in (4, 16, 4, 16)
        ]
    assert computed == [4, 16] * 2


@given(
    prompt=st.lists(st.integers(0, 9), min_size=1, max_size=20).map(tuple),
    answered=st.lists(st.integers(0, 9), max_size=20).map(tuple),
    block_size=st.integers(1, 7),
)
def test_hashes_go_on_over_what_was_answered(
    prompt: tuple[int, ...], answered: tuple[int, ...], block_size: int
) -> None:
    hashes = PromptHashes(FINGERPRINT, "salt", prompt)
    whole = tuple(block_hashes(hashes.seed, (*prompt, *answered), block_size))
    for _ in range(2):
        assert asyncio.run(hashes.of(block_size, answered)) == whole
