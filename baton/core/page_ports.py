"""What transfers need of the pages of an engine, which may be host memory or lie on a device."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from baton.core.kv_layout import KVLayout


class Mark(Protocol):
    """A point in the work that a device was given."""

    def wait(self) -> None:
        """Block until the device has come this far. Any thread. Raises what went wrong on the device."""
        ...


@dataclass(frozen=True, slots=True)
class ExportedPool:
    """What another process of this machine needs to read a pool on a device.

    Whoever holds it can read and write all of the pool: it travels on authenticated calls alone.
    """

    handle: bytes  # of the allocation that the pool lies in
    offset: int  # bytes of it before block 0
    num_blocks: int


class DevicePages(Protocol):
    """Pages on a device. Transfers copy them, beside the steps that go on.

    Each copy blocks until it is done. Any thread may call, and has a stream and staging memory of its own, so
    that neither steps nor other threads' copies wait. Copies are not ordered after steps: whoever copies has
    waited for a Mark. A buffer is a one-dimensional tensor of bytes (torch.uint8) on the device.
    """

    @property
    def device(self) -> str:
        """ "cuda", or "cpu" for pages that tests treat as a device's."""
        ...

    @property
    def gpu_id(self) -> str:
        """Tells the GPUs of all machines apart; empty where there is none."""
        ...

    @property
    def gpu_index(self) -> int:
        """The GPU among those that this process sees."""
        ...

    @property
    def pool(self) -> Any:
        """All of the pages that requests can have, as one buffer."""
        ...

    def mark(self) -> Mark:
        """The end of all that the calling thread's steps have queued until now."""
        ...

    def prepare(self, num_bytes: int) -> None:
        """Make the calling thread's stream and staging, so that its first copies of so much are not slow."""
        ...

    def host_buffer(self, num_bytes: int) -> memoryview:
        """Page-locked host memory, from which and to which copies are fastest."""
        ...

    def buffer(self, num_bytes: int) -> Any:
        """A new buffer."""
        ...

    def read(self, block_ids: Sequence[int], first_layer: int, num_layers: int, target: memoryview) -> None:
        """Copy those layers of pages, page after page, into host memory of just that size."""
        ...

    def write(self, source: memoryview, block_ids: Sequence[int], first_layer: int, num_layers: int) -> None:
        """Inverse of `read`."""
        ...

    def gather(self, block_ids: Sequence[int], first_layer: int, num_layers: int, target: Any) -> None:
        """Copy those layers of pages, page after page, into a buffer, or a tensor of bytes on the CPU."""
        ...

    def scatter(self, source: Any, block_ids: Sequence[int], first_layer: int, num_layers: int) -> None:
        """Inverse of `gather`, from a buffer."""
        ...

    def checksum(self, payload: Any) -> int:
        """crc32c (RFC 3720) of a buffer whose size is a multiple of four."""
        ...

    def pages_checksum(self, block_ids: Sequence[int], first_layer: int, num_layers: int) -> int:
        """crc32c (RFC 3720) of what `gather` would copy."""
        ...

    def to_host(self, payload: Any) -> memoryview:
        """The bytes of a buffer, in new host memory."""
        ...

    def export(self) -> ExportedPool:
        """For processes of this machine. Raises StartupError where the device does not let them in."""
        ...

    def open(self, pool: ExportedPool, layout: KVLayout) -> Any:
        """Map another process's pool, for `fetch` and `close`. Raises TransferRefused where it can't be."""
        ...

    def fetch(
        self, pool: Any, block_ids: Sequence[int], first_layer: int, num_layers: int, target: Any
    ) -> int:
        """`gather` from an open pool; returns the crc32c of what has arrived."""
        ...

    def close(self, pool: Any) -> None:
        """Unmap a pool. Nobody may fetch from it any more."""
        ...


class PageStore(Protocol):
    """The bytes of the KV pool, for transfers."""

    @property
    def layout(self) -> KVLayout:
        """Layout of every page in the pool."""
        ...

    @property
    def num_blocks(self) -> int:
        """Pages in the pool."""
        ...

    @property
    def device_pages(self) -> DevicePages | None:
        """The way to pages on a device, which have no `memory` and no `page`; None: they are host memory."""
        ...

    @property
    def memory(self) -> memoryview:
        """The whole pool's bytes, block after block; for transports that register memory."""
        ...

    def page(self, block_id: int, first_layer: int, num_layers: int) -> memoryview:
        """Writable bytes of some layers of one page, `num_layers * layout.bytes_per_layer` long.

        The memory is the pool's own: only the page's one writer (docs/architecture.md: who owns a page) may
        write it.
        """
        ...
