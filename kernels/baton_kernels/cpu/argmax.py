"""The likeliest token of each row in C (argmax.c): torch's argmax reads half precision number by number."""

import ctypes

import torch
from torch import Tensor

from baton_kernels.cpu.calls import ChosenRows, Kernel, make_call, new_tensor
from baton_kernels.cpu.library import DTYPES


class _Argmax(ctypes.Structure):
    """struct argmax"""

    _fields_ = [
        ("rows", ctypes.c_void_p),
        ("size", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
        ("indices", ctypes.c_void_p),
    ]


def argmax(library: ctypes.CDLL, rows: Tensor, chosen: ChosenRows | None = None) -> Tensor:
    """The index of the greatest number of each row, the lowest of equals: `[R, V]` to int64 `[R]`.

    NaN counts as the least and infinities as the greatest and least finite numbers. Of `chosen` rows, which
    `rows` has made, as many are looked at as count. Raises MemoryError.
    """
    rows = rows.contiguous()
    num_rows, size = rows.shape
    indices = new_tensor(num_rows, dtype=torch.int64)
    arguments = _Argmax(rows=rows.data_ptr(), size=size, dtype=DTYPES[rows.dtype], indices=indices.data_ptr())
    make_call(library, Kernel.ARGMAX, arguments, num_rows, chosen)
    return indices
