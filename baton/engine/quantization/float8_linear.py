"""Weight matrices in 8-bit floats on a GPU."""

import torch
from torch import Tensor

from baton_kernels.quantization import float8_rows

ALIGNMENT = 16  # torch._scaled_mm takes matrices whose sides are multiples of it


def is_aligned(*sides: int) -> bool:
    """Whether a matrix with these sides can be multiplied by Float8Linear."""
    return not any(side % ALIGNMENT for side in sides)


class Float8Linear:
    """`y = x W^T + b` in float8_e4m3fn, a scale for each output and each row of x (torch._scaled_mm)."""

    def __init__(self, weight: Tensor, scales: Tensor, bias: Tensor | None) -> None:
        """Of `weight * scales[:, None]`, which is not copied.

        weight: float8_e4m3fn `[out_features, in_features]`, both multiples of ALIGNMENT. scales: float32
        `[out_features]`. bias: bfloat16 `[out_features]`.
        """
        self._weight = weight.t()  # the product wants it by columns
        self._scales = scales[None, :]
        self._bias = bias

    def __call__(self, states: Tensor, residual: Tensor | None = None) -> Tensor:
        """bfloat16 `[T, in_features]` to `[T, out_features]`, plus `residual`."""
        rounded, scales = _rounded(states)
        output: Tensor = torch._scaled_mm(
            rounded, self._weight, scales[:, None], self._scales, out_dtype=torch.bfloat16
        )
        if self._bias is not None:
            output += self._bias
        return output if residual is None else output.add_(residual)


def _rounded(states: Tensor) -> tuple[Tensor, Tensor]:
    """See `baton_kernels.quantization.float8_rows`."""
    if not states.is_cuda:
        return float8_rows(states)
    from baton_kernels.gpu.float8 import float8_rows as in_one_pass

    return in_one_pass(states.contiguous())
