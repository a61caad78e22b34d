"""Numbers in 8 bits, and the scales that give them their size back, in plain torch."""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

INT8_MAX = 127  # -128 is left out: numbers of either sign then have the same range
INT8_GROUP = 32  # inputs that share a scale
FLOAT8_MAX = 448.0  # of float8_e4m3fn


def int8_groups(weight: Tensor) -> tuple[Tensor, Tensor]:
    """`[O, I]` of any floating dtype, rounded to the nearest: int8 `[O, I]`, bfloat16 scales `[O, groups]`.

    A group is INT8_GROUP inputs of one output, the last may have fewer. Symmetric, the greatest of each
    becomes 127: `weight` is about `int8 * scale` (as llama.cpp's Q8_0).
    """
    num_outputs, num_inputs = weight.shape
    groups = F.pad(weight.float(), (0, -num_inputs % INT8_GROUP)).view(num_outputs, -1, INT8_GROUP)
    scales = (groups.abs().amax(dim=2) / INT8_MAX).bfloat16()
    rounded = (groups / scales.float().clamp_(min=1e-30)[:, :, None]).round_().to(torch.int8)
    return rounded.view(num_outputs, -1)[:, :num_inputs].contiguous(), scales


def layer_scales(scales: tuple[float, ...], layer: int) -> tuple[float, float]:
    """Scales of one layer's K and V pages; `scales` has K's and V's of each layer in turn, none: all 1."""
    return (scales[2 * layer], scales[2 * layer + 1]) if scales else (1.0, 1.0)


def to_float8(numbers: Tensor, scale: float) -> Tensor:
    """float8_e4m3fn of `numbers / scale`, to the nearest; too large becomes the greatest, NaN stays NaN."""
    return (numbers.float() / scale).clamp(-FLOAT8_MAX, FLOAT8_MAX).to(torch.float8_e4m3fn)


def float8_rows(values: Tensor) -> tuple[Tensor, Tensor]:
    """As `int8_rows`: float8_e4m3fn `[R, C]`, the greatest of each row 448, and float32 scales `[R]`."""
    numbers = values.float()
    scales = numbers.abs().amax(dim=1).clamp(min=1e-30) / FLOAT8_MAX
    return (numbers / scales[:, None]).clamp(-FLOAT8_MAX, FLOAT8_MAX).to(torch.float8_e4m3fn), scales
