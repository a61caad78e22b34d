"""Pages on a GPU to and from host memory that a network can read and write, beside the steps that go on.

Whole pages, or some layers of them, are gathered by one kernel into a buffer on the device and leave it in
one copy, and the other way round; both on a stream of their own, so that decode steps do not wait for them.
"""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from kernels.gpu.page_copies import gather_blocks, scatter_blocks


class PageStaging:
    """One buffer of pinned memory and one on the device; not thread-safe, one copy at a time.

    On a CPU device, where kernels are interpreted, all of it happens at once.
    """

    def __init__(self, pool: Tensor, max_blocks: int) -> None:
        """`pool`: `[N, L, 2, K, P, D]`, contiguous; `max_blocks`: pages of one copy."""
        self._pool = pool
        is_gpu = pool.device.type == "cuda"
        size = max_blocks * pool.stride(0)
        self._device = torch.empty(size, dtype=pool.dtype, device=pool.device)
        self._host = torch.empty(size, dtype=pool.dtype, pin_memory=is_gpu)
        self._stream = torch.cuda.Stream(pool.device) if is_gpu else None

    def read(self, block_ids: Sequence[int], first_layer: int, num_layers: int) -> memoryview:
        """Bytes of those layers of the pages, page after page, valid until the next copy.

        What steps have queued before is in them. Waits for the copy, not for steps queued after it.
        """
        device, host = self._views(len(block_ids), num_layers)
        with self._on_stream():
            gather_blocks(self._pool, self._ids(block_ids), first_layer, num_layers, device)
            host.copy_(device, non_blocking=True)
        self._wait()
        return host.view(torch.uint8).numpy().reshape(-1).data

    def buffer(self, num_blocks: int, num_layers: int) -> memoryview:
        """Writable bytes for so many pages' layers, for `write` to take."""
        return self._views(num_blocks, num_layers)[1].view(torch.uint8).numpy().reshape(-1).data

    def write(self, block_ids: Sequence[int], first_layer: int, num_layers: int) -> None:
        """Bring what `buffer` holds into those layers of the pages; steps queued afterwards see it."""
        device, host = self._views(len(block_ids), num_layers)
        with self._on_stream():
            device.copy_(host, non_blocking=True)
            scatter_blocks(device, self._pool, self._ids(block_ids), first_layer)
        self._wait()

    def _views(self, num_blocks: int, num_layers: int) -> tuple[Tensor, Tensor]:
        shape = (num_blocks, num_layers, *self._pool.shape[2:])
        size = num_blocks * num_layers * self._pool.stride(1)
        return self._device[:size].view(shape), self._host[:size].view(shape)

    def _ids(self, block_ids: Sequence[int]) -> Tensor:
        return torch.tensor(block_ids, dtype=torch.int64).to(self._pool.device)

    def _on_stream(self) -> "torch.cuda.StreamContext | nullcontext[None]":
        if self._stream is None:
            return nullcontext()
        self._stream.wait_stream(torch.cuda.current_stream(self._pool.device))
        return torch.cuda.stream(self._stream)

    def _wait(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()
