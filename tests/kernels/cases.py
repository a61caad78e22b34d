"""Random cases for the C kernels, and what `baton_kernels.reference` and torch in float64 say of them."""

import ctypes
import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from baton_kernels import reference
from baton_kernels.cpu.allowed_rows import allowed_rows
from baton_kernels.cpu.argmax import argmax
from baton_kernels.cpu.attention import PagedAttention
from baton_kernels.cpu.linear import PackedInt8Linear, PackedLinear
from baton_kernels.quantization import INT8_GROUP, int8_groups, to_float8
from baton_kernels.reads import Normalise
from baton_kernels.rotation import Rotation

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Of one rounding to the dtype; sums are in float32.
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 1e-2, torch.float16: 1.5e-3}
EPS = 1e-5
# AMX multiplies 8-bit weights with bfloat16 states in another way, where there are more rows than these.
INT8_FEW_ROWS = 12
INT8_DTYPES = (*DTYPES, torch.bfloat16)


def numbers(generator: torch.Generator, dtype: torch.dtype, *shape: int) -> Tensor:
    """Normally distributed."""
    return torch.randn(shape, generator=generator).to(dtype)


def check_close(ours: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Within the dtype's rounding of float64 `expected`, relative to the greatest."""
    assert ours.dtype == dtype
    assert not ours.isnan().any()
    error = (ours.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-3)
    assert error < TOLERANCE[dtype], f"off by {error:.2e}"


def check_linear(library: ctypes.CDLL, seed: int) -> None:
    """One matrix of random size, dtype, bias, residual, norm and gate."""
    choose, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    dtype = choose.choice(DTYPES)
    num_rows, inputs, width = (choose.choice([1, 2, choose.randint(3, 90)]) for _ in range(3))
    if choose.random() < 0.1:
        num_rows, inputs = 300, 2049  # more rows than one block has
    is_gated = choose.random() < 0.3
    outputs = width * (2 if is_gated else 1)
    weight = numbers(generator, dtype, outputs, inputs) * inputs**-0.5
    bias = numbers(generator, dtype, outputs) if choose.random() < 0.5 else None
    residual = numbers(generator, dtype, num_rows, width) if choose.random() < 0.5 else None
    norm = Normalise(numbers(generator, dtype, inputs), EPS) if choose.random() < 0.5 else None
    states = numbers(generator, dtype, num_rows, inputs)
    packed = PackedLinear(library, weight, bias, norm, is_gated)
    expected = F.linear(_normed(states, norm), weight.double(), None if bias is None else bias.double())
    if is_gated:
        expected = F.silu(expected[:, :width]) * expected[:, width:]
    if residual is not None:
        expected += residual.double()
    check_close(packed(states, residual), expected, dtype)
    if not is_gated:
        ids = torch.randint(outputs, (num_rows,), generator=generator)
        assert torch.equal(packed.table()(ids), weight[ids])


def check_linear_int8(library: ctypes.CDLL, seed: int) -> None:
    """As `check_linear`, against the reference, or what AMX makes of many rows of bfloat16."""
    choose, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    dtype = choose.choice(INT8_DTYPES)
    num_rows, inputs, outputs = (choose.choice([1, 2, choose.randint(3, 90)]) for _ in range(3))
    if choose.random() < 0.1:
        num_rows, inputs, outputs = 300, 2049, 70  # more rows than one block has
    weight = numbers(generator, dtype, outputs, inputs)
    bias = numbers(generator, dtype, outputs) if choose.random() < 0.5 else None
    residual = numbers(generator, dtype, num_rows, outputs) if choose.random() < 0.5 else None
    norm = Normalise(numbers(generator, dtype, inputs), EPS) if choose.random() < 0.5 else None
    states = numbers(generator, dtype, num_rows, inputs)
    states[0] = 0.0
    read = _normed(states, norm)
    rounded, scales = int8_groups(weight)
    ours = PackedInt8Linear(library, weight, bias, norm)(states, residual)
    assert ours.dtype == dtype

    def is_close(products: Tensor, step: float) -> bool:
        """To these products; states may be rounded to either side of a tie, `step` of the greatest apart."""
        expected = products
        for addend in (bias, residual):
            expected = expected if addend is None else expected + addend.double()
        # A few states' last place times the greatest weight.
        one_step = read.abs().amax(dim=1, keepdim=True) * step * weight.double().abs().amax(dim=1)
        in_sums = TOLERANCE[torch.float32] * expected.abs().max().clamp(min=1e-3)
        allowed = 2 * one_step + in_sums + torch.finfo(dtype).eps / 2 * 1.01 * expected.abs()
        return bool(((ours.double() - expected).abs() <= allowed).all())

    is_right = is_close(reference.int8_linear(read, rounded, scales), 1 / 32767)
    if dtype == torch.bfloat16 and num_rows > INT8_FEW_ROWS:
        step = 0.0 if norm is None else 2.0**-8  # what is not normalised is bfloat16 already
        is_right = is_right or is_close(_int8_linear_in_bfloat16(read, rounded, scales), step)
    assert is_right


def _int8_linear_in_bfloat16(states: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    """As `reference.int8_linear`, with weights times their scales and states each rounded to bfloat16."""
    sizes = scales.double().repeat_interleave(INT8_GROUP, dim=1)[:, : weight.shape[1]]
    return F.linear(states.bfloat16().double(), (weight.double() * sizes).bfloat16().double())


def check_int8_is_exact(library: ctypes.CDLL, seed: int) -> None:
    """Whole numbers lose nothing in 8 and 16 bits where the greatest of each scale is 127 and 32,767.

    So float64 says all, but for what summing the groups in float32 loses.
    """
    choose, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    num_rows, inputs, outputs = (choose.choice([1, 5, choose.randint(6, 300)]) for _ in range(3))
    matrices = []
    for rows, most, period in ((outputs, 127, INT8_GROUP), (num_rows, 32767, inputs)):
        matrix = torch.randint(-most, most + 1, (rows, inputs), generator=generator)
        if choose.random() < 0.3:
            matrix = matrix.sign() * most  # the greatest sums
        matrix[:, ::period] = choose.choice([-most, most])
        powers = torch.randint(-12, -5, (rows, (inputs + period - 1) // period), generator=generator)
        matrices.append(matrix * 2.0 ** powers.repeat_interleave(period, dim=1)[:, :inputs])
    weight, states = matrices
    expected = F.linear(states.double(), weight.double())
    check_close(PackedInt8Linear(library, weight)(states), expected, torch.float32)


def check_int8_without_a_scale(library: ctypes.CDLL) -> None:
    """A row with NaN or infinity gives NaN and no row beside it does."""
    states = torch.ones(4, 40)
    states[1, 7], states[2, 39] = float("nan"), float("-inf")
    output = PackedInt8Linear(library, torch.full((50, 40), 127.0))(states)
    assert output[1:3].isnan().all()
    assert torch.allclose(output[::3], torch.full((2, 50), 127.0 * 40))


def check_gated_int8(library: ctypes.CDLL, seed: int) -> None:
    """The gate of outputs that are what they are without it."""
    choose, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    dtype = choose.choice(INT8_DTYPES)
    num_rows, inputs, width = (choose.choice([1, 2, choose.randint(3, 90)]) for _ in range(3))
    weight, bias = numbers(generator, dtype, 2 * width, inputs), numbers(generator, dtype, 2 * width)
    states = numbers(generator, dtype, num_rows, inputs)
    gate, other = PackedInt8Linear(library, weight, bias)(states).double().chunk(2, dim=1)
    gated = PackedInt8Linear(library, weight, bias, None, is_gated=True)(states)
    expected = F.silu(gate) * other
    if dtype == torch.float32:
        check_close(gated, expected, dtype)
        return
    # Gate, other and the result were rounded to the dtype; SiLU makes up to 1 + |gate| times as much of it.
    assert gated.dtype == dtype
    allowed = torch.finfo(dtype).eps / 2 * ((3 + gate.abs()) * expected.abs() * 1.1 + 1e-4)
    assert ((gated.double() - expected).abs() <= allowed).all()


def _normed(states: Tensor, norm: Normalise | None) -> Tensor:
    """What is multiplied, float64 `[T, inputs]`."""
    if norm is None:
        return states.double()
    return F.rms_norm(states.double(), states.shape[1:], norm.weight.double(), EPS)


def check_argmax(library: ctypes.CDLL, seed: int) -> None:
    """Few different numbers, so that many are equal, among them NaN and infinities."""
    choose, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    dtype, size = choose.choice(DTYPES), choose.choice([1, 5, 100, 4096, 9000])
    values = torch.tensor([float("nan"), float("-inf"), -3.0, 0.0, 2.0, choose.choice([2.0, float("inf")])])
    logits = values[torch.randint(len(values), (6, size), generator=generator)]
    logits[0] = float("nan")
    logits[1, 1:] = float("-inf")
    logits[2] = torch.randn(size, generator=generator)
    expected = torch.nan_to_num(logits.to(dtype).float(), nan=torch.finfo(torch.float32).min).argmax(dim=-1)
    assert torch.equal(argmax(library, logits.to(dtype)), expected)


def check_allowed_rows(library: ctypes.CDLL, seed: int) -> None:
    """What is forbidden is below the least of what is allowed; of that changes only what is not finite."""
    choose, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    dtype, size = choose.choice(DTYPES), choose.choice([1, 5, 64, 100, 4097])
    logits = torch.randn(4, size, generator=generator).to(dtype)
    logits[choose.randrange(4), choose.randrange(size)] = float("nan")
    logits[choose.randrange(4), choose.randrange(size)] = choose.choice([float("inf"), float("-inf")])
    lines = choose.choices(range(4), k=choose.randint(0, 6))
    masks = [None if choose.random() < 0.2 else choose.randbytes(-(-size // 8) + 3) for _ in lines]
    rows = allowed_rows(library, logits, lines, masks)
    most = torch.finfo(torch.float32).max
    for row, line, mask in zip(rows, lines, masks, strict=True):
        bits = int.from_bytes(mask or b"\xff" * (size // 8 + 1), "little")
        allowed = torch.tensor([bool(bits >> token_id & 1) for token_id in range(size)])
        expected = logits[line].float().nan_to_num(nan=-most / 2, posinf=most, neginf=-most / 2)
        assert torch.equal(row[allowed], expected[allowed])
        assert (row[~allowed] == -most).all()


@dataclass
class Pages:
    """A pool of NaN in which only the rows' own context is finite."""

    pool: Tensor
    tables: Tensor
    slots: Tensor
    lengths: list[int]
    starts: list[int]


def make_pages(choose: random.Random, generator: torch.Generator, dtype: torch.dtype) -> Pages:
    """Rows of one token by length, then longer ones, over pages in random order."""
    lengths = sorted(choose.choices([1, 7, 40, 200, 1100, 2300], k=choose.randint(0, 3)))
    rows = [(length - 1, 1) for length in lengths]
    for _ in range(choose.randint(0 if rows else 1, 2)):
        rows.append((choose.choice([0, 0, 5, 130]), choose.choice([2, 19, 150])))
    block_size, head_dim = choose.choice([1, 3, 16, 40]), choose.choice([2, 8, 24, 64, 80, 128])
    num_layers, kv_heads = choose.randint(1, 2), choose.randint(1, 3)
    counts = [-(-(start + length) // block_size) for start, length in rows]
    pages = torch.randperm(sum(counts) + 1, generator=generator)
    pool = torch.full(
        (len(pages) + 1, num_layers, 2, kv_heads, block_size, head_dim), float("nan"), dtype=dtype
    )
    tables = torch.full((len(rows), max(counts)), len(pages))
    slots = []
    for row, (start, length) in enumerate(rows):
        tables[row, : counts[row]], pages = pages[: counts[row]], pages[counts[row] :]
        positions = torch.arange(start + length)
        in_pages = tables[row, positions // block_size]
        context = numbers(generator, dtype, start + length, num_layers, 2, kv_heads, head_dim)
        pool[in_pages[:start], :, :, :, positions[:start] % block_size] = context[:start]
        slots.append((in_pages * block_size + positions % block_size)[start:])
    starts = [start for start, _ in rows]
    return Pages(pool, tables, torch.cat(slots), [length for _, length in rows], starts)


@dataclass
class AttentionCase:
    """A step of random rows over one layer; `query`, `key` and `value` as they are after the rotation."""

    pages: Pages
    layer: int
    window: int | None
    states: Tensor
    rotation: Rotation | None
    query: Tensor
    key: Tensor
    value: Tensor


def attention_case(choose: random.Random, generator: torch.Generator, dtype: torch.dtype) -> AttentionCase:
    """Rotated or not."""
    pages = make_pages(choose, generator, dtype)
    _, num_layers, _, kv_heads, _, head_dim = pages.pool.shape
    layer, heads = choose.randrange(num_layers), kv_heads * choose.choice([1, 3, 14])
    window = choose.choice([None, None, choose.randint(1, 300)])
    states = numbers(generator, dtype, len(pages.slots), heads + 2 * kv_heads, head_dim)
    rotation = _rotation(choose, generator, dtype, len(pages.slots), head_dim)
    plain = states.double()
    if rotation is not None:
        plain[:, : heads + kv_heads] = _rotated(plain[:, : heads + kv_heads], heads, rotation)
    return AttentionCase(
        pages, layer, window, states, rotation, *plain.split((heads, kv_heads, kv_heads), dim=1)
    )


def check_attention(library: ctypes.CDLL, seed: int) -> None:
    """A step of random rows over one layer, stored and attended, rotated or not, against the reference."""
    choose, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    dtype = choose.choice(DTYPES)
    case = attention_case(choose, generator, dtype)
    pages, layer, window = case.pages, case.layer, case.window
    exact = pages.pool.double()
    query, key, value = (part.to(dtype).double() for part in (case.query, case.key, case.value))
    reference.store_kv(exact, layer, key, value, reference.token_lines(exact, pages.slots))
    expected = _expected(exact, layer, query, pages, window)
    output = _attention(library, pages).attend(layer, case.states.clone(), window, case.rotation)
    check_close(output, expected, dtype)
    assert torch.equal(pages.pool.isnan(), exact.isnan())
    check_close(pages.pool.nan_to_num(), exact.nan_to_num(), dtype)


def _attention(library: ctypes.CDLL, pages: Pages, scales: tuple[float, ...] = ()) -> PagedAttention:
    lengths = torch.tensor(pages.lengths)
    bounds = torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)))
    attention = PagedAttention(library, pages.pool, scales)
    contexts = lengths + torch.tensor(pages.starts)
    attention.begin_step(
        pages.slots.numpy(), pages.tables.numpy(), contexts.numpy(), bounds.numpy(), pages.lengths.count(1)
    )
    return attention


def check_attention_float8(library: ctypes.CDLL, seed: int) -> None:
    """The same over float8 pages: what was stored is near, and what is attended is what was stored."""
    choose, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    dtype = choose.choice(DTYPES)
    case = attention_case(choose, generator, dtype)
    pages, layer, window = case.pages, case.layer, case.window
    num_layers = pages.pool.shape[1]
    scales = tuple(choose.choice([1.0, 0.25, 0.013]) for _ in range(2 * num_layers))
    factors = torch.tensor(scales).double().view(1, num_layers, 2, 1, 1, 1)
    pages.pool = (pages.pool.float() / factors.float()).to(torch.float8_e4m3fn)
    ideal = pages.pool.double() * factors
    reference.store_kv(ideal, layer, case.key, case.value, reference.token_lines(ideal, pages.slots))
    output = _attention(library, pages, scales).attend(layer, case.states.clone(), window, case.rotation)
    stored = pages.pool.double() * factors
    assert torch.equal(stored.isnan(), ideal.isnan())
    half_steps = (ideal.abs() / 16).maximum(factors * 2.0**-10) * 1.01 + TOLERANCE[dtype]
    limited = ideal.clamp(-448 * factors, 448 * factors)
    assert ((stored - limited).abs().nan_to_num(0.0) <= half_steps.nan_to_num(1.0)).all()
    expected = _expected(stored, layer, case.query.to(dtype).double(), pages, window)
    check_close(output, expected, dtype)


def check_every_float8(library: ctypes.CDLL, dtype: torch.dtype) -> None:
    """Every number of 16 bits as a value to store, and what one token's attention reads back."""
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).view(1024, 1, 64)
    pool = torch.zeros(1025, 1, 2, 1, 1, 64, dtype=torch.float8_e4m3fn)
    slots, ones = torch.arange(1024), torch.ones(1024, dtype=torch.int64)
    attention = PagedAttention(library, pool)
    attention.begin_step(
        slots.numpy(), slots[:, None].numpy(), ones.numpy(), torch.arange(1025).numpy(), 1024
    )
    states = torch.zeros(1024, 3, 64, dtype=dtype)
    states[:, 2:] = values
    output = attention.attend(0, states, None, None)
    expected = to_float8(values, 1.0)
    is_nan = values.isnan()
    stored = pool[:1024, 0, 1, 0]
    assert torch.equal(stored.view(torch.uint8)[~is_nan], expected.view(torch.uint8)[~is_nan])
    assert torch.equal(stored.float().isnan(), is_nan)
    assert torch.equal(output.float()[~is_nan], expected.float()[~is_nan])
    assert torch.equal(output.isnan(), is_nan)


def _rotation(
    choose: random.Random, generator: torch.Generator, dtype: torch.dtype, num_tokens: int, head_dim: int
) -> Rotation | None:
    if choose.random() < 0.5:
        return None
    angles = torch.randn(num_tokens, 1, head_dim, generator=generator)
    norms = None
    if choose.random() < 0.5:
        query_norm, key_norm = torch.randn(2, head_dim, generator=generator)
        norms = (query_norm, key_norm, EPS)
    return Rotation(angles.cos().to(dtype), angles.sin().to(dtype), norms)


def _rotated(states: Tensor, heads: int, rotation: Rotation) -> Tensor:
    """float64 `[T, H + K, D]`, of which H are queries."""
    if rotation.norms is not None:
        query_norm, key_norm, eps = rotation.norms
        size = (states.shape[2],)
        states = torch.cat(
            (
                F.rms_norm(states[:, :heads], size, query_norm.double(), eps),
                F.rms_norm(states[:, heads:], size, key_norm.double(), eps),
            ),
            dim=1,
        )
    turned = states.roll(states.shape[2] // 2, -1)
    return states * rotation.cosines.double() + turned * rotation.sines.double()


def _expected(pool: Tensor, layer: int, query: Tensor, pages: Pages, window: int | None) -> Tensor:
    outputs, first = [], 0
    for row, (length, start) in enumerate(zip(pages.lengths, pages.starts, strict=True)):
        queries, table = query[first : first + length], pages.tables[row : row + 1]
        if length == 1:
            found = reference.one_token_rows(pool, table, torch.tensor([start + 1]), window)
            outputs.append(reference.attend_one_token_rows(queries, pool, layer, found))
        else:
            num_blocks = -(-(start + length) // pool.shape[4])
            lines = reference.page_lines(pool, table[:, :num_blocks])
            if window is not None:  # it multiplies hidden slots by zero
                pool = pool.nan_to_num()
            outputs.append(reference.attend_long_row(queries, pool, layer, lines, start, window))
        first += length
    return torch.cat(outputs)
