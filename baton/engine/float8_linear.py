"""Weight matrices in 8-bit floats on a GPU."""

import torch
from torch import Tensor

from kernels.quantization import float8_rows

ALIGNMENT = 16  # torch._scaled_mm takes matrices whose sides are multiples of it


class Float8Linear:
    """`y = x W^T + b` in float8_e4m3fn, a scale for each output and each row of x (torch._scaled_mm)."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """Rounds weight `[out_features, in_features]`, bfloat16, both multiples of ALIGNMENT."""
        rounded, scales = float8_rows(weight)
        self._weight = rounded.t()  # the product wants it by columns
        self._scales = scales[None, :]
        self._bias = bias

    def __call__(self, states: Tensor, residual: Tensor | None = None) -> Tensor:
        """bfloat16 `[T, in_features]` to `[T, out_features]`, plus `residual`."""
        rounded, scales = float8_rows(states)
        output: Tensor = torch._scaled_mm(
            rounded, self._weight, scales[:, None], self._scales, out_dtype=torch.bfloat16
        )
        if self._bias is not None:
            output += self._bias
        return output if residual is None else output.add_(residual)
