"""One generation as the front doors ask for it, before and after tokens; the back of the router fills it."""

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Protocol

from baton.core.sampling import SampledToken, SamplingParams
from baton.core.stopping import FinishReason


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One prompt and what is to come after it, in token ids."""

    request_id: str
    token_ids: tuple[int, ...]
    sampling: SamplingParams
    priority: int = 0  # lower first
    cache_salt: str = ""  # requests with different salts never share cached prefixes


@dataclass(frozen=True, slots=True)
class TokenDelta:
    """The next tokens of one choice, in order and without gaps; `finish_reason` only on its last delta."""

    choice: int
    tokens: tuple[SampledToken, ...]
    finish_reason: FinishReason | None = None
    num_cached_prompt_tokens: int = 0  # of the request; set on choice 0's first delta


class Backend(Protocol):
    """The workers, seen from the front doors."""

    @property
    def max_model_len(self) -> int:
        """Most tokens (prompt + output) of a request that the workers take now."""
        ...

    @property
    def is_ready(self) -> bool:
        """Whether a request sent now has workers to run on."""
        ...

    def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenDelta]:
        """Stream the tokens of every choice, interleaved.

        Closing the generator aborts the request on every worker. Raises Overloaded or Unavailable
        before the first delta, WorkerLost or RequestFailed at any time.
        """
        ...

    def abort_choice(self, request_id: str, choice: int) -> None:
        """The front door has cut this choice (a stop string); no more deltas of it will be wanted."""
        ...
