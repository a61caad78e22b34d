"""Matrix products with weights that were packed once (linear.h)."""

import ctypes

import torch
from torch import Tensor

from baton_kernels.cpu.calls import ChosenRows, Kernel, make_call, new_tensor
from baton_kernels.cpu.embedding import EmbeddingTable
from baton_kernels.cpu.library import DTYPES
from baton_kernels.quantization import int8_groups
from baton_kernels.reads import Normalise


class _Linear(ctypes.Structure):
    """struct linear"""

    _fields_ = [
        ("weights", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("norm", ctypes.c_void_p),
        ("num_inputs", ctypes.c_int64),
        ("num_outputs", ctypes.c_int64),
        ("output_width", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
        ("is_gated", ctypes.c_int32),
        ("eps", ctypes.c_float),
        ("row_ids", ctypes.c_void_p),
        ("states", ctypes.c_void_p),
        ("residual", ctypes.c_void_p),
        ("output", ctypes.c_void_p),
    ]


def interleave(parameter: Tensor, lanes: int) -> Tensor:
    """Gates and then the others, `[2 * N, ...]`, as kernels gate them: `lanes` of each in turn, then 0."""
    halves = []
    for half in parameter.chunk(2):
        missing = -half.shape[0] % lanes
        filled = torch.cat((half, half.new_zeros(missing, *half.shape[1:])))
        halves.append(filled.unflatten(0, (-1, lanes)))
    return torch.stack(halves, dim=1).flatten(0, 2)


class PackedMatrix:
    """`y = norm(x) W^T + b`, or `SiLU(gate) * other` of that's halves. Not for several threads at once."""

    def __init__(
        self,
        library: ctypes.CDLL,
        weight: Tensor,
        bias: Tensor | None = None,
        norm: Normalise | None = None,
        is_gated: bool = False,
    ) -> None:
        """Packs a copy of weight `[out_features, in_features]`: float32, bfloat16 or float16, on the CPU.

        With `is_gated` the gates are the first half of the outputs.
        """
        width, num_inputs = weight.shape
        if is_gated:
            width //= 2
            lanes = library.baton_lanes()
            weight = interleave(weight, lanes)
            bias = None if bias is None else interleave(bias, lanes)
        norm_weight = None if norm is None else norm.weight.float().contiguous()
        packed = self._pack(library, weight.contiguous())
        self._library = library
        self._dtype = weight.dtype
        self._width = width
        self._tensors: tuple[Tensor, Tensor | None, Tensor | None] = (
            packed,
            bias,
            norm_weight,
        )  # keeps the memory that the arguments point to
        self._arguments = _Linear(
            weights=packed.data_ptr(),
            bias=_address(bias),
            norm=_address(norm_weight),
            num_inputs=num_inputs,
            num_outputs=weight.shape[0],
            output_width=width,
            dtype=DTYPES[weight.dtype],
            is_gated=is_gated,
            eps=0.0 if norm is None else norm.eps,
        )

    _kernel: Kernel

    @staticmethod
    def _pack(library: ctypes.CDLL, weight: Tensor) -> Tensor:
        """The weights as the kernel reads them, uint8."""
        raise NotImplementedError

    def __call__(
        self, states: Tensor, residual: Tensor | None = None, chosen: ChosenRows | None = None
    ) -> Tensor:
        """`[T, in_features]` to `[T, out_features]` (half as wide where it gates), plus `residual` if given.

        Of `chosen` rows to `[N, out_features]`, of which as many are written as count. All in the dtype of
        the bias and of the weights as they were loaded. Raises MemoryError.
        """
        states = states.contiguous()
        arguments = self._arguments
        num_rows = states.shape[0] if chosen is None else chosen.ids.shape[0]
        output = new_tensor(num_rows, self._width, dtype=self._dtype)
        arguments.states = states.data_ptr()
        arguments.residual = _address(residual)
        arguments.row_ids = None if chosen is None else chosen.ids.data_ptr()
        arguments.output = output.data_ptr()
        make_call(self._library, self._kernel, arguments, num_rows, chosen)
        return output


class PackedLinear(PackedMatrix):
    """Weights in their own dtype, products summed in float32 (linear.c)."""

    _kernel = Kernel.LINEAR

    @staticmethod
    def _pack(library: ctypes.CDLL, weight: Tensor) -> Tensor:
        num_outputs, num_inputs = weight.shape
        dtype = DTYPES[weight.dtype]
        packed = torch.zeros(library.baton_packed_bytes(num_outputs, num_inputs, dtype), dtype=torch.uint8)
        library.baton_pack(
            packed.data_ptr(), weight.data_ptr(), num_outputs, num_inputs, dtype, torch.get_num_threads()
        )
        return packed

    def table(self) -> EmbeddingTable:
        """The weight as rows that tokens are looked up in."""
        arguments = self._arguments
        return EmbeddingTable(
            self._library, self._tensors[0], arguments.num_inputs, self._dtype, is_packed=True
        )


class PackedInt8Linear(PackedMatrix):
    """8-bit weights and 16-bit states, products summed in 32-bit integers (linear_int8.c).

    Weights are rounded with a scale for each 32 inputs of an output; each row of states gets its own when it
    is multiplied.
    """

    _kernel = Kernel.LINEAR_INT8

    @staticmethod
    def _pack(library: ctypes.CDLL, weight: Tensor) -> Tensor:
        num_outputs, num_inputs = weight.shape
        rounded, scales = int8_groups(weight)
        packed = torch.zeros(library.baton_packed_bytes_int8(num_outputs, num_inputs), dtype=torch.uint8)
        library.baton_pack_int8(
            packed.data_ptr(), rounded.data_ptr(), scales.data_ptr(), num_outputs, num_inputs
        )
        return packed


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
