"""Builds an engine's parts from a model directory."""

import logging
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from baton.config import EngineConfig
from baton.core.errors import StartupError
from baton.core.kv_layout import KVLayout
from baton.core.plan import SampleTask, ScheduledRow, StepPlan
from baton.core.sampling import SamplingParams
from baton.engine.attention.registry import attention_backend
from baton.engine.kv_cache import KVCache
from baton.engine.layers import Placement
from baton.engine.memory import num_blocks_for
from baton.engine.models.decoder import Decoder, DecoderConfig
from baton.engine.models.registry import decoder_config
from baton.engine.runner import ModelRunner
from baton.engine.weights import load_weights, resolve_dtype
from baton.model_files import eos_token_ids, model_fingerprint, read_config

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Engine:
    """A loaded model, ready to run steps, and the facts about it that others need."""

    runner: ModelRunner
    page_store: KVCache
    config: DecoderConfig
    max_model_len: int
    vocab_size: int
    fingerprint: bytes  # 16 bytes, see model_files.model_fingerprint
    eos_token_ids: tuple[int, ...]


def load_engine(model_dir: Path, options: EngineConfig) -> Engine:
    """Load a Hugging Face checkpoint and run one small step, so that the first request is not slow.

    Everything that can be refused is refused before the weights are read. Raises StartupError.
    """
    torch.set_num_threads(options.num_threads)
    started = time.monotonic()
    hf_config = read_config(model_dir)
    config = decoder_config(hf_config)
    max_model_len = _max_model_len(config, options.max_model_len)
    placement = Placement(resolve_dtype(options.dtype, hf_config), torch.device("cpu"))
    layout = _layout(config, options.block_size, placement.dtype)
    num_blocks = num_blocks_for(layout, options.kv_cache_bytes, max_model_len)
    decoder = Decoder(config, placement)
    load_weights(model_dir, decoder.checkpoint_tensors())
    decoder.pack()
    page_store = KVCache(layout, num_blocks, placement.device)
    runner = ModelRunner(decoder, page_store, attention_backend(page_store.pool, config.windows))
    _warm_up(runner, page_store)
    _logger.info(
        "model ready in %.1f s: %s, %s, %d pages of %d tokens, requests of at most %d tokens",
        time.monotonic() - started, model_dir, layout.dtype, num_blocks, layout.block_size, max_model_len,
    )  # fmt: skip
    fingerprint = model_fingerprint(model_dir)
    return Engine(
        runner, page_store, config, max_model_len, config.vocab_size, fingerprint, eos_token_ids(model_dir)
    )


def _max_model_len(config: DecoderConfig, asked: int | None) -> int:
    if asked is None:
        return config.max_position_embeddings
    if asked > config.max_position_embeddings:
        raise StartupError(
            f"--max-model-len {asked} is more than the model's "
            f"{config.max_position_embeddings} tokens; lower it."
        )
    return asked


def _layout(config: DecoderConfig, block_size: int, dtype: torch.dtype) -> KVLayout:
    return KVLayout(
        block_size=block_size,
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        dtype=str(dtype).removeprefix("torch."),
    )


def _warm_up(runner: ModelRunner, page_store: KVCache) -> None:
    """A prefill row and a decode row, greedy and drawn, all in the padding page."""
    block_table = [page_store.padding_block]
    greedy = SampleTask(SamplingParams(temperature=0.0), 0, 2, [0], [])
    drawn = SampleTask(SamplingParams(top_k=2, top_p=0.5), 0, 1, [0], [])
    long_row = ScheduledRow([0] * min(2, page_store.layout.block_size), 0, block_table, (greedy,))
    runner.run(StepPlan((long_row, ScheduledRow([0], 0, block_table, (drawn,)))))
