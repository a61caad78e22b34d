"""The steps of bench.engine_step in llama.cpp: the engine alone, on a GGUF file of the same shape.

Needs llama-cpp-python and gguf. The weights are random, in bfloat16, with norms in float32 as llama.cpp wants
them; there is no tokenizer in the file.
"""

import ctypes
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from bench.random_model import LlamaShape


def write_gguf(path: Path, shape: LlamaShape, max_context: int) -> None:
    """A Llama of this shape with tied embeddings."""
    import gguf

    head_dim = shape.hidden_size // shape.num_heads
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(max_context)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_block_count(shape.num_layers)
    writer.add_feed_forward_length(shape.intermediate_size)
    writer.add_head_count(shape.num_heads)
    writer.add_head_count_kv(shape.num_kv_heads)
    writer.add_rope_dimension_count(head_dim)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(shape.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    random = np.random.default_rng(0)
    matrices = {"token_embd": (shape.vocab_size, shape.hidden_size)}
    norms = ["output_norm"]
    for layer in range(shape.num_layers):
        block = f"blk.{layer}."
        norms += [f"{block}attn_norm", f"{block}ffn_norm"]
        matrices |= {
            f"{block}attn_q": (shape.hidden_size, shape.hidden_size),
            f"{block}attn_k": (shape.num_kv_heads * head_dim, shape.hidden_size),
            f"{block}attn_v": (shape.num_kv_heads * head_dim, shape.hidden_size),
            f"{block}attn_output": (shape.hidden_size, shape.hidden_size),
            f"{block}ffn_gate": (shape.intermediate_size, shape.hidden_size),
            f"{block}ffn_up": (shape.intermediate_size, shape.hidden_size),
            f"{block}ffn_down": (shape.hidden_size, shape.intermediate_size),
        }
    for name, size in matrices.items():
        values = random.normal(0, 0.02, size).astype(np.float32)
        bfloat16 = (values.view(np.uint32) >> 16).astype(np.uint16)
        writer.add_tensor(f"{name}.weight", bfloat16.view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)
    for name in norms:
        writer.add_tensor(f"{name}.weight", np.ones(shape.hidden_size, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class LlamaCpp:
    """A loaded model with room for `num_sequences` of `max_context` tokens."""

    def __init__(self, path: Path, num_sequences: int, max_context: int, num_threads: int) -> None:
        from llama_cpp import llama_cpp

        self._api: Any = llama_cpp
        self._api.llama_backend_init()
        self._log = self._api.llama_log_callback(lambda *_: None)
        self._api.llama_log_set(self._log, None)
        self._model = self._api.llama_model_load_from_file(
            str(path).encode(), self._api.llama_model_default_params()
        )
        parameters = self._api.llama_context_default_params()
        parameters.n_ctx = num_sequences * max_context
        parameters.n_seq_max = num_sequences
        parameters.n_batch = parameters.n_ubatch = max(512, num_sequences)
        parameters.n_threads = parameters.n_threads_batch = num_threads
        self._context = self._api.llama_init_from_model(self._model, parameters)
        if not self._context:
            raise RuntimeError(f"llama.cpp can't serve {path}")
        self._memory = self._api.llama_get_memory(self._context)

    def close(self) -> None:
        """Let go of context and model."""
        self._api.llama_free(self._context)
        self._api.llama_model_free(self._model)

    def prefill(self, sequence: int, num_tokens: int) -> None:
        """A prompt into an empty sequence, in batches as llama.cpp takes them; logits of its last token."""
        self._api.llama_memory_seq_rm(self._memory, sequence, -1, -1)
        for start in range(0, num_tokens, 512):
            end = min(start + 512, num_tokens)
            self._decode([(sequence, position, position == num_tokens - 1) for position in range(start, end)])

    def step(self, num_sequences: int, position: int) -> None:
        """One token for each of the first sequences, and their place in the cache free again after it."""
        self._decode([(sequence, position, True) for sequence in range(num_sequences)])
        for sequence in range(num_sequences):
            self._api.llama_memory_seq_rm(self._memory, sequence, position, -1)

    def _decode(self, entries: list[tuple[int, int, bool]]) -> None:
        batch = self._api.llama_batch_init(len(entries), 0, 1)
        batch.n_tokens = len(entries)
        for index, (sequence, position, has_logits) in enumerate(entries):
            batch.token[index] = 7
            batch.pos[index] = position
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = sequence
            batch.logits[index] = has_logits
        status = self._api.llama_decode(self._context, batch)
        self._api.llama_batch_free(batch)
        if status:
            raise RuntimeError(f"llama_decode says {status}")
        ctypes.cast(self._api.llama_get_logits_ith(self._context, -1), ctypes.c_void_p)  # waits for them


@contextmanager
def llama_cpp(
    shape: LlamaShape, num_sequences: int, max_context: int, num_threads: int
) -> Iterator[LlamaCpp]:
    """A model of this shape while the block lasts. Raises ImportError where a package is missing."""
    with tempfile.TemporaryDirectory(prefix="baton-bench-gguf-") as directory:
        path = Path(directory) / "model.gguf"
        write_gguf(path, shape, max_context)
        model = LlamaCpp(path, num_sequences, max_context, num_threads)
        try:
            yield model
        finally:
            model.close()


def measure(
    shape: LlamaShape,
    batches: tuple[int, ...],
    prompts: tuple[int, ...],
    context: int,
    num_threads: int,
    milliseconds_of: Callable[[Callable[[], object]], dict[str, Any]],
) -> list[dict[str, Any]]:
    """Rows as bench.engine_step has them; `milliseconds_of` times a step."""
    rows = []
    with llama_cpp(shape, max(batches), 2 * max(context, *prompts), num_threads) as model:
        for sequence in range(max(batches)):
            model.prefill(sequence, context - 1)
        for batch in batches:
            figures = milliseconds_of(lambda batch=batch: model.step(batch, context - 1))  # type: ignore[misc]
            rows.append({"step": f"decode batch {batch} context {context}", **figures})
        for num_tokens in prompts:
            figures = milliseconds_of(lambda num_tokens=num_tokens: model.prefill(0, num_tokens))  # type: ignore[misc]
            rows.append({"step": f"prefill {num_tokens}", **figures})
    return rows
