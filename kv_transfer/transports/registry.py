"""What this worker can move pages with, found out once at start; a transport is imported when it is used."""

import importlib.util
import logging
import socket
from pathlib import Path
from typing import TYPE_CHECKING

from baton.core.errors import StartupError
from baton.core.ports import PageStore
from baton.rpc.ticket import Ticket, WorkerTransports
from kv_transfer.transports import nixl_library

if TYPE_CHECKING:
    from kv_transfer.nixl_route import NixlRoute
    from kv_transfer.route import PushCall
    from kv_transfer.transports.nixl_memory import NixlReader, NixlSource

logger = logging.getLogger(__name__)

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class SendingTransports:
    """A prefill server's transports. Raises StartupError where one that is asked for does not work."""

    def __init__(self, store: PageStore, asked: str | None = None) -> None:
        self._store = store
        self._nixl_source: NixlSource | None = None
        names = _installed(asked)
        if "nixl" in names:
            self._nixl_source = self._open_nixl(asked)
            if self._nixl_source is None:
                names.remove("nixl")
        self.offer = WorkerTransports(host_id(), "cpu", tuple(names))

    def nixl_route(self, ticket: Ticket, call: "PushCall", stall_timeout_s: float) -> "NixlRoute":
        """A transfer's way over NIXL, which this worker has."""
        from kv_transfer.nixl_route import NixlRoute

        assert self._nixl_source is not None
        return NixlRoute(ticket, self._store, self._nixl_source, call, stall_timeout_s)

    def close(self) -> None:
        """Let go of what was registered."""
        if self._nixl_source is not None:
            self._nixl_source.close()

    def _open_nixl(self, asked: str | None) -> "NixlSource | None":
        from kv_transfer.transports.nixl_memory import NixlSource

        try:
            return NixlSource(
                self._store.memory[: self._store.num_blocks * self._store.layout.bytes_per_block],
                self._store.layout.bytes_per_block,
                self._store.num_blocks,
            )
        except StartupError as error:
            _note_nixl_failure(error, asked)
            return None


class ReceivingTransports:
    """A decode server's transports; made on its event loop. Raises StartupError as SendingTransports does."""

    def __init__(self, asked: str | None = None) -> None:
        names = _installed(asked)
        self.nixl_reader: NixlReader | None = None
        if "nixl" in names:
            self.nixl_reader = self._open_nixl(asked)
            if self.nixl_reader is None:
                names.remove("nixl")
        self.offer = WorkerTransports(host_id(), "cpu", tuple(names))

    async def close(self) -> None:
        """End what runs."""
        if self.nixl_reader is not None:
            await self.nixl_reader.close()

    def _open_nixl(self, asked: str | None) -> "NixlReader | None":
        from kv_transfer.transports.nixl_memory import NixlReader

        try:
            return NixlReader()
        except StartupError as error:
            _note_nixl_failure(error, asked)
            return None


def host_id() -> str:
    """A word that is the same for all processes of one running machine, containers included."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:  # not Linux
        return socket.gethostname()


def _installed(asked: str | None) -> list[str]:
    """gRPC, which is always there, and those of the others whose packages are and which may be used."""
    names = ["grpc"]
    if asked in (None, "nccl") and _is_installed("torch"):
        names.append("nccl")
    if asked in (None, "nixl") and nixl_library.is_available():
        names.append("nixl")
    if asked is not None and asked not in names:
        raise StartupError(
            f"KV transport {asked} was asked for, but its package is not installed: "
            f"pip install 'baton-serve[{asked}]'"
        )
    return names


def _note_nixl_failure(error: StartupError, asked: str | None) -> None:
    if asked == "nixl":
        raise error
    logger.warning("KV transport nixl is not used: %s", error)


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
