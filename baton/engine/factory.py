"""Builds an engine's parts from a model directory."""

import logging
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from baton.config import DEFAULT_KV_CACHE_BYTES, EngineConfig
from baton.core.errors import StartupError
from baton.core.kv_layout import FLOAT8, KVLayout
from baton.core.plan import SampleTask, ScheduledRow, StepPlan
from baton.core.ports import Runner
from baton.core.sampling import SamplingParams
from baton.engine.attention.registry import attention_backend
from baton.engine.cpu.runner import ModelRunner
from baton.engine.cpu.shared_cores import SharedCores
from baton.engine.devices import (
    multiplies_float8,
    require_dtype,
    require_float8,
    require_quantization,
    resolve_device,
)
from baton.engine.layers.placement import ParameterPlacement
from baton.engine.models.decoder import Decoder, DecoderConfig
from baton.engine.models.registry import decoder_config
from baton.engine.pages.kv_cache import KVCache
from baton.engine.pages.memory import PoolSize, num_blocks_for, require_page_size, room_for
from baton.engine.quantization.checkpoint_scales import float8_matrices, kv_cache_scales
from baton.engine.weights import load_weights, progress, resolve_dtype
from baton.fingerprint import fingerprint_beside
from baton.grammars.compiler import GrammarCompiler
from baton.model_files import eos_token_ids, read_config, safetensors_files

if TYPE_CHECKING:
    from baton.engine.gpu.graphs import DecodeGraphs

_MORE_ROOM = "stop other programs that use it, or use --dtype bf16 or a checkpoint in FP8"
_LESS_CACHE = "lower --gpu-memory-utilization, --kv-cache-memory or --max-num-seqs, or use --enforce-eager"

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Engine:
    """A loaded model, ready to run steps, and the facts about it that others need."""

    runner: Runner
    page_store: KVCache
    config: DecoderConfig
    max_model_len: int
    vocab_size: int
    fingerprint: bytes  # see baton.fingerprint
    eos_token_ids: tuple[int, ...]
    grammars: GrammarCompiler


def load_engine(model_dir: Path, options: EngineConfig) -> Engine:
    """Load a Hugging Face checkpoint and run one small step, so that the first request is not slow.

    Everything that can be refused is refused before the weights are read. Raises StartupError.
    """
    torch.set_num_threads(options.num_threads)
    started = time.monotonic()
    hf_config = read_config(model_dir)
    config = decoder_config(hf_config)
    max_model_len = _max_model_len(config, options.max_model_len)
    dtype, device = resolve_dtype(options.dtype, hf_config), resolve_device(options.device)
    placement = ParameterPlacement(dtype, device, options.quantization)
    require_dtype(dtype, device)
    require_quantization(options.quantization, dtype, device)
    if options.kv_cache_dtype == FLOAT8:
        require_float8(device)
    layout = _layout(config, options, dtype, model_dir)
    require_page_size(layout)
    asked_size = _asked_size(options, device)
    if asked_size is not None:
        num_blocks_for(layout, asked_size, max_model_len)  # refuses
    if multiplies_float8(device) and dtype == torch.bfloat16:  # which is what its products give
        placement = replace(placement, float8=float8_matrices(safetensors_files(model_dir)))
    with room_for("the weights", device, _MORE_ROOM), fingerprint_beside(model_dir) as await_fingerprint:
        decoder = Decoder(config, placement)
        load_weights(model_dir, decoder.checkpoint_tensors())
        decoder.pack()
        fingerprint = await_fingerprint()
    size = asked_size or _size_on_gpu(decoder, layout, options, device)
    num_blocks = num_blocks_for(layout, size, max_model_len)
    page_store = KVCache(layout, num_blocks, placement.device)
    with room_for("graphs and a first step", device, _LESS_CACHE):
        runner = _runner(decoder, page_store, options, max_model_len)
        is_eager = device.type == "cuda" and options.enforce_eager
        _warm_up(runner, page_store, options.max_num_seqs if is_eager else 1)
    _logger.info(
        "model ready in %.1f s: %s, %s, %d pages of %d tokens, room for %.1f requests of the most, %d tokens",
        time.monotonic() - started, model_dir, layout.dtype, num_blocks, layout.block_size,
        num_blocks / layout.blocks_for(max_model_len), max_model_len,
    )  # fmt: skip
    ends = eos_token_ids(model_dir)
    grammars = GrammarCompiler(model_dir, config.vocab_size, ends)
    return Engine(runner, page_store, config, max_model_len, config.vocab_size, fingerprint, ends, grammars)


def _asked_size(options: EngineConfig, device: torch.device) -> PoolSize | None:
    """None: a GPU has as many pages as fit beside the weights."""
    if options.kv_cache_bytes is None and device.type != "cpu":
        return None
    return PoolSize(options.kv_cache_bytes or DEFAULT_KV_CACHE_BYTES)


