"""CUDA graphs of decode steps: one for each of some batch sizes, replayed with the step's inputs.

A decode step of a small batch launches hundreds of short kernels, and launching costs the host more than
running costs the device; a graph launches them all at once: it takes the tokens that the last step sampled,
computes, samples, and leaves the new tokens where the next step takes them from. Rows that fill a batch up to
a graph's size lie in the padding page.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from baton.core.plan import SampleTask
from baton.engine.attention.base import AttentionBackend, AttentionMetadata
from baton.engine.gpu.decode_columns import DecodeColumns, padding_columns
from baton.engine.gpu.device_sampler import sampling_columns
from baton.engine.gpu.host_copies import staged
from baton.engine.gpu.token_feed import TokenFeed
from baton.engine.inputs import StepInputs
from baton.engine.models.decoder import Decoder
from baton_kernels.gpu.sample_tokens import SamplingRows, sample_tokens

_SMALL_BATCHES = (1, 2, 4, 8, 16)
_BATCH_STEP = 16

# Does the work once and returns what it returned, and what does it again, into the same memory.
Recorder = Callable[[Callable[[], Tensor]], tuple[Tensor, Callable[[], None]]]


def graph_batch_sizes(max_num_seqs: int) -> tuple[int, ...]:
    """1, 2, 4, 8, 16, then steps of 16; the last one is `max_num_seqs`."""
    sizes = (*_SMALL_BATCHES, *range(2 * _BATCH_STEP, max_num_seqs, _BATCH_STEP))
    return (*(size for size in sizes if size < max_num_seqs), max_num_seqs)


def graph_for(num_rows: int, sizes: tuple[int, ...]) -> int | None:
    """The smallest of the ascending `sizes` that `num_rows` fit in; None: they don't fit in any."""
    index = bisect_left(sizes, num_rows)
    return sizes[index] if index < len(sizes) else None


class CudaRecorder:
    """Captures CUDA graphs that share their memory; the largest first, so that the others fit in it."""

    def __init__(self) -> None:
        self._memory = torch.cuda.graph_pool_handle()

    def __call__(self, work: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        """See Recorder."""
        work()  # kernels are compiled and libraries loaded outside of captures
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory):
            result = work()
        return result, graph.replay


@dataclass(frozen=True, slots=True)
class GraphShape:
    """Of the largest batch: rows, pages of a row, tokens of a page, and the page that padding lies in."""

    num_rows: int
    num_blocks: int
    block_size: int
    padding_block: int


class GraphInputs:
    """What graphs read, on the device, at addresses that stay.

    Columns of a graph's own number of rows lie at the beginning of memory that all share, so that one copy
    without gaps fills them. block_tables: int64 `[R, B]`.
    """

    def __init__(self, shape: GraphShape, device: torch.device) -> None:
        self._shape = shape
        self._device = device
        self._memory = self._padding(shape.num_rows).to(device)
        self.block_tables = torch.full(
            (shape.num_rows, shape.num_blocks), shape.padding_block, dtype=torch.int64, device=device
        )

    def columns(self, size: int) -> DecodeColumns:
        """Of the first `size` rows."""
        return DecodeColumns.view(self._memory, size)

    def pad(self, size: int) -> None:
        """Put `size` rows into the padding page: columns of another size would be read as anything."""
        memory = self._padding(size)
        self._memory[: memory.numel()].copy_(staged(memory, self._device), non_blocking=True)

    def fill(self, inputs: StepInputs, sources: Tensor, tasks: Sequence[SampleTask], size: int) -> None:
        """Take the step's rows, each of one token and one sample, and padding up to `size` rows.

        `inputs` and `sources` are in host memory; `tasks` in the rows' order.
        """
        attention, num_rows = inputs.attention, len(tasks)
        memory = self._padding(size)
        columns = DecodeColumns.view(memory, size)
        integers, numbers = sampling_columns(tasks)
        for column, values in (
            (columns.token_ids, inputs.token_ids),
            (columns.sources, sources),
            (columns.positions, inputs.positions),
            (columns.slot_mapping, attention.slot_mapping),
            (columns.context_lens, attention.context_lens),
            *zip((columns.top_k, columns.seeds, columns.sampled_positions), integers, strict=True),
            *zip((columns.temperatures, columns.top_p, columns.min_p), numbers, strict=True),
        ):
            column[:num_rows] = values
        self._memory[: memory.numel()].copy_(staged(memory, self._device), non_blocking=True)
        # Pages beyond a row's context are never read, so what an earlier step left there may stay.
        num_blocks = attention.block_tables.shape[1]
        tables = torch.full((size, num_blocks), self._shape.padding_block, dtype=torch.int64)
        tables[:num_rows] = attention.block_tables
        self.block_tables[:size, :num_blocks].copy_(staged(tables, self._device), non_blocking=True)

    def metadata(self, size: int, max_context_len: int) -> AttentionMetadata:
        """Of the first `size` rows, with contexts as long as they may become."""
        columns = self.columns(size)
        return AttentionMetadata(
            slot_mapping=columns.slot_mapping,
            block_tables=self.block_tables[:size],
            context_lens=columns.context_lens,
            row_bounds=tuple(range(size + 1)),
            context_lengths=(max_context_len,) * size,
            num_one_token_rows=size,
        )

    def _padding(self, size: int) -> Tensor:
        return padding_columns(size, self._shape.padding_block * self._shape.block_size)


