"""Attention with kernels that come with flash-attn (2 and 3) or with torch itself, over Baton's pages.

They take a layer's pages as `[N, P, K, D]`, which the pool's are with other strides. K and V are stored with
Baton's own kernel, so that one call serves decode, prefill and both together.
"""

import inspect
import logging
from collections.abc import Callable
from importlib import import_module
from typing import Any

from torch import Tensor

from baton.engine.attention.base import AttentionMetadata, AttentionStep
from baton.engine.attention.paged import LayerPages, PagedRows, layer_pages
from baton_kernels.gpu import rotary_store

# (query, pages with tokens before heads, rows, window) -> output
VarlenAttention = Callable[[Tensor, LayerPages, PagedRows, int | None], Tensor]


class BackendUnavailable(Exception):
    """A backend can't be used here; the text says why, for the log."""


class LibraryAttention:
    """One library's attention of rows of all lengths in one call."""

    def __init__(self, pool: Tensor, windows: tuple[int | None, ...], attention: VarlenAttention) -> None:
        """`pool` as in `baton_kernels.reference`; `windows`: each layer's sliding window; None: all."""
        self._pages = layer_pages(pool)
        self._turned = tuple(
            LayerPages(pages.key.transpose(1, 2), pages.value.transpose(1, 2)) for pages in self._pages
        )
        self._windows = windows
        self._attention = attention

    def begin_step(self, metadata: AttentionMetadata) -> AttentionStep:
        """Make the rows' int32 tensors."""
        return _LibraryStep(self, PagedRows(metadata))

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, rows: PagedRows) -> Tensor:
        """See `AttentionStep`."""
        pages = self._pages[layer]
        rotary_store.store(key, value, pages.key, pages.value, rows.slot_mapping)
        return self._attention(query, self._turned[layer], rows, self._windows[layer])


class _LibraryStep:
    def __init__(self, backend: LibraryAttention, rows: PagedRows) -> None:
        self._backend = backend
        self._rows = rows

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See `AttentionStep`."""
        return self._backend.attend(layer, query, key, value, self._rows)


def flash_attention_3() -> VarlenAttention:
    """flash-attn 3 (package `flash_attn_interface`). Raises BackendUnavailable."""
    function = _function(
        "flash_attn_interface", "flash_attn_with_kvcache", ("page_table", "cache_seqlens", "cu_seqlens_q")
    )

    def attend(query: Tensor, pages: LayerPages, rows: PagedRows, window: int | None) -> Tensor:
        output = function(
            query, pages.key, pages.value,
            cache_seqlens=rows.context_lens, page_table=rows.block_tables,
            cu_seqlens_q=rows.row_bounds, max_seqlen_q=rows.max_row_len,
            causal=True, window_size=_window(window, -1),
        )  # fmt: skip
        # Some versions return the log-sum-exp as well.
        first: Tensor = output[0] if isinstance(output, tuple) else output
        return first

    return attend


def flash_attention_2() -> VarlenAttention:
    """flash-attn 2 (package `flash_attn`), pages of a multiple of 256 tokens. Raises BackendUnavailable."""
    function = _function("flash_attn", "flash_attn_varlen_func", ("block_table",))

    def attend(query: Tensor, pages: LayerPages, rows: PagedRows, window: int | None) -> Tensor:
        # It takes the contexts' lengths as bounds; with a block table only their differences are read.
        context_bounds = rows.context_bounds
        output: Tensor = function(
            query, pages.key, pages.value,
            cu_seqlens_q=rows.row_bounds, cu_seqlens_k=context_bounds,
            max_seqlen_q=rows.max_row_len, max_seqlen_k=rows.max_context_len,
            block_table=rows.block_tables, causal=True, window_size=_window(window, -1),
        )  # fmt: skip
        return output

    return attend


def torch_varlen() -> VarlenAttention:
    """`torch.nn.attention.varlen.varlen_attn`, that takes a block table. Raises BackendUnavailable."""
    function = _function("torch.nn.attention.varlen", "varlen_attn", ("block_table", "seqused_k"))
    # It says at every call, so in every layer of every step, which kernels it uses.
    logging.getLogger("torch.nn.attention.varlen").setLevel(logging.WARNING)

    def attend(query: Tensor, pages: LayerPages, rows: PagedRows, window: int | None) -> Tensor:
        output: Tensor = function(
            query, pages.key, pages.value, rows.row_bounds, None, rows.max_row_len, rows.max_context_len,
            window_size=_window(window, 0), enable_gqa=query.shape[1] != pages.key.shape[2],
            seqused_k=rows.context_lens, block_table=rows.block_tables,
        )  # fmt: skip
        return output

    return attend


def _window(window: int | None, right: int) -> tuple[int, int]:
    """Tokens seen before and after a query's own, -1: all; a window of w is w - 1 tokens before it.

    `right` is what the library wants of causal attention without a window.
    """
    return (-1, right) if window is None else (window - 1, 0)


def _function(module: str, name: str, parameters: tuple[str, ...]) -> Callable[..., Any]:
    try:
        function: Callable[..., Any] = getattr(import_module(module), name)
    except Exception as error:  # a package built for another torch fails in ways of its own
        raise BackendUnavailable(f"{module} can't be imported ({type(error).__name__}: {error})") from error
    known = inspect.signature(function).parameters
    missing = [parameter for parameter in parameters if parameter not in known]
    if missing:
        raise BackendUnavailable(f"{module}.{name} of this version has no {', '.join(missing)}")
    return function
