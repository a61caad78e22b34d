"""How many KV pages a server has room for, and what to do where a device has no room."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from baton.core.errors import StartupError
from baton.core.kv_layout import KVLayout

KV_CACHE_MEMORY = "--kv-cache-memory"
# Of what other programs leave of a GPU's memory, an engine takes at most so much.
_FREE_SHARE = 0.9
# Of one page. A message of a transfer has room for twice as much of a layer, a launch that copies pages for
# twice as much of a page.
_MAX_LAYER_BYTES, _MAX_PAGE_BYTES = 32 << 20, 512 << 20


def require_page_size(layout: KVLayout) -> None:
    """Raise StartupError where a page is larger than what transfers and kernels take."""
    most = min(_MAX_LAYER_BYTES, _MAX_PAGE_BYTES // layout.num_layers)
    if layout.bytes_per_layer <= most:
        return
    tokens = most // (layout.bytes_per_layer // layout.block_size)
    raise StartupError(
        f"A page of {layout.block_size} tokens takes {_in_words(layout.bytes_per_block)}, "
        f"{_in_words(layout.bytes_per_layer)} a layer, which is more than transfers and kernels take; "
        f"lower --block-size to {tokens} or less."
    )


@dataclass(frozen=True, slots=True)
class PoolSize:
    """Memory for KV pages, and the option that sets it."""

    num_bytes: int
    option: str = KV_CACHE_MEMORY


def num_blocks_for(layout: KVLayout, size: PoolSize, max_model_len: int) -> int:
    """Pages that there is room for besides the one that is reserved for padding.

    Raises StartupError unless one request of `max_model_len` tokens fits.
    """
    num_blocks = size.num_bytes // layout.bytes_per_block - 1
    needed = layout.blocks_for(max_model_len)
    if num_blocks >= needed:
        return num_blocks
    needed_bytes = (needed + 1) * layout.bytes_per_block
    longest = max(0, num_blocks) * layout.block_size
    # A share of a GPU's memory says nothing in MiB.
    how_far = f" to {_in_words(needed_bytes)}" if size.option == KV_CACHE_MEMORY else ""
    raise StartupError(
        f"One request of {max_model_len} tokens needs {_in_words(needed_bytes)} of KV cache, but there are "
        f"{_in_words(size.num_bytes)} (room for {longest} tokens); raise {size.option}"
        f"{how_far} or lower --max-model-len{f' to {longest}' if longest else ''}."
    )


def kv_cache_bytes_on_gpu(total: int, elsewhere: int, peak: int, utilization: float) -> int:
    """Bytes of a GPU's memory that are left for KV pages.

    total: the GPU's memory. elsewhere: what others and CUDA itself use of it. peak: the most that weights and
    the largest step have used together. utilization: the share of `total` that this engine may use, weights,
    steps and pages; others have theirs, and of what they leave some stays free for graphs and staging.
    Raises StartupError if nothing is left.
    """
    room = int((total - elsewhere) * max(_FREE_SHARE, utilization))
    allowed = min(int(total * utilization), room)
    if allowed > peak:
        return allowed - peak
    raise StartupError(
        f"Weights and the largest step take {_in_words(peak)}, of {_in_words(allowed)} that other programs "
        f"({_in_words(elsewhere)}) leave and --gpu-memory-utilization {utilization} allows; raise it, lower "
        "--max-num-batched-tokens, or stop the other programs."
    )


@contextmanager
def room_for(what: str, device: torch.device, advice: str) -> Iterator[None]:
    """Raises StartupError, that gives `advice`, where what is done within finds no memory on a GPU."""
    try:
        yield
    except RuntimeError as error:
        # A capture that memory ends is told of by the error that follows from it.
        if not any(_is_out_of_memory(cause) for cause in (error, error.__context__)):
            raise
        raise StartupError(f"There is no memory for {what} on {device}: {advice}.") from error


def _is_out_of_memory(error: BaseException | None) -> bool:
    """Torch's own words, the driver's and cuBLAS's."""
    words = ("CUDA out of memory", "CUDA error: out of memory", "_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in words)


def _in_words(num_bytes: int) -> str:
    """Rounded up; of a few, in KiB, as that hides what is missing."""
    if num_bytes < 8 << 20:
        return f"{-(-num_bytes // 2**10)}KiB"
    return f"{-(-num_bytes // 2**20)}MiB"
