"""The log probabilities of a prompt's tokens, put together from what workers say of its parts."""

from dataclasses import replace

from baton.core.request import PromptLogprobs
from baton.core.sampling import SampledToken, SamplingParams
from baton_router.backend import GenerationRequest


class PromptTokens:
    """Of one request; a prompt that is computed again tells what is known already."""

    def __init__(self, request: GenerationRequest) -> None:
        self._num_wanted = len(request.token_ids) - 1
        self._tokens: list[SampledToken] = []
        is_asked = request.sampling.num_prompt_logprobs is not None
        self._untold = set(range(request.sampling.n)) if is_asked else set()  # choices

    def add(self, event: PromptLogprobs) -> None:
        """Take a part in."""
        num_known = len(self._tokens) - (event.first_position - 1)
        if num_known >= 0:
            self._tokens += event.tokens[num_known:]

    def take(self, choice: int) -> tuple[SampledToken, ...]:
        """All of them, once for each choice; by its first token they are all there."""
        if choice not in self._untold:
            return ()
        self._untold.remove(choice)
        return tuple(self._tokens)

    def still_asked(self, sampling: SamplingParams) -> SamplingParams:
        """The settings for another attempt, which need not tell again what is known."""
        if len(self._tokens) < self._num_wanted or sampling.num_prompt_logprobs is None:
            return sampling
        return replace(sampling, num_prompt_logprobs=None)
