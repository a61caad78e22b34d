"""A step's plan as tensors."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from baton.core.plan import ScheduledRow, StepPlan
from baton.engine.attention.base import AttentionMetadata


@dataclass(frozen=True, slots=True)
class StepInputs:
    """What one forward pass reads.

    token_ids, positions: int64 `[T]`, the rows' tokens one after the other, in AttentionMetadata's order.
    attention: where those tokens lie.
    sampled_tokens: int64 `[S]`, index into T of the last token of every row that is sampled.
    sampled_rows: index into the plan's rows of every row that is sampled, in the same order.
    row_order: index into the plan's rows of every row, in AttentionMetadata's order.
    """

    token_ids: Tensor
    positions: Tensor
    attention: AttentionMetadata
    sampled_tokens: Tensor
    sampled_rows: tuple[int, ...]
    row_order: tuple[int, ...]


def build_inputs(plan: StepPlan, block_size: int, padding_block: int, device: torch.device) -> StepInputs:
    """Flatten the plan's rows; `padding_block` fills block tables up to a rectangle."""
    order = sorted(range(len(plan.rows)), key=lambda index: _place(plan.rows[index]))
    rows = [plan.rows[index] for index in order]
    lengths = np.array([len(row.token_ids) for row in rows])
    bounds = np.concatenate(([0], np.cumsum(lengths)))
    starts = np.array([row.start for row in rows])
    row_of_token = np.repeat(np.arange(len(rows)), lengths)
    positions = np.arange(bounds[-1]) + (starts - bounds[:-1])[row_of_token]
    block_tables = _block_tables(rows, block_size, padding_block)
    blocks = block_tables[row_of_token, positions // block_size]
    sampled = [index for index, row in enumerate(rows) if row.samples]

    def to_device(values: "np.ndarray[tuple[int, ...], np.dtype[np.int64]]") -> Tensor:
        return torch.from_numpy(values).to(device)

    attention = AttentionMetadata(
        slot_mapping=to_device(blocks * block_size + positions % block_size),
        block_tables=to_device(block_tables),
        context_lens=to_device(starts + lengths),
        row_bounds=tuple(bounds.tolist()),
        context_lengths=tuple((starts + lengths).tolist()),
        num_one_token_rows=int((lengths == 1).sum()),
    )
    return StepInputs(
        token_ids=to_device(np.concatenate([np.array(row.token_ids, dtype=np.int64) for row in rows])),
        positions=to_device(positions),
        attention=attention,
        sampled_tokens=to_device(bounds[1:][sampled] - 1),
        sampled_rows=tuple(order[index] for index in sampled),
        row_order=tuple(order),
    )


def _place(row: ScheduledRow) -> tuple[bool, int]:
    """Sorts rows of one token before longer ones, and shorter contexts before longer ones."""
    return len(row.token_ids) > 1, row.start + len(row.token_ids)


def _block_tables(
    rows: list[ScheduledRow], block_size: int, padding_block: int
) -> "np.ndarray[tuple[int, ...], np.dtype[np.int64]]":
    """int64 `[R, B]`: the pages up to each row's last token; a request's own table may be longer."""
    counts = [-(-(row.start + len(row.token_ids)) // block_size) for row in rows]
    tables = np.full((len(rows), max(counts)), padding_block, dtype=np.int64)
    for table, row, count in zip(tables, rows, counts, strict=True):
        table[:count] = row.block_table[:count]
    return tables
