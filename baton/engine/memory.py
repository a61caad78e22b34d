"""How many KV pages a server has room for."""

from baton.core.errors import StartupError
from baton.core.kv_layout import KVLayout


def num_blocks_for(layout: KVLayout, kv_cache_bytes: int, max_model_len: int) -> int:
    """Pages that fit in `kv_cache_bytes`, besides the one that is reserved for padding.

    Raises StartupError unless one request of `max_model_len` tokens fits.
    """
    num_blocks = kv_cache_bytes // layout.bytes_per_block - 1
    needed = layout.blocks_for(max_model_len)
    if num_blocks >= needed:
        return num_blocks
    needed_bytes = (needed + 1) * layout.bytes_per_block
    longest = max(0, num_blocks) * layout.block_size
    raise StartupError(
        f"One request of {max_model_len} tokens needs {_mebibytes(needed_bytes)} of KV cache, but there are "
        f"{_mebibytes(kv_cache_bytes)} (room for {longest} tokens); raise --kv-cache-memory to "
        f"{_mebibytes(needed_bytes)} or lower --max-model-len{f' to {longest}' if longest else ''}."
    )


def _mebibytes(num_bytes: int) -> str:
    return f"{-(-num_bytes // 2**20)}MiB"
