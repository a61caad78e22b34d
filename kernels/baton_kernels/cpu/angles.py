"""Cosines and sines by which queries and keys are rotated (angles.c)."""

import ctypes

import torch
from torch import Tensor

from baton_kernels.cpu.calls import Kernel, make_call, new_tensor
from baton_kernels.cpu.library import DTYPES


class _Angles(ctypes.Structure):
    """struct angles"""

    _fields_ = [
        ("frequencies", ctypes.c_void_p),
        ("scale", ctypes.c_float),
        ("dtype", ctypes.c_int32),
        ("head_dim", ctypes.c_int64),
        ("positions", ctypes.c_void_p),
        ("cosines", ctypes.c_void_p),
        ("sines", ctypes.c_void_p),
    ]


class Angles:
    """Not for several threads at once."""

    def __init__(self, library: ctypes.CDLL, frequencies: Tensor, scale: float, dtype: torch.dtype) -> None:
        """frequencies: float32 `[D / 2]`; `scale`: of cosines and sines; `dtype`: theirs."""
        self._library = library
        self._frequencies = frequencies.contiguous()
        self._head_dim = 2 * frequencies.shape[0]
        self._dtype = dtype
        self._arguments = _Angles(
            frequencies=self._frequencies.data_ptr(),
            scale=scale,
            dtype=DTYPES[dtype],
            head_dim=self._head_dim,
        )

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """int64 `[T]` to cosines and signed sines, each `[T, 1, D]`: see `RotaryEmbedding.angles`."""
        num_rows = positions.shape[0]
        cosines = new_tensor(num_rows, 1, self._head_dim, dtype=self._dtype)
        sines = new_tensor(num_rows, 1, self._head_dim, dtype=self._dtype)
        arguments = self._arguments
        arguments.positions = positions.data_ptr()
        arguments.cosines, arguments.sines = cosines.data_ptr(), sines.data_ptr()
        make_call(self._library, Kernel.ANGLES, arguments, num_rows)
        return cosines, sines
