"""The pool of KV pages: one tensor, and its bytes for transfers."""

import math

import numpy as np
import torch
from torch import Tensor

from baton.core.errors import StartupError
from baton.core.kv_layout import KVLayout
from baton.core.page_ports import DevicePages


class KVCache:
    """Pages `[num_blocks + 1, num_layers, 2, kv_heads, block_size, head_dim]`; a `core.page_ports.PageStore`.

    The last page is not in the block pool: padding is written to it and read from it, and never looked at.
    """

    def __init__(self, layout: KVLayout, num_blocks: int, device: torch.device) -> None:
        shape = (layout.num_layers, 2, layout.num_kv_heads, layout.block_size, layout.head_dim)
        self._layout = layout
        self._num_blocks = num_blocks
        self.pool: Tensor = _zeros((num_blocks + 1, *shape), getattr(torch, layout.dtype), device)
        # Through uint8, because numpy has no bfloat16.
        flat = self.pool.view(torch.uint8).flatten()
        self._bytes = flat.numpy().data if device.type == "cpu" else None
        self._device_pages = None if device.type == "cpu" else _device_pages(self.pool[:num_blocks])

    @property
    def layout(self) -> KVLayout:
        """Layout of every page."""
        return self._layout

    @property
    def num_blocks(self) -> int:
        """Pages that requests can have."""
        return self._num_blocks

    @property
    def padding_block(self) -> int:
        """The page that belongs to no request."""
        return self._num_blocks

    @property
    def device_pages(self) -> DevicePages | None:
        """See PageStore."""
        return self._device_pages

    @property
    def memory(self) -> memoryview:
        """All pages' bytes. Raises BufferError where the pool is not in host memory."""
        if self._bytes is None:
            raise BufferError(f"The KV pool lies on {self.pool.device}, not in host memory.")
        return self._bytes

    def page(self, block_id: int, first_layer: int, num_layers: int) -> memoryview:
        """Writable bytes of some layers of one page: the pool's own memory.

        Raises IndexError outside the pool, and BufferError where the pool is not in host memory.
        """
        memory = self.memory
        if not (
            0 <= block_id < self._num_blocks
            and 0 <= first_layer <= first_layer + num_layers <= self._layout.num_layers
        ):
            raise IndexError(
                f"No layers {first_layer} to {first_layer + num_layers} of page {block_id} in a pool of "
                f"{self._num_blocks} pages of {self._layout.num_layers} layers."
            )
        first = block_id * self._layout.bytes_per_block + first_layer * self._layout.bytes_per_layer
        return memory[first : first + num_layers * self._layout.bytes_per_layer]

    def copy_blocks(self, copies: tuple[tuple[int, int], ...]) -> None:
        """Copy whole pages, (source, destination), in order: a copy may read what one before it wrote."""
        for source, destination in copies:
            self.pool[destination].copy_(self.pool[source])


def _device_pages(pool: Tensor) -> DevicePages:
    from baton.engine.pages.page_staging import PageStaging  # imports Triton

    return PageStaging(pool)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    num_bytes = math.prod(shape) * dtype.itemsize
    try:
        if device.type == "cpu":
            # Through numpy, which leaves it to the system to clear a page when it is first touched: torch
            # would write a gigabyte at start.
            return torch.from_numpy(np.zeros(num_bytes, dtype=np.uint8)).view(dtype).view(shape)
        return torch.zeros(shape, dtype=dtype, device=device)
    # torch.OutOfMemoryError is a RuntimeError; what no address can count is numpy's ValueError.
    except (RuntimeError, MemoryError, ValueError) as error:
        or_share = "" if device.type == "cpu" else " or --gpu-memory-utilization"
        raise StartupError(
            f"There is no memory for {num_bytes // 2**20}MiB of KV cache on {device}; "
            f"lower --kv-cache-memory{or_share}."
        ) from error
