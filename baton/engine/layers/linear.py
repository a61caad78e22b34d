"""Matrix products, and the residual stream that they read and add to."""

from collections.abc import Iterator

import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from baton.engine.layers.gate import Gate
from baton.engine.layers.norm import RMSNorm
from baton.engine.layers.placement import ParameterPlacement, has_gpu_kernels
from baton.engine.quantization.float8_linear import Float8Linear
from baton.engine.quantization.packing import Packed, embedding_table, pack, pack_float8, pack_int8
from baton_kernels.cpu.calls import ChosenRows
from baton_kernels.cpu.embedding import EmbeddingTable
from baton_kernels.cpu.linear import PackedLinear, PackedMatrix
from baton_kernels.reads import Normalise


class ResidualStream:
    """What a decoder's layers read and add to in one step: `[T, hidden_size]`.

    On a GPU what a layer adds is kept until the next one reads, since one kernel then adds and normalises;
    but for a single row, which products read, normalise and add to themselves.
    """

    def __init__(self, states: Tensor) -> None:
        """`states` are overwritten."""
        self._states = states
        self._added: Tensor | None = None

    def normed(self, norm: RMSNorm) -> Tensor:
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


class Linear:
    """`y = reads(x) W^T + b`, where W may hold several matrices of the checkpoint, one below the other."""

    def __init__(
        self,
        in_features: int,
        parts: dict[str, int],
        bias: bool,
        placement: ParameterPlacement,
        reads: RMSNorm | Gate | None = None,
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
        from baton_kernels.gpu.one_row import one_row

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

    def pack(self, gate: Gate | None = None) -> bool:
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

    def pack(self, gate: Gate | None = None) -> bool:
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
