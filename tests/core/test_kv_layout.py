"""Arithmetic of pages, and which pages fit where."""

from dataclasses import replace

import pytest

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


def test_scales_of_1_are_no_scales() -> None:
    plain = replace(LAYOUT, dtype="float8_e4m3fn")
    assert replace(plain, scales=(1.0,) * 24) == plain
    assert replace(plain, scales=(1.0,) * 23 + (0.5,)) != plain
