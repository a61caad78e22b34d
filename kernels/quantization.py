"""Numbers in 8 bits, and the scales that give them their size back, in plain torch."""

import torch
from torch import Tensor

INT8_MAX = 127  # -128 is left out: numbers of either sign then have the same range


def int8_rows(values: Tensor) -> tuple[Tensor, Tensor]:
    """`[R, C]` of any floating dtype, rounded to the nearest: int8 `[R, C]` and float32 scales `[R]`.

    Symmetric, the greatest of each row becomes 127: `values` are about `int8 * scales[:, None]` (Dettmers et
    al., LLM.int8(), 2022, section 2.1).
    """
    numbers = values.float()
    greatest = numbers.abs().amax(dim=1)
    factors = torch.where(greatest > 0, INT8_MAX / greatest, 0.0)
    return (numbers * factors[:, None]).round_().to(torch.int8), greatest / INT8_MAX
