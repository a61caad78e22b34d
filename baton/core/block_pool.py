"""Who holds which KV page: reference counts, prefix cache and LRU eviction. Numbers only, no memory.

A page is held (reference count above zero), or free. A free page that has a name (a hash) is still cached: it
can be found again until it is evicted to serve an allocation, least recently released first.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence


class OutOfBlocks(Exception):
    """More pages were asked for than are free; nothing was taken."""


class BlockPool:
    """Pages 0 to num_blocks - 1 of one device. Not thread-safe: the engine's thread owns it."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.num_queried_tokens = 0  # looked up in the prefix cache
        self.num_hit_tokens = 0  # and found
        self._reference_counts = [0] * num_blocks
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        # Insertion order is eviction order: pages without a name at the front, then least recent first.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))

    @property
    def num_free(self) -> int:
        """Pages that nobody holds, cached ones included."""
        return len(self._free)

    def find_prefix(self, hashes: Sequence[bytes]) -> list[int]:
        """Pages of the longest cached prefix of `hashes`, not yet held: acquire them before allocating."""
        found: list[int] = []
        for digest in hashes:
            block = self._block_of.get(digest)
            if block is None:
                break
            found.append(block)
        return found

    def count_lookup(self, num_tokens: int, num_found: int) -> None:
        """Record one admitted request's look-up, for metrics; retried look-ups are not counted again.

        `num_tokens`: all tokens of the request; `num_found`: those of them whose pages were cached.
        """
        self.num_queried_tokens += num_tokens
        self.num_hit_tokens += num_found

    def acquire(self, blocks: Iterable[int]) -> None:
        """Hold pages, each once more; cached free pages leave the eviction order."""
        for block in blocks:
            if self._reference_counts[block] == 0:
                del self._free[block]
            self._reference_counts[block] += 1

    def num_free_among(self, blocks: Iterable[int]) -> int:
        """How many of `blocks` acquiring would take out of the free pages."""
        return sum(1 for block in blocks if self._reference_counts[block] == 0)

    def allocate(self, count: int) -> list[int]:
        """Hold `count` free pages, evicting what is cached in them. Raises OutOfBlocks, taking none."""
        if count > len(self._free):
            raise OutOfBlocks(f"{count} pages wanted, {len(self._free)} of {self.num_blocks} free")
        blocks = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block in blocks:
            self._forget(block)
            self._reference_counts[block] = 1
        return blocks

    def release(self, blocks: Sequence[int]) -> None:
        """Give up one hold on each page of a block table.

        The table's tail becomes evictable before its head: a prefix is useless without its beginning.
        """
        for block in reversed(blocks):
            count = self._reference_counts[block] - 1
            if count < 0:
                raise AssertionError(f"page {block} released more often than it was held")
            self._reference_counts[block] = count
            if count == 0:
                self._free[block] = None
                if self._hash_of[block] is None:
                    self._free.move_to_end(block, last=False)

    def publish(self, block: int, digest: bytes) -> None:
        """Name a held, completely computed page. A name that another page has already stays there."""
        if self._hash_of[block] is None and digest not in self._block_of:
            self._hash_of[block] = digest
            self._block_of[digest] = block

    def forget_all(self) -> None:
        """Nothing that was computed so far is found again; pages that are held stay so."""
        for block in list(self._block_of.values()):
            self._forget(block)

    def is_shared(self, block: int) -> bool:
        """Whether writing to the page would be seen by somebody else."""
        return self._reference_counts[block] > 1

    def reference_count(self, block: int) -> int:
        """Holds on the page."""
        return self._reference_counts[block]

    def check_integrity(self) -> None:
        """Raise AssertionError unless counts, free pages and names agree."""
        for block, count in enumerate(self._reference_counts):
            if count < 0 or (count == 0) != (block in self._free):
                raise AssertionError(f"page {block}: {count} holds, free: {block in self._free}")
        names = {block: digest for digest, block in self._block_of.items()}
        if len(names) != len(self._block_of):
            raise AssertionError("a page has two names")
        for block, digest in enumerate(self._hash_of):
            if names.get(block) != digest:
                raise AssertionError(f"page {block}: its name and the name's page differ")

    def _forget(self, block: int) -> None:
        digest = self._hash_of[block]
        if digest is not None:
            del self._block_of[digest]
            self._hash_of[block] = None
