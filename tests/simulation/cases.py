"""What is asked in a schedule, and the oracle: the tokens that each request must get."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

from baton.core.prefix import block_hashes, chain_seed
from baton.core.request import EngineRequest
from baton.core.sampling import SamplingParams, choice_seed
from baton.core.stopping import FinishReason, finish_reason

VOCABULARY_SIZE = 1 << 30  # a wrong state never gives the right token
MAX_MODEL_LEN = 16
HASH_SEED = chain_seed(b"the fake model's")

_MASK = (1 << 64) - 1
_LENGTHS = (6, 1, 3, 4, 5, 8, 9, 11)
_MAX_TOKENS = (2, 1, 3, 2, 4, 2, 3, 6)
_NUM_CHOICES = (1, 1, 2, 3)
# (choice, position) of tokens that are made stop tokens; choice -1 is all of them.
_STOPS = ((), (), (), (), ((-1, 0),), ((0, 0),), ((0, 1),), ((-1, 1),))

Outcome = tuple[tuple[int, ...], FinishReason]


def next_state(state: int, token_id: int) -> int:
    """What a token's K and V stand for: itself and all tokens before it."""
    return hash((state, token_id)) & _MASK  # of ints: the same in every process


def sample(state: int, seed: int, position: int) -> int:
    """The token after a state."""
    return hash((state, seed, position)) % VOCABULARY_SIZE


@cache
def states_of(prompt: tuple[int, ...]) -> tuple[int, ...]:
    """The state of each token of a prompt."""
    states, state = [], 0
    for token_id in prompt:
        state = next_state(state, token_id)
        states.append(state)
    return tuple(states)


@dataclass(frozen=True, slots=True)
class Case:
    """One request, and what becomes of it where nothing goes wrong."""

    prompt: tuple[int, ...]
    sampling: SamplingParams
    outcomes: tuple[Outcome, ...]  # by choice
    is_local: bool  # prefill and decode on one worker

    def request(
        self, request_id: str, block_size: int, choices: tuple[int, ...], answered: tuple[int, ...]
    ) -> EngineRequest:
        """What a worker with such blocks gets, for all choices or for one that goes on after `answered`."""
        sampling, hashes = self.sampling, _hashes((*self.prompt, *answered), block_size)
        if len(choices) == 1:
            sampling = replace(sampling, n=1, seed=choice_seed(sampling.seed, choices[0]))
        return EngineRequest(
            request_id, self.prompt, HASH_SEED, hashes, sampling, answered_token_ids=answered
        )


@cache
def make_case(which_prompt: int, which_sampling: int) -> Case:
    """One of the requests that occur, by two bytes. Many prompts begin like others; outputs are short."""
    family, variant = which_prompt >> 3 & 1, which_prompt >> 4 & 1
    prompt = [7 + 100 * family + index for index in range(_LENGTHS[which_prompt & 7])]
    prompt[-1] += 50 * variant
    max_tokens, num_choices = _MAX_TOKENS[which_sampling & 7], _NUM_CHOICES[which_sampling >> 3 & 3]
    free = SamplingParams(max_tokens=max_tokens, n=num_choices)
    tokens = [output for output, _ in _outcomes(tuple(prompt), free)]
    stops = {
        tokens[choice][position]
        for wanted, position in _STOPS[which_sampling >> 5]
        for choice in (range(num_choices) if wanted < 0 else (wanted,))
        if position < len(tokens[choice])
    }
    sampling = SamplingParams(max_tokens=max_tokens, n=num_choices, stop_token_ids=tuple(sorted(stops)))
    is_local = which_prompt >= 0xE0 and max_tokens > 1
    return Case(tuple(prompt), sampling, _outcomes(tuple(prompt), sampling), is_local)


def _outcomes(prompt: tuple[int, ...], sampling: SamplingParams) -> tuple[Outcome, ...]:
    return tuple(_outcome(prompt, sampling, choice) for choice in range(sampling.n))


def _outcome(prompt: tuple[int, ...], sampling: SamplingParams, choice: int) -> Outcome:
    seed, state = choice_seed(sampling.seed, choice), states_of(prompt)[-1]
    output: list[int] = []
    reason = None
    while reason is None:
        position = len(prompt) + len(output)
        token_id = sample(state, seed, position)
        state = next_state(state, token_id)
        output.append(token_id)
        reason = finish_reason(sampling, token_id, len(output), position + 1, MAX_MODEL_LEN)
    return tuple(output), reason


@cache
def _hashes(prompt: Sequence[int], block_size: int) -> tuple[bytes, ...]:
    return tuple(block_hashes(HASH_SEED, prompt, block_size))
