"""The tokens that a step has sampled, kept on the device for the rows of the next step that follow it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from baton.core.plan import StepPlan

_KNOWN = -1


class TokenFeed:
    """The last step's tokens, at an address that stays, so that graphs can read and write them.

    tokens: int64 `[max_num_seqs]`, one of every row that sampled one token, in the runner's own order.
    """

    def __init__(self, max_num_seqs: int, device: torch.device) -> None:
        self.tokens = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)
        self._place_of_row: dict[int, int] = {}  # of the last plan's rows

    def sources(self, plan: StepPlan, row_order: Sequence[int], num_tokens: int) -> Tensor:
        """Where each of the step's tokens comes from: its place in `tokens`, or -1, int64 `[T]` on the host.

        `row_order`: indices of the plan's rows as the step has them, those of one token first.
        """
        followed = [plan.rows[row].follows for row in row_order if len(plan.rows[row].token_ids) == 1]
        places = [_KNOWN if row is None else self._place_of_row[row] for row in followed]
        sources = torch.full((num_tokens,), _KNOWN, dtype=torch.int64)
        sources[: len(places)] = torch.tensor(places, dtype=torch.int64)
        return sources

    def resolve(self, token_ids: Tensor, sources: Tensor) -> Tensor:
        """int64 `[T]`: the tokens as they are known, and those of the last step where they are not."""
        return torch.where(sources == _KNOWN, token_ids, self.tokens.index_select(0, sources.clamp(min=0)))

    def remember(self, rows: Sequence[int]) -> None:
        """`tokens` begins with the samples of these rows of the plan, each of which has one."""
        self._place_of_row = {row: place for place, row in enumerate(rows)}
