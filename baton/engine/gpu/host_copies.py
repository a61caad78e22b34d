"""Copies between the host and a device that nobody waits for: through pinned memory, in the device's order.

On a CPU the same calls copy at once, so that whoever makes them runs there as well.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def staged(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host's memory where `device` can fetch it while the host goes on."""
    return tensor.pin_memory() if device.type == "cuda" else tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host's memory on `device`."""
    return staged(tensor, device).to(device, non_blocking=True)


def all_to_device(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Several int64 tensors of the host's memory, in one copy."""
    packed = to_device(torch.cat([tensor.flatten() for tensor in tensors]), device)
    parts = packed.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


class HostCopies:
    """Tensors on their way from a device to the host."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        """Begin to copy; the tensors may be overwritten by whatever the device does afterwards."""
        is_cuda = any(tensor.is_cuda for tensor in tensors)
        self._host = [
            torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=is_cuda).copy_(tensor, non_blocking=True)
            for tensor in tensors
        ]
        self._done: torch.cuda.Event | None = None
        if is_cuda:
            self._done = torch.cuda.Event()
            self._done.record()

    def wait(self) -> list[Tensor]:
        """The copies, in host memory. Raises what the device failed of meanwhile."""
        if self._done is not None:
            self._done.synchronize()
        return self._host
