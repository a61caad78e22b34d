"""Checkpoints with random weights, for benchmarks whose figures do not depend on what a model says."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class LlamaShape:
    """Sizes of a Llama with tied embeddings."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int

    @property
    def num_step_weights(self) -> int:
        """Weights that every step reads: all matrices, the tied output projection among them."""
        head_dim = self.hidden_size // self.num_heads
        attention = self.hidden_size * head_dim * 2 * (self.num_heads + self.num_kv_heads)
        mlp = 3 * self.hidden_size * self.intermediate_size
        return self.num_layers * (attention + mlp) + self.vocab_size * self.hidden_size


SHAPES = {
    "small": LlamaShape(4096, 768, 2048, num_layers=12, num_heads=12, num_kv_heads=4),  # 79M parameters
    "medium": LlamaShape(32000, 1024, 4096, num_layers=24, num_heads=16, num_kv_heads=8),  # 410M
}


@contextmanager
def random_llama(
    *, hidden_size: int, num_layers: int, num_heads: int, num_kv_heads: int, max_position_embeddings: int
) -> Iterator[Path]:
    """A directory with a Llama of this shape in float32, for as long as the block lasts."""
    shape = LlamaShape(1024, hidden_size, 2 * hidden_size, num_layers, num_heads, num_kv_heads)
    with random_checkpoint(shape, "float32", max_position_embeddings) as directory:
        yield directory


@contextmanager
def random_checkpoint(shape: LlamaShape, dtype: str, max_position_embeddings: int) -> Iterator[Path]:
    """A directory with a Llama of this shape, for as long as the block lasts. `dtype`: torch's name of it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        max_position_embeddings=max_position_embeddings,
        eos_token_id=None,
        bos_token_id=None,
        tie_word_embeddings=True,
    )
    with tempfile.TemporaryDirectory(prefix="baton-bench-model-") as directory:
        LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(directory)
        yield Path(directory)
