"""Rotary position embeddings (Su et al., 2021) and the scaled variants that checkpoints name."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from baton_kernels.cpu.angles import Angles
from baton_kernels.cpu.library import DTYPES, cpu_kernels

ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """One model's rotary embedding; fields of other variants than `rope_type` are not read.

    `dynamic` (NTK) leaves angles as they are up to the model's own length and changes the angles of *all*
    positions with every token beyond it, which keys that were cached rotated can't follow. Baton serves such
    models up to their own length, where the numbers are the model's exactly, whatever a
    server's `max_model_len`.
    """

    rope_type: str
    theta: float
    factor: float
    original_length: float  # tokens the model was trained on before scaling; llama3 and yarn
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn: whole dimensions as bounds of the ramp
    attention_factor: float = 1.0  # yarn: cos and sin are multiplied by it


class RotaryEmbedding:
    """Turns positions into the cosines and sines that rotate queries and keys."""

    def __init__(self, rope: RopeConfig, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
        self._frequencies = rotary_frequencies(rope, head_dim).to(device)
        self._scale = rope.attention_factor
        self._dtype = dtype
        self._kernel: Angles | None = None

    def pack(self) -> None:
        """Let a C kernel find the angles, where there are any."""
        library = cpu_kernels() if self._frequencies.device.type == "cpu" and self._dtype in DTYPES else None
        if library is not None:
            self._kernel = Angles(library, self._frequencies, self._scale, self._dtype)

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """What `rotate` needs for int64 positions `[T]`: two of `[T, 1, D]` in the model's dtype.

        The cosines, and the sines with the sign that each half of a head takes.
        """
        if self._kernel is not None:
            return self._kernel(positions)
        angles = positions[:, None].float() * self._frequencies  # [T, D / 2]
        cosines, sines = (angles.cos() * self._scale)[:, None], (angles.sin() * self._scale)[:, None]
        return (
            torch.cat((cosines, cosines), dim=-1).to(self._dtype),
            torch.cat((-sines, sines), dim=-1).to(self._dtype),
        )


def rotate(states: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotate `[T, heads, D]`; the two numbers of a pair are D / 2 apart, as Hugging Face stores them."""
    return torch.addcmul(states * cosines, states.roll(states.shape[-1] // 2, -1), sines)


def rotary_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """Angle per position of every pair, float32 `[D / 2]`."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequencies = 1.0 / (rope.theta**exponents)
    if rope.rope_type == "linear":
        return frequencies / rope.factor
    if rope.rope_type == "llama3":
        return _llama3(frequencies, rope)
    if rope.rope_type == "yarn":
        return _yarn(frequencies, rope, head_dim)
    return frequencies


def yarn_attention_factor(factor: float, mscale: float | None, mscale_all_dim: float | None) -> float:
    """YaRN's attention temperature, section 3.4, for checkpoints that give no `attention_factor`."""
    if mscale and mscale_all_dim:
        return _magnitude(factor, mscale) / _magnitude(factor, mscale_all_dim)
    return _magnitude(factor, 1.0)


def _magnitude(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1.0 else 0.1 * mscale * math.log(factor) + 1.0


def _llama3(frequencies: Tensor, rope: RopeConfig) -> Tensor:
    """Llama 3.1: long waves are slowed by `factor`, short ones kept, and those between blended."""
    turns = rope.original_length * frequencies / (2 * math.pi)  # full turns within the original length
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend = blend.clamp(0.0, 1.0)
    return (1.0 - blend) * frequencies / rope.factor + blend * frequencies


def _yarn(frequencies: Tensor, rope: RopeConfig, head_dim: int) -> Tensor:
    """YaRN (Peng et al., 2023), section 3.2: a ramp over dimensions from kept to slowed."""

    def dimension_of(turns: float) -> float:
        wavelength = rope.original_length / (turns * 2 * math.pi)
        return head_dim * math.log(wavelength) / (2 * math.log(rope.theta))

    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    span = high - low or 0.001  # a ramp of no width is a step
    slowed = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / span).clamp(0.0, 1.0)
    return frequencies / rope.factor * slowed + frequencies * (1.0 - slowed)
