"""Conversion between KV layouts, against dense tensors and torch's own dtypes."""

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from baton.core.errors import TransferRefused
from baton.core.kv_layout import DTYPE_BYTES, FLOAT8, KVLayout
from baton.core.reservation import FramePlace
from baton_kv_transfer.pages.convert import PageConverter, convert_dtype
from tests.services.fake_engine import BytesPages

DTYPES = tuple(DTYPE_BYTES)
BLOCK_SIZES = (16, 32, 64)
TP_DEGREES = (1, 2, 4)
NUM_LAYERS, NUM_HEADS, HEAD_DIM = 2, 4, 4
NUM_TOKENS = 139  # a multiple of nothing
BASE = KVLayout(16, NUM_LAYERS, NUM_HEADS, HEAD_DIM, "bfloat16")


INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def as_integers(tensor: Tensor) -> Tensor:
    return tensor.view(INTEGERS[tensor.element_size()])


def converted(tensor: Tensor, dtype: str, source_scale: float = 1.0, target_scale: float = 1.0) -> Tensor:
    """What torch makes of it; 8 bits have no infinity, so what is too large becomes the greatest."""
    if source_scale != target_scale:
        tensor = tensor.float() * source_scale / target_scale
    if dtype == FLOAT8 and tensor.element_size() > 1:
        tensor = tensor.float().clamp(-448.0, 448.0)
    return tensor.to(getattr(torch, dtype))


def from_bits(bits: np.ndarray[Any, Any], dtype: str) -> Tensor:
    signed = bits.view({1: np.uint8, 2: np.int16, 4: np.int32}[DTYPE_BYTES[dtype]])
    return torch.from_numpy(signed.copy()).view(getattr(torch, dtype))


@cache
def dense_kv(num_tokens: int, num_heads: int, dtype: str, seed: int) -> Tensor:
    """`[tokens, layers, 2, heads, head_dim]`: any numbers at all, and as many of ordinary size."""
    shape = (num_tokens, NUM_LAYERS, 2, num_heads, HEAD_DIM)
    generator = np.random.default_rng(seed)
    bits = generator.integers(0, 1 << 8 * DTYPE_BYTES[dtype], shape, f"u{DTYPE_BYTES[dtype]}")
    ordinary = torch.from_numpy(generator.standard_normal(shape)).to(getattr(torch, dtype))
    wild = from_bits(bits, dtype)
    is_wild = torch.from_numpy(generator.random(shape) < 0.5) & ~wild.float().isnan()
    mixed = torch.where(is_wild, as_integers(wild), as_integers(ordinary))
    return mixed.view(ordinary.dtype)


def ranks(layout: KVLayout, tp_degree: int) -> Iterator[KVLayout]:
    """The layouts of the workers that share a model."""
    share = layout.num_kv_heads // tp_degree
    for rank in range(tp_degree):
        yield replace(layout, num_kv_heads=share, first_kv_head=rank * share)


def heads_of(layout: KVLayout) -> range:
    return range(layout.first_kv_head, layout.first_kv_head + layout.num_kv_heads)


def source_pages(layout: KVLayout, dense: Tensor) -> Tensor:
    """A sender's pages in order, no slot empty: `[blocks, layers, 2, heads, block_size, head_dim]`."""
    num_blocks = dense.shape[0] // layout.block_size
    heads = heads_of(layout)
    cut = dense[: num_blocks * layout.block_size, :, :, heads.start : heads.stop]
    slots_apart = cut.reshape(num_blocks, layout.block_size, *cut.shape[1:])
    return slots_apart.permute(0, 2, 3, 4, 1, 5).contiguous()


def frames(pages: Tensor, blocks: range, rng: random.Random) -> Iterator[tuple[FramePlace, memoryview]]:
    """Cut anyhow by blocks and layers, out of order."""
    places = []
    start = blocks.start
    while start < blocks.stop:
        count = rng.randint(1, min(4, blocks.stop - start))
        layers = rng.choice([[(0, NUM_LAYERS)], [(layer, 1) for layer in range(NUM_LAYERS)]])
        places += [FramePlace(start, count, *group) for group in layers]
        start += count
    rng.shuffle(places)
    for place in places:
        part = pages[place.first_block :][: place.num_blocks, place.first_layer :][:, : place.num_layers]
        yield place, memoryview(part.contiguous().view(torch.uint8).numpy().tobytes())


