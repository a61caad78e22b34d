"""Pages that have come and were checked, on their way into the places that were reserved for them. Pure."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from baton.core.page_ports import PageStore
from baton.core.reservation import FramePlace
from baton_kv_transfer.pages.convert import PageConverter, Pages

WhenWritten = Callable[[BaseException | None], None]


@dataclass(frozen=True, slots=True)
class Arrived:
    """Pages of one place, in their sender's layout, and where they belong: see PageConverter.write."""

    converter: PageConverter
    block_table: Sequence[int]
    first_token: int
    num_tokens: int
    place: FramePlace
    payload: Any  # bytes in host memory, or a buffer of DevicePages

    def convert_into(self, pages: Pages, payload: memoryview) -> None:
        """Write the payload, as it lies in host memory, into pages there."""
        self.converter.write(pages, self.block_table, self.first_token, self.num_tokens, self.place, payload)


class PageWriter(Protocol):
    """Writes pages."""

    def write(self, arrived: Arrived, when_written: WhenWritten) -> None:
        """Write what has arrived, and tell: at once, or later on the event loop."""
        ...

    async def room(self) -> None:
        """Wait while too much waits to be written."""
        ...


class HostWriter:
    """Pages in host memory are written on the spot."""

    def __init__(self, store: PageStore) -> None:
        self._store = store

    def write(self, arrived: Arrived, when_written: WhenWritten) -> None:
        """See PageWriter."""
        try:
            arrived.convert_into(self._store, arrived.payload)
        except BaseException as error:
            when_written(error)
            raise
        when_written(None)

    async def room(self) -> None:
        """See PageWriter."""
