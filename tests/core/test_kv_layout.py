"""Arithmetic of pages, and which pages fit where."""

from dataclasses import replace
from typing import Any

import pytest

from baton.core.errors import TransferRefused
from baton.core.kv_layout import DTYPE_BYTES, KVLayout

LAYOUT = KVLayout(block_size=16, num_layers=12, num_kv_heads=4, head_dim=64, dtype="bfloat16")


def test_bytes_of_a_page() -> None:
    assert LAYOUT.bytes_per_layer == 2 * 4 * 16 * 64 * 2 == 16384
    assert LAYOUT.bytes_per_block == 12 * 16384


@pytest.mark.parametrize(("dtype", "num_bytes"), DTYPE_BYTES.items())
def test_dtypes_have_their_size(dtype: str, num_bytes: int) -> None:
    assert num_bytes == {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1}[dtype]
    assert replace(LAYOUT, dtype=dtype).bytes_per_layer == 8192 * num_bytes


@pytest.mark.parametrize(("num_tokens", "num_blocks"), [(0, 0), (1, 1), (15, 1), (16, 1), (17, 2), (32, 2)])
def test_blocks_for(num_tokens: int, num_blocks: int) -> None:
    assert LAYOUT.blocks_for(num_tokens) == num_blocks


def test_equal_layouts_fit() -> None:
    LAYOUT.require_same(replace(LAYOUT))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("block_size", 32),
        ("num_layers", 13),
        ("num_kv_heads", 2),
        ("head_dim", 128),
        ("dtype", "float16"),  # the same size, and yet no fit
        ("version", 2),
    ],
)
def test_any_difference_is_refused_by_name(field: str, value: Any) -> None:
    other = replace(LAYOUT, **{field: value})
    with pytest.raises(TransferRefused, match=rf"differ in {field}: ") as refused:
        LAYOUT.require_same(other)
    assert refused.value.reason == "layout"
    assert repr(LAYOUT) in str(refused.value)
    assert repr(other) in str(refused.value)


def test_scales_of_1_are_no_scales() -> None:
    plain = replace(LAYOUT, dtype="float8_e4m3fn")
    assert replace(plain, scales=(1.0,) * 24) == plain
    with pytest.raises(TransferRefused, match="differ in scales"):
        plain.require_same(replace(plain, scales=(1.0,) * 23 + (0.5,)))


def test_all_differences_are_named() -> None:
    with pytest.raises(TransferRefused, match="differ in num_layers, head_dim: "):
        LAYOUT.require_same(replace(LAYOUT, num_layers=1, head_dim=1))
