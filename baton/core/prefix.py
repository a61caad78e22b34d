"""Names of KV blocks by content, so that equal prefixes are found again (automatic prefix caching).

A block's hash covers its own tokens and, through its parent's hash, all tokens before it; the chain
starts from a seed of model fingerprint and cache salt. 128 bits of BLAKE2b (RFC 7693): a collision would
hand one user's KV to another, so the hash is a cryptographic one.
"""

import array
import hashlib
import sys
from collections.abc import Sequence

HASH_BYTES = 16
_TOKEN_ID_BYTES = 4


def chain_seed(model_fingerprint: bytes, cache_salt: str = "") -> bytes:
    """The parent of the first block's hash; different salts never meet."""
    return hashlib.blake2b(
        cache_salt.encode(), digest_size=HASH_BYTES, key=model_fingerprint, person=b"baton-prefix"
    ).digest()


def pack_token_ids(token_ids: Sequence[int]) -> bytes:
    """Little-endian uint32 each: the form that is hashed and that travels."""
    packed = array.array("I", token_ids)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def unpack_token_ids(packed: bytes) -> list[int]:
    """Inverse of pack_token_ids. Raises ValueError where `packed` is not a whole number of ids."""
    token_ids = array.array("I")
    token_ids.frombytes(packed)
    if sys.byteorder == "big":
        token_ids.byteswap()
    return token_ids.tolist()


def block_hash(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Hash of one full block whose predecessor's hash is `parent`."""
    return _hash(parent + pack_token_ids(token_ids))


def block_hashes(seed: bytes, token_ids: Sequence[int], block_size: int) -> list[bytes]:
    """Hashes of all full blocks of `token_ids`; a last, partial block has none."""
    hashes: list[bytes] = []
    parent = seed
    packed = pack_token_ids(token_ids)
    block_bytes = block_size * _TOKEN_ID_BYTES
    for start in range(0, len(packed) - block_bytes + 1, block_bytes):
        parent = _hash(parent + packed[start : start + block_bytes])
        hashes.append(parent)
    return hashes


def _hash(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=HASH_BYTES).digest()
