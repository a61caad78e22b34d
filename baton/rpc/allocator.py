"""Tells the C library's allocator to keep the memory that gRPC's messages are made of."""

import ctypes

# <malloc.h> of glibc
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3

_LONGEST_KEPT = 32 << 20  # bytes; the longest that glibc takes for M_MMAP_THRESHOLD
_MOST_KEPT = 128 << 20


def keep_message_buffers() -> bool:
    """Let freed memory be used again instead of going back to the system; returns whether that can be told.

    A frame of pages is copied into a buffer of its own on both sides. By default glibc gives such a buffer
    back when it is freed, and the system clears every page of the next one: a fifth of a transfer's time.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # another C library than glibc: it has its own ways
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _LONGEST_KEPT) and mallopt(_M_TRIM_THRESHOLD, _MOST_KEPT))
