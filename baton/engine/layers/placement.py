"""What a model's parameters are made of, and where they lie."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from baton.engine.quantization.float8_linear import is_aligned


@dataclass(frozen=True, slots=True)
class ParameterPlacement:
    """What every parameter of a model is made of and where it lies."""

    dtype: torch.dtype
    device: torch.device
    quantization: str = "none"  # of the matrices of linear layers: EngineConfig.quantization
    float8: frozenset[str] = frozenset()  # matrices of the checkpoint that stay as they are, in float8

    def empty(self, *shape: int) -> Tensor:
        """An uninitialised parameter."""
        return torch.empty(*shape, dtype=self.dtype, device=self.device)

    def empty_matrix(self, parts: Mapping[str, int], in_features: int) -> tuple[Tensor, Tensor | None]:
        """Uninitialised weight `[sum of the parts, in_features]`, and float32 scale of each output.

        No scales: it is of the model's dtype, since not all of it is in float8, or it can't be multiplied.
        """
        outputs = sum(parts.values())
        if not self.float8.issuperset(parts) or not is_aligned(outputs, in_features):
            return self.empty(outputs, in_features), None
        weight = torch.empty(outputs, in_features, dtype=torch.float8_e4m3fn, device=self.device)
        return weight, torch.empty(outputs, dtype=torch.float32, device=self.device)

    def within(self, prefix: str) -> "ParameterPlacement":
        """For the part of a model whose names in the checkpoint begin with `prefix`, which it leaves out."""
        names = (name.removeprefix(prefix) for name in self.float8 if name.startswith(prefix))
        return replace(self, float8=frozenset(names))


class Layer(Protocol):
    """Whatever owns parameters."""

    def checkpoint_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name in the checkpoint, the view of a parameter to load it into)."""
        ...


def has_gpu_kernels(states: Tensor) -> bool:
    """Whether Baton's kernels for GPUs run where `states` lie."""
    return states.is_cuda
