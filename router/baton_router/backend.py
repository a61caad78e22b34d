"""One generation as the front doors ask for it, before and after tokens; the back of the router fills it."""

import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Protocol

from baton.core.errors import BatonError
from baton.core.sampling import SampledToken, SamplingParams
from baton.core.stopping import FinishReason
from baton_router.beams import BeamSearch
from baton_router.text.repetition import Repetition
from baton_router.text.stop_strings import StopStrings


@dataclass(frozen=True, slots=True)
class TextOptions:
    """How tokens become the client's text; nothing to the workers."""

    stop_strings: StopStrings = field(default_factory=StopStrings)
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    includes_stop: bool = False  # the text ends with the stop string, or token, that ended it
    repetition: Repetition = field(default_factory=Repetition)  # which ends it


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One prompt and what is to come after it, checked."""

    request_id: str  # no other's: see request_ids.py
    token_ids: tuple[int, ...]  # the prompt
    sampling: SamplingParams
    priority: int = 0  # lower first
    cache_salt: str = ""  # requests with different salts never share cached prefixes
    text: TextOptions = field(default_factory=TextOptions)
    arrived_s: float = field(default_factory=time.monotonic)
    answer_id: str = ""  # what the client knows it by, alone or among others
    num_candidates: int = 0  # that are computed, where more than `n`: the best of them are the choices
    beams: BeamSearch | None = None  # the choices are those that such a search finds
    end_token_ids: tuple[int, ...] = ()  # of the stop tokens, those by which the model says that it is done


@dataclass(frozen=True, slots=True)
class TokenDelta:
    """The next tokens of one choice, in order and without gaps; `finish_reason` only on its last delta."""

    choice: int
    tokens: tuple[SampledToken, ...]
    finish_reason: FinishReason | None = None
    num_cached_prompt_tokens: int = 0  # of the request; set on choice 0's first delta
    prompt_logprobs: tuple[SampledToken, ...] = ()  # of all prompt tokens but the first; on the first delta


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

    def end_all(self, error: BatonError) -> None:
        """End every request, those that come included: its generator raises the error."""
        ...

    def reset_prefix_cache(self) -> None:
        """Requests that come find nothing of what was computed before."""
        ...

    def abort_choice(self, request_id: str, choice: int) -> None:
        """The front door has cut this choice (a stop string); no more deltas of it will be wanted."""
        ...
