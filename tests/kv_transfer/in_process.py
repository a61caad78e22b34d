"""Transport "in_process" of tests: decode reads prefill's pool where it lies, in the same process.

It is what docs/how-to/add-a-transport.md asks for, less the proto message: the pool is told of by a variable.
"""

from contextlib import suppress

from baton.core.errors import TransferRefused
from baton.core.page_ports import PageStore
from baton.core.ticket import WorkerTransports
from baton.v1 import transfer_pb2
from baton_kv_transfer.pages.device_copies import DeviceCopies
from baton_kv_transfer.pages.frames import checksum, views
from baton_kv_transfer.pages.page_reading import PageReader
from baton_kv_transfer.transports import base
from baton_kv_transfer.transports.read_route import ReadRoute

pools: list[PageStore] = []  # that can be read
intakes: list[base.Intake] = []  # that were prepared and not closed
num_landings = 0  # that were not released


class _Route(ReadRoute):
    name = "in_process"
    failures = ReadRoute.failures | {"in_process"}
    read_bytes = 128


class _Intake(base.Intake):
    async def prepare(self) -> None:
        if not pools:
            raise TransferRefused("in_process", "there is no pool to be read")
        intakes.append(self)

    async def fetch(self, shipped: transfer_pb2.Shipped) -> base.Landing:
        global num_landings
        place = base.shipped_place(shipped, self.request.layout)
        payload = b"".join(views(pools[0], shipped.source_blocks, place))
        if checksum([memoryview(payload)]) != shipped.pages.crc32c:
            raise TransferRefused("checksum", "pages were not what their server said of them")
        num_landings += 1
        return base.Landing(memoryview(payload), _release)

    def close(self) -> None:
        with suppress(ValueError):
            intakes.remove(self)


def _release() -> None:
    global num_landings
    num_landings -= 1


def _sending(store: PageStore, reader: PageReader) -> base.SendingSide:
    pools.append(store)
    memory = transfer_pb2.Open()

    async def close() -> None:
        pools.clear()

    return base.SendingSide(route=lambda request: _Route(request, store.layout, reader, memory), close=close)


def _receiving(store: PageStore, copies: DeviceCopies | None) -> base.ReceivingSide:
    return base.ReceivingSide(intake=_Intake)


def _lack(store: PageStore) -> str | None:
    return None if store.device_pages is None else "is for pages in host memory"


def _obstacle(mine: WorkerTransports, theirs: WorkerTransports) -> str | None:
    return None if mine.is_on_host_of(theirs) else "the two servers are not on one host"


TRANSPORT = base.Transport(sending=_sending, receiving=_receiving, lack=_lack, obstacle=_obstacle)
