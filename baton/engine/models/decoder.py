"""One decoder for the whole Llama family; what tells its members apart is data.

Letters in shape comments: T tokens of a step, H query heads, K kv heads, D head_dim, V vocab_size.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from baton.engine.attention.base import AttentionStep, RotatingAttentionStep
from baton.engine.layers.linear import Linear, OutputProjection, ResidualStream
from baton.engine.layers.mlp import GatedMLP
from baton.engine.layers.norm import RMSNorm
from baton.engine.layers.placement import Layer, ParameterPlacement
from baton.engine.layers.rope import RopeConfig, RotaryEmbedding, rotate
from baton.engine.quantization.packing import embedding_table
from baton_kernels.cpu.calls import ChosenRows
from baton_kernels.cpu.embedding import EmbeddingTable
from baton_kernels.rotation import Rotation


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """The shape of a decoder-only transformer with rotary positions, RMSNorm and a gated MLP."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    activation: str  # a key of layers.ACTIVATIONS
    rope: RopeConfig
    qkv_bias: bool
    output_bias: bool  # of attention's output projection
    mlp_bias: bool
    qk_norm: bool  # RMSNorm over every head's query and key before they are rotated
    tied_embeddings: bool  # the output projection is the embedding
    windows: tuple[
        int | None, ...
    ]  # of each layer: last tokens that a query sees, itself included; None: all
    max_position_embeddings: int  # tokens


class Decoder:
    """Token ids to hidden states to logits. Its parameters are uninitialised until loaded."""

    def __init__(self, config: DecoderConfig, placement: ParameterPlacement) -> None:
        self.config = config
        self.dtype = placement.dtype
        self._rotary = RotaryEmbedding(config.rope, config.head_dim, placement.dtype, placement.device)
        self._layers = [
            _DecoderLayer(config, index, placement.within(f"model.layers.{index}."))
            for index in range(config.num_layers)
        ]
        placement = replace(placement, float8=frozenset())  # too coarse for logits
        self._norm = RMSNorm("model.norm", config.hidden_size, config.rms_norm_eps, placement)
        name = "model.embed_tokens" if config.tied_embeddings else "lm_head"
        self._output = OutputProjection(
            config.hidden_size, {name: config.vocab_size}, False, placement, reads=self._norm
        )
        self._table: EmbeddingTable | None = None
        self._embedding: Tensor | None = None
        if not config.tied_embeddings:
            self._embedding = placement.empty(config.vocab_size, config.hidden_size)

    def pack(self) -> None:
        """Put the loaded weights into the layout that is multiplied fastest, one matrix after the other."""
        for layer in self._layers:
            layer.pack()
        self._output.pack()
        self._rotary.pack()
        if self._embedding is not None:
            self._table = embedding_table(self._embedding)

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        attention: AttentionStep,
        after_layer: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Hidden states after the last layer, before the final norm.

        token_ids, positions: int64 `[T]`, the rows of the step one after the other. `after_layer` is called
        with the number of layers that are done, after each.
        Returns `[T, hidden_size]` in the model's dtype.
        """
        states = self.embed(token_ids)
        return self.run_layers(states, *self.angles(positions), attention, after_layer)

    def run_layers(
        self,
        states: Tensor,
        cosines: Tensor,
        sines: Tensor,
        attention: AttentionStep,
        after_layer: Callable[[int], None] | None = None,
    ) -> Tensor:
        """`forward` of embedded tokens, which are overwritten, and the angles of their positions."""
        stream = ResidualStream(states)
        for num_done, layer in enumerate(self._layers, start=1):
            layer(stream, cosines, sines, attention)
            if after_layer is not None:
                after_layer(num_done)
        return stream.states()

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits `[rows, V]` of hidden states `[rows, hidden_size]`, both in the model's dtype."""
        return self._output(hidden)

    def chosen_logits(self, hidden: Tensor, rows: ChosenRows) -> Tensor:
        """Logits `[N, V]` of some rows of `[T, hidden_size]`; those that don't count may be anything."""
        return self._output.chosen(hidden, rows)

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines of int64 `[T]`, each `[T, 1, D]` in the model's dtype."""
        return self._rotary.angles(positions)

    def embed(self, token_ids: Tensor) -> Tensor:
        """int64 `[T]` to `[T, hidden_size]`."""
        if self._embedding is None:
            return self._output.embed(token_ids)
        if self._table is not None:
            return self._table(token_ids)
        return F.embedding(token_ids, self._embedding)

    def checkpoint_tensors(self) -> dict[str, Tensor]:
        """The tensors that a checkpoint must have: name, and (part of a) parameter to load it into."""
        tensors = dict(self._output.checkpoint_tensors())
        if self._embedding is not None:
            tensors["model.embed_tokens.weight"] = self._embedding
        for index, layer in enumerate(self._layers):
            tensors |= {f"model.layers.{index}.{name}": part for name, part in layer.checkpoint_tensors()}
        tensors.update(self._norm.checkpoint_tensors())
        return tensors


