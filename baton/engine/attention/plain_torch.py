"""Attention in plain torch: correct everywhere, meant for the CPU."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from baton.engine.attention.base import AttentionMetadata, AttentionStep
from baton_kernels import reference


class CpuAttention:
    """Rows of one token are computed together with others of similar length, longer rows one by one."""

    def __init__(self, pool: Tensor, windows: tuple[int | None, ...], scales: tuple[float, ...] = ()) -> None:
        """`pool`, `scales` as in `baton_kernels.reference`; `windows`: of each layer; None: all."""
        self._pool = pool
        self._windows = windows
        self._scales = scales

    def begin_step(self, metadata: AttentionMetadata) -> AttentionStep:
        """Find the pages and masks that all layers of the step share."""
        return _CpuStep(self._pool, self._windows, self._scales, metadata)


class _CpuStep:
    def __init__(
        self,
        pool: Tensor,
        windows: tuple[int | None, ...],
        scales: tuple[float, ...],
        metadata: AttentionMetadata,
    ) -> None:
        self._scales = scales
        self._pool = pool
        self._windows = windows
        self._metadata = metadata
        self._token_lines = reference.token_lines(pool, metadata.slot_mapping)
        self._groups = list(_similar(metadata.context_lengths[: metadata.num_one_token_rows]))
        self._one_token_rows = {
            (window, group.start): reference.one_token_rows(
                pool, metadata.block_tables[group], metadata.context_lens[group], window
            )
            for window in set(windows)
            for group in self._groups
        }
        self._long_rows = range(metadata.num_one_token_rows, len(metadata.context_lengths))
        self._long_row_lines = [self._row_lines(row) for row in self._long_rows]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See `AttentionStep`."""
        pool, window, scales = self._pool, self._windows[layer], self._scales
        reference.store_kv(pool, layer, key, value, self._token_lines, scales)
        outputs = []
        for group in self._groups:  # a row is a token here
            rows = self._one_token_rows[window, group.start]
            outputs.append(reference.attend_one_token_rows(query[group], pool, layer, rows, scales))
        for row, lines in zip(self._long_rows, self._long_row_lines, strict=True):
            first, end = self._metadata.row_bounds[row : row + 2]
            start = self._metadata.context_lengths[row] - (end - first)
            output = reference.attend_long_row(query[first:end], pool, layer, lines, start, window, scales)
            outputs.append(output)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _row_lines(self, row: int) -> Tensor:
        num_blocks = -(-self._metadata.context_lengths[row] // self._pool.shape[4])
        return reference.page_lines(self._pool, self._metadata.block_tables[row : row + 1, :num_blocks])


def _similar(context_lengths: Sequence[int]) -> Iterator[slice]:
    """Groups of rows, sorted by length, in which nobody is padded to much more than twice its length."""
    first = 0
    for row, length in enumerate(context_lengths):
        if length > 2 * context_lengths[first] + 64:
            yield slice(first, row)
            first = row
    if context_lengths:
        yield slice(first, len(context_lengths))
