"""Rotary positions and the store of K and V into their pages, in one pass over a step's qkv.

Letters in shapes as in `baton_kernels.reference`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from baton_kernels.gpu.float8 import as_float8


def rotate_and_store(
    qkv: Tensor,
    cosines: Tensor,
    sines: Tensor,
    key: Tensor,
    value: Tensor,
    slot_mapping: Tensor,
    scales: tuple[float, float] = (1.0, 1.0),
) -> Tensor:
    """Rotate queries and keys in float32, write K and V into their slots.

    qkv: `[T, H + 2K, D]`, D contiguous: queries, keys, values. cosines, sines: `[T, 1, D]`, contiguous, as
    `rotate` of the engine takes them: sines carry the sign of their half of a head. key, value: one layer of
    the pool, `[N, K, P, D]` with any strides but D's, in qkv's dtype or float8_e4m3fn. scales: what float8 K
    and V are divided by; what is too large becomes the greatest there is. slot_mapping: int64 `[T]`, page * P
    + slot in page.
    Returns the rotated queries, `[T, H, D]`, contiguous, in qkv's dtype.
    """
    num_tokens, num_states, head_dim = qkv.shape
    num_kv_heads, block_size = key.shape[1:3]
    num_heads = num_states - 2 * num_kv_heads
    group = num_heads // num_kv_heads
    rotated = torch.empty((num_tokens, num_heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    _rotate_and_store[(num_tokens, num_kv_heads)](
        qkv, cosines, sines, key, value, slot_mapping, rotated, *scales,
        qkv.stride(0), qkv.stride(1), key.stride(0), key.stride(1), key.stride(2),
        NUM_HEADS=num_heads, GROUP=group, GROUP_PADDED=triton.next_power_of_2(group),
        HEAD_DIM=head_dim, HEAD_DIM_PADDED=triton.next_power_of_2(head_dim), BLOCK_SIZE=block_size,
        IS_FLOAT8=key.dtype == torch.float8_e4m3fn, num_warps=1 if group * head_dim <= 512 else 4,
    )  # fmt: skip
    return rotated


def store(
    key_states: Tensor,
    value_states: Tensor,
    key: Tensor,
    value: Tensor,
    slot_mapping: Tensor,
    scales: tuple[float, float] = (1.0, 1.0),
) -> None:
    """Write K and V, `[T, K, D]` with any strides but D's, into their slots; the rest as above."""
    num_tokens, num_kv_heads, head_dim = key_states.shape
    _store[(num_tokens,)](
        key_states, value_states, key, value, slot_mapping, *scales,
        key_states.stride(0), key_states.stride(1), value_states.stride(0), value_states.stride(1),
        key.stride(0), key.stride(1), key.stride(2),
        NUM_KV_HEADS=num_kv_heads, NUM_KV_HEADS_PADDED=triton.next_power_of_2(num_kv_heads),
        HEAD_DIM=head_dim, HEAD_DIM_PADDED=triton.next_power_of_2(head_dim), BLOCK_SIZE=key.shape[2],
        IS_FLOAT8=key.dtype == torch.float8_e4m3fn, num_warps=4,
    )  # fmt: skip


@triton.jit
def _as_stored(numbers, scale, page, IS_FLOAT8: tl.constexpr):  # noqa: N803
    """Numbers in the dtype of the page that they go to."""
    if IS_FLOAT8:
        quotients = tl.div_rn(numbers.to(tl.float32), scale)  # as torch divides, to the last bit
        return as_float8(quotients).to(page.dtype.element_ty, bitcast=True)
    return numbers.to(page.dtype.element_ty)


