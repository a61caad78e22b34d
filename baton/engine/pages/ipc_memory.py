"""Memory of a GPU that another process of the machine reads: CUDA's legacy IPC, through the driver.

Not through torch's sharing of tensors, which counts its readers in a file in /dev/shm that containers do not
share, numbers GPUs as the exporting process sees them, and never says when a mapping ends. Whoever maps an
allocation keeps its memory alive, also when the process that made it has died; so a mapping has to be closed
by whoever knows that the other has gone.
"""

import ctypes
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from baton.core.errors import StartupError, TransferRefused

_HANDLE_BYTES = 64
_LAZY_ENABLE_PEER_ACCESS = 1
_DEVICE_ORDINAL = 9  # CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL


class IpcMemory(Protocol):
    """How processes of one machine share memory of a device."""

    def export(self, memory: Tensor) -> tuple[bytes, int]:
        """The handle of the allocation that holds `memory`, and where in it `memory` begins.

        Raises StartupError where the device or its allocator can't.
        """
        ...

    def open(self, handle: bytes, offset: int, num_bytes: int) -> Tensor:
        """Another process's memory as bytes, torch.uint8 `[num_bytes]`.

        Raises TransferRefused where it can't be mapped, or is shorter.
        """
        ...

    def close(self, memory: Tensor) -> None:
        """Unmap what `open` returned, or a view of it from its beginning."""
        ...


class _Handle(ctypes.Structure):
    _fields_ = (("data", ctypes.c_ubyte * _HANDLE_BYTES),)


class CudaIpc:
    """The driver's own calls; their context is the one that torch has made current on the thread."""

    def __init__(self, device: torch.device, driver: Any = None) -> None:
        """`driver`: libcuda, as ctypes loads it."""
        self._device = device
        self._driver = _libcuda() if driver is None else driver
        self._opened: dict[int, int] = {}  # where a mapping begins, by where its memory does

    def export(self, memory: Tensor) -> tuple[bytes, int]:
        """See IpcMemory."""
        handle = _Handle()
        try:
            base, _ = self._range_of(memory.data_ptr())  # of which alone a handle is promised
            self._call("cuIpcGetMemHandle", ctypes.byref(handle), ctypes.c_uint64(base))
        except RuntimeError as error:
            raise StartupError(f"{error}; PYTORCH_CUDA_ALLOC_CONF=expandable_segments rules it out") from None
        return bytes(handle.data), memory.data_ptr() - base

    def open(self, handle: bytes, offset: int, num_bytes: int) -> Tensor:
        """See IpcMemory."""
        if len(handle) != _HANDLE_BYTES:
            raise TransferRefused("cuda_ipc", f"a handle of {len(handle)} bytes")
        base = ctypes.c_uint64()
        torch.cuda.set_device(self._device)  # makes the context current on this thread
        try:
            copied = _Handle.from_buffer_copy(handle)
            self._call(
                "cuIpcOpenMemHandle_v2", ctypes.byref(base), copied, ctypes.c_uint(_LAZY_ENABLE_PEER_ACCESS)
            )
        except RuntimeError as error:
            raise TransferRefused("cuda_ipc", str(error)) from None
        try:
            _, size = self._range_of(base.value)
            if offset < 0 or offset + num_bytes > size:
                raise TransferRefused(
                    "range", f"bytes {offset}..{offset + num_bytes} of an allocation of {size}"
                )
            memory = _tensor_at(base.value + offset, num_bytes, self._device_of(base.value))
        except BaseException:
            self._call("cuIpcCloseMemHandle", base)
            raise
        self._opened[base.value + offset] = base.value
        return memory

    def close(self, memory: Tensor) -> None:
        """See IpcMemory."""
        self._call("cuIpcCloseMemHandle", ctypes.c_uint64(self._opened.pop(memory.data_ptr())))

    def _device_of(self, address: int) -> torch.device:
        """The GPU that memory lies on, which may be another than this server's. Raises TransferRefused."""
        ordinal = ctypes.c_int(-1)
        self._call("cuPointerGetAttribute", ctypes.byref(ordinal), _DEVICE_ORDINAL, ctypes.c_uint64(address))
        if not 0 <= ordinal.value < torch.cuda.device_count():
            raise TransferRefused("cuda_ipc", "the pages lie on a GPU that this server does not see")
        return torch.device("cuda", ordinal.value)

    def _range_of(self, address: int) -> tuple[int, int]:
        """Where the allocation that holds an address begins, and its size."""
        base, size = ctypes.c_uint64(), ctypes.c_size_t()
        self._call(
            "cuMemGetAddressRange_v2", ctypes.byref(base), ctypes.byref(size), ctypes.c_uint64(address)
        )
        return base.value, size.value

    def _call(self, name: str, *arguments: Any) -> None:
        """Raises RuntimeError, with the driver's word for it, where a call fails."""
        code = getattr(self._driver, name)(*arguments)
        if code:
            text = ctypes.c_char_p()
            self._driver.cuGetErrorName(code, ctypes.byref(text))
            raise RuntimeError(f"{name} says {(text.value or b'error').decode()} ({code})")


class _DeviceArray:
    """Memory on a GPU as others describe it to torch
    (https://numba.readthedocs.io/en/stable/cuda/cuda_array_interface.html)."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }


def _tensor_at(address: int, num_bytes: int, device: torch.device) -> Tensor:
    """On the device where the memory is: on any other it would become a copy of the whole."""
    return torch.as_tensor(_DeviceArray(address, num_bytes), device=device)


class NoIpc:
    """Of devices that share nothing."""

    def export(self, memory: Tensor) -> tuple[bytes, int]:
        """See IpcMemory."""
        raise StartupError(f"memory of {memory.device} is not shared by handle")

    def open(self, handle: bytes, offset: int, num_bytes: int) -> Tensor:
        """See IpcMemory."""
        raise TransferRefused("cuda_ipc", "this server maps no memory of others")

    def close(self, memory: Tensor) -> None:
        """See IpcMemory."""


def ipc_memory(device: torch.device) -> IpcMemory:
    """The way of this device."""
    return CudaIpc(device) if device.type == "cuda" else NoIpc()


@cache
def _libcuda() -> Any:
    return ctypes.CDLL("libcuda.so.1")
