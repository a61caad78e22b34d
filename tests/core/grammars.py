"""Grammars for tests: of tokens, and that end where they are told."""

from collections.abc import Callable, Sequence, Set

NUM_MASK_BYTES = 20  # of the vocabulary of tests: 160


class Allowing:
    """Implements `core.grammar.Grammar`: the same tokens may come at each place, or by what came before."""

    def __init__(self, allowed: Set[int] | Callable[[Sequence[int]], Set[int]]) -> None:
        self._allowed = allowed

    def matcher(self) -> "AllowingMatcher":
        return AllowingMatcher(self._allowed)


class AllowingMatcher:
    """Implements `core.grammar.TokenMatcher`; where nothing is allowed it fails."""

    def __init__(self, allowed: Set[int] | Callable[[Sequence[int]], Set[int]]) -> None:
        self.failure: str | None = None
        self._allowed = allowed

    def allowed(self, output_token_ids: Sequence[int]) -> bytes:
        tokens = self._allowed(output_token_ids) if callable(self._allowed) else self._allowed
        if not tokens:
            self.failure = f"nothing may come after {list(output_token_ids)}"
            return b"\xff" * NUM_MASK_BYTES
        bits = sum(1 << token_id for token_id in tokens)
        return bits.to_bytes(NUM_MASK_BYTES, "little")
