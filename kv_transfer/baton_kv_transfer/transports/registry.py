"""The transports that there are, and those that one worker has; each is imported when it may be used."""

import importlib
import logging
import socket
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from baton.core.errors import StartupError, TransferRefused
from baton.core.page_ports import PageStore
from baton.core.ticket import WorkerTransports
from baton_kv_transfer.pages.device_copies import DeviceCopies
from baton_kv_transfer.pages.page_reading import page_reader
from baton_kv_transfer.pages.page_writing import page_writer
from baton_kv_transfer.transports import base

logger = logging.getLogger(__name__)

T = TypeVar("T")

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, slots=True)
class Row:
    """One transport: its name, which users know and routes have, and the module that has its TRANSPORT."""

    name: str
    module: str
    joins_gpus: bool = False  # of one host, past libraries and the host's memory

    def load(self) -> base.Transport:
        """Import it."""
        transport: base.Transport = importlib.import_module(self.module).TRANSPORT
        return transport


# Best first. NIXL reads straight out of the other's memory; process groups need a copy into staging on
# either side; gRPC copies several times, but is always there.
ROWS = (
    Row("cuda_ipc", "baton_kv_transfer.transports.cuda_ipc", joins_gpus=True),
    Row("nixl", "baton_kv_transfer.transports.nixl.transport"),
    Row("nccl", "baton_kv_transfer.transports.pair.transport", joins_gpus=True),
    Row("grpc", "baton_kv_transfer.transports.grpc_push"),
)


def preference(*, between_gpus: bool) -> list[Row]:
    """All transports, best first; `between_gpus` of one host, those that join them come first."""
    return sorted(ROWS, key=lambda row: between_gpus and not row.joins_gpus)


def row_of(name: str) -> Row:
    """The transport of that name."""
    return next(row for row in ROWS if row.name == name)


class SendingTransports:
    """A prefill server's transports. Raises StartupError where one that is asked for does not work."""

    def __init__(self, store: PageStore, asked: str | None = None) -> None:
        self._copies = _copies(store)
        reader = page_reader(store, self._copies)
        self._sides = _made(store, asked, lambda transport: transport.sending(store, reader))
        self.offer = _offer(store, self._sides)

    def route(self, name: str, request: base.RouteRequest) -> base.Route:
        """A transfer's way over a transport that is offered; by the last one where there is no way yet."""
        route = self._sides[name].route(request) or self._sides[ROWS[-1].name].route(request)
        assert route is not None
        return route

    async def close(self) -> None:
        """Let go of what was registered."""
        await _close(self._sides.values(), self._copies)


class ReceivingTransports:
    """A decode server's transports; made on its event loop. Raises StartupError as SendingTransports does."""

    def __init__(self, store: PageStore, asked: str | None = None) -> None:
        self._copies = _copies(store)
        self.writer = page_writer(store, self._copies)
        self._sides = _made(store, asked, lambda transport: transport.receiving(store, self._copies))
        self.offer = _offer(store, self._sides)

    def intake(self, name: str, request: base.IntakeRequest) -> base.Intake:
        """The way in for a call's pages. Raises TransferRefused where this worker lacks the transport."""
        if name not in self._sides:  # its bytes would be counted under that name for ever
            raise TransferRefused("transport", "a transport that this server does not have")
        return self._sides[name].intake(request)

    def methods(self, worker: base.ReceivingWorker) -> base.Methods:
        """Calls of baton.v1.Transfer that single transports have, by name."""
        return {name: call for side in self._sides.values() for name, call in side.methods(worker).items()}

    async def close(self) -> None:
        """End what runs."""
        await _close(self._sides.values(), self._copies)


def host_id() -> str:
    """A word that is the same for all processes of one running machine, containers included."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:  # not Linux
        return socket.gethostname()


def _copies(store: PageStore) -> DeviceCopies | None:
    return None if store.device_pages is None else DeviceCopies(store.device_pages, store.layout)


def _offer(store: PageStore, names: Iterable[str]) -> WorkerTransports:
    device = store.device_pages
    if device is None:
        return WorkerTransports(host_id(), "cpu", tuple(names))
    return WorkerTransports(host_id(), device.device, tuple(names), device.gpu_id)


def _made(store: PageStore, asked: str | None, make: Callable[[base.Transport], T]) -> dict[str, T]:
    """One side of each transport that works here and may be used, the last one among them, by name.

    Raises StartupError where the one that is asked for does not work.
    """
    sides: dict[str, T] = {}
    for row in reversed(ROWS):
        if asked not in (None, row.name) and row is not ROWS[-1]:
            continue
        transport = row.load()
        if (lack := transport.lack(store)) is not None:
            if asked == row.name:
                raise StartupError(f"KV transport {asked} {lack}")
            continue
        try:
            sides[row.name] = make(transport)
        except StartupError as error:
            if asked == row.name:
                raise
            logger.warning("KV transport %s is not used: %s", row.name, error)
    return sides


async def _close(sides: Iterable[base.SendingSide | base.ReceivingSide], copies: DeviceCopies | None) -> None:
    for side in sides:
        await side.close()
    if copies is not None:
        copies.close()
