"""Memory that is shared by handle, as CUDA shares it between processes; here within one, for tests."""

import secrets

import torch
from torch import Tensor

from baton.core.errors import TransferRefused

_memory: dict[bytes, Tensor] = {}  # of all who have exported, by handle


class SameProcessIpc:
    """Implements baton.engine.pages.ipc_memory.IpcMemory."""

    def __init__(self) -> None:
        self.opened: list[bytes] = []

    def export(self, memory: Tensor) -> tuple[bytes, int]:
        handle = secrets.token_bytes(64)
        # As with CUDA, the handle is that of a whole allocation.
        _memory[handle] = torch.empty(0, dtype=torch.uint8, device=memory.device).set_(
            memory.untyped_storage()
        )
        return handle, int(memory.storage_offset()) * memory.element_size()

    def open(self, handle: bytes, offset: int, num_bytes: int) -> Tensor:
        if handle not in _memory:
            raise TransferRefused("cuda_ipc", "no such handle")
        if offset + num_bytes > len(_memory[handle]):
            raise TransferRefused("range", "the allocation is shorter")
        self.opened.append(handle)
        return _memory[handle][offset : offset + num_bytes]

    def close(self, memory: Tensor) -> None:
        self.opened.pop()
