"""Who is what: which commands a worker of each role takes, and which workers a router lets in for a role."""

import asyncio
import logging
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from baton.core.commands import FailureReason
from baton.core.request import TokenEvent
from baton.core.sampling import SampledToken
from baton.core.stopping import FinishReason
from baton.v1 import worker_pb2
from tests.services.by_hand import next_event, open_session, prefill, reserve, work
from tests.services.cluster import Cluster, Limits, Worker, cluster, until
from tests.services.fake_engine import expected
from tests.services.prompts import prompt_of


async def answers_right(running: Cluster, **sampling: Any) -> None:
    request = running.request(prompt_of(20), **sampling)
    assert (await running.ask(request)).outcomes == expected(request.token_ids, request.sampling)


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_a_server_of_one_role_does_not_take_the_other(role: str) -> None:
    async with cluster() as running:
        worker = running.prefill if role == "prefill" else running.decode
        async with grpc.aio.insecure_channel(worker.address) as channel:
            call = await open_session(channel)
            stays = worker_pb2.Prefill(work=work(1, "stays"), decodes_here=True)
            await call.write(worker_pb2.Command(prefill=stays))
            failed = (await next_event(call, "failed")).failed
            assert (failed.number, failed.reason) == (1, worker_pb2.Failed.REASON_INVALID)
            assert f"this is a {role} server" in failed.message
            call.cancel()
        await running.all_clean()


async def test_a_worker_of_both_roles_takes_every_command() -> None:
    async with cluster(num_boths=1) as running, grpc.aio.insecure_channel(running.both.address) as channel:
        call = await open_session(channel)
        await call.write(reserve(1, "reserved"))
        assert (await next_event(call, "reserved")).reserved.number == 1
        await call.write(prefill(2, "one token", max_tokens=1))
        stays = worker_pb2.Prefill(work=work(3, "stays", max_tokens=2), decodes_here=True)
        await call.write(worker_pb2.Command(prefill=stays))
        numbers: list[int] = []
        while len(numbers) < 3:
            numbers += (await next_event(call, "step_output")).step_output.numbers
        assert sorted(numbers) == [2, 3, 3]
        await call.write(worker_pb2.Command(abort=worker_pb2.Abort(number=1)))
        await until(lambda: not running.both.leftovers)
        health = health_pb2_grpc.HealthStub(channel)
        for name in ("baton.v1.Worker", "baton.v1.Transfer"):
            status = await health.Check(health_pb2.HealthCheckRequest(service=name))
            assert status.status == health_pb2.HealthCheckResponse.SERVING
        call.cancel()


async def test_a_worker_of_both_roles_may_be_named_for_one() -> None:
    async with cluster(start=False) as running:
        running.decodes[0] = Worker("both", running.decode.address, Limits())
        await asyncio.gather(*(worker.start() for worker in running.workers))
        await running.connected()
        await answers_right(running, n=2)
        assert tuple(running.decode.stats.transports) == ("grpc",)
        await running.all_clean()


async def test_a_server_of_one_role_is_no_worker_of_both(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with cluster(num_boths=1, start=False) as running:
        running.boths[0] = Worker("prefill", running.both.address, Limits())
        await asyncio.gather(*(worker.start() for worker in running.workers))
        await until(lambda: "it is no worker of both roles" in caplog.text)
        await until(lambda: running.backend.is_ready)
        await answers_right(running)


@pytest.mark.parametrize("max_tokens", [1, 8])
async def test_each_role_passes_over_what_is_not_its_own(max_tokens: int) -> None:
    """A request of one token is prefill's, one that stays is decode's."""
    async with cluster(num_prefills=0, num_decodes=0, num_boths=1) as running:
        running.both.hold()
        request = running.request(prompt_of(20), n=2, max_tokens=max_tokens)
        task = asyncio.create_task(running.ask(request))
        await running.both.is_held()
        roles = (running.both.prefill_role, running.both.decode_role)
        other: Any = roles[1] if max_tokens == 1 else roles[0]
        other._handover.failed(request.request_id, FailureReason.INTERNAL, "not yours")
        other._handover.token(TokenEvent(request.request_id, 0, 0, SampledToken(1), FinishReason.STOP))
        running.both.let_go()
        assert (await task).outcomes == expected(request.token_ids, request.sampling)
        await running.all_clean()
