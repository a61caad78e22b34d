"""What an engine tells waits for the device, and stays in order."""

import queue
import threading

import pytest

from baton.core.commands import EngineOutput
from baton.core.request import BlocksReserved, LoadSnapshot, PagesReady
from baton.engine.device_order import DeviceOrder

SOON_S = 10.0


class Device:
    """Its marks are reached when the test says so (baton.core.ports.DevicePages, as far as it is used)."""

    def __init__(self):
        self.marks = []

    def mark(self):
        self.marks.append(HeldMark())
        return self.marks[-1]


class HeldMark:
    def __init__(self):
        self.reached = threading.Event()
        self.is_awaited = threading.Event()
        self.error = None

    def wait(self):
        self.is_awaited.set()
        assert self.reached.wait(SOON_S)
        if self.error is not None:
            raise self.error


def output(**what):
    load = LoadSnapshot(*range(8))
    return EngineOutput(load, **what)


def pages():
    return output(pages=[PagesReady("request", 0, (1,), 0, None, True)])


@pytest.fixture
def made():
    device, passed = Device(), queue.SimpleQueue()
    order = DeviceOrder(device, passed.put, passed.put)
    order.start()
    yield device, passed, order
    for mark in device.marks:
        mark.reached.set()
    order.stop()


def test_pages_and_reservations_wait_for_the_device(made):
    device, passed, order = made
    sent = [output(), pages(), output(reserved=[BlocksReserved("request", (1,), 0)]), output()]
    for one in sent:
        order.put(one)
    assert passed.get(timeout=SOON_S) is sent[0]
    for index in (0, 1):
        assert device.marks[index].is_awaited.wait(SOON_S)
        assert passed.empty()
        device.marks[index].reached.set()
        assert passed.get(timeout=SOON_S) is sent[index + 1]
    assert passed.get(timeout=SOON_S) is sent[3]
    assert len(device.marks) == 2


def test_what_goes_wrong_on_the_device_ends_it(made):
    device, passed, order = made
    order.put(pages())
    device.marks[0].error = RuntimeError("an illegal memory access")
    device.marks[0].reached.set()
    order.put(output())
    assert str(passed.get(timeout=SOON_S)) == "an illegal memory access"
    order.stop()
    assert passed.empty()
