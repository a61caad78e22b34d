"""Signals to a router: what runs over gRPC goes on, as over HTTP; the second signal ends it."""

import asyncio
import gc
import json
import os
import signal
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from baton.config import RouterConfig
from baton.rpc import server
from baton.v1 import inference_pb2 as pb
from baton.v1 import inference_pb2_grpc
from baton_router import main as router_main
from baton_router.served_model import ServedModel
from baton_router.workers.pool import WorkerPool
from tests.free_ports import free_port
from tests.router_front.fake_backend import FakeBackend
from tests.services.cluster import until

DEADLINE_S = 10


@pytest.fixture
async def router(
    served: ServedModel, backend: FakeBackend, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncGenerator[RouterConfig]:
    """One without workers; of each answer one token comes, the next waits for the backend."""

    async def no_workers(self: WorkerPool, on_change: object) -> None:
        await asyncio.Event().wait()

    backend.hang_after = 1
    monkeypatch.setattr(server, "_STOP_GRACE_S", 0.05)
    monkeypatch.setattr(router_main, "_served_model", lambda *_: served)
    monkeypatch.setattr(router_main, "config_digest", lambda _: b"x" * 16)
    monkeypatch.setattr(gc, "freeze", lambda: None)
    monkeypatch.setattr(WorkerPool, "run", no_workers)
    config = RouterConfig(
        model_dir, ("tiny",), ("unix:/p",), ("unix:/d",), http_port=free_port(), grpc_port=free_port()
    )
    task = asyncio.create_task(router_main._main(config))
    yield config
    await asyncio.wait_for(task, DEADLINE_S)
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().remove_signal_handler(number)


@pytest.fixture
async def call(router: RouterConfig, backend: FakeBackend) -> AsyncGenerator[Any]:
    """Of twelve tokens, of which one has come."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{router.grpc_port}") as channel:
        request = pb.GenerateRequest(text="x", stream=True, sampling=pb.Sampling(max_tokens=12))
        call = inference_pb2_grpc.InferenceStub(channel).Generate(
            request, wait_for_ready=True, timeout=DEADLINE_S
        )
        await call.read()
        await asyncio.wait_for(backend.is_hanging.wait(), DEADLINE_S)
        yield call


async def test_without_workers_it_lives_and_is_not_healthy(call: Any, router: RouterConfig) -> None:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{router.grpc_port}") as channel:
        asked = health_pb2.HealthCheckRequest(service="baton.v1.Inference")
        answer = await health_pb2_grpc.HealthStub(channel).Check(asked, timeout=DEADLINE_S)
    assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{router.http_port}") as client:
        assert (await client.get("/live")).status_code == 200
    os.kill(os.getpid(), signal.SIGINT)


async def test_sigterm_lets_grpc_calls_end(call: Any, backend: FakeBackend) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.sleep(0.5)  # ten times the moment that calls have where nobody waits for them
    backend.may_go_on.set()
    responses = []
    while (response := await call.read()) is not grpc.aio.EOF:
        responses.append(response)
    assert len(responses) == 11
    assert responses[-1].finish_reason == "length"


async def test_the_second_signal_cuts_them(call: Any) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.sleep(0.1)
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    assert caught.value.details() == "The server is stopping. Try again later."


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
async def test_what_is_cut_over_http_ends_with_openais_error(
    call: Any, router: RouterConfig, backend: FakeBackend, first: signal.Signals
) -> None:
    """`call` is there as well: the router serves, and has more than one to cut."""
    body = {"prompt": "x", "max_tokens": 12}
    async with httpx.AsyncClient(
        base_url=f"http://127.0.0.1:{router.http_port}", timeout=DEADLINE_S
    ) as client:
        whole = asyncio.create_task(client.post("/v1/completions", json=body))
        async with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as stream:
            lines = stream.aiter_lines()
            assert "choices" in await anext(lines)
            await until(lambda: backend.num_running == 3)
            os.kill(os.getpid(), first)
            if first == signal.SIGTERM:
                os.kill(os.getpid(), signal.SIGTERM)
            *_, last = [line async for line in lines if line]
        error = json.loads(last.removeprefix("data: "))["error"]
        answer = await whole
    assert (error["code"], error["message"]) == ("unavailable", "The server is stopping. Try again later.")
    assert (answer.status_code, answer.json()["error"]) == (503, error)
    with pytest.raises(grpc.aio.AioRpcError):
        await call.read()
