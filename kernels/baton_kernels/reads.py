"""What a kernel that multiplies states by a matrix may do to them as it reads them."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Normalise:
    """RMSNorm of the states before they are multiplied; weight `[in_features]`, any dtype."""

    weight: Tensor
    eps: float


@dataclass(frozen=True, slots=True)
class SiluGate:
    """`silu(states[..., :in_features]) * states[..., in_features:]` before they are multiplied."""


Reads = Normalise | SiluGate
