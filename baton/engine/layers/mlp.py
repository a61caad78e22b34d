"""The feed-forward part of a decoder's layer."""

from collections.abc import Iterator

from torch import Tensor

from baton.engine.layers.gate import Gate
from baton.engine.layers.linear import Linear, ResidualStream
from baton.engine.layers.norm import RMSNorm
from baton.engine.layers.placement import ParameterPlacement


class GatedMLP:
    """`x + down(activation(gate(n)) * up(n))` of n = norm(x); SwiGLU (Shazeer, 2020) where that is SiLU."""

    def __init__(
        self,
        norm: RMSNorm,
        sizes: tuple[int, int],
        activation: str,
        bias: bool,
        placement: ParameterPlacement,
    ) -> None:
        """`sizes`: of the hidden states, and between the matrices."""
        hidden_size, intermediate_size = sizes
        self._norm = norm
        gate_up = {"mlp.gate_proj": intermediate_size, "mlp.up_proj": intermediate_size}
        self._gate_up = Linear(hidden_size, gate_up, bias, placement, reads=norm)
        down = {"mlp.down_proj": hidden_size}
        self._gate = Gate(activation)
        self._down = Linear(intermediate_size, down, bias, placement, reads=self._gate)

    def __call__(self, stream: ResidualStream) -> None:
        """Read the stream and add to it."""
        stream.add(self._down, self._gate_up.of_stream(stream))

    def pack(self) -> None:
        """See `Linear.pack`."""
        if self._gate_up.pack(self._gate):
            self._down.read_gated()
        self._down.pack()

    def checkpoint_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name in the checkpoint, the view of a parameter to load it into)."""
        for part in (self._norm, self._gate_up, self._down):
            yield from part.checkpoint_tensors()
