"""Numbers in 8 bits, and the scales that give them their size back, in plain torch."""

import torch
from torch import Tensor

INT8_MAX = 127  # -128 is left out: numbers of either sign then have the same range
FLOAT8_MAX = 448.0  # of float8_e4m3fn


def int8_rows(values: Tensor) -> tuple[Tensor, Tensor]:
    """`[R, C]` of any floating dtype, rounded to the nearest: int8 `[R, C]` and float32 scales `[R]`.

    Symmetric, the greatest of each row becomes 127: `values` are about `int8 * scales[:, None]` (Dettmers et
    al., LLM.int8(), 2022, section 2.1).
    """
    numbers = values.float()
    greatest = numbers.abs().amax(dim=1)
    factors = torch.where(greatest > 0, INT8_MAX / greatest, 0.0)
    return (numbers * factors[:, None]).round_().to(torch.int8), greatest / INT8_MAX


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
