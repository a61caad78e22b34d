"""Pages on a GPU to and from memory that a transport can send and receive, beside the steps that go on.

Whole pages, or some layers of them, are gathered by one kernel into a buffer on the device and leave it in
one copy, and the other way round. Each thread that copies has a stream of its own, so that steps do not wait
for copies; a step's pages are copied once a mark behind it has been reached, so that copies do not wait for
later steps either.
"""

import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from baton.core.kv_layout import KVLayout
from baton.core.page_ports import ExportedPool
from baton.engine.pages.ipc_memory import IpcMemory, ipc_memory
from baton_kernels.gpu.checksum import crc32c_of, crc32c_remainder
from baton_kernels.gpu.page_copies import gather_blocks, scatter_blocks

_one_at_a_time = threading.RLock()  # Triton interprets one kernel at a time


class StreamMark:
    """The end of what a stream had queued when this was made (core.page_ports.Mark)."""

    def __init__(self, device: torch.device) -> None:
        # Blocking: who waits for a long step should not keep a core busy with it.
        self._event = torch.cuda.Event(blocking=True) if device.type == "cuda" else None
        if self._event is not None:
            self._event.record(torch.cuda.current_stream(device))

    def wait(self) -> None:
        """See Mark."""
        if self._event is not None:
            self._event.synchronize()


class Lane:
    """One thread's stream, and its staging memory on either side, which grows to what is asked of it.

    On a CPU device, where kernels are interpreted, everything happens at once.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._is_gpu = device.type == "cuda"
        # First among the streams: a copy is short, and a request waits for it.
        self._stream = torch.cuda.Stream(device, priority=-1) if self._is_gpu else None
        self._staging = self._host = torch.empty(0, dtype=torch.int32)
        with self.queue():  # this stream's own memory: what steps let go of, they may still be using
            self.remainder = torch.zeros(1, dtype=torch.int32, device=device)

    def staging(self, num_words: int) -> Tensor:
        """int32 `[num_words]` on the device, the same each time."""
        if len(self._staging) < num_words:
            with self.queue():
                self._staging = torch.empty(num_words, dtype=torch.int32, device=self._device)
        return self._staging[:num_words]

    def host(self, num_words: int) -> Tensor:
        """int32 `[num_words]`, page-locked, the same each time."""
        if len(self._host) < num_words:
            self._host = torch.empty(num_words, dtype=torch.int32, pin_memory=self._is_gpu)
        return self._host[:num_words]

    def queue(self) -> AbstractContextManager[Any]:
        """Within it, what is launched goes to this lane's stream."""
        return _one_at_a_time if self._stream is None else torch.cuda.stream(self._stream)

    def wait(self) -> None:
        """Until all that was queued is done."""
        with self.queue():
            StreamMark(self._device).wait()


