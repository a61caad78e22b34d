"""Rows of a table for the ids of tokens (embedding.c)."""

import ctypes

import torch
from torch import Tensor

from baton_kernels.cpu.calls import Kernel, make_call, new_tensor
from baton_kernels.cpu.library import DTYPES


class _Embedding(ctypes.Structure):
    """struct embedding"""

    _fields_ = [
        ("table", ctypes.c_void_p),
        ("width", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
        ("is_packed", ctypes.c_int32),
        ("ids", ctypes.c_void_p),
        ("output", ctypes.c_void_p),
    ]


class EmbeddingTable:
    """Not for several threads at once."""

    def __init__(
        self, library: ctypes.CDLL, table: Tensor, width: int, dtype: torch.dtype, *, is_packed: bool
    ) -> None:
        """`table`: `[V, width]`, contiguous, or what PackedLinear made of it."""
        self._library = library
        self._table = table  # keeps the memory that the arguments point to
        self._width = width
        self._dtype = dtype
        self._arguments = _Embedding(
            table=table.data_ptr(), width=width, dtype=DTYPES[dtype], is_packed=is_packed
        )

    def __call__(self, ids: Tensor) -> Tensor:
        """int64 `[T]`, each below V, to `[T, width]`."""
        output = new_tensor(ids.shape[0], self._width, dtype=self._dtype)
        self._arguments.ids, self._arguments.output = ids.data_ptr(), output.data_ptr()
        make_call(self._library, Kernel.EMBEDDING, self._arguments, ids.shape[0])
        return output
