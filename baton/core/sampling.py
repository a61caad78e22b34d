"""How the next token of one request is chosen, and the checks on what a client may ask for."""

import hashlib
from dataclasses import dataclass

from baton.core.errors import InvalidRequest

MAX_CHOICES = 128
MAX_LOGPROBS = 20
MAX_STOP_TOKEN_IDS = 128
MAX_LOGIT_BIASES = 1024  # a step, which others share, takes time for each


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Complete sampling settings of one request, as the workers see them.

    `seed` is always set (the router draws one where the client gave none), and `stop_token_ids` already
    contains the model's end-of-sequence tokens unless the client said `ignore_eos`, so that a request
    gives the same tokens on whichever worker it runs.

    Raises InvalidRequest, with the field's public name, where a value is out of range.
    """

    temperature: float = 1.0
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0  # unsigned 64 bits
    max_tokens: int = 16
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, added to its logit)
    num_logprobs: int | None = None  # None: no logprobs; 0: the chosen token's; k: and the k likeliest
    n: int = 1

    def __post_init__(self) -> None:
        _require_range("temperature", self.temperature, 0.0, 100.0)
        _require_range("top_k", self.top_k, 0, 2**31 - 1)
        if not 0.0 < self.top_p <= 1.0:
            raise _out_of_range("top_p", self.top_p, "above 0 and at most 1")
        _require_range("min_p", self.min_p, 0.0, 1.0)
        _require_range("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _require_range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        if not 0.0 < self.repetition_penalty <= 100.0:
            raise _out_of_range("repetition_penalty", self.repetition_penalty, "above 0 and at most 100")
        _require_range("seed", self.seed, 0, 2**64 - 1)
        _require_range("max_tokens", self.max_tokens, 1, 2**31 - 1)
        _require_range("min_tokens", self.min_tokens, 0, self.max_tokens)
        if len(self.stop_token_ids) > MAX_STOP_TOKEN_IDS:
            raise _out_of_range(
                "stop_token_ids", len(self.stop_token_ids), f"at most {MAX_STOP_TOKEN_IDS} long"
            )
        if len(self.logit_bias) > MAX_LOGIT_BIASES:
            raise _out_of_range("logit_bias", len(self.logit_bias), f"at most {MAX_LOGIT_BIASES} long")
        for _, bias in self.logit_bias:
            _require_range("logit_bias", bias, -100.0, 100.0)
        if self.num_logprobs is not None:
            _require_range("logprobs", self.num_logprobs, 0, MAX_LOGPROBS)
        _require_range("n", self.n, 1, MAX_CHOICES)

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature == 0.0

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


def _require_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:  # false for NaN as well
        raise _out_of_range(name, value, f"between {low} and {high}")


def _out_of_range(name: str, value: float, allowed: str) -> InvalidRequest:
    return InvalidRequest(f"{name} must be {allowed}, but is {value}.", param=name, code="out_of_range")
