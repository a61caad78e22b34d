"""Names of blocks: equal content, equal name; anything else, another name."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.core.prefix import (
    HASH_BYTES,
    block_hash,
    block_hashes,
    chain_seed,
    pack_token_ids,
    unpack_token_ids,
)

SEED = chain_seed(b"model")
token_ids = st.lists(st.integers(0, 2**32 - 1), max_size=40)


@given(token_ids)
def test_token_ids_survive_packing(ids: list[int]) -> None:
    packed = pack_token_ids(ids)
    assert len(packed) == 4 * len(ids)
    assert unpack_token_ids(packed) == ids


def test_packed_token_ids_are_little_endian() -> None:
    assert pack_token_ids([1, 0x01020304]) == b"\x01\0\0\0\x04\x03\x02\x01"


def test_half_a_token_id_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple"):
        unpack_token_ids(b"\0" * 6)


@given(token_ids, st.integers(1, 7))
def test_only_full_blocks_have_hashes(ids: list[int], block_size: int) -> None:
    hashes = block_hashes(SEED, ids, block_size)
    assert len(hashes) == len(ids) // block_size
    assert all(len(digest) == HASH_BYTES for digest in hashes)


@given(token_ids, st.integers(1, 7))
def test_each_hash_is_its_parents_child(ids: list[int], block_size: int) -> None:
    parent = SEED
    for index, digest in enumerate(block_hashes(SEED, ids, block_size)):
        parent = block_hash(parent, ids[index * block_size : (index + 1) * block_size])
        assert digest == parent


@given(token_ids.filter(bool), st.integers(1, 7), st.data())
def test_a_changed_token_changes_its_block_and_all_after_it(
    ids: list[int], block_size: int, data: st.DataObject
) -> None:
    place = data.draw(st.integers(0, len(ids) - 1))
    changed = [*ids[:place], ids[place] ^ 1, *ids[place + 1 :]]
    before, after = block_hashes(SEED, ids, block_size), block_hashes(SEED, changed, block_size)
    first = place // block_size
    assert before[:first] == after[:first]
    assert not set(before[first:]) & set(after[first:])


def test_equal_blocks_at_different_places_have_different_names() -> None:
    hashes = block_hashes(SEED, [7] * 12, 3)
    assert len(set(hashes)) == 4


def test_models_and_salts_never_meet() -> None:
    seeds = [chain_seed(model, salt) for model in (b"one", b"two", b"") for salt in ("", "a", "b", "é")]
    assert len(set(seeds)) == len(seeds)
    assert len({block_hash(seed, [1, 2]) for seed in seeds}) == len(seeds)
    assert chain_seed(b"one", "a") == chain_seed(b"one", "a")


def test_names_are_the_same_in_every_process_and_release() -> None:
    """They travel between workers; a change of the algorithm needs a new protocol version."""
    assert block_hashes(chain_seed(b"model", "salt"), [1, 2, 3, 4], 2)[-1].hex() == GOLDEN


GOLDEN = "9936931e74c9bc649a53074d22066396"
