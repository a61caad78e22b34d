"""Random draws by the C kernel, and what the definition says of them in float64."""

import ctypes
import random

import pytest
import torch
from torch import Tensor

from baton_kernels.cpu.logprobs import Chosen, logprobs
from baton_kernels.cpu.sample_tokens import Drawn, sample_tokens
from tests.kernels.cases import DTYPES

ROUNDING = 1e-5  # of the cumulative weight: float32 exponentials


def check_drawn(library: ctypes.CDLL, seed: int) -> None:
    """Rows of every spread, some of few different numbers, under every filter alone and with others."""
    choose, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    dtype, size = choose.choice(DTYPES), choose.choice([1, 5, 100, 4096, 9000])
    spread = torch.tensor([0.01, 1.0, 4.0, 30.0, 1.0])[:, None]
    logits = torch.randn(5, size, generator=generator) * spread
    logits[4] = logits[4].round()  # many are equal
    logits = logits.to(dtype)
    rows = [_row(choose, size) for _ in range(12)]
    before = logits.clone()
    drawn = sample_tokens(library, logits, rows).tolist()
    assert torch.equal(logits, before)
    for row, token in zip(rows, drawn, strict=True):
        _check(logits[row.line].float(), row, token)


def check_logprobs(library: ctypes.CDLL, seed: int) -> None:
    """Rows of every spread, one of few different numbers and one with NaN and infinities."""
    choose, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    dtype, size = choose.choice(DTYPES), choose.choice([1, 5, 100, 4096, 9000])
    logits = torch.randn(5, size, generator=generator) * torch.tensor([0.01, 1.0, 4.0, 30.0, 1.0])[:, None]
    logits[4] = logits[4].round()
    logits[3, :3] = torch.tensor([float("nan"), -float("inf"), 50.0])[: size if size < 3 else 3]
    logits = logits.to(dtype)
    least = torch.finfo(torch.float32).min
    expected = torch.log_softmax(logits.float().nan_to_num(nan=least).double(), dim=-1)
    counts = [choose.choice([0, 1, 5, 20]) for _ in range(9)]
    rows = [Chosen(choose.randrange(5), choose.randrange(size), count) for count in counts]
    for row, (own, likeliest) in zip(rows, logprobs(library, logits, rows), strict=True):
        line = expected[row.line]
        assert own == pytest.approx(float(line[row.token_id]), rel=1e-6, abs=1e-5)
        order = line.argsort(descending=True, stable=True)[: row.count]
        assert [token_id for token_id, _ in likeliest] == order.tolist()
        values = torch.tensor([value for _, value in likeliest], dtype=torch.float64)
        torch.testing.assert_close(values, line[order], rtol=1e-6, atol=1e-5)


def check_draws_of_what_is_no_number(library: ctypes.CDLL) -> None:
    nan, inf = float("nan"), float("inf")
    logits = torch.tensor(
        [[nan, 1.0, nan, 1.0], [-inf, -inf, 3.0, -inf], [inf, 0.0, inf, 0.0], [nan] * 4, [3e38, -3e38, 0, 0]]
    )
    expected = ({1, 3}, {2}, {0, 2}, {0, 1, 2, 3}, {0})
    for line, allowed in enumerate(expected):
        for top_p in (1.0, 0.9):
            rows = [Drawn(line, 0.5, 0, top_p, 0.0, number / 64) for number in range(64)]
            assert set(sample_tokens(library, logits, rows).tolist()) <= allowed
            assert allowed == set(sample_tokens(library, logits, rows).tolist()) or top_p < 1.0
    coldest = Drawn(4, torch.finfo(torch.float32).tiny, 0, 0.5, 0.0, 0.999)
    assert sample_tokens(library, logits, [coldest]).tolist() == [0]


def _row(choose: random.Random, size: int) -> Drawn:
    return Drawn(
        line=choose.randrange(5),
        temperature=choose.choice([0.01, 0.7, 1.0, 5.0]),
        top_k=choose.choice([0, 0, 1, 2, 50, size, 10 * size]),
        top_p=choose.choice([1.0, 1.0, 0.01, 0.5, 0.9, 0.999]),
        min_p=choose.choice([0.0, 0.0, 0.05, 0.5, 1.0]),
        number=choose.choice([0.0, choose.random(), choose.random(), 1.0 - 2.0**-53]),
    )


def _check(logits: Tensor, row: Drawn, token: int) -> None:
    """`token` is kept, and the number falls into it, but for rounding."""
    weights = _kept_weights(logits, row)
    assert weights[token] > 0, f"{row} drew {token}, which it leaves out"
    cumulative = weights.cumsum(0)
    total = float(cumulative[-1])
    target, end = row.number * total, float(cumulative[token])
    assert end - float(weights[token]) - ROUNDING * total <= target <= end + ROUNDING * total, row


def _kept_weights(logits: Tensor, row: Drawn) -> Tensor:
    """float64 `[V]`: the weights of the tokens that may be drawn, 0 for all others."""
    depths = (logits.max() - logits) / torch.tensor(row.temperature)
    order = depths.argsort(stable=True)
    if row.min_p > 0.0:
        order = order[depths[order] <= torch.tensor(row.min_p).log().abs()]
    if row.top_k > 0:
        order = order[: row.top_k]
    masses = (-depths[order].double()).exp()
    if row.top_p < 1.0:
        reached = masses.cumsum(0) >= row.top_p * masses.sum() * (1 - 1e-9)  # the last bits of sums
        num_kept = int(reached.nonzero()[0]) + 1
        order, masses = order[:num_kept], masses[:num_kept]
    weights = torch.zeros(len(logits), dtype=torch.float64)
    weights[order] = masses
    return weights
