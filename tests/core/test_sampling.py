"""Ranges of what clients may ask for, and the random numbers."""

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.core.errors import InvalidRequest
from baton.core.fields import RulesText
from baton.core.sampling import (
    MAX_ALLOWED_TOKENS,
    MAX_BAD_WORDS,
    MAX_CHOICES,
    MAX_FORMAT_LENGTH,
    MAX_LOGIT_BIASES,
    MAX_LOGPROB_TOKENS,
    MAX_LOGPROBS,
    MAX_STOP_TOKEN_IDS,
    SamplingParams,
    choice_seed,
    uniform,
)

seeds = st.integers(0, 2**64 - 1)
NAN, INFINITY = float("nan"), float("inf")

# field, its public name, values just inside, values just outside
RANGES: list[tuple[str, str, list[Any], list[Any]]] = [
    ("temperature", "temperature", [0.0, 100.0], [-0.01, 100.01, NAN, INFINITY]),
    ("top_k", "top_k", [0, 2**31 - 1], [-1, 2**31]),
    ("top_p", "top_p", [0.0, 1e-9, 1.0], [1.01, -0.5, NAN]),
    ("min_p", "min_p", [0.0, 1.0], [-0.01, 1.01, NAN]),
    ("presence_penalty", "presence_penalty", [-2.0, 2.0], [-2.01, 2.01, NAN]),
    ("frequency_penalty", "frequency_penalty", [-2.0, 2.0], [-2.01, 2.01, NAN]),
    ("repetition_penalty", "repetition_penalty", [1e-3, 100.0], [0.0, -1.0, 100.1, NAN, INFINITY]),
    ("seed", "seed", [0, 2**64 - 1], [-1, 2**64, 10**400]),
    ("max_tokens", "max_tokens", [1, 2**31 - 1], [0, -1, 2**31, 10**400]),
    ("min_tokens", "min_tokens", [0, 16], [-1, 17]),
    (
        "stop_token_ids",
        "stop_token_ids",
        [(), (1,) * MAX_STOP_TOKEN_IDS],
        [(1,) * (MAX_STOP_TOKEN_IDS + 1)],
    ),
    (
        "logit_bias",
        "logit_bias",
        [(), ((1, -100.0), (2, 100.0)), ((1, 1.0),) * MAX_LOGIT_BIASES],
        [((1, 0.0), (2, 100.1)), ((1, -100.1),), ((1, NAN),), ((1, 1.0),) * (MAX_LOGIT_BIASES + 1)],
    ),
    ("num_logprobs", "logprobs", [None, 0, MAX_LOGPROBS], [-1, MAX_LOGPROBS + 1]),
    ("num_prompt_logprobs", "prompt_logprobs", [None, 0, MAX_LOGPROBS], [-1, MAX_LOGPROBS + 1]),
    ("n", "n", [1, MAX_CHOICES], [0, MAX_CHOICES + 1]),
    (
        "allowed_token_ids",
        "allowed_token_ids",
        [None, (1,), (1,) * MAX_ALLOWED_TOKENS],
        [(), (1,) * (MAX_ALLOWED_TOKENS + 1)],
    ),
    ("logprob_token_ids", "logprob_token_ids", [()], [(1,) * (MAX_LOGPROB_TOKENS + 1)]),
    ("bad_words", "bad_words", [(), ((1, 2),) * MAX_BAD_WORDS], [((1, 2),) * (MAX_BAD_WORDS + 1)]),
    ("logits_rules", "logits_rules", [RulesText("{}")], [RulesText("x" * 65_537)]),
    ("grammar", "structured_outputs", ["", "x" * MAX_FORMAT_LENGTH], ["x" * (MAX_FORMAT_LENGTH + 1)]),
]
GOOD = [(field, value) for field, _, good, _ in RANGES for value in good]
BAD = [(field, param, value) for field, param, _, bad in RANGES for value in bad]


@pytest.mark.parametrize(("field", "value"), GOOD, ids=lambda value: str(value)[:20])
def test_values_in_range_are_taken(field: str, value: Any) -> None:
    assert getattr(SamplingParams(**{field: value}), field) == value


@pytest.mark.parametrize(("field", "param", "value"), BAD, ids=lambda value: str(value)[:20])
def test_values_out_of_range_are_refused_by_name(field: str, param: str, value: Any) -> None:
    with pytest.raises(InvalidRequest) as refused:
        SamplingParams(**{field: value})
    assert (refused.value.param, refused.value.code) == (param, "out_of_range")


def test_every_field_has_its_range_tested() -> None:
    assert {field for field, *_ in RANGES} == set(SamplingParams.__dataclass_fields__)


def test_greedy_means_no_temperature() -> None:
    assert SamplingParams(temperature=0.0).is_greedy
    assert SamplingParams(top_p=0.0).is_greedy
    assert not SamplingParams(temperature=0.01).is_greedy


@pytest.mark.parametrize("penalty", ["presence_penalty", "frequency_penalty", "repetition_penalty"])
def test_any_penalty_counts(penalty: str) -> None:
    assert not SamplingParams().has_penalties
    changed: dict[str, Any] = {penalty: 0.5}
    assert SamplingParams(**changed).has_penalties


def test_choice_0_keeps_the_requests_seed() -> None:
    assert choice_seed(17, 0) == 17


def test_choices_have_seeds_of_their_own() -> None:
    drawn = [choice_seed(seed, choice) for seed in (0, 1, 2**64 - 1) for choice in range(MAX_CHOICES)]
    assert len(set(drawn)) == len(drawn)
    assert all(0 <= seed < 2**64 for seed in drawn)
    assert drawn == [choice_seed(seed, choice) for seed in (0, 1, 2**64 - 1) for choice in range(MAX_CHOICES)]


@given(seeds, st.integers(0, 2**31))
def test_uniform_is_in_range_and_repeatable(seed: int, position: int) -> None:
    number = uniform(seed, position)
    assert 0.0 <= number < 1.0
    assert number == uniform(seed, position)


@given(seeds, seeds, st.integers(0, 2**31), st.integers(0, 2**31))
def test_uniform_depends_on_both_arguments(seed: int, other_seed: int, position: int, other: int) -> None:
    if seed != other_seed:
        assert uniform(seed, position) != uniform(other_seed, position)
    if position != other:
        assert uniform(seed, position) != uniform(seed, other)


@pytest.mark.parametrize("varied", ["seed", "position", "both"])
def test_uniform_is_roughly_uniform_and_uncorrelated(varied: str) -> None:
    pairs = {
        "seed": lambda i: (i, 5),
        "position": lambda i: (5, i),
        "both": lambda i: (i % 100, i // 100),
    }
    numbers = [uniform(*pairs[varied](i)) for i in range(10_000)]
    # Chi-squared with 19 and 99 degrees of freedom: a fair source is above these once in a million.
    assert _chi_squared(Counter(int(20 * number) for number in numbers), 20) < 65
    steps = Counter((int(10 * a), int(10 * b)) for a, b in zip(numbers[::2], numbers[1::2], strict=True))
    assert _chi_squared(steps, 100) < 180


def _chi_squared(counts: Counter[Any], num_cells: int) -> float:
    expected = counts.total() / num_cells
    seen = sum((count - expected) ** 2 / expected for count in counts.values())
    return seen + (num_cells - len(counts)) * expected
