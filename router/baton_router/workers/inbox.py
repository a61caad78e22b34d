"""What the workers of one attempt have said and its flight has not read yet."""

import asyncio

from baton.core.errors import BatonError
from baton.core.request import PromptLogprobs, TokenEvent
from baton.core.transfer_stats import TransferReport
from baton.v1 import transfer_pb2

InboxItem = TokenEvent | PromptLogprobs | transfer_pb2.Ticket | TransferReport | BatonError


class Inbox:
    """One reader; never blocks its writers, the sessions' readers.

    Bounded by the request itself: a ticket, its prompt and its tokens, a report, and an error of each worker.
    """

    def __init__(self, news: asyncio.Event) -> None:
        """`news` is set whenever something comes: a reader may have several inboxes."""
        self._items: list[InboxItem] = []
        self._news = news

    def put(self, item: InboxItem) -> None:
        """Add an item."""
        self._items.append(item)
        self._news.set()

    def take_all(self) -> list[InboxItem]:
        """Everything that has come."""
        items, self._items = self._items, []
        return items