@triton.jit
def _rotated(line, dims, is_there, cosines, sines, HEAD_DIM: tl.constexpr):  # noqa: N803
    """A head, or several, turned: `line` points at each one's first number."""
    # The two numbers of a pair are half a head apart.
    partners = (dims + HEAD_DIM // 2) % HEAD_DIM
    states = tl.load(line + dims, mask=is_there, other=0.0).to(tl.float32)
    others = tl.load(line + partners, mask=is_there, other=0.0).to(tl.float32)
    return states * cosines + others * sines


@triton.jit
def _rotate_and_store(
    qkv, cosines, sines, key, value, slot_mapping, rotated, key_scale, value_scale,
    token_stride, state_stride, page_stride, head_stride, slot_stride,
    NUM_HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_PADDED: tl.constexpr,  # noqa: N803
    HEAD_DIM: tl.constexpr, HEAD_DIM_PADDED: tl.constexpr, BLOCK_SIZE: tl.constexpr,  # noqa: N803
    IS_FLOAT8: tl.constexpr,  # noqa: N803
):  # fmt: skip
    token, kv_head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    dims = tl.arange(0, HEAD_DIM_PADDED)
    is_dim = dims < HEAD_DIM
    cos = tl.load(cosines + token * HEAD_DIM + dims, mask=is_dim, other=0.0).to(tl.float32)
    sin = tl.load(sines + token * HEAD_DIM + dims, mask=is_dim, other=0.0).to(tl.float32)
    states = qkv + token * token_stride
    in_group = tl.arange(0, GROUP_PADDED)
    heads = kv_head * GROUP + in_group
    is_query = (in_group < GROUP)[:, None] & is_dim[None, :]
    queries = _rotated(
        states + heads[:, None] * state_stride, dims[None, :], is_query, cos[None, :], sin[None, :], HEAD_DIM
    )
    places = rotated + (token * NUM_HEADS + heads)[:, None] * HEAD_DIM + dims[None, :]
    tl.store(places, queries.to(rotated.dtype.element_ty), mask=is_query)
    key_line = states + (NUM_HEADS + kv_head) * state_stride
    keys = _rotated(key_line, dims, is_dim, cos, sin, HEAD_DIM)
    value_line = states + (NUM_HEADS + tl.num_programs(1) + kv_head) * state_stride
    values = tl.load(value_line + dims, mask=is_dim)
    slot = tl.load(slot_mapping + token)
    place = slot // BLOCK_SIZE * page_stride + kv_head * head_stride + slot % BLOCK_SIZE * slot_stride
    tl.store(key + place + dims, _as_stored(keys, key_scale, key, IS_FLOAT8), mask=is_dim)
    tl.store(value + place + dims, _as_stored(values, value_scale, value, IS_FLOAT8), mask=is_dim)


@triton.jit
def _store(
    key_states, value_states, key, value, slot_mapping, key_scale, value_scale,
    key_token_stride, key_state_stride, value_token_stride, value_state_stride,
    page_stride, head_stride, slot_stride,
    NUM_KV_HEADS: tl.constexpr, NUM_KV_HEADS_PADDED: tl.constexpr,  # noqa: N803
    HEAD_DIM: tl.constexpr, HEAD_DIM_PADDED: tl.constexpr, BLOCK_SIZE: tl.constexpr,  # noqa: N803
    IS_FLOAT8: tl.constexpr,  # noqa: N803
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    heads, dims = tl.arange(0, NUM_KV_HEADS_PADDED)[:, None], tl.arange(0, HEAD_DIM_PADDED)[None, :]
    is_there = (heads < NUM_KV_HEADS) & (dims < HEAD_DIM)
    keys = tl.load(key_states + token * key_token_stride + heads * key_state_stride + dims, mask=is_there)
    values = tl.load(
        value_states + token * value_token_stride + heads * value_state_stride + dims, mask=is_there
    )
    slot = tl.load(slot_mapping + token)
    places = slot // BLOCK_SIZE * page_stride + heads * head_stride + slot % BLOCK_SIZE * slot_stride + dims
    tl.store(key + places, _as_stored(keys, key_scale, key, IS_FLOAT8), mask=is_there)
    tl.store(value + places, _as_stored(values, value_scale, value, IS_FLOAT8), mask=is_there)
