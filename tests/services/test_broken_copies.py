"""A decode server whose copying threads could not start: no memory for their staging."""

import asyncio
from concurrent.futures.thread import BrokenThreadPool
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="pages on a device are copied by Triton's kernels")

from baton.core.errors import Unavailable
from baton_kv_transfer.pages.device_copies import DeviceCopies
from tests.services.cluster import DEADLINE_S, Limits, cluster
from tests.services.device_engine import on_device
from tests.services.fake_engine import fake_layout
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


def test_threads_that_fail_before_all_have_started() -> None:
    """However soon: it is the copies that are told."""

    class Pages:
        def prepare(self, num_bytes: int) -> None:
            raise RuntimeError("CUDA out of memory")

    pages: Any = Pages()
    for _ in range(50):
        copies = DeviceCopies(pages, fake_layout())
        with pytest.raises(BrokenThreadPool):
            copies.submit(print).result(DEADLINE_S)
        copies.close()
