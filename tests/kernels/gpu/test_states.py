"""What happens to states between the matrix products, against plain torch in float64."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from baton_kernels import reference
from baton_kernels.gpu import float8, one_row, page_copies, rotary_store, row_functions
from baton_kernels.quantization import float8_rows
from baton_kernels.reads import Normalise, SiluGate
from tests.kernels.gpu.paged import TOLERANCE, relative_error

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def randn(*shape, dtype, device, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def rotated(states, cosines, sines):
    """float64, pairs half a head apart."""
    low, high = states.double().chunk(2, -1)
    states = states.double()
    return states * cosines.double() + torch.cat((high, low), -1) * sines.double()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [64, 100])
def test_rms_norm(device, dtype, size):
    states = randn(5, size, dtype=dtype, device=device)
    residual = randn(5, size, dtype=dtype, device=device, seed=1)
    weight = randn(size, dtype=dtype, device=device, seed=2)
    expected = F.rms_norm(states.double(), (size,), weight.double(), 1e-5).cpu()
    assert relative_error(row_functions.rms_norm(states, weight, 1e-5), expected) < TOLERANCE[dtype]
    sums = states + residual  # rounded to the dtype, as the model does
    expected = F.rms_norm(sums.double(), (size,), weight.double(), 1e-5).cpu()
    output = row_functions.add_rms_norm(states, residual, weight, 1e-5)
    if device.type == "cuda":
        assert torch.equal(residual, sums)
    # Triton's interpreter cuts bfloat16 off where a GPU rounds.
    assert relative_error(residual, sums.cpu().double()) < TOLERANCE[dtype]
    assert relative_error(output, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [64, 1500])
def test_gated_silu(device, dtype, size):
    gate_up = randn(3, 2 * size, dtype=dtype, device=device)
    gate, up = gate_up.double().chunk(2, -1)
    output = row_functions.gated_silu(gate_up)
    assert relative_error(output, (F.silu(gate) * up).cpu()) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reads", [None, Normalise, SiluGate])
@pytest.mark.parametrize(("size", "outputs"), [(64, 9), (100, 4), (1024, 7), (2500, 3)])
def test_one_row(device, dtype, reads, size, outputs):
    def numbers(*shape, seed):
        return randn(*shape, dtype=dtype, device=device, seed=seed)

    weight = numbers(outputs, size, seed=1)
    states = numbers(1, 2 * size if reads is SiluGate else size, seed=2)
    read = states.double()
    if reads is Normalise:
        reads = Normalise(numbers(size, seed=3), 1e-2)
        read = F.rms_norm(read, (size,), reads.weight.double(), reads.eps)
    elif reads is SiluGate:
        reads, (gate, up) = SiluGate(), read.chunk(2, -1)
        read = F.silu(gate) * up
    product = F.linear(read, weight.double())
    assert relative_error(one_row.one_row(states, weight, None, reads), product.cpu()) < TOLERANCE[dtype]
    bias, residual = numbers(outputs, seed=4), numbers(1, outputs, seed=5)
    expected = product + bias.double() + residual.double()
    assert one_row.one_row(states, weight, bias, reads, residual) is residual
    assert relative_error(residual, expected.cpu()) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kv_heads", "group", "head_dim"), [(2, 3, 24), (1, 4, 64), (3, 1, 16)])
def test_rotate_and_store(device, dtype, kv_heads, group, head_dim):
    num_tokens, heads, block_size = 7, kv_heads * group, 4
    wide = randn(num_tokens, heads + 2 * kv_heads + 1, head_dim, dtype=dtype, device=device)
    qkv = wide[:, :-1]
    angles = torch.rand(num_tokens, 1, head_dim // 2, generator=torch.Generator().manual_seed(3)) * 6
    cosines = torch.cat((angles.cos(), angles.cos()), -1).to(dtype).to(device)
    sines = torch.cat((-angles.sin(), angles.sin()), -1).to(dtype).to(device)
    slots = torch.randperm(6 * block_size, generator=torch.Generator().manual_seed(4))[:num_tokens].to(device)
    pool = torch.full((6, 2, 2, kv_heads, block_size, head_dim), float("nan"), dtype=dtype, device=device)
    output = rotary_store.rotate_and_store(qkv, cosines, sines, pool[:, 1, 0], pool[:, 1, 1], slots)
    query, key, value = qkv.split_with_sizes((heads, kv_heads, kv_heads), 1)
    assert relative_error(output, rotated(query, cosines, sines).cpu()) < TOLERANCE[dtype]
    stored = pool[slots // block_size, 1, :, :, slots % block_size]  # [T, 2, K, D]
    assert relative_error(stored[:, 0], rotated(key, cosines, sines).cpu()) < TOLERANCE[dtype]
    assert torch.equal(stored[:, 1], value)
    assert int(pool.isfinite().sum()) == num_tokens * 2 * kv_heads * head_dim


@pytest.mark.parametrize("dtype", DTYPES)
def test_store_equals_reference(device, dtype):
    states = randn(2, 9, 3, 24, dtype=dtype, device=device)
    slots = torch.randperm(20, generator=torch.Generator().manual_seed(4))[:9].to(device)
    pools = [torch.zeros(4, 2, 2, 3, 5, 24, dtype=dtype, device=device) for _ in range(2)]
    rotary_store.store(states[0], states[1], pools[0][:, 1, 0], pools[0][:, 1, 1], slots)
    reference.store_kv(pools[1], 1, states[0], states[1], reference.token_lines(pools[1], slots))
    assert torch.equal(*pools)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("first_layer", "num_layers"), [(0, 3), (1, 1), (1, 2)])
def test_gather_and_scatter_blocks(device, dtype, first_layer, num_layers):
    pool = randn(6, 3, 2, 2, 5, 8, dtype=dtype, device=device)
    before = pool.clone()
    blocks = torch.tensor([4, 0, 5], device=device)
    staging = page_copies.gather_blocks(pool, blocks, first_layer, num_layers)
    assert torch.equal(staging, pool[blocks, first_layer : first_layer + num_layers])
    assert torch.equal(pool, before)
    target = torch.zeros_like(pool)
    page_copies.scatter_blocks(staging, target, blocks, first_layer)
    expected = torch.zeros_like(pool)
    expected[blocks, first_layer : first_layer + num_layers] = staging
    assert torch.equal(target, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [64, 1500])
def test_float8_rows(device, dtype, size):
    values = randn(5, size, dtype=dtype, device=device)
    values[1] = 0.0
    values[2] *= 1e-4
    expected, expected_scales = float8_rows(values.cpu())
    rounded, scales = float8.float8_rows(values)
    assert torch.equal(scales.cpu(), expected_scales)
    assert torch.equal(rounded.cpu().view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_store_into_float8_pages(device, dtype):
    """Every number of 16 bits, bit for bit as torch rounds it, divided by a scale."""
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).view(256, 4, 64)
    states = values.to(device)
    pages = torch.zeros(2, 64, 4, 4, 64, device=device).to(torch.float8_e4m3fn)
    slots = torch.randperm(256, generator=torch.Generator().manual_seed(7))
    rotary_store.store(states, states, pages[0], pages[1], slots.to(device), (1.0, 0.25))
    for page, scale in zip(pages.cpu(), (1.0, 0.25), strict=True):
        found = page.view(torch.uint8)[slots // 4, :, slots % 4]
        limited = (values.float() / scale).clamp(-448.0, 448.0)
        is_nan = limited.isnan()
        expected = limited.to(torch.float8_e4m3fn).view(torch.uint8)
        assert torch.equal(found[~is_nan], expected[~is_nan])
        assert (found[is_nan] & 0x7F == 0x7F).all()
