"""A decode server whose copying threads could not start: no memory for their staging."""

import asyncio

import pytest
import torch

pytest.importorskip("triton", reason="pages on a device are copied by Triton's kernels")

from baton.core.errors import Unavailable
from tests.services.cluster import DEADLINE_S, Limits, cluster
from tests.services.device_engine import on_device
from tests.services.prompts import prompt_of

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="kernels are interpreted without a GPU only"
)


async def test_pages_come_back_where_none_can_be_written() -> None:
    def broken(engine):
        engine = on_device(engine)

        def fail(num_bytes: int) -> None:
            raise RuntimeError("CUDA out of memory")

        engine.page_store.device_pages.prepare = fail
        return engine

    async with cluster(Limits(), Limits(on_device=broken)) as running:
        with pytest.raises(Unavailable):
            await asyncio.wait_for(running.ask(running.request(prompt_of(20))), DEADLINE_S)
        await running.all_clean()
