"""Chooses the attention of a CUDA device: the first backend that computes a small problem right."""

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from baton.core.errors import StartupError
from baton.engine.attention.base import AttentionBackend, AttentionMetadata
from baton.engine.attention.flash_kernels import (
    BackendUnavailable,
    LibraryAttention,
    VarlenAttention,
    flash_attention_2,
    flash_attention_3,
    torch_varlen,
)
from baton_kernels import reference

_LIBRARIES: tuple[tuple[str, Callable[[], VarlenAttention]], ...] = (
    ("flash-attn 3", flash_attention_3),
    ("flash-attn 2", flash_attention_2),
    ("torch varlen_attn", torch_varlen),
)
_OWN = "Triton"
_TRIAL_ERROR = 2e-2  # of the norm; bfloat16 stays below half of it, a wrong page or mask is far above

_logger = logging.getLogger(__name__)

Windows = tuple[int | None, ...]


def cuda_attention(pool: Tensor, windows: Windows, scales: tuple[float, ...] = ()) -> AttentionBackend:
    """The backend for this pool, tried out on a small one of the same layout. Raises StartupError."""
    reasons = []
    for name, make in (*_LIBRARIES, (_OWN, None)):
        try:
            if make is not None and pool.dtype == torch.float8_e4m3fn:
                raise BackendUnavailable("its pages in 8 bits have another meaning")
            backend = _backend(name, make)
            error = _trial_error(backend, pool)
            if not error < _TRIAL_ERROR:  # NaN is not
                raise BackendUnavailable(f"it is off by {error:.1e} of the norm in a trial")
        except BackendUnavailable as obstacle:
            reasons.append(f"{name}: {obstacle}")
            continue
        except torch.OutOfMemoryError:
            raise  # says nothing of the library
        except Exception as obstacle:  # whatever a library says of this device, dtype or page size
            first_line = (str(obstacle).splitlines() or [""])[0]
            reasons.append(f"{name}: {type(obstacle).__name__}: {first_line}")
            continue
        _logger.info("attention: %s on %s%s", name, pool.device, _not_taken(reasons))
        return backend(pool, windows, scales)
    raise StartupError(
        f"No attention kernel runs on {pool.device} with {pool.dtype}, head_dim {pool.shape[5]} and pages of "
        f"{pool.shape[4]} tokens; install triton, or choose another --dtype or --block-size. "
        f"{'; '.join(reasons)}"
    )


def _backend(name: str, make: Callable[[], VarlenAttention] | None) -> Callable[..., AttentionBackend]:
    if make is not None:
        attention = make()
        return lambda pool, windows, scales=(): LibraryAttention(pool, windows, attention)
    try:
        from baton.engine.attention.triton_kernels import KernelAttention
    except ImportError as error:
        raise BackendUnavailable(f"it can't be imported ({error})") from error
    return KernelAttention


def _not_taken(reasons: list[str]) -> str:
    return f" (not taken: {'; '.join(reasons)})" if reasons else ""


def _trial_error(backend: Callable[..., AttentionBackend], pool: Tensor) -> float:
    """Relative error of a decode row and a chunk of prefill with a sliding window, against plain torch.

    Layers and pages that are not the rows' hold NaN, so that reading one shows.
    """
    _, _, _, kv_heads, block_size, head_dim = pool.shape
    generator = torch.Generator().manual_seed(0)
    length = 2 * block_size + 3
    dtype = torch.bfloat16 if pool.dtype == torch.float8_e4m3fn else pool.dtype
    numbers = torch.full((8, 2, *pool.shape[2:]), float("nan"))
    numbers[:7, 1] = torch.randn(7, *pool.shape[2:], generator=generator)
    pages = numbers.to(pool.device).to(pool.dtype)
    untouched = pages.clone()
    tables = torch.tensor([[6, 2, 4], [1, 5, 3]], device=pool.device)
    slots = [2, *range(length - 4, length)]
    slot_mapping = torch.tensor(
        [int(tables[0 if i == 0 else 1, slot // block_size]) * block_size + slot % block_size
         for i, slot in enumerate(slots)], device=pool.device,
    )  # fmt: skip
    metadata = AttentionMetadata(
        slot_mapping, tables, torch.tensor([3, length], device=pool.device), (0, 1, 5), (3, length), 1
    )
    states = (
        torch.randn(5, 6 * kv_heads, head_dim, generator=generator).to(pool.dtype).to(dtype).to(pool.device)
    )
    query, key, value = states.split_with_sizes((4 * kv_heads, kv_heads, kv_heads), 1)
    windows = (None, block_size + 1)
    output = backend(pages, windows).begin_step(metadata).attend(1, query, key, value)
    expected = _expected(untouched, metadata, windows[1], query, key, value)
    return float((output.double() - expected.double()).norm() / expected.double().norm())


def _expected(
    pool: Tensor, rows: AttentionMetadata, window: int | None, query: Tensor, key: Tensor, value: Tensor
) -> Tensor:
    """The trial's attention in float32."""
    pool = pool.float()
    reference.store_kv(pool, 1, key.float(), value.float(), reference.token_lines(pool, rows.slot_mapping))
    one = reference.one_token_rows(pool, rows.block_tables[:1], rows.context_lens[:1], window)
    lines = reference.page_lines(pool, rows.block_tables[1:])
    first = reference.attend_one_token_rows(query[:1].float(), pool, 1, one)
    start = rows.context_lengths[1] - 4
    return torch.cat((first, reference.attend_long_row(query[1:].float(), pool, 1, lines, start, window)))
