"""crc32c on a device against the library that the network's side uses."""

import numpy as np
import pytest
import torch
from crc32c import crc32c

from baton_kernels.gpu.checksum import crc32c_of, crc32c_remainder


def on_device(payload: bytes, device: torch.device) -> int:
    words = torch.from_numpy(np.frombuffer(payload, np.int32).copy()).to(device)
    remainder = torch.full((1,), 7, dtype=torch.int32, device=device)
    crc32c_remainder(words, remainder)
    return crc32c_of(int(remainder.item()), len(payload))


@pytest.mark.parametrize("num_words", [1, 2, 255, 256, 257, 8191, 8192, 8193, 20_000])
def test_equals_the_library(device: torch.device, num_words: int) -> None:
    payload = np.random.default_rng(num_words).bytes(4 * num_words)
    assert on_device(payload, device) == crc32c(payload)


def test_the_standards_own_example(device: torch.device) -> None:
    """RFC 3720, appendix B.4: 32 bytes of zeros, of ones, and counting up."""
    assert on_device(bytes(32), device) == 0x8A9136AA
    assert on_device(b"\xff" * 32, device) == 0x62A8AB43
    assert on_device(bytes(range(32)), device) == 0x46DD794E


def test_every_bit_counts(device: torch.device) -> None:
    payload = np.random.default_rng(0).bytes(64)
    right = on_device(payload, device)
    for bit in (0, 7, 8, 31, 32, 300, 511):
        changed = bytearray(payload)
        changed[bit // 8] ^= 1 << bit % 8
        assert on_device(bytes(changed), device) != right


@pytest.mark.gpu
def test_equals_the_library_on_whole_buffers(device: torch.device) -> None:
    pytest.importorskip("crc32c", reason="takes minutes without: pip install .")
    for num_bytes in (4 << 20, (64 << 20) + 4):
        payload = np.random.default_rng(num_bytes).bytes(num_bytes)
        assert on_device(payload, device) == crc32c(payload)
