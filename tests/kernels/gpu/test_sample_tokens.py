"""Sampling against the engine's sampler: the same tokens, for any settings, and the same random numbers."""

import pytest
import torch
import triton
import triton.language as tl

from baton.core.plan import SampleTask
from baton.core.sampling import SamplingParams, uniform
from baton.engine.logit_rules import apply_rules
from baton.engine.sampler import draw, filtered_probabilities, sample
from baton_kernels.gpu.penalties import penalise
from baton_kernels.gpu.random_numbers import uniform_bits
from baton_kernels.gpu.sample_tokens import SamplingRows, sample_tokens


def rows_of(params, device, lines=None, position=10):
    """Tensors of these settings; a row's seed is the params' own."""

    def column(values, dtype):
        return torch.tensor(values, dtype=dtype, device=device)

    return SamplingRows(
        lines=column(list(range(len(params))) if lines is None else lines, torch.int64),
        temperatures=column([p.temperature for p in params], torch.float32),
        top_k=column([p.top_k for p in params], torch.int32),
        top_p=column([p.top_p for p in params], torch.float64),
        min_p=column([p.min_p for p in params], torch.float32),
        seeds=column([p.seed - 2**64 if p.seed >= 2**63 else p.seed for p in params], torch.int64),
        positions=column([position] * len(params), torch.int64),
    )