class _DecoderLayer:
    def __init__(self, config: DecoderConfig, index: int, placement: ParameterPlacement) -> None:
        def norm(name: str) -> RMSNorm:
            return RMSNorm(name, config.hidden_size, config.rms_norm_eps, placement)

        self._attention = _Attention(config, index, norm("input_layernorm"), placement)
        sizes = config.hidden_size, config.intermediate_size
        self._mlp = GatedMLP(
            norm("post_attention_layernorm"), sizes, config.activation, config.mlp_bias, placement
        )

    def __call__(
        self, stream: ResidualStream, cosines: Tensor, sines: Tensor, attention: AttentionStep
    ) -> None:
        self._attention(stream, cosines, sines, attention)
        self._mlp(stream)

    def pack(self) -> None:
        self._attention.pack()
        self._mlp.pack()

    def checkpoint_tensors(self) -> Iterator[tuple[str, Tensor]]:
        for part in (self._attention, self._mlp):
            yield from part.checkpoint_tensors()


class _Attention:
    """`x + output(attention(norm(x)))`."""

    def __init__(
        self, config: DecoderConfig, index: int, norm: RMSNorm, placement: ParameterPlacement
    ) -> None:
        self._config = config
        self._index = index
        self._norm = norm
        query_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        parts = {"self_attn.q_proj": query_size, "self_attn.k_proj": kv_size, "self_attn.v_proj": kv_size}
        self._qkv = Linear(config.hidden_size, parts, config.qkv_bias, placement, reads=norm)
        self._output = Linear(
            query_size, {"self_attn.o_proj": config.hidden_size}, config.output_bias, placement
        )
        self._head_norms = []
        self._norm_weights: tuple[Tensor, Tensor, float] | None = None  # in float32, for kernels
        if config.qk_norm:
            self._head_norms = [
                RMSNorm(f"self_attn.{name}", config.head_dim, config.rms_norm_eps, placement)
                for name in ("q_norm", "k_norm")
            ]

    def __call__(
        self, stream: ResidualStream, cosines: Tensor, sines: Tensor, attention: AttentionStep
    ) -> None:
        heads, kv_heads = self._config.num_heads, self._config.num_kv_heads
        states = self._qkv.of_stream(stream).view(
            -1, heads + 2 * kv_heads, self._config.head_dim
        )  # [T, H + 2K, D]
        if isinstance(attention, RotatingAttentionStep):
            rotation = Rotation(cosines, sines, self._norm_weights)
            output = attention.rotate_and_attend(self._index, states, rotation)
        else:
            query, key, value = self._rotated(states, cosines, sines)
            output = attention.attend(self._index, query, key, value)
        stream.add(self._output, output.flatten(1))

    def _rotated(self, states: Tensor, cosines: Tensor, sines: Tensor) -> tuple[Tensor, ...]:
        """Query, key and value of `[T, H + 2K, D]`."""
        heads, kv_heads = self._config.num_heads, self._config.num_kv_heads
        query_key, value = states.split_with_sizes((heads + kv_heads, kv_heads), dim=1)
        if self._head_norms:
            parts = query_key.split_with_sizes((heads, kv_heads), dim=1)
            query_key = torch.cat([norm(part) for norm, part in zip(self._head_norms, parts, strict=True)], 1)
        query, key = rotate(query_key, cosines, sines).split_with_sizes((heads, kv_heads), dim=1)
        return query, key, value

    def pack(self) -> None:
        self._qkv.pack()
        self._output.pack()
        if self._head_norms:
            query_norm, key_norm = self._head_norms
            self._norm_weights = (query_norm.weight.float(), key_norm.weight.float(), query_norm.eps)

    def checkpoint_tensors(self) -> Iterator[tuple[str, Tensor]]:
        parts: tuple[Layer, ...] = (self._norm, self._qkv, self._output, *self._head_norms)
        for part in parts:
            yield from part.checkpoint_tensors()
