"""The layers that decoders are built of: plain objects that own preallocated, not yet loaded, tensors."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from baton.engine.float8_linear import Float8Linear, is_aligned
from baton.engine.packing import Packed, embedding_table, pack, pack_float8, pack_int8
from kernels.cpu.calls import ChosenRows
from kernels.cpu.embedding import EmbeddingTable
from kernels.cpu.linear import PackedLinear, PackedMatrix
from kernels.reads import Normalise, SiluGate

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

    def within(self, prefix: str) -> "Placement":
        """For the part of a model whose names in the checkpoint begin with `prefix`, which it leaves out."""
        names = (name.removeprefix(prefix) for name in self.float8 if name.startswith(prefix))
        return replace(self, float8=frozenset(names))


class Layer(Protocol):
    """Whatever owns parameters."""

    def checkpoint_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name in the checkpoint, the view of a parameter to load it into)."""
        ...


class ResidualStream:
    """What a decoder's layers read and add to in one step: `[T, hidden_size]`.

    On a GPU what a layer adds is kept until the next one reads, since one kernel then adds and normalises;
    but for a single row, which products read, normalise and add to themselves.
    """

    def __init__(self, states: Tensor) -> None:
        """`states` are overwritten."""
        self._states = states
        self._added: Tensor | None = None

    def normed(self, norm: "RMSNorm") -> Tensor:
        """The states so far, normalised."""
        if not has_gpu_kernels(self._states):
            return norm(self._states)
        added, self._added = self._added, None
        return norm.with_gpu_kernels(self._states, added)

    def states(self) -> Tensor:
        """The states so far."""
        if self._added is not None:
            self._states += self._added
            self._added = None
        return self._states

    def is_one_row_for(self, linear: "Linear") -> bool:
        """See Linear.takes_one_row."""
        return linear.takes_one_row(self._states)

    def add(self, linear: "Linear", states: Tensor) -> None:
        """Add a layer's output, which `linear` computes of `states`."""
        if has_gpu_kernels(states) and not linear.takes_one_row(states):
            assert self._added is None
            self._added = linear(states)
        else:
            self._states = linear(states, residual=self._states)


def has_gpu_kernels(states: Tensor) -> bool:
    """Whether Baton's kernels for GPUs run where `states` lie."""
    return states.is_cuda


