"""What the workers of one request have said and its flow has not read yet."""

import asyncio

from baton.core.errors import BatonError, RequestFailed
from baton.core.request import TokenEvent
from baton.core.transfer_stats import TransferReport
from baton.v1 import transfer_pb2

InboxItem = TokenEvent | transfer_pb2.Ticket | TransferReport | BatonError


class Inbox:
    """One reader; never blocks its writers, the sessions' readers.

    Bounded by the request itself: a ticket, its tokens, a report, and an error from each worker.
    """

    def __init__(self) -> None:
        self._items: list[InboxItem] = []
        self._wake = asyncio.Event()

    def put(self, item: InboxItem) -> None:
        """Add an item."""
        self._items.append(item)
        self._wake.set()

    def wake(self) -> None:
        """Let the reader look around, though nothing has come."""
        self._wake.set()

    async def take_all(self, timeout_s: float) -> list[InboxItem]:
        """Everything that has come; may be nothing after `wake`. Raises RequestFailed after the time-out."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._wake.wait()
        except TimeoutError:
            raise RequestFailed(
                f"The workers said nothing about this request for {timeout_s:.0f} s."
            ) from None
        self._wake.clear()
        items, self._items = self._items, []
        return items
