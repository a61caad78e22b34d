"""Transport "nixl": the decode server reads pages out of the prefill server's pool with NIXL."""

from functools import partial

from baton.core.page_ports import DevicePages, PageStore
from baton.v1 import transfer_pb2
from baton_kv_transfer.pages.device_copies import DeviceCopies
from baton_kv_transfer.pages.page_reading import PageReader
from baton_kv_transfer.transports import base
from baton_kv_transfer.transports.nixl.library import is_available
from baton_kv_transfer.transports.nixl.reader import SLOT_BYTES, NixlReader, NixlSource, RemoteMemory
from baton_kv_transfer.transports.read_route import ReadRoute


class _NixlRoute(ReadRoute):
    name = "nixl"
    failures = ReadRoute.failures | {"nixl"}
    read_bytes = SLOT_BYTES


class _NixlIntake(base.Intake):
    def __init__(self, reader: NixlReader, request: base.IntakeRequest) -> None:
        super().__init__(request)
        self._reader = reader
        pool, bytes_per_block = request.opening.nixl, request.layout.bytes_per_block
        gpu_index = pool.gpu_index if pool.HasField("gpu_index") else None
        self._remote = RemoteMemory(
            pool.agent_metadata, pool.base_address, pool.num_blocks, bytes_per_block, gpu_index
        )

    async def prepare(self) -> None:
        """See Intake: the first read would wait for the connection."""
        await self._reader.connect(self._remote, self.request.stall_timeout_s)

    async def fetch(self, shipped: transfer_pb2.Shipped) -> base.Landing:
        """See Intake."""
        layout, timeout_s = self.request.layout, self.request.stall_timeout_s
        place = base.shipped_place(shipped, layout)
        offset, length = place.first_layer * layout.bytes_per_layer, place.num_layers * layout.bytes_per_layer
        ranges = [(block * layout.bytes_per_block + offset, length) for block in shipped.source_blocks]
        return await self._reader.read(self._remote, ranges, crc=shipped.pages.crc32c, timeout_s=timeout_s)


def _sending(store: PageStore, reader: PageReader) -> base.SendingSide:
    device, num_bytes = store.device_pages, store.num_blocks * store.layout.bytes_per_block
    pool = store.memory[:num_bytes] if device is None else device.pool
    source = NixlSource(pool, store.layout.bytes_per_block, store.num_blocks, _gpu_index(device))
    remote = source.remote
    nixl = transfer_pb2.NixlMemory(
        agent_metadata=remote.agent_metadata,
        base_address=remote.base_address,
        num_blocks=remote.num_blocks,
        gpu_index=remote.gpu_index,
    )
    memory = transfer_pb2.Open(nixl=nixl)

    async def close() -> None:
        source.close()

    return base.SendingSide(
        route=lambda request: _NixlRoute(request, store.layout, reader, memory), close=close
    )


def _receiving(store: PageStore, copies: DeviceCopies | None) -> base.ReceivingSide:
    is_on_gpu = _gpu_index(store.device_pages) is not None
    reader = NixlReader(device=store.device_pages if is_on_gpu else None)
    return base.ReceivingSide(intake=partial(_NixlIntake, reader), close=reader.close)


def _gpu_index(device: DevicePages | None) -> int | None:
    """NIXL tells memory of GPUs from memory of the host."""
    return device.gpu_index if device is not None and device.device == "cuda" else None


def _lack(store: PageStore) -> str | None:
    return None if is_available() else base.lacks_package("nixl")


TRANSPORT = base.Transport(sending=_sending, receiving=_receiving, lack=_lack)