class DecodeGraphs:
    """The graphs of one decoder over one attention backend; used by the engine's thread alone."""

    def __init__(
        self,
        decoder: Decoder,
        attention: AttentionBackend,
        feed: TokenFeed,
        inputs: GraphInputs,
        sizes: tuple[int, ...],
        max_model_len: int,
    ) -> None:
        """`inputs` are of the largest batch; `sizes` as `graph_batch_sizes` gives them."""
        self._decoder = decoder
        self._attention = attention
        self._feed = feed
        self._inputs = inputs
        self._sizes = sizes
        self._max_model_len = max_model_len
        self._graphs: dict[int, tuple[Tensor, Callable[[], None]]] = {}
        self._logits: Tensor | None = None  # of the last step, `[largest size, V]`

    def capture(self, record: Recorder, progress: Callable[[int], None]) -> None:
        """Capture all sizes, the largest first. `progress` hears of every size that is done."""
        for size in reversed(self._sizes):
            self._inputs.pad(size)
            self._graphs[size] = record(partial(self._step, size))
            progress(size)

    def run(self, inputs: StepInputs, sources: Tensor, tasks: Sequence[SampleTask]) -> Tensor | None:
        """Logits `[rows, V]` of a step, valid until the next one; None: no graph takes such a step.

        The tokens are in the feed, in the rows' order, sampled from the logits as they are. `inputs` and
        `sources` are in host memory; `tasks` in the order of `inputs.sampled_rows`.
        """
        num_rows = len(inputs.row_order)
        size = graph_for(num_rows, self._sizes)
        is_decode = inputs.attention.num_one_token_rows == len(tasks) == len(inputs.sampled_rows) == num_rows
        if size is None or not is_decode:
            return None
        self._inputs.fill(inputs, sources, tasks, size)
        logits, replay = self._graphs[size]
        replay()
        return logits[:num_rows]

    def _step(self, size: int) -> Tensor:
        columns = self._inputs.columns(size)
        step = self._attention.begin_step(self._inputs.metadata(size, self._max_model_len))
        token_ids = self._feed.resolve(columns.token_ids, columns.sources)
        logits = self._keep(self._decoder.logits(self._decoder.forward(token_ids, columns.positions, step)))
        sample_tokens(logits, _sampling_rows(columns), self._feed.tokens[:size])
        return logits

    def _keep(self, logits: Tensor) -> Tensor:
        """Where all graphs leave them: of each its own, together they would take hundreds of MiB."""
        if self._logits is None:  # the largest size, before it is captured
            self._logits = torch.empty_like(logits)
        kept = self._logits[: logits.shape[0]]
        return kept.copy_(logits)


def _sampling_rows(columns: DecodeColumns) -> SamplingRows:
    return SamplingRows(
        lines=torch.arange(columns.seeds.shape[0], device=columns.seeds.device),
        temperatures=columns.temperatures.float(),
        top_k=columns.top_k.int(),
        top_p=columns.top_p,
        min_p=columns.min_p.float(),
        seeds=columns.seeds,
        positions=columns.sampled_positions,
    )
