"""Matrix products with weights that were packed once (linear.h)."""

import ctypes

import torch
from torch import Tensor

from kernels.cpu.calls import Kernel, make_call, new_tensor
from kernels.cpu.library import DTYPES
from kernels.quantization import int8_groups
from kernels.reads import Normalise, Reads

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
        ("states", ctypes.c_void_p),
        ("residual", ctypes.c_void_p),
        ("output", ctypes.c_void_p),
    ]


class PackedMatrix:
    """`y = reads(x) W^T + b` in some kernel of linear.h. Not for several threads at once."""

    def __init__(
        self,
        library: ctypes.CDLL,
        kernel: Kernel,
        packed: Tensor,
        shape: tuple[int, int],
        dtype: torch.dtype,
        bias: Tensor | None,
        reads: Reads | None,
    ) -> None:
        """`packed`: the weights. `shape`: out_features, in_features. `dtype`: of states."""
        norm = reads.weight.float().contiguous() if isinstance(reads, Normalise) else None
        self._library = library
        self._kernel = kernel
        self._dtype = dtype
        self._tensors = (packed, bias, norm)  # keeps the memory that the arguments point to
        self._num_outputs, num_inputs = shape
        self._arguments = _Linear(
            weights=packed.data_ptr(),
            bias=_address(bias),
            norm=_address(norm),
            num_inputs=num_inputs,
            num_outputs=self._num_outputs,
            dtype=DTYPES[dtype],
            transform=_PLAIN if reads is None else _GATE if norm is None else _NORMALISE,
            eps=reads.eps if isinstance(reads, Normalise) else 0.0,
        )

    def __call__(self, states: Tensor, residual: Tensor | None = None) -> Tensor:
        """`[T, in_features]` (twice as wide for SiluGate) to `[T, out_features]`, plus `residual` if given.

        All in the dtype of the bias and of the weights as they were loaded. Raises MemoryError.
        """
        states = states.contiguous()
        arguments = self._arguments
        num_rows = states.shape[0]
        output = new_tensor(num_rows, self._num_outputs, dtype=self._dtype)
        arguments.states = states.data_ptr()
        arguments.residual = _address(residual)
        arguments.output = output.data_ptr()
        make_call(self._library, self._kernel, arguments, num_rows)
        return output


class PackedLinear(PackedMatrix):
    """Weights in their own dtype, products summed in float32 (linear.c)."""

    def __init__(
        self,
        library: ctypes.CDLL,
        weight: Tensor,
        bias: Tensor | None = None,
        reads: Reads | None = None,
    ) -> None:
        """Packs a copy of weight `[out_features, in_features]`: float32, bfloat16 or float16, on the CPU."""
        num_outputs, num_inputs = weight.shape
        dtype = DTYPES[weight.dtype]
        packed = torch.zeros(library.baton_packed_bytes(num_outputs, num_inputs, dtype), dtype=torch.uint8)
        weight = weight.contiguous()
        library.baton_pack(
            packed.data_ptr(), weight.data_ptr(), num_outputs, num_inputs, dtype, torch.get_num_threads()
        )
        super().__init__(
            library, Kernel.LINEAR, packed, (num_outputs, num_inputs), weight.dtype, bias, reads
        )

    def rows(self, indices: Tensor) -> Tensor:
        """Rows of the weight, as an embedding looks them up: int64 `[T]` to `[T, in_features]`."""
        arguments = self._arguments
        output = torch.empty(indices.shape[0], arguments.num_inputs, dtype=self._dtype)
        self._library.baton_packed_rows(
            output.data_ptr(), arguments.weights, indices.data_ptr(),
            indices.shape[0], arguments.num_inputs, arguments.dtype,
        )  # fmt: skip
        return output


class PackedInt8Linear(PackedMatrix):
    """8-bit weights and 16-bit states, products summed in 32-bit integers (linear_int8.c)."""

    def __init__(
        self,
        library: ctypes.CDLL,
        weight: Tensor,
        bias: Tensor | None = None,
        reads: Reads | None = None,
    ) -> None:
        """Rounds and packs weight `[out_features, in_features]`: float32, bfloat16 or float16, on the CPU.

        A scale for each 32 inputs of an output; each row of states gets its own when it is multiplied.
        """
        num_outputs, num_inputs = weight.shape
        rounded, scales = int8_groups(weight)
        packed = torch.zeros(library.baton_packed_bytes_int8(num_outputs, num_inputs), dtype=torch.uint8)
        library.baton_pack_int8(
            packed.data_ptr(), rounded.data_ptr(), scales.data_ptr(), num_outputs, num_inputs
        )
        super().__init__(
            library, Kernel.LINEAR_INT8, packed, (num_outputs, num_inputs), weight.dtype, bias, reads
        )


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
