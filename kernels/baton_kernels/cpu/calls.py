"""Calls of C kernels: made at once, or recorded and then made again and again with no Python between them.

A recording is to these kernels what a CUDA graph is to a GPU's: the addresses of a pass through a model,
which stay as they are while what lies at them changes.
"""

import ctypes
import math
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_ALIGNMENT = 64
_NO_MEMORY = "There is no memory for the kernels to work in."


class Kernel(IntEnum):
    """`kernels` of calls.c."""

    LINEAR = 0
    LINEAR_INT8 = 1
    ATTENTION = 2
    EMBEDDING = 3
    ANGLES = 4
    ARGMAX = 5


@dataclass(frozen=True, slots=True)
class ChosenRows:
    """Some rows of states. ids: int64 `[N]`; count: int64 `[1]`, how many of them count, at least 1."""

    ids: Tensor
    count: Tensor


class NotRecordable(Exception):
    """Something computes that is none of the C kernels; the message names it."""


class _Call(ctypes.Structure):
    """struct call"""

    _fields_ = [("kernel", ctypes.c_int64), ("arguments", ctypes.c_void_p), ("num_rows", ctypes.c_void_p)]


class _Current(threading.local):
    recording: "Recording | None" = None


_current = _Current()


def make_call(
    library: ctypes.CDLL,
    kernel: Kernel,
    arguments: ctypes.Structure,
    num_rows: int,
    chosen: ChosenRows | None = None,
) -> None:
    """Run a kernel with that struct of arguments, or add it to the thread's recording.

    It is of `num_rows` rows, or as many as `chosen` counts when it runs. Raises MemoryError.
    """
    count = None if chosen is None else chosen.count.data_ptr()
    if _current.recording is not None:
        _current.recording.add(kernel, arguments, count)
        return
    call = _Call(kernel, ctypes.addressof(arguments), count)
    if library.baton_run(ctypes.byref(call), 1, num_rows, torch.get_num_threads()):
        raise MemoryError(_NO_MEMORY)


def new_tensor(num_rows: int, *shape: int, dtype: torch.dtype) -> Tensor:
    """`[num_rows, *shape]` for a kernel to write, uninitialised; of a recording's memory if there is one."""
    if _current.recording is not None:
        return _current.recording.new_tensor(num_rows, *shape, dtype=dtype)
    return torch.empty(num_rows, *shape, dtype=dtype)


class Recording:
    """Calls that `recorded` took down, and the memory that they work in.

    As a pass through a model lets go of tensors, the calls after it get their memory, so that it is as much
    as the pass needs at once.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._kept: list[ctypes.Structure] = []  # what calls point to
        self._free: list[np.ndarray[Any, Any]] = []
        self._calls: list[_Call] = []
        self._array: ctypes.Array[_Call] | None = None

    def __len__(self) -> int:
        """Calls so far."""
        return len(self._calls)

    def run(self, first: int, end: int, num_rows: int) -> None:
        """Make the calls first .. end, of states with that many rows. Raises MemoryError."""
        if self._array is None:
            self._array = (_Call * len(self._calls))(*self._calls)
        start = ctypes.addressof(self._array) + first * ctypes.sizeof(_Call)
        if self._library.baton_run(start, end - first, num_rows, torch.get_num_threads()):
            raise MemoryError(_NO_MEMORY)

    def add(self, kernel: Kernel, arguments: ctypes.Structure, count: int | None) -> None:
        """Take down a call with a copy of its arguments; `count`: address of its number of rows."""
        copy = type(arguments).from_buffer_copy(arguments)
        self._kept.append(copy)
        self._calls.append(_Call(kernel, ctypes.addressof(copy), count))

    def new_tensor(self, num_rows: int, *shape: int, dtype: torch.dtype) -> Tensor:
        """See the module's."""
        num_bytes = num_rows * math.prod(shape) * dtype.itemsize
        fitting = [index for index, block in enumerate(self._free) if block.nbytes >= num_bytes]
        if fitting:
            block = self._free.pop(min(fitting, key=lambda index: self._free[index].nbytes))
        else:
            memory = np.empty(num_bytes + _ALIGNMENT, dtype=np.uint8)
            skipped = -memory.ctypes.data % _ALIGNMENT
            block = memory[skipped : skipped + num_bytes]
        # The tensor's storage keeps this view, and with it the block is in use.
        view = block[:num_bytes]
        weakref.finalize(view, self._free.append, block)
        return torch.from_numpy(view).view(dtype).view(num_rows, *shape)


class _KernelsAlone(TorchDispatchMode):
    """Lets torch do nothing but look at tensors in other shapes."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not func.is_view:
            raise NotRecordable(f"{func} is no C kernel")
        return func(*args, **(kwargs or {}))


@contextmanager
def recorded(library: ctypes.CDLL) -> Iterator[Recording]:
    """Within it this thread's calls are taken down and not made. Raises NotRecordable."""
    recording = Recording(library)
    _current.recording = recording
    try:
        with _KernelsAlone():  # type: ignore[no-untyped-call]
            yield recording
    finally:
        _current.recording = None