def random_params(count, seed):
    """Every filter on and off, alone and together."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.rand(count, 8, generator=generator).tolist()
    return [
        SamplingParams(
            temperature=0.0 if a < 0.1 else 0.1 + 2 * b,
            top_k=int(60 * c) if d < 0.5 else 0,
            top_p=max(e, 0.01) if f < 0.5 else 1.0,
            min_p=0.2 * g if h < 0.5 else 0.0,
            seed=int(b * 2**53) * 2047,
        )
        for a, b, c, d, e, f, g, h in numbers
    ]


@triton.jit
def _uniforms(seeds, positions, output, TILE: tl.constexpr):  # noqa: N803
    places = tl.arange(0, TILE)
    bits = uniform_bits(tl.load(seeds + places), tl.load(positions + places))
    tl.store(output + places, bits.to(tl.int64, bitcast=True))


def test_random_numbers_are_the_hosts(device):
    generator = torch.Generator().manual_seed(0)
    seeds = torch.randint(-(2**63), 2**63 - 1, (128,), generator=generator)
    seeds[:3] = torch.tensor([0, -1, 2**62])
    positions = torch.randint(0, 2**31, (128,), generator=generator)
    output = torch.empty_like(seeds, device=device)
    _uniforms[(1,)](seeds.to(device), positions.to(device), output, TILE=128)
    pairs = zip(seeds.tolist(), positions.tolist(), strict=True)
    expected = [uniform(seed % 2**64, position) for seed, position in pairs]
    assert [bits % 2**64 / 2**64 for bits in output.tolist()] == expected


@pytest.mark.parametrize(("vocab_size", "spread"), [(50, 3.0), (5000, 0.5), (5000, 8.0)])
def test_draws_what_the_engine_draws(device, vocab_size, spread):
    count = 24 if vocab_size == 50 else 6
    count = 200 if device.type == "cuda" else count  # a GPU is quicker than the interpreter
    logits = torch.randn(count, vocab_size, generator=torch.Generator().manual_seed(vocab_size)) * spread
    params = random_params(count, seed=vocab_size)
    tasks = [(line, SampleTask(p, p.seed, 10, [], [])) for line, p in enumerate(params)]
    expected = [token.token_id for token in sample(logits, tasks)]
    assert sample_tokens(logits.to(device), rows_of(params, device)).tolist() == expected


@pytest.mark.parametrize(
    "params",
    [
        {"top_k": 3},
        {"top_k": 1},
        {"top_p": 0.3},
        {"top_p": 0.999},
        {"min_p": 0.5},
        {"min_p": 1.0},
        {"top_k": 5, "top_p": 0.5},
        {"top_k": 6, "top_p": 0.9, "min_p": 0.3},
    ],
)
def test_equals_are_kept_lowest_ids_first(device, params):
    """Only a few values, so that every bound falls among equals; many draws show the support."""
    logits = torch.tensor([[1.0, 2.0, 2.0, 0.0, 2.0, 1.0, 2.0, -1.0, 1.0, 0.0]])
    params = [SamplingParams(seed=seed, **params) for seed in range(5)]
    drawn = sample_tokens(logits.to(device), rows_of(params, device, lines=[0] * len(params)))
    probabilities = filtered_probabilities(logits, params[:1]).expand(len(params), -1)
    expected = draw(probabilities, [uniform(p.seed, 10) for p in params])
    assert drawn.tolist() == expected.tolist()


def test_broken_and_extreme_logits(device):
    nan, inf = float("nan"), float("inf")
    logits = torch.tensor(
        [[nan, 1.0, nan, 1.0], [-inf, -inf, 3.0, -inf], [inf, 0.0, inf, 0.0], [nan] * 4, [3e38, -3e38, 0, 0]]
    )
    greedy = [SamplingParams(temperature=0.0)] * 5
    assert sample_tokens(logits.to(device), rows_of(greedy, device)).tolist() == [1, 2, 0, 0, 0]
    drawn = [SamplingParams(temperature=0.5, top_p=0.9, seed=seed) for seed in range(5)]
    tokens = sample_tokens(logits.to(device), rows_of(drawn, device)).tolist()
    assert tokens[0] in (1, 3)
    assert tokens[1] == 2
    assert tokens[2] in (0, 2)
    assert 0 <= tokens[3] < 4
    assert tokens[4] == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_shared_lines(device, dtype):
    """Several draws of one line, logits as the model gives them."""
    logits = torch.randn(2, 300, generator=torch.Generator().manual_seed(2)).to(dtype)
    params = [SamplingParams(temperature=0.8, top_k=20, seed=seed) for seed in range(6)]
    lines = [seed % 2 for seed in range(6)]
    tasks = [(line, SampleTask(p, p.seed, 10, [], [])) for line, p in zip(lines, params, strict=True)]
    expected = [token.token_id for token in sample(logits, tasks)]
    assert sample_tokens(logits.to(device), rows_of(params, device, lines)).tolist() == expected


def test_a_row_does_not_depend_on_the_batch(device):
    logits = (torch.randn(8, 700, generator=torch.Generator().manual_seed(9)) * 2).to(device)
    params = random_params(8, seed=3)
    together = sample_tokens(logits, rows_of(params, device))
    for line in (0, 7):
        alone = sample_tokens(logits[line : line + 1], rows_of([params[line]], device))
        assert alone.tolist() == [together[line].item()]


def test_penalties_equal_the_engines_rules(device):
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(6, 1500, generator=generator) * 3
    params = [
        SamplingParams(repetition_penalty=1.0 + 0.3 * row, frequency_penalty=0.2 * row - 0.5,
                       presence_penalty=0.7 - 0.3 * row)
        for row in range(6)
    ]  # fmt: skip
    prompts = torch.randint(0, 1500, (6, 40), generator=generator)
    outputs = torch.randint(0, 30, (6, 60), generator=generator)
    expected = logits.clone()
    for line, p, prompt, output in zip(expected, params, prompts.tolist(), outputs.tolist(), strict=True):
        apply_rules(line, SampleTask(p, 0, 100, prompt, output), None)
    counts = [
        torch.zeros(6, 1500, dtype=torch.int32).scatter_add_(1, ids, torch.ones_like(ids, dtype=torch.int32))
        for ids in (prompts, outputs)
    ]
    columns = [
        torch.tensor([getattr(p, f"{name}_penalty") for p in params], device=device)
        for name in ("repetition", "frequency", "presence")
    ]
    ours = logits.to(device)
    penalise(ours, *(c.to(device) for c in counts), *columns)
    torch.testing.assert_close(ours.cpu(), expected, atol=1e-6, rtol=1e-6)
