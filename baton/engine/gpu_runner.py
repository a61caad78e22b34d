"""Runs the steps of one model on a GPU: decode steps as CUDA graphs, others kernel by kernel."""

import logging
from dataclasses import replace

import torch
from torch import Tensor

from baton.core.errors import StartupError
from baton.core.kv_layout import KVLayout
from baton.core.plan import SampleTask, ScheduledRow, StepPlan, StepResult
from baton.core.ports import LayersDone
from baton.core.sampling import SampledToken, SamplingParams
from baton.engine.attention.base import AttentionBackend
from baton.engine.attention.registry import attention_backend
from baton.engine.device_sampler import sample_on_device
from baton.engine.graphs import DecodeGraphs
from baton.engine.inputs import StepInputs, build_inputs
from baton.engine.kv_cache import KVCache
from baton.engine.memory import kv_cache_bytes_on_gpu
from baton.engine.models.decoder import Decoder
from baton.engine.runner import layer_group_ends
from baton.engine.sampler import Task

_CPU = torch.device("cpu")

_logger = logging.getLogger(__name__)


class GpuRunner:
    """Implements `core.ports.Runner`; not thread-safe, it belongs to the engine loop's thread.

    Layers are told of when they are queued on the device: who reads their pages waits for a mark behind them.
    """

    def __init__(
        self, decoder: Decoder, cache: KVCache, attention: AttentionBackend, graphs: DecodeGraphs | None
    ) -> None:
        self._decoder = decoder
        self._cache = cache
        self._attention = attention
        self._graphs = graphs

    def idle(self) -> None:
        """See Runner."""

    @torch.inference_mode()
    def run(self, plan: StepPlan, layers_done: LayersDone | None = None) -> StepResult:
        """Copy pages, compute all rows in one forward pass, sample. Token ids must be below vocab_size."""
        self._cache.copy_blocks(plan.block_copies)
        cache = self._cache
        inputs = build_inputs(plan, cache.layout.block_size, cache.padding_block, _CPU)
        logits = self._logits(inputs, self._after_layer(plan, layers_done))
        if not inputs.sampled_rows:
            return StepResult(samples=((),) * len(plan.rows))
        tasks: list[Task] = [
            (line, task) for line, row in enumerate(inputs.sampled_rows) for task in plan.rows[row].samples
        ]
        samples: list[list[SampledToken]] = [[] for _ in plan.rows]
        for (line, _), token in zip(tasks, sample_on_device(logits, tasks), strict=True):
            samples[inputs.sampled_rows[line]].append(token)
        return StepResult(samples=tuple(tuple(row) for row in samples))

    def _after_layer(self, plan: StepPlan, layers_done: LayersDone | None) -> LayersDone | None:
        """Tells `layers_done` after every group of layers but the last one."""
        if layers_done is None:
            return None
        ends = layer_group_ends(plan, self._cache.layout)

        def after_layer(end_layer: int) -> None:
            if end_layer in ends:
                layers_done(end_layer)

        return after_layer

    def _logits(self, inputs: StepInputs, after_layer: LayersDone | None) -> Tensor:
        """`[sampled rows, V]`."""
        num_rows = len(inputs.attention.context_lengths)
        if self._graphs is not None and len(inputs.sampled_rows) == num_rows:
            logits = self._graphs.run(inputs)
            if logits is not None:
                return logits
        inputs = _on_device(inputs, self._cache.pool.device)
        step = self._attention.begin_step(inputs.attention)
        hidden = self._decoder.forward(inputs.token_ids, inputs.positions, step, after_layer)
        return self._decoder.logits(hidden[inputs.sampled_tokens])


def size_pool(
    decoder: Decoder, layout: KVLayout, max_num_batched_tokens: int, max_num_seqs: int, utilization: float,
    windows: tuple[int | None, ...], device: torch.device,
) -> int:  # fmt: skip
    """Bytes of KV cache that fit beside the weights and the largest step, which is run to see what it takes.

    Raises StartupError, that says which option to change, where they don't fit.
    """
    torch.cuda.reset_peak_memory_stats(device)
    free, total = torch.cuda.mem_get_info(device)
    elsewhere = total - free - torch.cuda.memory_reserved(device)
    try:
        cache = KVCache(layout, 0, device)
        runner = GpuRunner(decoder, cache, attention_backend(cache.pool, windows, layout.scales), None)
        runner.run(largest_step(layout.block_size, max_num_batched_tokens, max_num_seqs))
    except torch.OutOfMemoryError as error:
        raise StartupError(
            f"The largest step does not fit into the memory of {torch.cuda.get_device_name(device)}; lower "
            "--max-num-batched-tokens or --max-num-seqs."
        ) from error
    peak = torch.cuda.max_memory_reserved(device)
    torch.cuda.empty_cache()
    num_bytes = kv_cache_bytes_on_gpu(total, elsewhere, peak, utilization)
    tokens = num_bytes // layout.bytes_per_block * layout.block_size
    _logger.info("KV cache: %d MiB beside %d MiB, %d tokens", num_bytes >> 20, peak >> 20, tokens)
    return num_bytes


def largest_step(block_size: int, max_num_batched_tokens: int, max_num_seqs: int) -> StepPlan:
    """As many rows and tokens as a step may have, all in page 0 and all drawn with every filter on."""
    num_rows = min(max_num_seqs, max_num_batched_tokens)
    lengths = [1] * (num_rows - 1) + [max_num_batched_tokens - num_rows + 1]
    params = SamplingParams(top_k=50, top_p=0.9, min_p=0.01)
    return StepPlan(
        tuple(
            ScheduledRow(
                [0] * length, 0, [0] * -(-length // block_size), (SampleTask(params, 0, length, [0], []),)
            )
            for length in lengths
        )
    )


def _on_device(inputs: StepInputs, device: torch.device) -> StepInputs:
    def move(tensor: Tensor) -> Tensor:
        return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)

    attention = replace(
        inputs.attention,
        slot_mapping=move(inputs.attention.slot_mapping),
        block_tables=move(inputs.attention.block_tables),
        context_lens=move(inputs.attention.context_lens),
    )
    return replace(
        inputs,
        token_ids=move(inputs.token_ids),
        positions=move(inputs.positions),
        attention=attention,
        sampled_tokens=move(inputs.sampled_tokens),
    )
