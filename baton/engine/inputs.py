"""A step's plan as tensors."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from baton.core.plan import ScheduledRow, StepPlan
from baton.engine.attention.base import AttentionMetadata

Integers = np.ndarray[Any, np.dtype[np.int64]]


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


@dataclass(frozen=True, slots=True)
class StepArrays:
    """The same, and the fields of AttentionMetadata, as int64 arrays on the host."""

    token_ids: Integers
    positions: Integers
    slot_mapping: Integers
    block_tables: Integers
    context_lens: Integers
    row_bounds: Integers
    num_one_token_rows: int
    sampled_tokens: Integers
    sampled_rows: tuple[int, ...]
    row_order: tuple[int, ...]


def build_arrays(plan: StepPlan, block_size: int, padding_block: int) -> StepArrays:
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
    return StepArrays(
        token_ids=np.concatenate([np.array(row.token_ids, dtype=np.int64) for row in rows]),
        positions=positions,
        slot_mapping=blocks * block_size + positions % block_size,
        block_tables=block_tables,
        context_lens=starts + lengths,
        row_bounds=bounds,
        num_one_token_rows=int((lengths == 1).sum()),
        sampled_tokens=bounds[1:][sampled] - 1,
        sampled_rows=tuple(order[index] for index in sampled),
        row_order=tuple(order),
    )


def build_inputs(plan: StepPlan, block_size: int, padding_block: int, device: torch.device) -> StepInputs:
    """`build_arrays` as tensors."""
    return to_tensors(build_arrays(plan, block_size, padding_block), device)


def to_tensors(arrays: StepArrays, device: torch.device) -> StepInputs:
    """The arrays on a device."""

    def to_device(values: Integers) -> Tensor:
        return torch.from_numpy(values).to(device)

    attention = AttentionMetadata(
        slot_mapping=to_device(arrays.slot_mapping),
        block_tables=to_device(arrays.block_tables),
        context_lens=to_device(arrays.context_lens),
        row_bounds=tuple(arrays.row_bounds.tolist()),
        context_lengths=tuple(arrays.context_lens.tolist()),
        num_one_token_rows=arrays.num_one_token_rows,
    )
    return StepInputs(
        token_ids=to_device(arrays.token_ids),
        positions=to_device(arrays.positions),
        attention=attention,
        sampled_tokens=to_device(arrays.sampled_tokens),
        sampled_rows=arrays.sampled_rows,
        row_order=arrays.row_order,
    )


def _place(row: ScheduledRow) -> tuple[bool, int]:
    """Sorts rows of one token before longer ones, and shorter contexts before longer ones."""
    return len(row.token_ids) > 1, row.start + len(row.token_ids)


def _block_tables(rows: list[ScheduledRow], block_size: int, padding_block: int) -> Integers:
    """int64 `[R, B]`: the pages up to each row's last token; a request's own table may be longer."""
    counts = [-(-(row.start + len(row.token_ids)) // block_size) for row in rows]
    tables = np.full((len(rows), max(counts)), padding_block, dtype=np.int64)
    for table, row, count in zip(tables, rows, counts, strict=True):
        table[:count] = row.block_table[:count]
    return tables
