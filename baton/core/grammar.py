"""What the core needs of grammars: which tokens may come next.

Grammars are never sent or kept: what a matcher says is a function of a choice's output, so that another
worker, or the same one after a preemption, goes on where the answer is.
"""

from collections.abc import Sequence
from typing import Protocol


class TokenMatcher(Protocol):
    """Follows the output of one choice."""

    failure: str | None  # why the output can't go on; None while it can

    def allowed(self, output_token_ids: Sequence[int]) -> bytes:
        """The tokens that may follow an output: a bit for each token of the model, the lowest ids first, in
        the lowest bits.

        The output is longer with each call, or as long. Where it is complete, the model's end tokens are
        allowed. Where no token is, or the output was never allowed, `failure` is set and all are.
        """
        ...


class Grammar(Protocol):
    """What an answer has to look like, compiled."""

    def matcher(self) -> TokenMatcher:
        """For a new choice; costs microseconds."""
        ...
