"""What this worker can move pages with, found out once at start; no transport is imported for that."""

import importlib.util
import socket
from pathlib import Path

from baton.core.ports import PageStore
from baton.rpc.ticket import WorkerTransports

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def available_transports(store: PageStore) -> WorkerTransports:
    """The transports whose packages are installed, for pages in `store`."""
    names = ["grpc"]
    return WorkerTransports(host_id(), "cpu", tuple(names))


def host_id() -> str:
    """A word that is the same for all processes of one running machine, containers included."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:  # not Linux
        return socket.gethostname()


def is_installed(module: str) -> bool:
    """Whether a package could be imported."""
    return importlib.util.find_spec(module) is not None
