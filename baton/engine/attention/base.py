"""What a decoder and an attention backend say to each other."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from baton_kernels.rotation import Rotation


@dataclass(frozen=True, slots=True)
class AttentionMetadata:
    """Where the tokens of one step lie.

    Rows of one token come first, longer rows after them; each kind is sorted by context length, so that a
    backend can take rows of similar work as slices.

    slot_mapping: int64 `[T]`, page * block_size + slot in page of every token.
    block_tables: int64 `[R, B]`, each row's pages in order, filled up with the padding page.
    context_lens: int64 `[R]`, tokens that the row's last token attends to, itself included.
    row_bounds: R + 1 numbers on the host; row r is tokens row_bounds[r] .. row_bounds[r + 1].
    context_lengths: `context_lens` on the host.
    num_one_token_rows: how many rows of one token there are.
    """

    slot_mapping: Tensor
    block_tables: Tensor
    context_lens: Tensor
    row_bounds: tuple[int, ...]
    context_lengths: tuple[int, ...]
    num_one_token_rows: int


class AttentionStep(Protocol):
    """Attention of one step, for all its layers in turn."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Store the tokens' key and value, then attend causally to each row's whole context.

        query `[T, H, D]`, key and value `[T, K, D]`, rotated. Returns `[T, H, D]`.
        """
        ...


class RotatingAttentionStep(ABC):
    """An AttentionStep that also rotates queries and keys, where a kernel does all of it at once."""

    @abstractmethod
    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See `AttentionStep`."""

    @abstractmethod
    def rotate_and_attend(self, layer: int, states: Tensor, rotation: Rotation) -> Tensor:
        """As `attend`, with each token's queries, keys and values in `[T, H + 2 * K, D]`, not rotated yet.

        The queries in `states` are overwritten.
        """


class AttentionBackend(Protocol):
    """Made once, over one pool and one model."""

    def begin_step(self, metadata: AttentionMetadata) -> AttentionStep:
        """Do the work that all layers of the step share."""
        ...
