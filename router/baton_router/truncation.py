"""Prompts cut to a length, as requests ask for it."""

from collections.abc import Sequence
from dataclasses import dataclass

from baton.core.errors import InvalidRequest

FIELD = "truncate_prompt_tokens"
_SIDES = ("left", "right")


@dataclass(frozen=True, slots=True)
class Truncation:
    """Of a longer prompt so many tokens are kept; -1: as many as fit. `side` is where it is cut: with "left"
    the last ones are kept.

    Raises InvalidRequest for other values.
    """

    num_tokens: int
    side: str = "left"

    def __post_init__(self) -> None:
        if self.num_tokens < 1 and self.num_tokens != -1:
            raise InvalidRequest(
                f"{FIELD} must be -1, for as many as fit, or at least 1, but is {self.num_tokens}.",
                param=FIELD,
                code="out_of_range",
            )
        if self.side not in _SIDES:
            raise InvalidRequest(
                f"truncation_side must be left or right, but is {self.side!r}.", param="truncation_side"
            )

    @classmethod
    def asked(cls, num_tokens: int | None, side: str | None) -> "Truncation | None":
        """What a request's fields say; None: nothing is cut. Raises InvalidRequest."""
        checked = cls(-1 if num_tokens is None else num_tokens, side or "left")
        return None if num_tokens is None else checked

    def kept(self, token_ids: Sequence[int], most: int) -> Sequence[int]:
        """What is kept of a prompt, of which `most` tokens fit. Raises InvalidRequest if it asks for more."""
        if self.num_tokens > most:
            raise InvalidRequest(
                f"{FIELD} is {self.num_tokens}, but a prompt may have {most} tokens here.",
                param=FIELD,
                code="context_length_exceeded",
            )
        num_tokens = most if self.num_tokens == -1 else self.num_tokens
        if len(token_ids) <= num_tokens:
            return token_ids
        return token_ids[-num_tokens:] if self.side == "left" else token_ids[:num_tokens]
