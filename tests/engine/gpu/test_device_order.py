"""What an engine tells waits for the device, and stays in order."""

import queue
import threading

import pytest

from baton.core.commands import EngineOutput
from baton.core.request import BlocksReserved, LoadSnapshot, PagesReady
from baton.engine.pages.device_order import DeviceOrder

SOON_S = 10.0


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


def layers():
    """Of pages that a step under way completes."""
    return output(pages=[PagesReady("request", 0, (1,), 0, 2, False)], is_within_step=True, mark=HeldMark())


@pytest.fixture
def made():
    passed = queue.SimpleQueue()
    order = DeviceOrder(passed.put, passed.put)
    order.start()
    yield passed, order
    order.stop()


def test_layers_wait_for_their_mark_and_all_stay_in_order(made):
    passed, order = made
    pages = output(pages=[PagesReady("request", 0, (1,), 2, None, True)])
    reserved = output(reserved=[BlocksReserved("request", (1,), 0)])
    sent = [output(), layers(), layers(), pages, reserved, output()]
    for one in sent:
        order.put(one)
    assert passed.get(timeout=SOON_S) is sent[0]
    for one in sent[1:3]:
        assert one.mark.is_awaited.wait(SOON_S)
        assert passed.empty()
        one.mark.reached.set()
        assert passed.get(timeout=SOON_S) is one
    for one in sent[3:]:
        assert passed.get(timeout=SOON_S) is one


def test_what_goes_wrong_on_the_device_ends_it(made):
    passed, order = made
    failing = layers()
    order.put(failing)
    failing.mark.error = RuntimeError("an illegal memory access")
    failing.mark.reached.set()
    order.put(output())
    assert str(passed.get(timeout=SOON_S)) == "an illegal memory access"
    order.stop()
    assert passed.empty()
