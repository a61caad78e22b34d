"""How the next token of one request is chosen, and the checks on what a client may ask for."""

import hashlib
from dataclasses import dataclass
from typing import Annotated

from baton.core.errors import InvalidRequest
from baton.core.fields import (
    ANY_FORMAT,
    NO_RULES,
    Above,
    AlsoOff,
    AtLeastOne,
    AtMost,
    Between,
    EachBias,
    FormatText,
    PublicName,
    RulesText,
    TokenBiases,
    TokenIds,
    TokenSequences,
    check_fields,
)

MAX_CHOICES = 128
MAX_FORMAT_LENGTH = 1_000_000  # characters
MAX_LOGPROBS = 1024  # that routers may allow; see --max-logprobs
MAX_STOP_TOKEN_IDS = 128
MAX_LOGIT_BIASES = 1024  # a step, which others share, takes time for each
MAX_ALLOWED_TOKENS = 16384
MAX_BAD_WORDS = 256
MAX_LOGPROB_TOKENS = 128
MAX_RULES_LENGTH = 65_536  # characters
MAX_SEED = 2**64 - 1
_MAX_INT32 = 2**31 - 1


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Complete sampling settings of one request, as the workers see them, and the table of what a client may
    ask for: see fields.py.

    `seed` is always set (the router draws one where the client gave none), and `stop_token_ids` already
    contains the model's end-of-sequence tokens unless the client said `ignore_eos`, so that a request
    gives the same tokens on whichever worker it runs.

    Raises InvalidRequest, with the field's public name, where a value is out of range.
    """

    temperature: Annotated[float, Between(0.0, 100.0)] = 1.0
    top_k: Annotated[int, Between(0, _MAX_INT32), AlsoOff(-1)] = 0  # 0: off
    top_p: Annotated[float, Between(0.0, 1.0)] = 1.0  # 0: the likeliest token alone
    min_p: Annotated[float, Between(0.0, 1.0)] = 0.0
    presence_penalty: Annotated[float, Between(-2.0, 2.0)] = 0.0
    frequency_penalty: Annotated[float, Between(-2.0, 2.0)] = 0.0
    repetition_penalty: Annotated[float, Above(0, 100)] = 1.0
    seed: Annotated[int, Between(0, MAX_SEED)] = 0
    max_tokens: Annotated[int, Between(1, _MAX_INT32)] = 16
    min_tokens: Annotated[int, Between(0, "max_tokens")] = 0
    stop_token_ids: Annotated[TokenIds, AtMost(MAX_STOP_TOKEN_IDS)] = ()
    logit_bias: Annotated[TokenBiases, AtMost(MAX_LOGIT_BIASES), EachBias(Between(-100.0, 100.0))] = ()
    # None: no logprobs; 0: the chosen token's; k: and the k likeliest
    num_logprobs: Annotated[int | None, PublicName("logprobs"), Between(0, MAX_LOGPROBS)] = None
    n: Annotated[int, Between(1, MAX_CHOICES)] = 1
    # As num_logprobs, of the prompt's tokens but the first
    num_prompt_logprobs: Annotated[int | None, PublicName("prompt_logprobs"), Between(0, MAX_LOGPROBS)] = None
    # No other tokens come, end tokens included; None: all may.
    allowed_token_ids: Annotated[TokenIds | None, AtLeastOne(), AtMost(MAX_ALLOWED_TOKENS)] = None
    # The last token of none of them comes where the output ends with the others.
    bad_words: Annotated[TokenSequences, AtMost(MAX_BAD_WORDS)] = ()
    # Whose log probabilities are told after the likeliest ones, whatever their rank.
    logprob_token_ids: Annotated[TokenIds, AtMost(MAX_LOGPROB_TOKENS)] = ()
    # What the answer has to look like: see baton/grammars/formats.py. Empty: anything.
    grammar: Annotated[FormatText, PublicName("structured_outputs"), AtMost(MAX_FORMAT_LENGTH)] = ANY_FORMAT
    # Of the worker's owner, before all that is above: see baton/core/logits_rules.py.
    logits_rules: Annotated[RulesText, AtMost(MAX_RULES_LENGTH)] = NO_RULES

    def __post_init__(self) -> None:
        check_fields(self)
        if self.logprob_token_ids and self.num_logprobs is None:
            raise InvalidRequest("logprob_token_ids need logprobs.", param="logprob_token_ids")

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature == 0.0 or self.top_p == 0.0

    @property
    def has_penalties(self) -> bool:
        """Whether logits depend on the tokens seen so far."""
        return self.presence_penalty != 0.0 or self.frequency_penalty != 0.0 or self.repetition_penalty != 1.0


@dataclass(frozen=True, slots=True)
class SampledToken:
    """One sampled token; log probabilities are natural logs of the model's own distribution
    (before temperature, penalties and filters), present only where the request asked for them."""

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()  # (token id, log probability), likeliest first


def choice_seed(seed: int, choice: int) -> int:
    """The seed of choice number `choice` of a request with `n` > 1; choice 0 keeps the request's own."""
    if choice == 0:
        return seed
    words = seed.to_bytes(8, "little") + choice.to_bytes(4, "little")
    return int.from_bytes(hashlib.blake2b(words, digest_size=8).digest(), "little")


def uniform(seed: int, position: int) -> float:
    """The random number in [0, 1) of the token at `position` (its index in prompt + output).

    Counter-based: it depends on (seed, position) alone, so a request gives the same tokens on whichever
    worker, in whichever batch, after whichever migration. It is splitmix64's output function (Steele,
    Lea and Flood, 2014) applied to the two words in turn.
    """
    word = _mix64(_mix64(seed) ^ (position * 0x9E3779B97F4A7C15 & _MASK64))
    return (word >> 11) * 2.0**-53


_MASK64 = 2**64 - 1


def _mix64(word: int) -> int:
    word = (word + 0x9E3779B97F4A7C15) & _MASK64
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _MASK64
    return word ^ (word >> 31)
