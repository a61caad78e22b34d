"""Normalisation of hidden states."""

from collections.abc import Iterator

import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from baton.engine.layers.placement import ParameterPlacement
from baton_kernels.reads import Normalise


class RMSNorm:
    """Root mean square normalisation over the last axis (Zhang and Sennrich, 2019), summed in float32."""

    def __init__(self, name: str, size: int, eps: float, placement: ParameterPlacement) -> None:
        self._name = name
        self.eps = eps
        self.weight = placement.empty(size)

    def fused(self) -> Normalise:
        """The same for kernels that do it as they read the states."""
        return Normalise(self.weight, self.eps)

    def __call__(self, states: Tensor) -> Tensor:
        """`[..., size]` to the same shape and dtype."""
        return F.rms_norm(states, self.weight.shape, self.weight, self.eps)

    def with_gpu_kernels(self, states: Tensor, added: Tensor | None) -> Tensor:
        """`[T, size]`, contiguous; `added`, of that shape, is added to `states` before, in place."""
        from baton_kernels.gpu.row_functions import add_rms_norm, rms_norm

        if added is None:
            return rms_norm(states, self.weight, self.eps)
        return add_rms_norm(added, states, self.weight, self.eps)

    def checkpoint_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name in the checkpoint, the parameter to load it into)."""
        yield f"{self._name}.weight", self.weight
