"""BlockPool against a naive model that knows only the rules, not the data structures."""

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from baton.core.block_pool import BlockPool, OutOfBlocks

CHAINS = tuple(tuple(bytes([family, depth]) for depth in range(4)) for family in range(3))
DIGESTS = tuple(digest for chain in CHAINS for digest in chain)
anything = st.integers(min_value=0, max_value=2**16)


class BlockPoolMachine(RuleBasedStateMachine):
    """Tables of pages come and go; the model keeps lists where the pool keeps counts."""

    @initialize(num_blocks=st.integers(1, 12))
    def start(self, num_blocks: int) -> None:
        self.pool = BlockPool(num_blocks)
        self.tables: list[list[int]] = []
        self.page_of: dict[bytes, int] = {}
        self.released_named: list[int] = []  # free pages with a name, least recently released first

    @rule(count=st.integers(0, 6))
    def allocate(self, count: int) -> None:
        nameless = self.free_pages() - set(self.released_named)
        if count > len(self.free_pages()):
            with pytest.raises(OutOfBlocks):
                self.pool.allocate(count)
            return
        blocks = self.pool.allocate(count)
        num_nameless = min(count, len(nameless))
        assert set(blocks[:num_nameless]) <= nameless, "a cached page was evicted before an empty one"
        assert blocks[num_nameless:] == self.released_named[: count - num_nameless]
        assert len(set(blocks)) == count
        self.forget(blocks)
        self.tables.append(blocks)

    @rule(family=st.integers(0, 2), length=st.integers(1, 4))
    def acquire_prefix(self, family: int, length: int) -> None:
        found = self.pool.find_prefix(CHAINS[family][:length])
        assert self.pool.num_free_among(found) == len(self.free_pages() & set(found))
        self.pool.acquire(found)
        self.released_named = [block for block in self.released_named if block not in found]
        self.tables.append(found)

    @precondition(lambda self: self.tables)
    @rule(which=anything)
    def acquire_held(self, which: int) -> None:
        table = self.tables[which % len(self.tables)]
        self.pool.acquire(table)
        self.tables.append(list(table))

    @precondition(lambda self: self.tables)
    @rule(which=anything)
    def release(self, which: int) -> None:
        table = self.tables.pop(which % len(self.tables))
        self.pool.release(table)
        named = set(self.page_of.values())
        self.released_named += [
            block for block in reversed(table) if block in self.free_pages() and block in named
        ]

    @precondition(lambda self: any(self.tables))
    @rule(which=anything, digest=st.sampled_from(DIGESTS))
    def publish(self, which: int, digest: bytes) -> None:
        held = sorted({block for table in self.tables for block in table})
        block = held[which % len(held)]
        self.pool.publish(block, digest)
        if digest not in self.page_of and block not in self.page_of.values():
            self.page_of[digest] = block

    @rule(family=st.integers(0, 2), first=st.integers(0, 3))
    def find_prefix(self, family: int, first: int) -> None:
        expected = []
        for digest in CHAINS[family][first:]:
            if digest not in self.page_of:
                break
            expected.append(self.page_of[digest])
        assert self.pool.find_prefix(CHAINS[family][first:]) == expected

    @invariant()
    def agrees(self) -> None:
        self.pool.check_integrity()
        assert self.pool.num_free == len(self.free_pages())
        for block in range(self.pool.num_blocks):
            holds = self.num_holds(block)
            assert self.pool.reference_count(block) == holds
            assert self.pool.is_shared(block) == (holds > 1)

    def teardown(self) -> None:
        for table in self.tables:
            self.pool.release(table)
        self.tables = []
        self.pool.check_integrity()
        assert self.pool.num_free == self.pool.num_blocks
        assert sorted(self.pool.allocate(self.pool.num_blocks)) == list(range(self.pool.num_blocks))

    def num_holds(self, block: int) -> int:
        return sum(table.count(block) for table in self.tables)

    def free_pages(self) -> set[int]:
        return {block for block in range(self.pool.num_blocks) if self.num_holds(block) == 0}

    def forget(self, blocks: list[int]) -> None:
        self.released_named = [block for block in self.released_named if block not in blocks]
        self.page_of = {digest: block for digest, block in self.page_of.items() if block not in blocks}


TestBlockPool = BlockPoolMachine.TestCase


def test_a_prefix_loses_its_tail_before_its_head() -> None:
    pool = BlockPool(3)
    table = pool.allocate(3)
    for block, digest in zip(table, DIGESTS, strict=False):
        pool.publish(block, digest)
    pool.release(table)
    pool.allocate(1)
    assert pool.find_prefix(DIGESTS[:3]) == table[:2]


def test_nothing_is_found_after_all_is_forgotten() -> None:
    """Not even of pages that are held, which stay held; names may be given anew."""
    pool = BlockPool(4)
    held, cached = pool.allocate(2), pool.allocate(1)
    for block, digest in zip([*held, *cached], DIGESTS, strict=False):
        pool.publish(block, digest)
    pool.release(cached)
    pool.forget_all()
    assert pool.find_prefix(DIGESTS[:3]) == []
    assert [pool.reference_count(block) for block in [*held, *cached]] == [1, 1, 0]
    pool.check_integrity()
    again = pool.allocate(1)
    pool.publish(again[0], DIGESTS[0])
    assert pool.find_prefix(DIGESTS[:3]) == again


def test_out_of_blocks_takes_nothing() -> None:
    pool = BlockPool(3)
    pool.allocate(1)
    with pytest.raises(OutOfBlocks, match=r"3 pages wanted, 2 of 3 free"):
        pool.allocate(3)
    assert pool.num_free == 2


def test_releasing_too_often_is_an_error() -> None:
    pool = BlockPool(1)
    table = pool.allocate(1)
    pool.release(table)
    with pytest.raises(AssertionError, match="released more often"):
        pool.release(table)


def test_lookups_are_counted() -> None:
    pool = BlockPool(1)
    pool.count_lookup(5, 3)
    pool.count_lookup(2, 0)
    assert (pool.num_queried_tokens, pool.num_hit_tokens) == (7, 3)


@pytest.mark.parametrize("damage", ["count", "free", "name"])
def test_integrity_check_sees_damage(damage: str) -> None:
    pool = BlockPool(2)
    pool.publish(pool.allocate(1)[0], DIGESTS[0])
    if damage == "count":
        pool._reference_counts[1] = 1
    elif damage == "free":
        del pool._free[1]
    else:
        pool._hash_of[0] = None
    with pytest.raises(AssertionError):
        pool.check_integrity()
