"""Two servers between which NIXL's packets vanish, and gRPC works."""

import asyncio
from dataclasses import replace

import pytest

from baton_kv_transfer.transports.nixl import library as nixl_library
from baton_kv_transfer.transports.nixl import read_thread as nixl_reads
from tests.services.cluster import DEADLINE_S, Limits, cluster
from tests.services.fake_engine import expected, fake_layout
from tests.services.prompts import prompt_of

pytestmark = pytest.mark.skipif(not nixl_library.is_available(), reason="NIXL is not installed")


@pytest.mark.parametrize("first", ["decode", "prefill"])
async def test_a_pool_whose_reads_never_end_falls_to_the_next_transport(first: str, monkeypatch) -> None:
    """Whichever of the two notices first."""
    monkeypatch.setattr(nixl_reads._Connection, "take_if_done", lambda self, read: False)
    limits = Limits(layout=fake_layout(), kv_transport="auto")
    async with cluster(limits, limits) as running:
        sender = running.prefill.service.sender
        receiver = running.decode.service.receiver
        receiver._worker = replace(receiver._worker, stall_timeout_s=0.3 if first == "decode" else 1.0)
        sender.stall_timeout_s = 1.0 if first == "decode" else 0.3
        sender._transports.offer = replace(
            sender._transports.offer, names=("grpc", "nixl")
        )  # no pair: simpler
        request = running.request(prompt_of(40))
        answer = await asyncio.wait_for(running.ask(request), DEADLINE_S)
        assert answer.outcomes == expected(request.token_ids, request.sampling)
        await running.all_clean()
