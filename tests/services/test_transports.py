"""Every transport carries the same pages to the same end."""

import asyncio
from typing import Any

import pytest

from baton.core.errors import InvalidRequest
from baton_kv_transfer.transports.nixl import library as nixl_library
from tests.services.cluster import DEADLINE_S, Cluster, Limits, cluster, until
from tests.services.fake_engine import expected, fake_layout
from tests.services.prompts import prompt_of

TRANSPORTS = [
    "grpc",
    "nccl",
    pytest.param(
        "nixl", marks=pytest.mark.skipif(not nixl_library.is_available(), reason="NIXL is not installed")
    ),
]
LONG = 200  # tokens


def limits(transport: str, block_size: int = 4) -> Limits:
    return Limits(
        layout=fake_layout(block_size), max_num_batched_tokens=32, num_blocks=512, kv_transport=transport
    )


def carried(running: Cluster, transport: str) -> int:
    return int(running.decode.service._stats.transports[transport].num_bytes)


async def until_carries(running: Cluster, transport: str) -> None:
    """Send requests until pages go over the transport: a pair is made in the background meanwhile."""
    async with asyncio.timeout(DEADLINE_S):
        salt = 0
        while not carried(running, transport):
            salt += 1
            await answer_is_right(running, LONG, salt)


async def answer_is_right(running: Cluster, length: int, salt: int = 0, **sampling: Any) -> None:
    request = running.request(prompt_of(length, salt), **sampling)
    answer = await asyncio.wait_for(running.ask(request), DEADLINE_S)
    assert answer.outcomes == expected(request.token_ids, request.sampling)


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_prompts_of_all_kinds(transport: str) -> None:
    async with cluster(limits(transport), limits(transport)) as running:
        await until_carries(running, transport)
        for length in (1, 3, 4, 5, 31, 32, 33, LONG):
            await answer_is_right(running, length, salt=100)
        await answer_is_right(running, 77, salt=101, n=3, seed=5)
        others = {name: carried(running, name) for name in ("grpc", "nccl", "nixl") if name != transport}
        await asyncio.gather(*(answer_is_right(running, 40 + salt, salt) for salt in range(200, 232)))
        assert others == {name: carried(running, name) for name in others}
        await running.all_clean()


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_blocks_of_different_sizes(transport: str) -> None:
    async with cluster(limits(transport, 8), limits(transport, 3)) as running:
        await until_carries(running, transport)
        for length in (1, 8, 9, 50, LONG):
            await answer_is_right(running, length, salt=300)
        await running.all_clean()


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_client_that_leaves_while_pages_travel(transport: str) -> None:
    async with cluster(limits(transport), limits(transport)) as running:
        await until_carries(running, transport)
        for num_steps in range(4):
            before, started = carried(running, transport), running.prefill.engine.runner.num_steps
            task = asyncio.create_task(running.ask(running.request(prompt_of(LONG, 400 + num_steps))))
            runner = running.prefill.engine.runner
            await until(lambda: runner.num_steps >= started + num_steps or task.done())  # noqa: B023
            task.cancel()
            await asyncio.wait((task,), timeout=DEADLINE_S)
            await running.all_clean()
            assert carried(running, transport) >= before
        await answer_is_right(running, LONG, salt=500)


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_decode_server_that_comes_back_is_used_again(transport: str) -> None:
    async with cluster(limits(transport), limits(transport)) as running:
        await until_carries(running, transport)
        await running.decode.stop()
        await until(lambda: running.links[1].worker is None)
        await running.decode.start()
        await running.connected()
        await until_carries(running, transport)
        await running.all_clean()


async def test_a_transport_that_only_one_side_may_use_is_refused_in_words() -> None:
    async with cluster(limits("nccl"), limits("grpc")) as running:
        with pytest.raises(InvalidRequest, match="nccl was asked for, but the decode server has only grpc"):
            await running.ask(running.request(prompt_of(20)))
        await running.all_clean()
