"""Functions of one token's states: RMSNorm with the residual added, and the gate of an MLP."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_GATE_TILE = 1024


def rms_norm(states: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root mean square normalisation (Zhang and Sennrich, 2019) of the last axis, in float32.

    states: `[..., size]`, contiguous; weight: `[size]`. Returns the same shape and dtype.
    """
    output = torch.empty_like(states)
    _launch_norm(states, states, weight, output, eps, has_residual=False)
    return output


def add_rms_norm(states: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`residual += states`, rounded to its dtype, then RMSNorm of that.

    states, residual: `[..., size]`, contiguous; weight: `[size]`. Returns states' shape and dtype.
    """
    output = torch.empty_like(states)
    _launch_norm(states, residual, weight, output, eps, has_residual=True)
    return output


def gated_silu(gate_up: Tensor) -> Tensor:
    """`silu(gate) * up` in float32, for SwiGLU (Shazeer, 2020).

    gate_up: `[T, 2 * size]`, contiguous, gate first. Returns `[T, size]` in its dtype.
    """
    num_tokens, size = gate_up.shape[0], gate_up.shape[1] // 2
    output = torch.empty((num_tokens, size), dtype=gate_up.dtype, device=gate_up.device)
    _gated_silu[(num_tokens, triton.cdiv(size, _GATE_TILE))](
        gate_up, output, size, TILE=_GATE_TILE, num_warps=4
    )
    return output


def _launch_norm(
    states: Tensor, residual: Tensor, weight: Tensor, output: Tensor, eps: float, has_residual: bool
) -> None:
    size = states.shape[-1]
    padded = triton.next_power_of_2(size)
    _rms_norm[(states.numel() // size,)](
        states, residual, weight, output, eps,
        SIZE=size, SIZE_PADDED=padded, HAS_RESIDUAL=has_residual,
        num_warps=min(16, max(1, padded // 512)),
    )  # fmt: skip


@triton.jit
def _rms_norm(
    states, residual, weight, output, eps,
    SIZE: tl.constexpr, SIZE_PADDED: tl.constexpr, HAS_RESIDUAL: tl.constexpr,  # noqa: N803
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * SIZE
    columns = tl.arange(0, SIZE_PADDED)
    is_there = columns < SIZE
    values = tl.load(states + row + columns, mask=is_there, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        values += tl.load(residual + row + columns, mask=is_there, other=0.0).to(tl.float32)
        rounded = values.to(residual.dtype.element_ty)
        tl.store(residual + row + columns, rounded, mask=is_there)
        values = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, 0) / SIZE + eps)
    weights = tl.load(weight + columns, mask=is_there, other=0.0).to(tl.float32)
    tl.store(output + row + columns, (values * scale * weights).to(output.dtype.element_ty), mask=is_there)


@triton.jit
def _gated_silu(gate_up, output, size, TILE: tl.constexpr):  # noqa: N803
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    is_there = columns < size
    gate = tl.load(gate_up + token * 2 * size + columns, mask=is_there, other=0.0).to(tl.float32)
    up = tl.load(gate_up + token * 2 * size + size + columns, mask=is_there, other=0.0).to(tl.float32)
    gated = gate * tl.sigmoid(gate) * up
    tl.store(output + token * size + columns, gated.to(output.dtype.element_ty), mask=is_there)
