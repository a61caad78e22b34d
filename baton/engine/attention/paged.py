"""What the attention backends of a GPU share: the pool seen layer by layer, and a step's rows as tensors."""

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from baton.engine.attention.base import AttentionMetadata


@dataclass(frozen=True, slots=True)
class LayerPages:
    """One layer's K and V of all pages, `[N, K, P, D]`: views of the pool, no copies."""

    key: Tensor
    value: Tensor


def layer_pages(pool: Tensor) -> tuple[LayerPages, ...]:
    """The pool's layers; made once, since a view costs the host microseconds in every layer of every step."""
    return tuple(LayerPages(pool[:, layer, 0], pool[:, layer, 1]) for layer in range(pool.shape[1]))


class PagedRows:
    """A step's metadata with int32 tensors, the one-token rows and the longer ones apart."""

    def __init__(self, metadata: AttentionMetadata) -> None:
        self._metadata = metadata
        self.num_one_token_rows = metadata.num_one_token_rows
        self.slot_mapping = metadata.slot_mapping
        self.block_tables = metadata.block_tables.to(torch.int32)  # [R, B]
        self.context_lens = metadata.context_lens.to(torch.int32)  # [R]

    @property
    def num_rows(self) -> int:
        """Of both kinds."""
        return len(self._metadata.context_lengths)

    @property
    def max_context_len(self) -> int:
        """Tokens, of all rows."""
        return max(self._metadata.context_lengths)

    @cached_property
    def max_row_len(self) -> int:
        """Tokens of the longest row."""
        bounds = self._metadata.row_bounds
        return max(end - start for start, end in pairwise(bounds))

    @cached_property
    def row_bounds(self) -> Tensor:
        """int32 `[R + 1]`, row r is tokens row_bounds[r] .. row_bounds[r + 1]."""
        device = self.context_lens.device
        if self.num_one_token_rows == self.num_rows:  # so that decode copies nothing from the host
            return torch.arange(self.num_rows + 1, dtype=torch.int32, device=device)
        bounds = torch.tensor(self._metadata.row_bounds, dtype=torch.int32)
        return (bounds.pin_memory() if device.type == "cuda" else bounds).to(device, non_blocking=True)

    @cached_property
    def context_bounds(self) -> Tensor:
        """int32 `[R + 1]`: the contexts' lengths, summed up."""
        sums = self.context_lens.cumsum(0, dtype=torch.int32)
        return torch.nn.functional.pad(sums, (1, 0))
