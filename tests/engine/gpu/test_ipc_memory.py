"""The driver's calls for memory of other processes, against a driver that only remembers."""

import ctypes
from typing import Any

import pytest
import torch

from baton.core.errors import StartupError, TransferRefused
from baton.engine.pages import ipc_memory
from baton.engine.pages.ipc_memory import CudaIpc
from baton.engine.pages.ipc_memory import ipc_memory as ipc_memory_of

CUDA = torch.device("cuda", 0)
INVALID = 1


class Driver:
    """Allocations by address; a handle is its address in text."""

    def __init__(self, allocations):
        self.allocations = allocations  # size by address
        self.opened = []
        self.ordinal = 1

    def cuIpcGetMemHandle(self, handle, address):  # noqa: N802
        if address.value not in self.allocations:
            return INVALID
        ctypes.memmove(handle, str(address.value).encode().ljust(64, b"\0"), 64)
        return 0

    def cuIpcOpenMemHandle_v2(self, pointer, handle, flags):  # noqa: N802
        assert flags.value == 1
        text = bytes(handle.data).rstrip(b"\0")
        if not text.isdigit() or int(text) not in self.allocations:
            return INVALID
        self.opened.append(int(text))
        pointer._obj.value = int(text)
        return 0

    def cuIpcCloseMemHandle(self, address):  # noqa: N802
        self.opened.remove(address.value)
        return 0

    def cuMemGetAddressRange_v2(self, base, size, address):  # noqa: N802
        found = self._base_of(address.value)
        if found is None:
            return INVALID
        base._obj.value, size._obj.value = found, self.allocations[found]
        return 0

    def cuPointerGetAttribute(self, value, attribute, address):  # noqa: N802
        assert attribute == 9
        value._obj.value = self.ordinal
        return 0

    def cuGetErrorName(self, code, text):  # noqa: N802
        text._obj.value = b"CUDA_ERROR_INVALID_VALUE"
        return 0

    def _base_of(self, address):
        return next((b for b, size in self.allocations.items() if b <= address < b + size), None)


class Memory:
    """A tensor, as far as its address is asked for."""

    def __init__(self, address, device=None):
        self.address = address
        self.device = device

    def data_ptr(self):
        return self.address


def at(address) -> Any:
    return Memory(address)


@pytest.fixture
def driver(monkeypatch):
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(ipc_memory, "_tensor_at", lambda address, num_bytes, device: Memory(address, device))
    return Driver({1 << 20: 4096})


def test_a_pool_inside_an_allocation_is_found_again(driver):
    ipc = CudaIpc(CUDA, driver)
    handle, offset = ipc.export(at((1 << 20) + 512))
    assert (len(handle), offset) == (64, 512)
    memory = ipc.open(handle, offset, 3584)
    assert memory.data_ptr() == (1 << 20) + 512
    assert memory.device == torch.device("cuda", 1)  # where it is, not where this server's own pages are
    assert driver.opened == [1 << 20]
    ipc.close(memory)
    assert not driver.opened


def test_a_pool_that_reaches_beyond_its_allocation_is_refused_and_unmapped(driver):
    ipc = CudaIpc(CUDA, driver)
    handle, offset = ipc.export(at((1 << 20) + 512))
    for where, size in ((offset, 3585), (4096, 1), (-1, 8)):
        with pytest.raises(TransferRefused) as refused:
            ipc.open(handle, where, size)
        assert refused.value.reason == "range"
    assert not driver.opened


def test_a_gpu_that_is_not_visible_is_refused_and_unmapped(driver):
    ipc = CudaIpc(CUDA, driver)
    driver.ordinal = 2
    with pytest.raises(TransferRefused, match="a GPU that this server does not see"):
        ipc.open(*ipc.export(at(1 << 20)), 8)
    assert not driver.opened


@pytest.mark.parametrize("handle", [b"", bytes(64), bytes(65)], ids=["empty", "unknown", "too long"])
def test_what_is_no_handle_is_refused(driver, handle):
    with pytest.raises(TransferRefused) as refused:
        CudaIpc(CUDA, driver).open(handle, 0, 8)
    assert refused.value.reason == "cuda_ipc"


def test_memory_that_cannot_be_shared_says_what_may_be_the_cause(driver):
    with pytest.raises(StartupError, match=r"CUDA_ERROR_INVALID_VALUE.*expandable_segments"):
        CudaIpc(CUDA, driver).export(at(7))


def test_a_cpu_shares_nothing_by_handle():
    with pytest.raises(StartupError, match="not shared by handle"):
        ipc_memory_of(torch.device("cpu")).export(torch.zeros(1))
