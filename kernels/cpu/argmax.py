"""The likeliest token of each row in C (argmax.c): torch's argmax reads half precision number by number."""

import ctypes

import torch
from torch import Tensor

from kernels.cpu.library import DTYPES


def argmax(library: ctypes.CDLL, rows: Tensor) -> Tensor:
    """The index of the greatest number of each row, the lowest of equals: `[R, V]` to int64 `[R]`.

    NaN counts as the least and infinities as the greatest and least finite numbers. Raises MemoryError.
    """
    rows = rows.contiguous()
    num_rows, size = rows.shape
    indices = torch.empty(num_rows, dtype=torch.int64)
    failed = library.baton_argmax(
        indices.data_ptr(), rows.data_ptr(), num_rows, size, DTYPES[rows.dtype], torch.get_num_threads()
    )
    if failed:
        raise MemoryError("There is no memory to look for the likeliest tokens.")
    return indices
