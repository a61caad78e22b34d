"""The layers that decoders are built of: plain objects that own preallocated, not yet loaded, tensors."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
}


@dataclass(frozen=True, slots=True)
class Placement:
    """What every parameter of a model is made of and where it lies."""

    dtype: torch.dtype
    device: torch.device

    def empty(self, *shape: int) -> Tensor:
        """An uninitialised parameter."""
        return torch.empty(*shape, dtype=self.dtype, device=self.device)


class Layer(Protocol):
    """Whatever owns parameters."""

    def checkpoint_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name in the checkpoint, the view of a parameter to load it into)."""
        ...


class Linear:
    """`y = x W^T + b`, where W may hold several matrices of the checkpoint, one below the other."""

    def __init__(self, in_features: int, parts: dict[str, int], bias: bool, placement: Placement) -> None:
        """`parts`: name in the checkpoint and number of outputs of each matrix, in order."""
        self._parts = parts
        self.weight = placement.empty(sum(parts.values()), in_features)
        self.bias = placement.empty(sum(parts.values())) if bias else None

    def __call__(self, states: Tensor) -> Tensor:
        """`[..., in_features]` to `[..., sum of the parts' outputs]`."""
        return F.linear(states, self.weight, self.bias)

    def checkpoint_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name in the checkpoint, the view of a parameter to load it into)."""
        first = 0
        for name, size in self._parts.items():
            yield f"{name}.weight", self.weight[first : first + size]
            if self.bias is not None:
                yield f"{name}.bias", self.bias[first : first + size]
            first += size


class RMSNorm:
    """Root mean square normalisation over the last axis (Zhang and Sennrich, 2019), summed in float32."""

    def __init__(self, name: str, size: int, eps: float, placement: Placement) -> None:
        self._name = name
        self._eps = eps
        self.weight = placement.empty(size)

    def __call__(self, states: Tensor) -> Tensor:
        """`[..., size]` to the same shape and dtype."""
        return F.rms_norm(states, self.weight.shape, self.weight, self._eps)

    def checkpoint_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name in the checkpoint, the parameter to load it into)."""
        yield f"{self._name}.weight", self.weight


class GatedMLP:
    """`down(activation(gate(x)) * up(x))`; SwiGLU (Shazeer, 2020) where the activation is SiLU."""

    def __init__(
        self, hidden_size: int, intermediate_size: int, activation: str, bias: bool, placement: Placement
    ) -> None:
        self._activation = ACTIVATIONS[activation]
        gate_up = {"mlp.gate_proj": intermediate_size, "mlp.up_proj": intermediate_size}
        self._gate_up = Linear(hidden_size, gate_up, bias, placement)
        self._down = Linear(intermediate_size, {"mlp.down_proj": hidden_size}, bias, placement)

    def __call__(self, states: Tensor) -> Tensor:
        """`[T, hidden_size]` to `[T, hidden_size]`."""
        gate, up = self._gate_up(states).chunk(2, dim=-1)
        return self._down(self._activation(gate) * up)

    def checkpoint_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name in the checkpoint, the view of a parameter to load it into)."""
        yield from self._gate_up.checkpoint_tensors()
        yield from self._down.checkpoint_tensors()
