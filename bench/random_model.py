"""Checkpoints with random weights, for benchmarks whose figures do not depend on what a model says."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def random_llama(
    *, hidden_size: int, num_layers: int, num_heads: int, num_kv_heads: int, max_position_embeddings: int
) -> Iterator[Path]:
    """A directory with a Llama of this shape in float32, for as long as the block lasts."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        max_position_embeddings=max_position_embeddings,
        eos_token_id=None,
        bos_token_id=None,
        tie_word_embeddings=True,
    )
    with tempfile.TemporaryDirectory(prefix="baton-bench-model-") as directory:
        LlamaForCausalLM(config).save_pretrained(directory)
        yield Path(directory)
