"""Every sampling parameter against a plain implementation of its definition."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.core.plan import SampleTask
from baton.core.request import EngineRequest
from baton.core.sampling import SamplingParams
from baton.engine import sampler
from baton.engine.logit_rules import apply_rules
from baton.engine.sampler import draw, filtered_probabilities, sample

VOCAB = 50


@pytest.fixture(params=["C kernels", "torch"], autouse=True)
def _computed_by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "torch":
        monkeypatch.setattr(sampler, "cpu_kernels", lambda: None)


def task(params, *, seed=1, position=10, prompt=(), output=()):
    return SampleTask(params, seed, position, list(prompt), list(output))


def random_logits(rows=1, vocab=VOCAB, seed=0):
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3


def one(logits, params, **kwargs):
    return sample(logits[None], [(0, task(params, **kwargs))])[0].token_id


def naive_probabilities(logits, params):
    """Temperature, min_p, top_k, top_p in that order, in Python floats."""
    scaled = [value / params.temperature for value in logits.double().tolist()]

    def softmax(values):
        weights = [math.exp(v - max(values)) if v > -math.inf else 0.0 for v in values]
        return [w / sum(weights) for w in weights]

    probabilities = softmax(scaled)
    if params.min_p:
        floor = params.min_p * max(probabilities)
        scaled = [s if p >= floor else -math.inf for s, p in zip(scaled, probabilities, strict=True)]
    ranked = sorted(range(len(scaled)), key=lambda i: (-scaled[i], i))
    if params.top_k:
        for index in ranked[params.top_k :]:
            scaled[index] = -math.inf
    probabilities = softmax(scaled)
    if params.top_p < 1.0:
        mass = 0.0
        for index in ranked:
            if mass >= params.top_p:
                scaled[index] = -math.inf
            mass += probabilities[index]
    return softmax(scaled)


@settings(max_examples=150, deadline=None)
@given(
    st.floats(0.05, 5.0),
    st.integers(0, 60),
    st.floats(0.01, 1.0),
    st.one_of(st.just(0.0), st.floats(0.0, 1.0)),
    st.integers(0, 1000),
)
def test_filters_equal_naive(temperature, top_k, top_p, min_p, seed):
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    logits = random_logits(seed=seed)
    ours = filtered_probabilities(logits, [params])[0]
    assert torch.allclose(ours / ours.sum(), torch.tensor(naive_probabilities(logits[0], params)), atol=1e-5)


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        ({"top_k": 2}, [1, 2]),
        ({"top_k": 1}, [1]),  # the lowest id of equals
        ({"top_k": 1000}, [0, 1, 2, 3]),
        ({"top_p": 0.39}, [1]),
        ({"top_p": 0.41}, [1, 2]),
        ({"top_p": 0.85}, [0, 1, 2]),
        ({"min_p": 0.31}, [1, 2]),
        ({"min_p": 1.0}, [1, 2]),
        ({"min_p": 0.05, "top_k": 3, "top_p": 0.99}, [0, 1, 2]),
    ],
)
def test_support(params, kept):
    logits = torch.tensor([[0.12, 0.4, 0.4, 0.08]]).log()
    assert filtered_probabilities(logits, [SamplingParams(**params)])[0].nonzero()[:, 0].tolist() == kept


def test_top_p_beyond_the_likeliest_looked_at():
    """A flat distribution needs more tokens than are looked at first."""
    logits = random_logits(vocab=5000, seed=3) * 0.01
    probabilities = filtered_probabilities(logits, [SamplingParams(top_p=0.9)])[0]
    assert 4000 < int((probabilities > 0).sum()) < 4600
    together = filtered_probabilities(
        torch.cat((logits, logits * 500)), [SamplingParams(top_p=0.9), SamplingParams(top_p=0.5)]
    )
    assert torch.equal(together[0], probabilities)


def test_greedy_takes_the_lowest_of_equals():
    logits = torch.tensor([[0.0, 5.0, 5.0], [7.0, 1.0, 7.0]])
    tasks = [(line, task(SamplingParams(temperature=0.0))) for line in (1, 0)]
    assert [token.token_id for token in sample(logits, tasks)] == [0, 1]


def test_nan_stays_in_its_row():
    logits = random_logits(4)
    expected = [token.token_id for token in sample(logits, mixed_tasks(4))]
    broken = torch.cat((logits, torch.full((2, VOCAB), float("nan"))))
    broken[5, 3] = 1.0
    tokens = sample(broken, [*mixed_tasks(4), (4, task(SamplingParams(num_logprobs=2))),
                             (5, task(SamplingParams(temperature=0.0)))])  # fmt: skip
    assert [token.token_id for token in tokens[:4]] == expected
    assert 0 <= tokens[4].token_id < VOCAB
    assert tokens[4].logprob is not None
    assert math.isfinite(tokens[4].logprob)
    assert tokens[5].token_id == 3


def mixed_tasks(count):
    kinds = [
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=0.7, top_k=9),
        SamplingParams(top_p=0.8, presence_penalty=1.0, num_logprobs=4),
        SamplingParams(temperature=0.0, repetition_penalty=1.3),
        SamplingParams(min_p=0.02, temperature=1.4, min_tokens=4, stop_token_ids=(1, 2)),
    ]
    return [
        (line, task(kinds[line % len(kinds)], seed=line, prompt=[1, 2, 3], output=[4, line]))
        for line in range(count)
    ]


def test_the_batch_does_not_matter():
    """Alone, in a big batch, in another order: the same tokens and log probabilities, to the last bit."""
    logits = random_logits(100)
    tasks = mixed_tasks(100)
    together = sample(logits, tasks)
    assert sample(logits, tasks[::-1]) == together[::-1]
    for (line, one_task), token in zip(tasks, together, strict=True):
        assert sample(logits[line : line + 1].clone(), [(0, one_task)]) == [token]


def test_logits_are_left_unchanged():
    logits = random_logits(10)
    before = logits.clone()
    sample(logits, mixed_tasks(10))
    assert torch.equal(logits, before)


def test_seed_and_position_alone_decide():
    logits = random_logits(1, seed=5)[0] * 0.2
    params = SamplingParams()
    tokens = {(s, p): one(logits, params, seed=s, position=p) for s in range(8) for p in range(8)}
    assert len(set(tokens.values())) > 10
    for (seed, position), token_id in tokens.items():
        assert one(logits, params, seed=seed, position=position, prompt=[9], output=[8]) == token_id


def test_distribution():
    """20,000 draws follow the probabilities (chi-squared, 99.9%)."""
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0, -9.0])
    count = 20_000
    tasks = [(0, task(SamplingParams(), seed=3, position=position)) for position in range(count)]
    drawn = [token.token_id for token in sample(logits[None], tasks)]
    seen = torch.bincount(torch.tensor(drawn), minlength=5).double()
    expected = torch.softmax(logits.double(), 0) * count
    assert ((seen - expected) ** 2 / expected).sum() < 18.5


def test_draw_never_takes_what_has_no_probability():
    probabilities = torch.tensor([[0.0, 0.3, 0.0, 0.7, 0.0]])
    for number, expected in [(0.0, 1), (0.2999, 1), (0.3001, 3), (1.0 - 2.0**-53, 3), (0.999999999, 3)]:
        assert draw(probabilities, [number]).item() == expected
    assert draw(torch.tensor([[1e-38, 0.0]]), [1.0 - 2.0**-53]).item() == 0


def test_penalties_equal_their_definitions():
    logits = random_logits()[0]
    prompt, output = [1, 2, 2], [3, 3, 4, 1]
    params = SamplingParams(
        temperature=0.0, repetition_penalty=1.7, frequency_penalty=0.6, presence_penalty=0.9
    )
    expected = logits.tolist()
    for token_id in {*prompt, *output}:
        value = expected[token_id]
        expected[token_id] = value / 1.7 if value > 0 else value * 1.7
    for token_id in set(output):
        expected[token_id] -= 0.6 * output.count(token_id) + 0.9
    for token_id in range(6):  # each in turn the likeliest by a hair or not
        bias = max(v for i, v in enumerate(expected) if i != token_id) - expected[token_id]
        for nudge, wins in ((0.01, True), (-0.01, False)):
            biased = logits.clone()
            biased[token_id] = _undo_penalties(expected[token_id] + bias + nudge, token_id, prompt, output)
            assert (one(biased, params, prompt=prompt, output=output) == token_id) is wins


def _undo_penalties(value, token_id, prompt, output):
    if token_id in output:
        value += 0.6 * output.count(token_id) + 0.9
    if token_id in {*prompt, *output}:
        value = value * 1.7 if value > 0 else value / 1.7
    return value


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({}, 0),
        ({"repetition_penalty": 2.0}, 1),  # 0 is in the prompt, 1 in neither
        ({"presence_penalty": 0.5}, 0),  # the prompt does not count
        ({"logit_bias": ((3, 4.0),)}, 3),
        ({"logit_bias": ((0, -100.0), (1, -100.0))}, 2),
        ({"logit_bias": ((99, 50.0), (-1, 50.0))}, 0),  # outside the vocabulary
        ({"min_tokens": 3, "max_tokens": 9, "stop_token_ids": (0, 1, 99)}, 2),
        ({"min_tokens": 2, "max_tokens": 9, "stop_token_ids": (0, 1)}, 0),
    ],
)
def test_rules(params, expected):
    logits = torch.tensor([3.0, 2.9, 2.8, 0.0])
    for temperature in (0.0, 0.001):
        chosen = SamplingParams(temperature=temperature, **params)
        assert one(logits, chosen, prompt=[0], output=[2, 2], position=3) == expected


def test_presence_and_frequency_count_the_output():
    logits = torch.tensor([3.0, 2.0, 1.0])
    presence = SamplingParams(temperature=0.0, presence_penalty=1.5)
    frequency = SamplingParams(temperature=0.0, frequency_penalty=0.6)
    assert one(logits, presence, output=[0]) == 1
    assert one(logits, frequency, output=[0]) == 0
    assert one(logits, frequency, output=[0, 0]) == 1
    assert one(logits, SamplingParams(temperature=0.0, presence_penalty=-2.0), output=[1]) == 1


def test_temperature_sharpens():
    logits = torch.tensor([1.0, 0.0])
    cold = [one(logits, SamplingParams(temperature=0.01), position=p) for p in range(50)]
    hot = [one(logits, SamplingParams(temperature=50.0), position=p) for p in range(50)]
    assert set(cold) == {0}
    assert set(hot) == {0, 1}


def test_logprobs_are_of_the_raw_distribution():
    logits = random_logits(1, seed=9)
    logits[0, 7] = logits[0, 8] = 50.0
    params = SamplingParams(
        temperature=0.3, top_k=1, num_logprobs=3, logit_bias=((20, 100.0),), repetition_penalty=3.0
    )
    token = sample(logits, [(0, task(params, prompt=[7]))])[0]
    expected = torch.log_softmax(logits[0], -1)
    assert token.token_id == 20
    assert token.logprob == pytest.approx(float(expected[20]))
    assert [token_id for token_id, _ in token.top_logprobs][:2] == [7, 8]  # equals in id order
    assert [v for _, v in token.top_logprobs] == pytest.approx(expected.topk(3).values.tolist())


def test_logprobs_only_where_asked():
    logits = random_logits(1)
    plain, chosen, all_of_them = (
        sample(logits, [(0, task(SamplingParams(temperature=0.0, num_logprobs=count)))])[0]
        for count in (None, 0, 20)
    )
    assert plain.logprob is None
    assert plain.top_logprobs == chosen.top_logprobs == ()
    assert chosen.logprob == all_of_them.top_logprobs[0][1] == all_of_them.logprob
    few = sample(random_logits(1, vocab=5), [(0, task(SamplingParams(num_logprobs=20)))])[0]
    assert len(few.top_logprobs) == 5


def test_a_packed_prompt_is_penalised_as_any_other():
    params = SamplingParams(temperature=0.0, repetition_penalty=1.7)
    request = EngineRequest("a", (1, 2, 2, 60), b"", (), params)
    assert EngineRequest("b", (1, 2), b"", (), SamplingParams()).prompt_for_sampler == (1, 2)
    logits = random_logits(seed=7)[0]
    logits[2] = logits.max() * 1.1
    packed = SampleTask(params, 1, 10, request.prompt_for_sampler, [4])
    plain = SampleTask(params, 1, 10, request.prompt_token_ids, [4])
    rows = [logits.clone(), logits.clone()]
    for row, each in zip(rows, (packed, plain), strict=True):
        apply_rules(row, each, None)
    assert torch.equal(*rows)
    assert rows[0][2] == logits[2] / 1.7
