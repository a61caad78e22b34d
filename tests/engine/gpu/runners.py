"""Runners of a GPU on whatever device the tests have: graphs are replayed by doing the work again."""

from collections.abc import Callable

import torch
from torch import Tensor

from baton.engine.attention.triton_kernels import KernelAttention
from baton.engine.cpu.runner import ModelRunner
from baton.engine.factory import Engine
from baton.engine.gpu.graphs import CudaRecorder, DecodeGraphs, GraphInputs, GraphShape, graph_batch_sizes
from baton.engine.gpu.runner import GpuRunner
from baton.engine.gpu.token_feed import TokenFeed


def recorder(device: torch.device) -> Callable[[Callable[[], Tensor]], tuple[Tensor, Callable[[], None]]]:
    """CUDA graphs, and elsewhere what does the same from the same memory into the same memory."""
    return CudaRecorder() if device.type == "cuda" else _record_by_doing_again


def _record_by_doing_again(work: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
    result = work()

    def replay() -> None:
        result.copy_(work())

    return result, replay


def gpu_runner(engine: Engine, *, max_num_seqs: int = 4, eager: bool = False) -> GpuRunner:
    """Over an engine's weights and pages, with Baton's own attention."""
    store, device = engine.page_store, engine.page_store.pool.device
    attention = KernelAttention(store.pool, engine.config.windows)
    feed = TokenFeed(max_num_seqs, device)
    assert isinstance(engine.runner, ModelRunner)
    decoder = engine.runner._decoder
    if eager:
        return GpuRunner(decoder, store, attention, feed, None)
    sizes, layout = graph_batch_sizes(max_num_seqs), store.layout
    num_blocks = layout.blocks_for(engine.max_model_len)
    shape = GraphShape(max_num_seqs, num_blocks, layout.block_size, store.padding_block)
    graphs = DecodeGraphs(decoder, attention, feed, GraphInputs(shape, device), sizes, engine.max_model_len)
    with torch.inference_mode():
        graphs.capture(recorder(device), lambda _: None)
    return GpuRunner(decoder, store, attention, feed, graphs)
