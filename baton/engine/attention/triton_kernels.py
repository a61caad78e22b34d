"""Attention with Baton's own GPU kernels; under Triton's interpreter they run on a CPU as well."""

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from baton.engine.attention.base import AttentionMetadata, AttentionStep, RotatingAttentionStep
from baton.engine.attention.paged import PagedRows, layer_pages
from baton_kernels.gpu import paged_decode, paged_prefill, rotary_store
from baton_kernels.quantization import layer_scales
from baton_kernels.rotation import Rotation

_INTERPRETED_MULTIPROCESSORS = 1  # programs run one after the other; a few rows are split all the same


class KernelAttention:
    """Rows of one token in one launch, the context split among programs, longer rows in another."""

    def __init__(
        self,
        pool: Tensor,
        windows: tuple[int | None, ...],
        scales: tuple[float, ...] = (),
        soft_cap: float | None = None,
    ) -> None:
        """`pool`, `scales` as in `baton_kernels.reference`; `windows`: of each layer; None: all."""
        self._scales = tuple(layer_scales(scales, layer) for layer in range(pool.shape[1]))
        self._pages = layer_pages(pool)
        self._windows = windows
        self._soft_cap = soft_cap
        self._num_multiprocessors = _INTERPRETED_MULTIPROCESSORS
        if pool.device.type == "cuda":
            properties = torch.cuda.get_device_properties(pool.device)
            self._num_multiprocessors = properties.multi_processor_count

    def begin_step(self, metadata: AttentionMetadata) -> AttentionStep:
        """Choose how often contexts are split."""
        rows = PagedRows(metadata)
        num_splits = paged_decode.splits_for(
            max(1, rows.num_one_token_rows),
            self._pages[0].key.shape[1],
            self._num_multiprocessors,
        )
        return _KernelStep(self, rows, num_splits)

    def attend(self, layer: int, query: Tensor, rows: PagedRows, num_splits: int) -> Tensor:
        """Attention of query `[T, H, D]`, after the tokens' K and V are stored. Returns `[T, H, D]`."""
        pages, split = self._pages[layer], rows.num_one_token_rows
        options: dict[str, Any] = {
            "window": self._windows[layer], "soft_cap": self._soft_cap, "scales": self._scales[layer],
        }  # fmt: skip
        output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        if split:
            paged_decode.attend_one_token_rows(
                query[:split], pages.key, pages.value, rows.block_tables, rows.context_lens[:split],
                num_splits=num_splits, output=output[:split], **options,
            )  # fmt: skip
        if split < rows.num_rows:
            paged_prefill.attend_long_rows(
                query, pages.key, pages.value, rows.block_tables[split:], rows.context_lens[split:],
                rows.row_bounds[split:], rows.max_row_len, output=output, **options,
            )  # fmt: skip
        return output

    def store(self, layer: int, key: Tensor, value: Tensor, rows: PagedRows) -> None:
        """Write the tokens' K and V, `[T, K, D]`, into their slots."""
        pages = self._pages[layer]
        rotary_store.store(key, value, pages.key, pages.value, rows.slot_mapping, self._scales[layer])

    def rotate_and_store(self, layer: int, states: Tensor, rotation: Rotation, rows: PagedRows) -> Tensor:
        """Rotate `[T, H + 2K, D]`, write K and V into their slots; returns the rotated queries."""
        pages = self._pages[layer]
        if rotation.norms is not None:
            states = _with_head_norms(states, rotation.norms, pages.key.shape[1])
        return rotary_store.rotate_and_store(
            states, rotation.cosines, rotation.sines, pages.key, pages.value, rows.slot_mapping,
            self._scales[layer],
        )  # fmt: skip


def _with_head_norms(states: Tensor, norms: tuple[Tensor, Tensor, float], kv_heads: int) -> Tensor:
    """`[T, H + 2K, D]` with an RMSNorm of each head of the queries and of the keys."""
    query_weight, key_weight, eps = norms
    parts = states.split_with_sizes((states.shape[1] - 2 * kv_heads, kv_heads, kv_heads), dim=1)
    normed = (
        F.rms_norm(part, weight.shape, weight.to(part.dtype), eps)
        for part, weight in zip(parts, (query_weight, key_weight), strict=False)
    )
    return torch.cat((*normed, parts[2]), dim=1)


class _KernelStep(RotatingAttentionStep):
    def __init__(self, backend: KernelAttention, rows: PagedRows, num_splits: int) -> None:
        self._backend = backend
        self._rows = rows
        self._num_splits = num_splits

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See `AttentionStep`."""
        self._backend.store(layer, key, value, self._rows)
        return self._backend.attend(layer, query, self._rows, self._num_splits)

    def rotate_and_attend(self, layer: int, states: Tensor, rotation: Rotation) -> Tensor:
        """See `RotatingAttentionStep`; `states` are left as they are."""
        query = self._backend.rotate_and_store(layer, states, rotation, self._rows)
        return self._backend.attend(layer, query, self._rows, self._num_splits)
