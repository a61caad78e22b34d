"""What glibc is told to keep is not given back to the system."""

import platform
import subprocess
import sys

import pytest

_FAULTS = """
import resource
from baton.rpc.allocator import keep_message_buffers

if {keep}:
    assert keep_message_buffers()

def use_buffers() -> None:
    buffers = [b"x" * (512 << 10) for _ in range(16)]
    del buffers

use_buffers()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    use_buffers()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator is told so, no other")
def test_buffers_are_used_again_without_page_faults() -> None:
    def faults(keep: bool) -> int:
        command = [sys.executable, "-c", _FAULTS.format(keep=keep)]
        return int(subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout)

    assert faults(keep=True) < 100 < faults(keep=False)
