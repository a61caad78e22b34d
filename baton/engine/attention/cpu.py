"""Attention in plain torch: correct everywhere, meant for the CPU."""

import torch
from torch import Tensor

from baton.engine.attention.base import AttentionMetadata, AttentionStep
from kernels import reference


class CpuAttention:
    """Rows of one token are computed together, longer rows one by one."""

    def __init__(self, pool: Tensor, windows: tuple[int | None, ...]) -> None:
        """`pool` as in `kernels.reference`; `windows`: each layer's sliding window; None: all."""
        self._pool = pool
        self._windows = windows

    def begin_step(self, metadata: AttentionMetadata) -> AttentionStep:
        """Find the pages and masks that all layers of the step share."""
        return _CpuStep(self._pool, self._windows, metadata)


class _CpuStep:
    def __init__(self, pool: Tensor, windows: tuple[int | None, ...], metadata: AttentionMetadata) -> None:
        self._pool = pool
        self._windows = windows
        self._metadata = metadata
        self._token_lines = reference.token_lines(pool, metadata.slot_mapping)
        count = metadata.num_one_token_rows
        self._one_token_rows: dict[int | None, reference.OneTokenRows] = {}
        if count:
            tables, lens = metadata.block_tables[:count], metadata.context_lens[:count]
            self._one_token_rows = {
                window: reference.one_token_rows(pool, tables, lens, window) for window in set(windows)
            }
        self._long_row_lines = [self._row_lines(row) for row in range(count, len(metadata.context_lengths))]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See `AttentionStep`."""
        reference.store_kv(self._pool, layer, key, value, self._token_lines)
        window, count = self._windows[layer], self._metadata.num_one_token_rows
        outputs = []
        if count:
            rows = self._one_token_rows[window]
            outputs.append(reference.attend_one_token_rows(query[:count], self._pool, layer, rows))
        for row, lines in enumerate(self._long_row_lines, start=count):
            first, end = self._metadata.row_bounds[row : row + 2]
            start = self._metadata.context_lengths[row] - (end - first)
            outputs.append(
                reference.attend_long_row(query[first:end], self._pool, layer, lines, start, window)
            )
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _row_lines(self, row: int) -> Tensor:
        num_blocks = -(-self._metadata.context_lengths[row] // self._pool.shape[4])
        return reference.page_lines(self._pool, self._metadata.block_tables[row : row + 1, :num_blocks])
