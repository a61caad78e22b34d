"""What attention kernels need to rotate queries and keys by their positions."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Rotation:
    """How queries and keys are rotated: cosines and signed sines `[T, 1, D]` in the dtype of states.

    norms: float32 `[D]` weights of RMSNorms of each head of the query and of the key before that, and eps.
    """

    cosines: Tensor
    sines: Tensor
    norms: tuple[Tensor, Tensor, float] | None = None
