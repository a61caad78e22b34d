"""Matrix products with weights that were packed once (linear.c)."""

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.cpu.library import DTYPES

_PLAIN, _NORMALISE, _GATE = 0, 1, 2  # enum transform


class _Linear(ctypes.Structure):
    """struct linear"""

    _fields_ = [
        ("weights", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("norm", ctypes.c_void_p),
        ("num_inputs", ctypes.c_int64),
        ("num_outputs", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
        ("transform", ctypes.c_int32),
        ("eps", ctypes.c_float),
        ("num_threads", ctypes.c_int32),
        ("num_rows", ctypes.c_int64),
        ("states", ctypes.c_void_p),
        ("residual", ctypes.c_void_p),
        ("output", ctypes.c_void_p),
    ]


@dataclass(frozen=True, slots=True)
class Normalise:
    """RMSNorm of the states before they are multiplied; weight `[in_features]`, any dtype."""

    weight: Tensor
    eps: float


@dataclass(frozen=True, slots=True)
class SiluGate:
    """`silu(states[..., :in_features]) * states[..., in_features:]` before they are multiplied."""


class PackedLinear:
    """`y = reads(x) W^T + b`, summed in float32. Not for several threads at once."""

    def __init__(
        self,
        library: ctypes.CDLL,
        weight: Tensor,
        bias: Tensor | None = None,
        reads: Normalise | SiluGate | None = None,
    ) -> None:
        """Packs a copy of weight `[out_features, in_features]`: float32, bfloat16 or float16, on the CPU."""
        num_outputs, num_inputs = weight.shape
        dtype = DTYPES[weight.dtype]
        num_bytes = library.baton_packed_bytes(num_outputs, num_inputs, dtype)
        self._library = library
        self._dtype = weight.dtype
        self._packed = torch.zeros(num_bytes, dtype=torch.uint8)
        weight = weight.contiguous()
        library.baton_pack(
            self._packed.data_ptr(),
            weight.data_ptr(),
            num_outputs,
            num_inputs,
            dtype,
            torch.get_num_threads(),
        )
        self._bias = bias
        self._norm = reads.weight.float().contiguous() if isinstance(reads, Normalise) else None
        self._arguments = _Linear(
            weights=self._packed.data_ptr(),
            bias=None if bias is None else bias.data_ptr(),
            norm=None if self._norm is None else self._norm.data_ptr(),
            num_inputs=num_inputs,
            num_outputs=num_outputs,
            dtype=dtype,
            transform=_PLAIN if reads is None else _GATE if self._norm is None else _NORMALISE,
            eps=reads.eps if isinstance(reads, Normalise) else 0.0,
        )
        self._num_outputs = num_outputs

    def __call__(self, states: Tensor, residual: Tensor | None = None) -> Tensor:
        """`[T, in_features]` (twice as wide for SiluGate) to `[T, out_features]`, plus `residual` if given.

        All in the weight's dtype. Raises MemoryError.
        """
        states = states.contiguous()
        arguments = self._arguments
        num_rows = states.shape[0]
        output = torch.empty(num_rows, self._num_outputs, dtype=self._dtype)
        arguments.num_rows = num_rows
        arguments.states = states.data_ptr()
        arguments.residual = None if residual is None else residual.data_ptr()
        arguments.output = output.data_ptr()
        arguments.num_threads = torch.get_num_threads()
        if self._library.baton_linear(ctypes.byref(arguments)):
            raise MemoryError("There is no memory for a matrix product's rows.")
        return output

    def rows(self, indices: Tensor) -> Tensor:
        """Rows of the weight, as an embedding looks them up: int64 `[T]` to `[T, in_features]`."""
        arguments = self._arguments
        output = torch.empty(indices.shape[0], arguments.num_inputs, dtype=self._dtype)
        self._library.baton_packed_rows(
            output.data_ptr(), arguments.weights, indices.data_ptr(),
            indices.shape[0], arguments.num_inputs, arguments.dtype,
        )  # fmt: skip
        return output
