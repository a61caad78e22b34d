"""The block hashes of one prompt, for workers of whatever block size."""

import asyncio

from baton.core.prefix import block_hashes, chain_seed

# Longer prompts are hashed on a thread: a million tokens take about a tenth of a second.
_HASH_ON_LOOP_TOKENS = 16_384


class PromptHashes:
    """Hashes a prompt once for each block size that is asked for."""

    def __init__(self, fingerprint: bytes, cache_salt: str, token_ids: tuple[int, ...]) -> None:
        self.seed = chain_seed(fingerprint, cache_salt)
        self._token_ids = token_ids
        self._by_block_size: dict[int, tuple[bytes, ...]] = {}

    async def of(self, block_size: int) -> tuple[bytes, ...]:
        """The hashes of the prompt's full blocks of `block_size` tokens."""
        if block_size not in self._by_block_size:
            self._by_block_size[block_size] = tuple(await self._compute(block_size))
        return self._by_block_size[block_size]

    async def _compute(self, block_size: int) -> list[bytes]:
        if len(self._token_ids) > _HASH_ON_LOOP_TOKENS:
            return await asyncio.to_thread(block_hashes, self.seed, self._token_ids, block_size)
        return block_hashes(self.seed, self._token_ids, block_size)
