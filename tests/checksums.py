"""crc32c (RFC 3720), also where the package for it is not installed: `bench.gpu_check` is to do without."""

from importlib.util import find_spec

if find_spec("crc32c") is not None:
    from crc32c import crc32c
else:

    def _entry(byte: int) -> int:
        for _ in range(8):
            byte = byte >> 1 ^ (byte & 1) * 0x82F63B78
        return byte

    _TABLE = tuple(_entry(byte) for byte in range(256))

    def crc32c(payload: bytes, value: int = 0) -> int:
        value ^= 0xFFFFFFFF
        for byte in payload:
            value = value >> 8 ^ _TABLE[(value ^ byte) & 0xFF]
        return value ^ 0xFFFFFFFF


__all__ = ["crc32c"]
