"""The log says that a router serves when it does, and not before."""

import asyncio
import logging

import pytest

from baton_router.main import _tell_health


class Pool:
    """Ready when it is told so."""

    is_ready = False


class Rpc:
    """Keeps what it was told, and says when that was."""

    def __init__(self) -> None:
        self.told: asyncio.Queue[bool] = asyncio.Queue()

    async def set_serving(self, is_serving: bool) -> None:
        self.told.put_nowait(is_serving)


async def test_serving_is_said_when_there_are_workers(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    pool, rpc, changed = Pool(), Rpc(), asyncio.Event()
    task = asyncio.create_task(_tell_health(rpc, pool, changed, "'m' at http://x"))  # type: ignore[arg-type]
    for is_ready in (False, True, True, False, True, True):  # the last: what came before has been logged
        pool.is_ready = is_ready
        changed.set()
        assert await asyncio.wait_for(rpc.told.get(), 10) == is_ready
    task.cancel()
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        "serving 'm' at http",
        "not serving 'm' at http",
        "serving 'm' at http",
    ]
