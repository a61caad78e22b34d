"""Workers on one machine lend each other the cores that they have no work for.

They share a small file. Each holds one slot of it, by a lock that ends with its process, and writes there
as it computes. The cores are divided among those that do; a step looks again after every layer, so that a
long prompt soon gives back what a request that has just come needs.
"""

import fcntl
import mmap
import os
import struct
from collections.abc import Callable
from pathlib import Path

from baton.core.errors import StartupError

NUM_SLOTS = 64
# When a worker last said that it computes, by the machine's monotonic clock; 0: it waits.
_SLOT = struct.Struct("<Q")
# A worker that has not said so for this long is stopped, or computes a layer that takes forever.
_STALE_NS = 5 * 10**9


class SharedCores:
    """One worker's part of the cores."""

    def __init__(
        self, path: Path, num_cores: int, set_num_threads: Callable[[int], None], clock_ns: Callable[[], int]
    ) -> None:
        """`set_num_threads` applies to the thread that calls it. Raises StartupError."""
        self._num_cores = num_cores
        self._set_num_threads = set_num_threads
        self._clock_ns = clock_ns
        self._num_threads = 0  # not set yet
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            os.ftruncate(self._file, NUM_SLOTS * _SLOT.size)
            self._page = mmap.mmap(self._file, NUM_SLOTS * _SLOT.size)
        except OSError as error:
            raise StartupError(f"'{path}' can't be shared for --share-cores: {error.strerror}") from error
        self._offset = self._claim_slot(path)
        self._others = [o for o in range(0, NUM_SLOTS * _SLOT.size, _SLOT.size) if o != self._offset]

    def working(self) -> None:
        """This worker computes, before a step and again within it: take what is its part by now."""
        now = self._clock_ns()
        _SLOT.pack_into(self._page, self._offset, now)
        num_working = 1 + sum(now - stamp < _STALE_NS for stamp in map(self._stamp, self._others) if stamp)
        num_threads = max(1, self._num_cores // num_working)
        if num_threads != self._num_threads:
            self._num_threads = num_threads
            self._set_num_threads(num_threads)

    def waiting(self) -> None:
        """This worker has nothing to compute."""
        _SLOT.pack_into(self._page, self._offset, 0)

    def close(self) -> None:
        """Leave the slot to others."""
        self.waiting()
        self._page.close()
        os.close(self._file)

    def _claim_slot(self, path: Path) -> int:
        for offset in range(0, NUM_SLOTS * _SLOT.size, _SLOT.size):
            try:
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, _SLOT.size, offset)
            except OSError:  # another worker's
                continue
            _SLOT.pack_into(self._page, offset, 0)  # the last holder may have died with work
            return offset
        raise StartupError(f"'{path}' is full: --share-cores is for at most {NUM_SLOTS} workers")

    def _stamp(self, offset: int) -> int:
        stamp: int = _SLOT.unpack_from(self._page, offset)[0]
        return stamp
