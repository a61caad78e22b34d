"""Transfers of pages that lie on a device, between whole services: tokens are right only if every byte is."""

import asyncio
import logging
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="pages on a device are copied by Triton's kernels")

from baton.core.errors import InvalidRequest
from baton_kv_transfer.pages import page_writing
from baton_kv_transfer.transports import cuda_ipc as ipc_reader
from baton_kv_transfer.transports.nixl import library as nixl_library
from tests.services.cluster import DEADLINE_S, Cluster, Limits, cluster, until
from tests.services.device_engine import on_device, on_late_device
from tests.services.fake_engine import expected, fake_layout
from tests.services.prompts import prompt_of

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="kernels are interpreted without a GPU only"
)
NIXL = pytest.param(
    "nixl", marks=pytest.mark.skipif(not nixl_library.is_available(), reason="NIXL is not installed")
)
TRANSPORTS = ["grpc", "nccl", NIXL, "cuda_ipc"]
LONG = 90  # tokens


def limits(transport: str, block_size: int = 4, place=on_device) -> Limits:
    return Limits(
        layout=fake_layout(block_size),
        max_num_batched_tokens=32,
        kv_transport=transport,
        on_device=place,
    )


def carried(running: Cluster, transport: str) -> int:
    return int(running.decode.service._stats.transports[transport].num_bytes)


async def answer_is_right(running: Cluster, length: int, salt: int = 0, **sampling: Any) -> None:
    request = running.request(prompt_of(length, salt), **sampling)
    answer = await asyncio.wait_for(running.ask(request), DEADLINE_S)
    assert answer.outcomes == expected(request.token_ids, request.sampling)


async def until_carries(running: Cluster, transport: str) -> None:
    """Send requests until pages go over the transport: a pair is made in the background meanwhile."""
    async with asyncio.timeout(DEADLINE_S):
        salt = 0
        while not carried(running, transport):
            salt += 1
            await answer_is_right(running, 9, salt)


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_prompts_of_all_kinds(transport: str) -> None:
    async with cluster(limits(transport), limits(transport)) as running:
        await until_carries(running, transport)
        for length in (1, 4, 33, LONG):
            await answer_is_right(running, length, salt=100)
        await answer_is_right(running, 37, salt=101, n=3, seed=5)
        await asyncio.gather(*(answer_is_right(running, 20 + salt, salt) for salt in range(6)))
        await running.all_clean()


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_blocks_of_different_sizes(transport: str) -> None:
    async with cluster(limits(transport, 8), limits(transport, 3)) as running:
        await until_carries(running, transport)
        for length in (1, 8, 9, LONG):
            await answer_is_right(running, length, salt=100)
        await running.all_clean()


@pytest.mark.parametrize("transport", ["grpc", "nccl", NIXL])
@pytest.mark.parametrize("places", [(on_device, None), (None, on_device)], ids=["to host", "to device"])
async def test_one_side_on_a_device(transport: str, places: tuple) -> None:
    prefill, decode = (limits(transport, place=place) for place in places)
    async with cluster(prefill, decode) as running:
        await until_carries(running, transport)
        await answer_is_right(running, LONG, salt=100)
        await running.all_clean()


async def test_cuda_ipc_needs_a_device_on_both_sides() -> None:
    async with cluster(limits("cuda_ipc"), limits("grpc", place=None)) as running:
        with pytest.raises(InvalidRequest, match="cuda_ipc was asked for, but the decode server has only"):
            await running.ask(running.request(prompt_of(20)))


async def test_cuda_ipc_is_what_two_servers_of_one_host_choose() -> None:
    async with cluster(limits("auto"), limits("auto")) as running:
        await answer_is_right(running, LONG)
        assert carried(running, "cuda_ipc")
        assert not carried(running, "grpc")


@pytest.mark.parametrize("transport", ["grpc", "cuda_ipc"])
async def test_no_page_leaves_before_the_device_has_written_it(transport: str) -> None:
    prefill = limits(transport, place=on_late_device)
    async with cluster(prefill, limits(transport)) as running:
        for length in (5, 33, LONG):
            await answer_is_right(running, length)
        await running.all_clean()


@pytest.mark.parametrize("transport", ["grpc", "cuda_ipc"])
async def test_aborts_at_any_moment_leave_nothing(transport: str) -> None:
    async with cluster(limits(transport), limits(transport)) as running:
        await answer_is_right(running, LONG)
        for turn in range(12):
            request = running.request(prompt_of(LONG, salt=turn + 1), max_tokens=30)
            task = asyncio.create_task(running.ask(request))
            for _ in range(8 * turn):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait((task,), timeout=DEADLINE_S)
        await running.all_clean()
        await answer_is_right(running, LONG, salt=500)


async def test_corrupted_pages_never_reach_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """One bit of what was fetched, the first time: the checksum finds it, and the router tries again."""
    async with cluster(limits("cuda_ipc"), limits("cuda_ipc")) as running:
        await answer_is_right(running, 5)
        device = running.decode.engine.page_store.device_pages
        checksum, left = device._checksum, [1]

        def spoilt_once(lane, words):
            if left:
                left.pop()
                words[0] ^= 1 << 7
            return checksum(lane, words)

        monkeypatch.setattr(device, "_checksum", spoilt_once)
        await answer_is_right(running, LONG)
        assert running.decode.service._stats.outcomes["checksum"] == 1
        await running.all_clean()


async def test_a_pool_is_unmapped_soon_after_its_last_transfer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ipc_reader, "LINGER_S", 0.02)
    async with cluster(limits("cuda_ipc"), limits("cuda_ipc")) as running:
        ipc = running.decode.engine.page_store.device_pages._ipc
        for salt in range(2):
            await answer_is_right(running, LONG, salt)
            await until(lambda: not ipc.opened, "the pool is unmapped")
        await running.all_clean()


async def test_a_handle_that_can_not_be_opened_falls_to_the_next_transport(caplog) -> None:
    """As where containers do not see each other's GPUs. The router tries again, by another transport."""
    caplog.set_level(logging.INFO)
    async with cluster(limits("auto"), limits("auto")) as running:
        transports = running.prefill.service.sender._transports
        route_of = transports.route

        def route_to_nowhere(name, request):
            route = route_of(name, request)
            if name == "cuda_ipc":
                route._memory.cuda_ipc.handle = bytes(64)
            return route

        transports.route = route_to_nowhere
        await answer_is_right(running, LONG)
        assert running.decode.service._stats.outcomes["cuda_ipc"] == 1
        assert not carried(running, "cuda_ipc")
        assert "cuda_ipc failed lately" in caplog.text
        await running.all_clean()


async def test_a_connection_waits_where_pages_wait_to_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_writing, "MAX_WAITING_BYTES", 1)
    async with cluster(limits("grpc"), limits("grpc")) as running:
        await answer_is_right(running, LONG)
        await running.all_clean()
