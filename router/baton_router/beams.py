"""Beam search without the model: which continuations go on, which are done, and when the search is.

It keeps the rules of transformers' `generate(num_beams=...)`, so that both find the same beams.
"""

import heapq
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from baton.core.sampling import SampledToken


@dataclass(frozen=True, slots=True)
class BeamSearch:
    """What a client asks for. Log probabilities are divided by length ** length_penalty, so that a penalty
    above 0 favours long answers."""

    width: int
    length_penalty: float = 1.0


@dataclass(frozen=True, slots=True)
class Beam:
    """An answer, or the beginning of one."""

    tokens: tuple[SampledToken, ...] = ()
    logprob: float = 0.0  # natural log, of all its tokens together
    is_ended: bool = False  # by an end token, which is its last

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Of all its tokens."""
        return tuple(token.token_id for token in self.tokens)


class Beams:
    """One search. `running` are the beams that want a continuation each; see `advance`."""

    def __init__(
        self, search: BeamSearch, *, end_token_ids: AbstractSet[int], max_tokens: int, num_logprobs: int = 0
    ) -> None:
        """`num_logprobs`: how many of the likeliest in its place each token of a beam keeps."""
        self._search = search
        self._ends = end_token_ids
        self._max_tokens = max_tokens
        self._num_logprobs = num_logprobs
        self._finished: list[tuple[float, Beam]] = []  # score and beam, the best first
        self._num_tokens = 0
        self.running = [Beam()]

    @property
    def num_candidates(self) -> int:
        """How many continuations of each beam `advance` looks at: enough that, whichever of them end, as many
        beams as were asked for can go on."""
        return num_candidates(self._search.width, len(self._ends))

    def advance(self, continuations: Sequence[Sequence[tuple[int, float]]]) -> None:
        """One token more. For each running beam the likeliest next tokens, (id, log probability)."""
        self._num_tokens += 1
        best = heapq.nlargest(self.num_candidates, self._longer(continuations), key=lambda beam: beam.logprob)
        is_full_length = self._num_tokens == self._max_tokens
        width = self._search.width
        # What ends further down is neither kept nor continued.
        done = [beam for beam in best[:width] if beam.is_ended or is_full_length]
        self._finished += [(self._score(beam), beam) for beam in done]
        self._finished = sorted(self._finished, key=lambda entry: entry[0], reverse=True)[:width]
        self.running = [] if is_full_length else [beam for beam in best if not beam.is_ended][:width]
        if self._is_settled():
            self.running = []

    def best(self, count: int) -> list[Beam]:
        """The finished ones of the best scores, when none is running."""
        return [beam for _, beam in self._finished[:count]]

    def _longer(self, continuations: Sequence[Sequence[tuple[int, float]]]) -> Iterator[Beam]:
        for beam, likeliest in zip(self.running, continuations, strict=True):
            top = tuple(likeliest[: self._num_logprobs])
            for token_id, logprob in likeliest:
                token = SampledToken(token_id, logprob, top)
                yield Beam((*beam.tokens, token), beam.logprob + logprob, token_id in self._ends)

    def _score(self, beam: Beam) -> float:
        length: float = self._num_tokens**self._search.length_penalty
        return beam.logprob / length

    def _is_settled(self) -> bool:
        """Whether the best that runs is, as long as it is now, no better than the worst that is finished."""
        if len(self._finished) < self._search.width or not self.running:
            return False
        return self._score(self.running[0]) <= self._finished[-1][0]


def num_candidates(width: int, num_end_tokens: int) -> int:
    """Of each beam; see `Beams`."""
    return max(2, 1 + num_end_tokens) * width