class Linear:
    """`y = reads(x) W^T + b`, where W may hold several matrices of the checkpoint, one below the other."""

    def __init__(
        self,
        in_features: int,
        parts: dict[str, int],
        bias: bool,
        placement: Placement,
        reads: "RMSNorm | Gate | None" = None,
    ) -> None:
        """`parts`: name in the checkpoint and number of outputs of each matrix, in order.

        `reads`: what is done to the states before they are multiplied; kernels may do both at once.
        """
        self._parts = parts
        self._reads = reads
        self._quantization = placement.quantization
        self._packed: Packed | None = None
        self.weight: Tensor | None
        self.weight, self._scales = placement.empty_matrix(parts, in_features)
        self.bias = placement.empty(sum(parts.values())) if bias else None

    def __call__(self, states: Tensor, residual: Tensor | None = None) -> Tensor:
        """`[T, what reads takes]` to `[T, sum of the parts' outputs]`, plus `residual` of that shape."""
        if self.takes_one_row(states):
            return self._multiply_one_row(states, residual)
        if self._reads is not None:
            states = self._reads(states)
        return self._multiply(states, residual)

    def of_stream(self, stream: ResidualStream) -> Tensor:
        """As of the stream's states, where `reads` is a norm."""
        if isinstance(self._reads, RMSNorm) and not stream.is_one_row_for(self):
            return self._multiply(stream.normed(self._reads), None)
        return self(stream.states())

    def takes_one_row(self, states: Tensor) -> bool:
        """Whether a kernel for one row multiplies these, with all that is done before and after in it."""
        return states.shape[0] == 1 and self._packed is None and has_gpu_kernels(states)

    def _multiply_one_row(self, states: Tensor, residual: Tensor | None) -> Tensor:
        from kernels.gpu.one_row import one_row

        assert self.weight is not None
        fused = self._reads.fused() if self._reads is not None else None
        if self._reads is not None and fused is None:
            states = self._reads(states)
        return one_row(states, self.weight, self.bias, fused, residual)

    def _multiply(self, states: Tensor, residual: Tensor | None) -> Tensor:
        if self._packed is not None:
            return self._packed(states, residual)
        assert self.weight is not None
        output = F.linear(states, self.weight, self.bias)
        return output if residual is None else residual + output

    def pack(self, gate: "Gate | None" = None) -> bool:
        """Put the loaded weights into the layout that is multiplied fastest; their plain copy is let go.

        Returns whether what is multiplied then comes through `gate`, which whoever reads it leaves out.
        Weights in float8 are not multiplied before.
        """
        assert self.weight is not None
        fused = self._reads.fused() if self._reads is not None else None
        norm = fused if isinstance(fused, Normalise) else None
        is_gated = gate is not None and gate.fused() is not None
        packed: tuple[Packed, bool] | None
        if self._scales is not None:
            packed = Float8Linear(self.weight, self._scales, self.bias), False
        elif self._quantization == "int8":
            packed = pack_int8(self.weight, self.bias, norm, is_gated), True
        elif self._quantization == "fp8":
            packed = pack_float8(self.weight, self.bias)
        else:
            packed = pack(self.weight, self.bias, norm, is_gated)
        if packed is None:
            return False
        self._packed, does_all = packed
        if norm is not None and does_all:
            self._reads = None
        self.weight = None
        return is_gated and does_all

    def read_gated(self) -> None:
        """Leave the gate out: states come through it already."""
        self._reads = None

    def checkpoint_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name in the checkpoint, the view of a parameter to load it into); before `pack`."""
        assert self.weight is not None
        first = 0
        for name, size in self._parts.items():
            yield f"{name}.weight", self.weight[first : first + size]
            if self._scales is not None:
                yield f"{name}.weight_scale", self._scales[first : first + size]
            if self.bias is not None:
                yield f"{name}.bias", self.bias[first : first + size]
            first += size


class OutputProjection(Linear):
    """Hidden states to logits; where embeddings are tied to it, tokens to hidden states as well."""

    _table: EmbeddingTable | None = None

    def chosen(self, states: Tensor, rows: ChosenRows) -> Tensor:
        """Logits `[N, V]` of some rows of `[T, in_features]`; those that don't count may be anything."""
        if isinstance(self._packed, PackedMatrix):
            return self._packed(states, chosen=rows)
        return self(states[rows.ids])

    def embed(self, token_ids: Tensor) -> Tensor:
        """int64 `[T]` to `[T, in_features]`: those tokens' rows of the weights."""
        if self._table is not None:
            return self._table(token_ids)
        assert self.weight is not None
        return F.embedding(token_ids, self.weight)

    def pack(self, gate: "Gate | None" = None) -> bool:
        """See `Linear.pack`; the plain copy is kept where tokens can't be looked up in the packed one.

        8-bit floats are too coarse for logits.
        """
        weight = self.weight
        if self._quantization == "fp8":
            return False
        is_gated = super().pack(gate)
        if isinstance(self._packed, PackedLinear):
            self._table = self._packed.table()
        else:
            assert weight is not None
            self.weight = weight
            self._table = embedding_table(weight)
        return is_gated


class RMSNorm:
    """Root mean square normalisation over the last axis (Zhang and Sennrich, 2019), summed in float32."""

    def __init__(self, name: str, size: int, eps: float, placement: Placement) -> None:
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
        from kernels.gpu.row_functions import add_rms_norm, rms_norm

        if added is None:
            return rms_norm(states, self.weight, self.eps)
        return add_rms_norm(added, states, self.weight, self.eps)

    def checkpoint_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name in the checkpoint, the parameter to load it into)."""
        yield f"{self._name}.weight", self.weight


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
            from kernels.gpu.row_functions import gated_silu

            return gated_silu(states)
        gate, up = states.chunk(2, dim=-1)
        return self._activation(gate) * up


class GatedMLP:
    """`x + down(activation(gate(n)) * up(n))` of n = norm(x); SwiGLU (Shazeer, 2020) where that is SiLU."""

    def __init__(
        self, norm: RMSNorm, sizes: tuple[int, int], activation: str, bias: bool, placement: Placement
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
