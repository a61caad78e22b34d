"""Attention in C kernels on the CPU."""

import ctypes

import numpy as np
import torch
from torch import Tensor

from baton.engine.attention.base import AttentionBackend, AttentionMetadata, RotatingAttentionStep
from baton.engine.attention.plain_torch import CpuAttention
from baton.engine.inputs import StepArrays
from baton_kernels.cpu.attention import PagedAttention
from baton_kernels.cpu.library import cpu_kernels
from baton_kernels.rotation import Rotation


def cpu_attention(
    pool: Tensor, windows: tuple[int | None, ...], scales: tuple[float, ...]
) -> AttentionBackend:
    """The C kernels' attention, or torch's where there are none."""
    library = cpu_kernels()
    if library is None:
        return CpuAttention(pool, windows, scales)
    return CpuKernelAttention(library, pool, windows, scales)


class CpuKernelAttention:
    """All rows of a layer in one call, which rotates queries and keys and stores keys and values as well."""

    def __init__(
        self,
        library: ctypes.CDLL,
        pool: Tensor,
        windows: tuple[int | None, ...],
        scales: tuple[float, ...] = (),
    ) -> None:
        """`pool`, `scales` as in `baton_kernels.reference`; `windows`: of each layer; None: all."""
        self.library = library
        self._attention = PagedAttention(library, pool, scales)
        self._windows = windows

    def begin_step(self, metadata: AttentionMetadata) -> RotatingAttentionStep:
        """See `AttentionBackend`; the step before is over."""
        self._attention.begin_step(
            metadata.slot_mapping.numpy(),
            metadata.block_tables.numpy(),
            metadata.context_lens.numpy(),
            np.array(metadata.row_bounds),
            metadata.num_one_token_rows,
        )
        return _CpuKernelStep(self._attention, self._windows)

    def begin_recorded_step(self, arrays: StepArrays, angles: tuple[Tensor, Tensor]) -> None:
        """The same for layers that were recorded, with the angles that they were recorded with."""
        self._attention.begin_step(
            arrays.slot_mapping,
            arrays.block_tables,
            arrays.context_lens,
            arrays.row_bounds,
            arrays.num_one_token_rows,
        )
        self._attention.use_angles(*angles)


class _CpuKernelStep(RotatingAttentionStep):
    def __init__(self, attention: PagedAttention, windows: tuple[int | None, ...]) -> None:
        self._attention = attention
        self._windows = windows

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See `AttentionStep`."""
        states = torch.cat((query, key, value), dim=1)
        return self._attention.attend(layer, states, self._windows[layer], None)

    def rotate_and_attend(self, layer: int, states: Tensor, rotation: Rotation) -> Tensor:
        """See `RotatingAttentionStep`."""
        return self._attention.attend(layer, states, self._windows[layer], rotation)
