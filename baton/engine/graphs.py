"""CUDA graphs of decode steps: one for each of some batch sizes, replayed with the step's inputs.

A decode step of a small batch launches hundreds of short kernels, and launching costs the host more than
running costs the device; a graph launches them all at once. Rows that fill a batch up to a graph's size
lie in the padding page.
"""

import logging
import time
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from baton.engine.attention.base import AttentionBackend, AttentionMetadata
from baton.engine.inputs import StepInputs
from baton.engine.models.decoder import Decoder

_SMALL_BATCHES = (1, 2, 4, 8, 16)
_BATCH_STEP = 16

_logger = logging.getLogger(__name__)


def graph_batch_sizes(max_num_seqs: int) -> tuple[int, ...]:
    """1, 2, 4, 8, 16, then steps of 16; the last one is `max_num_seqs`."""
    sizes = (*_SMALL_BATCHES, *range(2 * _BATCH_STEP, max_num_seqs, _BATCH_STEP))
    return (*(size for size in sizes if size < max_num_seqs), max_num_seqs)


def graph_for(num_rows: int, sizes: tuple[int, ...]) -> int | None:
    """The smallest of the ascending `sizes` that `num_rows` fit in; None: they don't fit in any."""
    index = bisect_left(sizes, num_rows)
    return sizes[index] if index < len(sizes) else None


@dataclass(frozen=True, slots=True)
class GraphInputs:
    """What graphs read, of the largest batch; on the device, at addresses that stay.

    token_ids, positions, slot_mapping, context_lens: int64 `[R]`; block_tables: int64 `[R, B]`.
    """

    token_ids: Tensor
    positions: Tensor
    slot_mapping: Tensor
    context_lens: Tensor
    block_tables: Tensor

    @classmethod
    def of(
        cls, num_rows: int, num_blocks: int, block_size: int, padding_block: int, device: torch.device
    ) -> "GraphInputs":
        """All rows in the padding page."""

        def full(value: int, *shape: int) -> Tensor:
            return torch.full(shape, value, dtype=torch.int64, device=device)

        slots = full(padding_block * block_size, num_rows)
        tables = full(padding_block, num_rows, num_blocks)
        return cls(full(0, num_rows), full(0, num_rows), slots, full(1, num_rows), tables)

    def fill(self, inputs: StepInputs, padding: "GraphInputs", size: int) -> None:
        """Take the step's rows, all of one token, and padding up to `size` rows. `inputs` may be anywhere."""
        attention = inputs.attention
        num_rows, num_blocks = attention.block_tables.shape
        for mine, theirs, filler in (
            (self.token_ids, inputs.token_ids, padding.token_ids),
            (self.positions, inputs.positions, padding.positions),
            (self.slot_mapping, attention.slot_mapping, padding.slot_mapping),
            (self.context_lens, attention.context_lens, padding.context_lens),
        ):
            mine[:num_rows].copy_(theirs, non_blocking=True)
            mine[num_rows:size].copy_(filler[num_rows:size])
        # Pages beyond a row's context are never read, so what an earlier step left there may stay.
        self.block_tables[:num_rows, :num_blocks].copy_(attention.block_tables, non_blocking=True)
        self.block_tables[num_rows:size, :1].copy_(padding.block_tables[num_rows:size, :1])

    def metadata(self, size: int, max_context_len: int) -> AttentionMetadata:
        """Of the first `size` rows, with contexts as long as they may become."""
        return AttentionMetadata(
            slot_mapping=self.slot_mapping[:size],
            block_tables=self.block_tables[:size],
            context_lens=self.context_lens[:size],
            row_bounds=tuple(range(size + 1)),
            context_lengths=(max_context_len,) * size,
            num_one_token_rows=size,
        )


class DecodeGraphs:
    """The graphs of one decoder over one attention backend; used by the engine's thread alone."""

    def __init__(
        self,
        decoder: Decoder,
        attention: AttentionBackend,
        inputs: Callable[[], GraphInputs],
        sizes: tuple[int, ...],
        max_model_len: int,
    ) -> None:
        """`inputs` makes the inputs of the largest batch; `sizes` as `graph_batch_sizes` gives them."""
        self._decoder = decoder
        self._attention = attention
        self._inputs, self._padding = inputs(), inputs()
        self._sizes = sizes
        self._max_model_len = max_model_len
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    def capture(self, progress: Callable[[int], None]) -> None:
        """Capture all sizes, the largest first, so that the smaller ones fit in its memory.

        `progress` hears of every size that is done.
        """
        started, free_before = time.monotonic(), torch.cuda.mem_get_info()[0]
        memory = torch.cuda.graph_pool_handle()
        for size in reversed(self._sizes):
            self._logits(size)  # kernels are compiled and libraries loaded outside of captures
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=memory):
                logits = self._logits(size)
            self._graphs[size] = graph, logits
            progress(size)
        used = free_before - torch.cuda.mem_get_info()[0]
        _logger.info(
            "%d CUDA graphs for up to %d rows in %.1f s, %d MiB",
            len(self._sizes), self._sizes[-1], time.monotonic() - started, used >> 20,
        )  # fmt: skip

    def run(self, inputs: StepInputs) -> Tensor | None:
        """Logits `[rows, V]` of a step, valid until the next one; None: no graph takes such a step."""
        metadata = inputs.attention
        num_rows = len(metadata.context_lengths)
        size = graph_for(num_rows, self._sizes)
        if size is None or metadata.num_one_token_rows < num_rows:
            return None
        self._inputs.fill(inputs, self._padding, size)
        graph, logits = self._graphs[size]
        graph.replay()
        return logits[:num_rows]

    def _logits(self, size: int) -> Tensor:
        step = self._attention.begin_step(self._inputs.metadata(size, self._max_model_len))
        hidden = self._decoder.forward(self._inputs.token_ids[:size], self._inputs.positions[:size], step)
        return self._decoder.logits(hidden)
