"""The block hashes of one prompt, for workers of whatever block size."""

import asyncio

from baton.core.prefix import block_hashes, chain_seed

# Longer prompts are hashed on a thread: a million tokens take about a tenth of a second.
_HASH_ON_LOOP_TOKENS = 16_384


class PromptHashes:
    """Hashes a prompt once for each block size that is asked for."""

    def __init__(self, fingerprint: bytes, cache_salt: str, token_ids: tuple[int, ...]) -> None:
        self.fingerprint = fingerprint
        self.seed = chain_seed(fingerprint, cache_salt)
        self._token_ids = token_ids
        self._by_block_size: dict[int, tuple[bytes, ...]] = {}

    async def of(self, block_size: int, answered_token_ids: tuple[int, ...] = ()) -> tuple[bytes, ...]:
        """The hashes of the full blocks of `block_size` tokens of the prompt and what comes after it."""
        hashes = self._by_block_size.get(block_size)
        if hashes is None:
            hashes = await _block_hashes(self.seed, self._token_ids, block_size)
            self._by_block_size[block_size] = hashes
        if not answered_token_ids:
            return hashes
        rest = (*self._token_ids[len(hashes) * block_size :], *answered_token_ids)
        parent = hashes[-1] if hashes else self.seed
        return (*hashes, *await _block_hashes(parent, rest, block_size))


async def _block_hashes(parent: bytes, token_ids: tuple[int, ...], block_size: int) -> tuple[bytes, ...]:
    if len(token_ids) > _HASH_ON_LOOP_TOKENS:
        return tuple(await asyncio.to_thread(block_hashes, parent, token_ids, block_size))
    return tuple(block_hashes(parent, token_ids, block_size))