@dataclass
class Receiver:
    """A decode server's pool, what was written to it, and what should have been."""

    layout: KVLayout
    num_tokens: int
    rng: random.Random

    def __post_init__(self) -> None:
        num_blocks = self.layout.blocks_for(self.num_tokens)
        self.store = BytesPages(self.layout, num_blocks + 3)
        self.table = self.rng.sample(range(num_blocks + 3), num_blocks)
        shape = (NUM_LAYERS, 2, self.layout.num_kv_heads, self.layout.block_size, HEAD_DIM)
        pool = torch.frombuffer(self.store.memory, dtype=getattr(torch, self.layout.dtype))
        self.pool = pool.view(-1, *shape)
        self.expected = self.pool.clone()

    def expect(self, source: KVLayout, dense: Tensor, first_token: int) -> None:
        """Say that tokens from `first_token` on of a sender's heads arrive."""
        is_copied = source == self.layout and first_token % self.layout.block_size == 0
        whole = self.layout.blocks_for(self.num_tokens) * self.layout.block_size
        tokens = torch.arange(first_token, whole if is_copied else self.num_tokens)
        pages = torch.tensor(self.table, dtype=torch.long)[tokens // self.layout.block_size]
        expected = as_integers(self.expected)
        for head in set(heads_of(source)) & set(heads_of(self.layout)):
            values = as_integers(
                converted(as_integers(dense)[tokens, :, :, head].view(dense.dtype), self.layout.dtype)
            )
            own = head - self.layout.first_kv_head
            expected[pages, :, :, own, tokens % self.layout.block_size] = values

    def receive(self, source: KVLayout, dense: Tensor, first_token: int) -> range:
        """Let a sender's pages come; the heads that were in them."""
        converter = PageConverter(source, self.layout)
        blocks = converter.source_blocks(first_token, self.num_tokens)
        assert set(blocks) == {token // source.block_size for token in range(first_token, self.num_tokens)}
        for place, payload in frames(source_pages(source, dense), blocks, self.rng):
            converter.write(self.store, self.table, first_token, self.num_tokens, place, payload)
        return converter.heads

    def check(self) -> None:
        """Every byte of the pool: what came, and what nobody may have touched."""
        assert torch.equal(as_integers(self.pool), as_integers(self.expected))


@pytest.mark.parametrize("target_tp", TP_DEGREES)
@pytest.mark.parametrize("source_tp", TP_DEGREES)
@pytest.mark.parametrize("target_dtype", DTYPES)
@pytest.mark.parametrize("source_dtype", DTYPES)
@pytest.mark.parametrize("target_size", BLOCK_SIZES)
@pytest.mark.parametrize("source_size", BLOCK_SIZES)
def test_any_layout_into_any(
    source_size: int, target_size: int, source_dtype: str, target_dtype: str, source_tp: int, target_tp: int
) -> None:
    rng = random.Random(f"{source_size} {target_size} {source_dtype} {target_dtype} {source_tp} {target_tp}")
    dense = dense_kv(192, NUM_HEADS, source_dtype, seed=0)
    first_token = target_size * rng.randint(0, NUM_TOKENS // target_size)
    for target in ranks(replace(BASE, block_size=target_size, dtype=target_dtype), target_tp):
        receiver = Receiver(target, NUM_TOKENS, rng)
        received: list[int] = []
        for source in ranks(replace(BASE, block_size=source_size, dtype=source_dtype), source_tp):
            if set(heads_of(source)).isdisjoint(heads_of(target)):
                with pytest.raises(TransferRefused, match="heads"):
                    PageConverter(source, target)
                continue
            receiver.expect(source, dense, first_token)
            received += receiver.receive(source, dense, first_token)
        assert received == list(heads_of(target))  # each once
        receiver.check()


@st.composite
def layouts(draw: st.DrawFn, total_heads: int) -> KVLayout:
    first = draw(st.integers(0, total_heads - 1))
    return KVLayout(
        block_size=draw(st.integers(1, 7)),
        num_layers=NUM_LAYERS,
        num_kv_heads=draw(st.integers(1, total_heads - first)),
        head_dim=HEAD_DIM,
        dtype=draw(st.sampled_from(DTYPES)),
        first_kv_head=first,
        total_kv_heads=total_heads,
    )


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_odd_sizes_and_heads(data: st.DataObject) -> None:
    total_heads = data.draw(st.integers(1, 4))
    source, target = data.draw(layouts(total_heads)), data.draw(layouts(total_heads))
    if data.draw(st.booleans()):
        target = replace(target, dtype=source.dtype)
    num_tokens = data.draw(st.integers(1, 30))
    first_token = data.draw(st.integers(0, num_tokens))  # in the middle of a page, too
    dense = dense_kv(42, total_heads, source.dtype, data.draw(st.integers(0, 99)))
    shared = sorted(set(heads_of(source)) & set(heads_of(target)))
    if not shared:
        with pytest.raises(TransferRefused, match="heads"):
            PageConverter(source, target)
        return
    receiver = Receiver(target, num_tokens, random.Random(data.draw(st.integers(0, 99))))
    receiver.expect(source, dense, first_token)
    assert list(receiver.receive(source, dense, first_token)) == shared
    receiver.check()


def test_same_layout_is_copied_whole_unless_the_first_page_is_shared() -> None:
    converter = PageConverter(BASE, replace(BASE))
    assert converter.is_same
    dense = dense_kv(192, NUM_HEADS, "bfloat16", seed=1)
    for first_token in (0, 32, 33):
        receiver = Receiver(BASE, NUM_TOKENS, random.Random(first_token))
        receiver.expect(BASE, dense, first_token)
        receiver.receive(BASE, dense, first_token)
        receiver.check()


@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("first_token", [96, NUM_TOKENS])
def test_blocks_of_other_tokens_are_left_out(block_size: int, first_token: int) -> None:
    """A sender that also sends what lies before and after writes no more than one that does not."""
    source = replace(BASE, block_size=block_size)
    dense = dense_kv(192, NUM_HEADS, "bfloat16", seed=2)
    receiver = Receiver(BASE, NUM_TOKENS, random.Random(3))
    if first_token < NUM_TOKENS:
        receiver.expect(source, dense, first_token)
    converter = PageConverter(source, BASE)
    for place, payload in frames(source_pages(source, dense), range(192 // block_size), receiver.rng):
        converter.write(receiver.store, receiver.table, first_token, NUM_TOKENS, place, payload)
    receiver.check()


@pytest.mark.parametrize("target", [BASE, replace(BASE, block_size=24), replace(BASE, dtype="float16")])
def test_a_payload_may_lie_anywhere(target: KVLayout) -> None:
    dense = dense_kv(192, NUM_HEADS, "float32", seed=4)
    source = replace(BASE, dtype="float32")
    receiver = Receiver(target, NUM_TOKENS, random.Random(5))
    receiver.expect(source, dense, 0)
    converter = PageConverter(source, target)
    for place, payload in frames(source_pages(source, dense), range(9), receiver.rng):
        odd = memoryview(b"?" + bytes(payload))[1:]
        converter.write(receiver.store, receiver.table, 0, NUM_TOKENS, place, odd)
    receiver.check()


@pytest.mark.parametrize(
    ("first_token", "num_tokens", "blocks"),
    [
        (0, 0, range(0, 0)),
        (0, 1, range(0, 1)),
        (0, 17, range(0, 2)),
        (15, 16, range(0, 1)),
        (16, 17, range(1, 2)),
        (17, 17, range(0, 0)),  # as equal to any other empty range
        (40, 33, range(0, 0)),
    ],
)
def test_source_blocks(first_token: int, num_tokens: int, blocks: range) -> None:
    converter = PageConverter(BASE, replace(BASE, block_size=64))
    assert converter.source_blocks(first_token, num_tokens) == blocks


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"version": 2}, "version"),
        ({"num_layers": 3}, "num_layers"),
        ({"head_dim": 8}, "head_dim"),
        ({"total_kv_heads": 8}, "total_kv_heads"),
        ({"dtype": "float8_e5m2"}, "dtype"),
        ({"scales": (0.5,) * 2 * NUM_LAYERS}, "scales"),  # of pages that are not of 8 bits
        ({"dtype": FLOAT8, "scales": (0.5,)}, "scales"),
        ({"dtype": FLOAT8, "scales": (0.5, 0.5, 0.0, 1.0)}, "scales"),
        ({"dtype": FLOAT8, "scales": (0.5, float("nan"), 1.0, 1.0)}, "scales"),
        ({"block_size": 0}, "block_size"),
        ({"num_kv_heads": 0}, r"heads \(none is on both sides\)"),
        ({"num_kv_heads": 2, "first_kv_head": 2}, r"heads \(none is on both sides\)"),
        ({"num_kv_heads": 5}, r"heads \(some are not the model's\)"),
        ({"num_layers": 3, "dtype": "int8", "block_size": 32}, "num_layers, dtype"),
    ],
)
@pytest.mark.parametrize("is_reversed", [False, True])
def test_what_cannot_be_converted_is_refused(changes: dict[str, Any], named: str, is_reversed: bool) -> None:
    pair = (replace(BASE, **changes), replace(BASE, num_kv_heads=2))
    source, target = reversed(pair) if is_reversed else pair
    with pytest.raises(TransferRefused, match=rf"for their {named}: ") as refused:
        PageConverter(source, target)
    assert refused.value.reason == "layout"
    assert f"the receiver has {target}, the sender {source}." in str(refused.value)


def every_pattern(dtype: str) -> np.ndarray[Any, Any]:
    """All there are of two bytes. Of four: random ones, and those around every edge of rounding."""
    if DTYPE_BYTES[dtype] < 4:
        return np.arange(1 << 8 * DTYPE_BYTES[dtype], dtype=f"u{DTYPE_BYTES[dtype]}")
    generator = np.random.default_rng(6)
    anything = generator.integers(0, 1 << 32, 1 << 20, np.uint32)
    small = generator.integers(0, 1 << 32, 1 << 18, np.uint32) & 0x807FFFFF  # zero and subnormal
    upper = np.arange(1 << 16, dtype=np.uint32) << 16
    # A bfloat16 drops the last 16 bits, a float16 13 and, where it is subnormal, more: ties, and beside them.
    edges = [1 << bit for bit in range(17)]
    lower = {0, *edges, *(edge + 1 for edge in edges), *(edge - 1 for edge in edges)}
    return np.concatenate([anything, small, *(upper + np.uint32(end) for end in lower)])


@pytest.mark.parametrize(("source", "target"), list(itertools.product(DTYPES, DTYPES)))
def test_every_value_becomes_what_torch_makes_of_it(source: str, target: str) -> None:
    bits = every_pattern(source)
    expected = converted(from_bits(bits, source), target)
    found = from_bits(convert_dtype(bits, source, target), target)
    if source == target:
        assert torch.equal(as_integers(found), as_integers(from_bits(bits, source)))
        return
    # Which NaN it is depends on how torch was compiled.
    is_nan = expected.float().isnan()
    assert torch.equal(found.float().isnan(), is_nan)
    assert torch.equal(as_integers(found)[~is_nan], as_integers(expected)[~is_nan])
    assert is_nan.any()
    assert expected.float().isinf().any() == (FLOAT8 not in (source, target))


@pytest.mark.parametrize(
    ("source_scales", "target_scales"),
    [((), (0.5, 3.0, 0.1, 1.0)), ((0.5, 3.0, 0.1, 1.0), (0.25, 3.0, 1.0, 0.7)), ((0.5, 3.0, 0.1, 1.0), ())],
)
@pytest.mark.parametrize("other", ["bfloat16", "float32", FLOAT8])
def test_scales_of_layers_and_parts(
    source_scales: tuple[float, ...], target_scales: tuple[float, ...], other: str
) -> None:
    """Into 8 bits, out of them, and from one set of scales to another."""
    source = replace(BASE, dtype=FLOAT8 if source_scales else other, scales=source_scales)
    target = replace(BASE, dtype=FLOAT8 if target_scales else other, scales=target_scales, block_size=32)
    dense = dense_kv(192, NUM_HEADS, source.dtype, seed=8)
    receiver = Receiver(target, NUM_TOKENS, random.Random(9))
    receiver.receive(source, dense, 0)
    pages = torch.tensor(receiver.table)[torch.arange(NUM_TOKENS) // 32]
    found = as_integers(receiver.pool)[pages, :, :, :, torch.arange(NUM_TOKENS) % 32].view(
        receiver.pool.dtype
    )
    ones = (1.0,) * 2 * NUM_LAYERS
    for index, (source_scale, target_scale) in enumerate(
        zip(source_scales or ones, target_scales or ones, strict=True)
    ):
        layer, part = divmod(index, 2)
        numbers = as_integers(dense)[:NUM_TOKENS, layer, part].view(dense.dtype)
        expected = converted(numbers, target.dtype, source_scale, target_scale)
        is_nan = expected.float().isnan()
        ours = found[:, layer, part]
        assert torch.equal(ours.float().isnan(), is_nan)
        # The scales' quotient may be rounded before the product: the last place may differ.
        steps = as_integers(ours)[~is_nan].int() - as_integers(expected)[~is_nan].int()
        assert steps.abs().max() <= 1


def test_one_byte_too_few_is_an_error() -> None:
    """The receiver has checked the length; a mistake there must not write other tokens' values."""
    converter = PageConverter(BASE, replace(BASE, block_size=32))
    receiver = Receiver(replace(BASE, block_size=32), 32, random.Random(7))
    payload = memoryview(bytes(2 * BASE.bytes_per_block - 2))
    with pytest.raises(ValueError, match="reshape"):
        converter.write(receiver.store, receiver.table, 0, 32, FramePlace(0, 2, 0, NUM_LAYERS), payload)
    receiver.check()
