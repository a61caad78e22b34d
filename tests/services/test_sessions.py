"""Sessions and servers spoken to by hand: who is let in, what breaks a session, and what that costs."""

from collections.abc import AsyncIterator

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from baton.core.commands import FailureReason
from baton.core.sampling import SamplingParams
from baton.rpc import codec, sessions
from baton.rpc.auth import credentials
from baton.v1 import transfer_pb2, transfer_pb2_grpc, worker_pb2, worker_pb2_grpc
from tests.services.by_hand import next_event, open_session, prefill, reserve, work
from tests.services.cluster import Cluster, cluster, until
from tests.services.fake_engine import expected
from tests.services.prompts import prompt_of


@pytest.fixture
async def running() -> AsyncIterator[Cluster]:
    async with cluster() as made:
        yield made


async def test_another_protocol_version_is_refused_in_words(running: Cluster) -> None:
    async with grpc.aio.insecure_channel(running.decode.address) as channel:
        call = worker_pb2_grpc.WorkerStub(channel).Session()
        await call.write(worker_pb2.Command(hello=worker_pb2.Hello(protocol_version=99)))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert "the router 99: run the same version of Baton on both" in (caught.value.details() or "")


async def test_a_caller_that_says_nothing_is_refused_without_noise(
    running: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    async with grpc.aio.insecure_channel(running.decode.address) as channel:
        call = worker_pb2_grpc.WorkerStub(channel).Session()
        await call.done_writing()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


async def test_a_router_that_does_not_read_loses_its_session(
    running: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "MAX_OUTBOX", 50)
    host = running.decode.service.sessions
    options = (("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0))
    async with grpc.aio.insecure_channel(running.decode.address, options=options) as channel:
        call = await open_session(channel)
        await call.write(reserve(1, "mine"))
        await next_event(call, "reserved")
        [session] = [held for held in host._sessions if held.router_id == "by hand"]
        text = "x" * 100_000

        def fill() -> bool:
            session.send(codec.failure_to_proto(77, FailureReason.INTERNAL, text))
            return session not in host._sessions

        await until(fill)
        await until(lambda: not running.decode.leftovers)  # and what hung on it is gone
        call.cancel()
    request = running.request(prompt_of(9))
    assert (await running.ask(request)).outcomes == expected(request.token_ids, request.sampling)


async def test_a_session_that_breaks_aborts_what_hung_on_it_and_nothing_else(running: Cluster) -> None:
    async with grpc.aio.insecure_channel(running.decode.address) as channel:
        call = await open_session(channel)
        for number in range(1, 5):
            await call.write(reserve(number, f"by hand {number}"))
            await next_event(call, "reserved")
        assert len(running.decode.service._handover.table) == 4
        other = running.backend.generate(running.request(prompt_of(9), max_tokens=400))
        await anext(other)
        call.cancel()
        await until(lambda: len(running.decode.service.sessions._requests) == 1)
        table = running.decode.service._handover.table
        assert not any(table.of_request(f"by hand {number}") for number in range(1, 5))
        await anext(other)
        await other.aclose()
    await running.all_clean()


@pytest.mark.parametrize("same", ["number", "id"])
async def test_a_number_or_id_in_use_is_refused(running: Cluster, same: str) -> None:
    async with grpc.aio.insecure_channel(running.decode.address) as channel:
        call = await open_session(channel)
        await call.write(reserve(1, "one"))
        await next_event(call, "reserved")
        await call.write(reserve(1, "two") if same == "number" else reserve(2, "one"))
        failed = (await next_event(call, "failed")).failed
        assert failed.reason == worker_pb2.Failed.REASON_INVALID
        assert "in use" in failed.message
        assert list(running.decode.service.sessions._requests) == ["one"]
        await call.write(worker_pb2.Command(abort=worker_pb2.Abort(number=1)))
        await until(lambda: not running.decode.leftovers)
        call.cancel()


async def test_commands_that_do_not_hold_together_fail_alone(running: Cluster) -> None:
    async with grpc.aio.insecure_channel(running.decode.address) as channel:
        call = await open_session(channel)
        good = work(9, "good")
        wrong = []
        for number in range(5):
            message = worker_pb2.Work()
            message.CopyFrom(good)
            message.number, message.request_id = number, f"wrong {number}"
            wrong.append(message)
        wrong[0].token_ids = b"\0" * 7
        wrong[1].block_hashes = b"short"
        wrong[2].sampling.temperature = float("nan")
        wrong[3].sampling.logit_bias.add(token_id=5, bias=101.0)
        wrong[4].sampling.n = 0
        for message in wrong:
            await call.write(worker_pb2.Command(reserve=worker_pb2.Reserve(work=message)))
            failed = (await next_event(call, "failed")).failed
            assert (failed.number, failed.reason) == (message.number, worker_pb2.Failed.REASON_INVALID)
        await call.write(prefill(6, "not here"))
        assert "decode server" in (await next_event(call, "failed")).failed.message
        await call.write(worker_pb2.Command())
        await call.write(worker_pb2.Command(abort=worker_pb2.Abort(number=12345, choice=3)))
        await call.write(worker_pb2.Command(reserve=worker_pb2.Reserve(work=good)))
        assert (await next_event(call, "reserved")).reserved.number == 9
        call.cancel()
    await running.all_clean()


async def test_a_draining_worker_takes_no_more_requests(running: Cluster) -> None:
    async with grpc.aio.insecure_channel(running.decode.address) as channel:
        call = await open_session(channel)
        assert await running.decode.service.sessions.drain(1.0) is True
        await next_event(call, "draining")
        await call.write(reserve(1, "late"))
        assert (await next_event(call, "failed")).failed.reason == worker_pb2.Failed.REASON_OVERLOADED
        call.cancel()


async def test_a_drain_ends_with_its_time(running: Cluster) -> None:
    async with grpc.aio.insecure_channel(running.decode.address) as channel:
        call = await open_session(channel)
        await call.write(reserve(1, "stays"))
        await next_event(call, "reserved")
        assert await running.decode.service.sessions.drain(0.01) is False
        call.cancel()


async def test_a_prompt_without_a_ticket_gives_its_first_tokens(running: Cluster) -> None:
    async with grpc.aio.insecure_channel(running.prefill.address) as channel:
        call = await open_session(channel)
        await call.write(prefill(1, "one token", n=2, max_tokens=1, seed=4))
        output = (await next_event(call, "step_output")).step_output
        while not output.token_ids:
            output = (await next_event(call, "step_output")).step_output
        oracle = expected(prompt_of(9), SamplingParams(n=2, max_tokens=1, seed=4))
        assert list(output.token_ids) == [tokens[0] for tokens, _ in oracle]
        call.cancel()


async def test_a_prompt_without_a_ticket_that_does_not_end_is_a_failure(running: Cluster) -> None:
    """No page can go anywhere, so that nobody would ever continue it."""
    async with grpc.aio.insecure_channel(running.prefill.address) as channel:
        call = await open_session(channel)
        await call.write(prefill(1, "goes on", max_tokens=5))
        failed = (await next_event(call, "failed")).failed
        assert (failed.number, failed.reason) == (1, worker_pb2.Failed.REASON_INVALID)
        await until(lambda: not running.prefill.leftovers)
        call.cancel()


@pytest.mark.parametrize("token", ["", "wrong", "secre", "secret "])
async def test_strangers_are_not_let_in(token: str) -> None:
    async with cluster(cluster_token="secret") as running:
        request = running.request(prompt_of(20))
        assert (await running.ask(request)).outcomes == expected(request.token_ids, request.sampling)
        metadata = credentials(token)
        async with grpc.aio.insecure_channel(running.decode.address) as channel:
            session = worker_pb2_grpc.WorkerStub(channel).Session(metadata=metadata)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await session.read()
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
            push = transfer_pb2_grpc.TransferStub(channel).Push(
                iter([transfer_pb2.TransferFrame()]), metadata=metadata
            )
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await push
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
            assert "BATON_CLUSTER_TOKEN" in (caught.value.details() or "")
            stub = health_pb2_grpc.HealthStub(channel)
            answer = await stub.Check(health_pb2.HealthCheckRequest())
            assert answer.status == health_pb2.HealthCheckResponse.SERVING


async def test_health_and_reflection_answer(running: Cluster) -> None:
    async with grpc.aio.insecure_channel(running.decode.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for name in ("", "baton.v1.Worker", "baton.v1.Transfer"):
            answer = await health.Check(health_pb2.HealthCheckRequest(service=name))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
        asked = reflection_pb2.ServerReflectionRequest(list_services="")
        answers = [answer async for answer in reflection.ServerReflectionInfo(iter([asked]))]
        names = {service.name for service in answers[0].list_services_response.service}
        assert {"baton.v1.Worker", "baton.v1.Transfer", "grpc.health.v1.Health"} <= names