def _size_on_gpu(decoder: Decoder, layout: KVLayout, options: EngineConfig, device: torch.device) -> PoolSize:
    from baton.engine.gpu.runner import size_pool

    num_bytes = size_pool(
        decoder, layout, options.max_num_batched_tokens, options.max_num_seqs,
        options.gpu_memory_utilization, decoder.config.windows, device,
    )  # fmt: skip
    return PoolSize(num_bytes, "--gpu-memory-utilization")


def _max_model_len(config: DecoderConfig, asked: int | None) -> int:
    if asked is None:
        return config.max_position_embeddings
    if asked > config.max_position_embeddings:
        raise StartupError(
            f"--max-model-len {asked} is more than the model's "
            f"{config.max_position_embeddings} tokens; lower it."
        )
    return asked


def _layout(config: DecoderConfig, options: EngineConfig, dtype: torch.dtype, model_dir: Path) -> KVLayout:
    scales: tuple[float, ...] = ()
    if options.kv_cache_dtype == FLOAT8:
        scales = kv_cache_scales(model_dir, config.num_layers)
        which = (
            "the checkpoint's scales" if set(scales) != {1.0} else "no scales in the checkpoint: all are 1"
        )
        _logger.info("KV cache in 8 bits (e4m3), %s", which)
    own = str(dtype).removeprefix("torch.")
    return KVLayout(
        block_size=options.block_size,
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        dtype=own if options.kv_cache_dtype == "auto" else options.kv_cache_dtype,
        scales=scales,
    )


def _runner(decoder: Decoder, page_store: KVCache, options: EngineConfig, max_model_len: int) -> Runner:
    attention = attention_backend(page_store.pool, decoder.config.windows, page_store.layout.scales)
    device, layout = page_store.pool.device, page_store.layout
    if device.type == "cpu":
        return ModelRunner(
            decoder, page_store, attention, options.max_num_batched_tokens, options.max_num_seqs,
            _shared_cores(options),
        )  # fmt: skip
    from baton.engine.gpu.runner import GpuRunner
    from baton.engine.gpu.token_feed import TokenFeed

    feed = TokenFeed(options.max_num_seqs, device)
    if options.enforce_eager:
        _logger.info("CUDA graphs are off: every step launches its kernels one by one")
        return GpuRunner(decoder, page_store, attention, feed, None)
    from baton.engine.gpu.graphs import DecodeGraphs, GraphInputs, GraphShape, graph_batch_sizes

    sizes = graph_batch_sizes(options.max_num_seqs)
    shape = GraphShape(
        sizes[-1], layout.blocks_for(max_model_len), layout.block_size, page_store.padding_block
    )
    graphs = DecodeGraphs(decoder, attention, feed, GraphInputs(shape, device), sizes, max_model_len)
    _capture(graphs, sizes)
    return GpuRunner(decoder, page_store, attention, feed, graphs)


def _capture(graphs: "DecodeGraphs", sizes: tuple[int, ...]) -> None:
    from baton.engine.gpu.graphs import CudaRecorder

    torch.cuda.empty_cache()  # as captures do: before and after, only what graphs keep is counted
    started, free_before = time.monotonic(), torch.cuda.mem_get_info()[0]
    with torch.inference_mode(), progress("Capturing graphs", len(sizes)) as advance:
        graphs.capture(CudaRecorder(), lambda _: advance())
    torch.cuda.empty_cache()
    _logger.info(
        "%d CUDA graphs for up to %d rows in %.1f s, %d MiB",
        len(sizes), sizes[-1], time.monotonic() - started,
        (free_before - torch.cuda.mem_get_info()[0]) >> 20,
    )  # fmt: skip


def _shared_cores(options: EngineConfig) -> SharedCores | None:
    if options.cores_file is None:
        return None
    return SharedCores(options.cores_file, options.num_threads, torch.set_num_threads, time.monotonic_ns)


def _warm_up(runner: Runner, page_store: KVCache, max_num_rows: int) -> None:
    """A prefill row and then decode rows, greedy, drawn and with penalties, all in the padding page.

    On a GPU that compiles what a first request would wait for. Where there are no graphs, whose capture does
    so too, decode steps of 2, 4, ... `max_num_rows` rows follow: each way to split contexts is a kernel.
    """
    block_table = [page_store.padding_block]
    greedy = SampleTask(SamplingParams(temperature=0.0), 0, 2, [0], [])
    drawn = SampleTask(SamplingParams(top_k=2, top_p=0.5), 0, 1, [0], [])
    long_row = ScheduledRow([0] * min(2, page_store.layout.block_size), 0, block_table, (greedy,))
    ruled = SampleTask(SamplingParams(repetition_penalty=1.1, num_logprobs=1), 0, 1, [0], [0])
    for row in (long_row, *(ScheduledRow([0], 0, block_table, (task,)) for task in (drawn, ruled))):
        runner.submit(StepPlan((row,))).collect()
    num_rows = 1
    while num_rows < max_num_rows:
        num_rows = min(2 * num_rows, max_num_rows)
        runner.submit(StepPlan((ScheduledRow([0], 0, block_table, (drawn,)),) * num_rows)).collect()
    runner.idle()
