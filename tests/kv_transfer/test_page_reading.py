"""Stages of pages that leave a device: one whose making nobody waits for any more is not lost."""

import asyncio
import threading

import pytest

from baton.core.reservation import FramePlace
from baton_kv_transfer.pages import page_reading
from baton_kv_transfer.pages.device_copies import DeviceCopies
from baton_kv_transfer.pages.frames import PagesToSend
from baton_kv_transfer.pages.page_reading import DeviceReader
from tests.services.fake_engine import fake_layout

LAYOUT = fake_layout()
PAGES = PagesToSend(FramePlace(0, 1, 0, 2), (0,))


class SlowDevice:
    """Takes a while to make page-locked memory, as CUDA does."""

    def __init__(self) -> None:
        self.may_make = threading.Event()
        self.is_making = threading.Event()
        self.error: Exception | None = None

    def prepare(self, num_bytes: int) -> None: ...

    def host_buffer(self, num_bytes: int) -> memoryview:
        self.is_making.set()
        assert self.may_make.wait(10)
        if self.error is not None:
            raise self.error
        return memoryview(bytearray(num_bytes))

    def read(self, block_ids, first_layer, num_layers, target) -> None: ...


async def take_all(reader: DeviceReader) -> int:
    return len([piece async for piece in reader.pieces(PAGES)])


@pytest.mark.parametrize("how", ["aborted", "failed"])
async def test_a_stage_is_not_lost(how: str) -> None:
    device = SlowDevice()
    copies = DeviceCopies(device, LAYOUT)  # type: ignore[arg-type]
    copies.stage_bytes = 4096
    reader = DeviceReader(LAYOUT, copies)
    for _ in range(page_reading.NUM_STAGES):
        device.may_make.clear()
        device.is_making.clear()
        task = asyncio.create_task(take_all(reader))
        await asyncio.to_thread(device.is_making.wait, 10)
        if how == "aborted":
            task.cancel()
        else:
            device.error = RuntimeError("CUDA out of memory")
        device.may_make.set()
        with pytest.raises((asyncio.CancelledError, RuntimeError)):
            await task
        device.error = None
    assert await asyncio.wait_for(take_all(reader), 2) == 1
    copies.close()
