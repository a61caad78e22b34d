"""Activations, and the gates that are made of them."""

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from baton.engine.layers.placement import has_gpu_kernels
from baton_kernels.reads import SiluGate

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
}


class Gate:
    """`activation(gate) * up` of states that hold both, gate first."""

    def __init__(self, activation: str) -> None:
        self._name = activation
        self._activation = ACTIVATIONS[activation]

    def fused(self) -> SiluGate | None:
        """The same for kernels that do it as they read the states; None: they don't know the activation."""
        return SiluGate() if self._name == "silu" else None

    def __call__(self, states: Tensor) -> Tensor:
        """`[..., 2 * size]` to `[..., size]`."""
        if has_gpu_kernels(states) and self._name == "silu":
            from baton_kernels.gpu.row_functions import gated_silu

            return gated_silu(states)
        gate, up = states.chunk(2, dim=-1)
        return self._activation(gate) * up
