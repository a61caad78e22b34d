"""What this worker can move pages with, found out once at start; a transport is imported when it is used."""

import importlib.util
import logging
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from baton.core.errors import StartupError
from baton.core.ports import DevicePages, ExportedPool, PageStore
from baton.core.ticket import Ticket, WorkerTransports
from baton_kv_transfer.pages.device_copies import DeviceCopies
from baton_kv_transfer.pages.page_reading import PageReader, page_reader
from baton_kv_transfer.pages.page_writing import PageWriter, page_writer
from baton_kv_transfer.transports.nixl import library as nixl_library

if TYPE_CHECKING:
    from baton_kv_transfer.transports.cuda_ipc import IpcReader
    from baton_kv_transfer.transports.grpc_push import PushCall
    from baton_kv_transfer.transports.nixl.reader import NixlReader, NixlSource
    from baton_kv_transfer.transports.read_route import ReadRoute

logger = logging.getLogger(__name__)

T = TypeVar("T")

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class SendingTransports:
    """A prefill server's transports. Raises StartupError where one that is asked for does not work."""

    def __init__(self, store: PageStore, asked: str | None = None) -> None:
        self._store = store
        self._copies = _copies(store)
        self._nixl_source: NixlSource | None = None
        self._exported: ExportedPool | None = None
        self.reader: PageReader = page_reader(store, self._copies)
        names = _installed(asked, store.device_pages)
        if "nixl" in names:
            self._nixl_source = _unless_it_fails("nixl", self._open_nixl, asked, names)
        if "cuda_ipc" in names:
            self._exported = _unless_it_fails("cuda_ipc", self._export, asked, names)
        self.offer = _offer(names, store.device_pages)

    @property
    def checksum(self) -> Callable[[Any], int] | None:
        """Of bytes on the device where the pages are; None: they are host memory."""
        return _checksum(self._store.device_pages)

    def read_route(self, name: str, ticket: Ticket, call: "PushCall", stall_timeout_s: float) -> "ReadRoute":
        """A transfer's way over "nixl" or "cuda_ipc", which this worker has."""
        from baton_kv_transfer.transports import cuda_ipc as ipc_reader
        from baton_kv_transfer.transports.nixl import messages as nixl_route
        from baton_kv_transfer.transports.read_route import ReadRoute

        if name == "nixl":
            assert self._nixl_source is not None
            describe = partial(nixl_route.describe, self._nixl_source)
        else:
            assert self._exported is not None
            describe = partial(ipc_reader.describe, self._exported)
        return ReadRoute(name, ticket, self._store.layout, self.reader, describe, call, stall_timeout_s)

    def close(self) -> None:
        """Let go of what was registered."""
        if self._nixl_source is not None:
            self._nixl_source.close()
        if self._copies is not None:
            self._copies.close()

    def _export(self) -> ExportedPool:
        assert self._store.device_pages is not None
        return self._store.device_pages.export()

    def _open_nixl(self) -> "NixlSource":
        from baton_kv_transfer.transports.nixl.reader import NixlSource

        bytes_per_block, num_blocks = self._store.layout.bytes_per_block, self._store.num_blocks
        device = self._store.device_pages
        if device is not None:
            return NixlSource(device.pool, bytes_per_block, num_blocks, _gpu_index(device))
        return NixlSource(self._store.memory[: num_blocks * bytes_per_block], bytes_per_block, num_blocks)


class ReceivingTransports:
    """A decode server's transports; made on its event loop. Raises StartupError as SendingTransports does."""

    def __init__(self, store: PageStore, asked: str | None = None) -> None:
        self._store = store
        self._copies = _copies(store)
        self.writer: PageWriter = page_writer(store, self._copies)
        self.nixl_reader: NixlReader | None = None
        self.ipc_reader: IpcReader | None = None
        names = _installed(asked, store.device_pages)
        if "nixl" in names:
            self.nixl_reader = _unless_it_fails("nixl", self._open_nixl, asked, names)
        if "cuda_ipc" in names:
            self.ipc_reader = _unless_it_fails("cuda_ipc", self._open_ipc, asked, names)
        self.offer = _offer(names, store.device_pages)

    @property
    def checksum(self) -> Callable[[Any], int] | None:
        """Of bytes on the device where the pages are; None: they are host memory."""
        return _checksum(self._store.device_pages)

    async def close(self) -> None:
        """End what runs."""
        if self.nixl_reader is not None:
            await self.nixl_reader.close()
        if self.ipc_reader is not None:
            await self.ipc_reader.close()
        if self._copies is not None:
            self._copies.close()

    def _open_nixl(self) -> "NixlReader":
        from baton_kv_transfer.transports.nixl.reader import NixlReader

        device = self._store.device_pages
        if device is None or _gpu_index(device) is None:
            return NixlReader()
        return NixlReader(device=device)

    def _open_ipc(self) -> "IpcReader":
        from baton_kv_transfer.transports.cuda_ipc import IpcReader

        assert self._copies is not None
        self._copies.pages.export()  # what can't be offered can't be mapped either
        return IpcReader(self._copies, self._store.layout)


def host_id() -> str:
    """A word that is the same for all processes of one running machine, containers included."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:  # not Linux
        return socket.gethostname()


def _copies(store: PageStore) -> DeviceCopies | None:
    return None if store.device_pages is None else DeviceCopies(store.device_pages, store.layout)


def _offer(names: list[str], device: DevicePages | None) -> WorkerTransports:
    if device is None:
        return WorkerTransports(host_id(), "cpu", tuple(names))
    return WorkerTransports(host_id(), device.device, tuple(names), device.gpu_id)


def _checksum(device: DevicePages | None) -> Callable[[Any], int] | None:
    return None if device is None else device.checksum


def _gpu_index(device: DevicePages) -> int | None:
    """For libraries that tell memory of GPUs from memory of the host."""
    return device.gpu_index if device.device == "cuda" else None


def _installed(asked: str | None, device: DevicePages | None) -> list[str]:
    """gRPC, which is always there, and those of the others whose packages are and which may be used."""
    names = ["grpc"]
    if asked in (None, "nccl") and _is_installed("torch"):
        names.append("nccl")
    if asked in (None, "nixl") and nixl_library.is_available():
        names.append("nixl")
    if asked in (None, "cuda_ipc") and device is not None:
        names.append("cuda_ipc")
    if asked == "cuda_ipc" and device is None:
        raise StartupError("KV transport cuda_ipc is for pages on a GPU: use --device cuda, or another one")
    if asked is not None and asked not in names:
        raise StartupError(
            f"KV transport {asked} was asked for, but its package is not installed: "
            f"pip install 'baton-serve[{asked}]'"
        )
    return names


def _unless_it_fails(name: str, make: Callable[[], T], asked: str | None, names: list[str]) -> T | None:
    """What a transport needs; where it does not work, it is taken off the names, unless it was asked for."""
    try:
        return make()
    except StartupError as error:
        if asked == name:
            raise
        logger.warning("KV transport %s is not used: %s", name, error)
        names.remove(name)
        return None


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
