"""Callers with the cluster's rights that open a call and say nothing."""

import asyncio
from collections.abc import AsyncIterator

import grpc
import pytest

from baton.rpc import first_message
from baton.v1 import transfer_pb2_grpc, worker_pb2_grpc
from tests.services.cluster import DEADLINE_S, Cluster, Limits, cluster


@pytest.fixture
async def running(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Cluster]:
    monkeypatch.setattr(first_message, "FIRST_MESSAGE_TIMEOUT_S", 0.1)
    async with cluster(decode=Limits(kv_transport="nccl")) as running:  # which serves Pair
        yield running


@pytest.mark.parametrize("method", ["Session", "Push", "Pair"])
async def test_a_call_without_a_word_is_refused_in_time(running: Cluster, method: str) -> None:
    async with grpc.aio.insecure_channel(running.decode.address) as channel:
        stubs = {
            "Session": worker_pb2_grpc.WorkerStub(channel).Session,
            "Push": transfer_pb2_grpc.TransferStub(channel).Push,
            "Pair": transfer_pb2_grpc.TransferStub(channel).Pair,
        }
        assert await asyncio.wait_for(stubs[method]().code(), DEADLINE_S) is (
            grpc.StatusCode.FAILED_PRECONDITION
        )
    await running.all_clean()
