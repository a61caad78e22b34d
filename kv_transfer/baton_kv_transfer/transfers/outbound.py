"""The prefill side of one transfer, without its transport: which pages wait to leave, and who holds them.

Pure: no I/O, no clock.
"""

from collections import deque
from collections.abc import Callable, Sequence

from baton.core.ticket import Ticket
from baton.v1 import transfer_pb2
from baton_kv_transfer.pages import wire
from baton_kv_transfer.pages.frames import PagesToSend


class OutboundTransfer:
    """A queue of pages, then one last frame. Each hold on pages that comes in is given back exactly once,
    through `release`, whatever happens."""

    def __init__(
        self, ticket: Ticket, release: Callable[[tuple[int, ...]], None], scales: Sequence[float] = ()
    ) -> None:
        """`scales`: of this server's pages (KVLayout)."""
        self.ticket = ticket
        self.is_over = False
        self.outcome = "committed"  # once the last frame is acknowledged
        # Bounded by what is put in: the request's blocks, once for each group of layers, and one last frame.
        self._queue: deque[PagesToSend | transfer_pb2.TransferFrame] = deque()
        self._release = release
        self._scales = scales
        self._held: list[tuple[int, ...]] = []  # of pages that were taken and are still read

    def add_pages(self, pages: PagesToSend) -> None:
        """Queue pages."""
        if self.is_over:
            self._release(pages.blocks)
        elif pages.blocks:
            self._queue.append(pages)

    def commit(self, first_tokens: list[int], finished_choices: list[int]) -> None:
        """The prompt is computed, and all its pages are queued."""
        frame = self.frame()
        frame.commit.first_tokens.extend(first_tokens)
        frame.commit.finished_choices.extend(finished_choices)
        wire.seal(frame.commit, self._scales)
        self._queue.append(frame)

    def withdraw(self) -> None:
        """The first tokens ended the request: decode need not wait."""
        frame = self.frame()
        frame.withdraw.SetInParent()
        self.outcome = "withdrawn"
        self._queue.append(frame)

    def next(self) -> PagesToSend | transfer_pb2.TransferFrame | None:
        """What leaves next: pages, or the last frame. None where there is nothing yet."""
        if not self._queue:
            return None
        item = self._queue.popleft()
        if isinstance(item, PagesToSend):
            self._held.append(item.blocks)
        return item

    def done_with(self, blocks: tuple[int, ...]) -> None:
        """The transport has read the pages of one `next`."""
        if not self.is_over:
            self._held.remove(blocks)
            self._release(blocks)

    def close(self) -> None:
        """Nothing is read any more, however the transfer ended."""
        self.is_over = True
        for blocks in self._held:
            self._release(blocks)
        self._held.clear()
        while self._queue:
            item = self._queue.popleft()
            if isinstance(item, PagesToSend):
                self._release(item.blocks)

    def frame(self) -> transfer_pb2.TransferFrame:
        """A new frame with the transfer's ticket."""
        return transfer_pb2.TransferFrame(transfer_id=self.ticket.transfer_id, epoch=self.ticket.epoch)