class PageStaging:
    """Copies of the pages of one pool (core.page_ports.DevicePages)."""

    def __init__(self, pool: Tensor, ipc: IpcMemory | None = None) -> None:
        """`pool`: `[N, L, 2, K, P, D]`, contiguous. `ipc`: how processes share memory; None: as CUDA does."""
        self._pages = _words_of(pool, pool.shape[0], pool.shape[1])
        self._device = pool.device
        self._ipc = ipc_memory(pool.device) if ipc is None else ipc
        self._lanes = threading.local()

    # --- the device ---------------------------------------------------------------------------------

    @property
    def device(self) -> str:
        """See DevicePages."""
        return self._device.type

    @property
    def gpu_index(self) -> int:
        """See DevicePages."""
        return self._device.index or 0

    @cached_property
    def gpu_id(self) -> str:
        """See DevicePages."""
        if self._device.type != "cuda":
            return ""
        return str(torch.cuda.get_device_properties(self._device).uuid)

    @property
    def pool(self) -> Tensor:
        """See DevicePages."""
        return self._pages.view(-1).view(torch.uint8)

    def mark(self) -> StreamMark:
        """See DevicePages."""
        return StreamMark(self._device)

    def prepare(self, num_bytes: int) -> None:
        """See DevicePages. Compiles the kernels too, which have nothing to copy yet."""
        lane, num_words = self._lane(), num_bytes // 4
        staging = lane.staging(num_words)
        lane.host(num_words)
        if len(self._pages) == 0:
            return
        with _one_at_a_time:  # Triton lets one thread launch a kernel that another is still loading
            self.pages_checksum([0], 0, self._pages.shape[1])
            layer = self._pages[:1, :1]
            with lane.queue():
                scatter_blocks(staging[: layer.numel()].view(layer.shape), layer.clone(), self._ids([0]), 0)
            lane.wait()

    def host_buffer(self, num_bytes: int) -> memoryview:
        """See DevicePages."""
        return _bytes_of(torch.empty(num_bytes, dtype=torch.uint8, pin_memory=self._device.type == "cuda"))

    def buffer(self, num_bytes: int) -> Tensor:
        """See DevicePages."""
        with self._lane().queue():  # as a lane's own memory
            return torch.empty(num_bytes, dtype=torch.uint8, device=self._device)

    # --- host memory --------------------------------------------------------------------------------

    def read(self, block_ids: Sequence[int], first_layer: int, num_layers: int, target: memoryview) -> None:
        """See DevicePages."""
        self.gather(block_ids, first_layer, num_layers, torch.frombuffer(target, dtype=torch.uint8))

    def write(self, source: memoryview, block_ids: Sequence[int], first_layer: int, num_layers: int) -> None:
        """See DevicePages. What comes from a network is not page-locked: it is copied there first."""
        lane, num_words = self._lane(), len(source) // 4
        host, staging = lane.host(num_words), lane.staging(num_words)
        np.copyto(np.frombuffer(_bytes_of(host), np.uint8), np.frombuffer(source, np.uint8))
        with lane.queue():
            staging.copy_(host, non_blocking=True)
            self._scatter(staging, block_ids, first_layer, num_layers)
        lane.wait()

    def to_host(self, payload: Tensor) -> memoryview:
        """See DevicePages."""
        lane = self._lane()
        with lane.queue():
            return _bytes_of(payload.cpu())

    # --- buffers ------------------------------------------------------------------------------------

    def gather(self, block_ids: Sequence[int], first_layer: int, num_layers: int, target: Tensor) -> None:
        """See DevicePages."""
        lane, words = self._lane(), target.view(torch.int32)
        is_here = target.device == self._device
        with lane.queue():
            staging = words if is_here else lane.staging(len(words))
            self._gather(self._pages, block_ids, first_layer, num_layers, staging)
            if not is_here:
                words.copy_(staging, non_blocking=True)
        lane.wait()

    def scatter(self, source: Tensor, block_ids: Sequence[int], first_layer: int, num_layers: int) -> None:
        """See DevicePages."""
        lane = self._lane()
        with lane.queue():
            self._scatter(source.view(torch.int32), block_ids, first_layer, num_layers)
        lane.wait()

    def checksum(self, payload: Tensor) -> int:
        """See DevicePages."""
        lane = self._lane()
        with lane.queue():
            return self._checksum(lane, payload.view(torch.int32))

    def pages_checksum(self, block_ids: Sequence[int], first_layer: int, num_layers: int) -> int:
        """See DevicePages."""
        lane = self._lane()
        staging = lane.staging(len(block_ids) * num_layers * self._pages.shape[2])
        with lane.queue():
            self._gather(self._pages, block_ids, first_layer, num_layers, staging)
            return self._checksum(lane, staging)

    # --- pools of other processes -------------------------------------------------------------------

    def export(self) -> ExportedPool:
        """See DevicePages."""
        handle, offset = self._ipc.export(self.pool)
        return ExportedPool(handle, offset, len(self._pages))

    def open(self, pool: ExportedPool, layout: KVLayout) -> Tensor:
        """See DevicePages. Returns int32 `[N, L, words of a layer]`."""
        num_bytes = pool.num_blocks * layout.bytes_per_block
        return _words_of(
            self._ipc.open(pool.handle, pool.offset, num_bytes), pool.num_blocks, layout.num_layers
        )

    def fetch(
        self, pool: Tensor, block_ids: Sequence[int], first_layer: int, num_layers: int, target: Tensor
    ) -> int:
        """See DevicePages."""
        lane, words = self._lane(), target.view(torch.int32)
        with lane.queue():
            self._gather(pool, block_ids, first_layer, num_layers, words)
            return self._checksum(lane, words)

    def close(self, pool: Tensor) -> None:
        """See DevicePages."""
        self._ipc.close(pool)

    # --- on a lane's stream -------------------------------------------------------------------------

    def _lane(self) -> Lane:
        if not hasattr(self._lanes, "lane"):
            self._lanes.lane = Lane(self._device)
        lane: Lane = self._lanes.lane
        return lane

    def _gather(
        self, pages: Tensor, block_ids: Sequence[int], first_layer: int, num_layers: int, staging: Tensor
    ) -> None:
        shape = (len(block_ids), num_layers, pages.shape[2])
        gather_blocks(pages, self._ids(block_ids), first_layer, num_layers, staging.view(shape))

    def _scatter(self, staging: Tensor, block_ids: Sequence[int], first_layer: int, num_layers: int) -> None:
        shape = (len(block_ids), num_layers, self._pages.shape[2])
        scatter_blocks(staging.view(shape), self._pages, self._ids(block_ids), first_layer)

    def _checksum(self, lane: Lane, words: Tensor) -> int:
        crc32c_remainder(words, lane.remainder)
        return crc32c_of(int(lane.remainder.item()), 4 * len(words))

    def _ids(self, block_ids: Sequence[int]) -> Tensor:
        return torch.tensor(block_ids, dtype=torch.int64).to(self._device)


def _words_of(pool: Tensor, num_blocks: int, num_layers: int) -> Tensor:
    """int32 `[N, L, words of a layer]`: kernels copy whichever dtype as words. Layers are whole words."""
    words = pool.view(-1).view(torch.int32)
    return words.view(num_blocks, num_layers, len(words) // max(1, num_blocks * num_layers))


def _bytes_of(tensor: Tensor) -> memoryview:
    """A CPU tensor's own memory."""
    return tensor.view(torch.uint8).numpy().data
