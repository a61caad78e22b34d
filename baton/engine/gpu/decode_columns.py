"""All inputs of a decode step but its block tables: one number a row each, which travel in one copy."""

from dataclasses import dataclass

import torch
from torch import Tensor

_NUM_COLUMNS = 11


@dataclass(frozen=True, slots=True)
class DecodeColumns:
    """Views `[R]` of one piece of memory, int64 but for the last three, float64.

    token_ids, sources: see `TokenFeed.resolve`. positions, slot_mapping, context_lens: see StepInputs.
    top_k and what comes after it: see `baton_kernels.gpu.sample_tokens.SamplingRows`.
    """

    token_ids: Tensor
    sources: Tensor
    positions: Tensor
    slot_mapping: Tensor
    context_lens: Tensor
    top_k: Tensor
    seeds: Tensor
    sampled_positions: Tensor
    temperatures: Tensor
    top_p: Tensor
    min_p: Tensor

    @classmethod
    def view(cls, memory: Tensor, num_rows: int) -> "DecodeColumns":
        """Of so many rows, at the beginning of `memory`, int64 `[memory_size(num_rows)]` or longer."""
        columns = memory[: memory_size(num_rows)].view(_NUM_COLUMNS, num_rows).unbind()
        return cls(*columns[:-3], *(column.view(torch.float64) for column in columns[-3:]))


def memory_size(num_rows: int) -> int:
    """How many int64 hold the columns of so many rows."""
    return _NUM_COLUMNS * num_rows


def padding_columns(num_rows: int, padding_slot: int) -> Tensor:
    """Host memory for `num_rows` rows that all lie in the padding page and take the likeliest token."""
    memory = torch.zeros(memory_size(num_rows), dtype=torch.int64)
    columns = DecodeColumns.view(memory, num_rows)
    columns.sources.fill_(-1)
    columns.slot_mapping.fill_(padding_slot)
    columns.context_lens.fill_(1)
    columns.top_p.fill_(1.0)
    return memory
