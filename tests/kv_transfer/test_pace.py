"""How fast pages may arrive beside running requests."""

import pytest

from baton_kv_transfer.transfers.pace import BURST_BYTES, BYTES_PER_CORE_SECOND, InboundPace

FRAME = 1 << 19


def serving() -> bool:
    return True


def test_nothing_waits_while_nobody_is_served() -> None:
    pace = InboundPace(lambda: False, num_cores=1)
    assert all(pace.delay_s(BURST_BYTES, now) == 0.0 for now in (0.0, 0.0, 0.001))


def test_a_chunk_comes_at_once_and_more_at_the_steady_rate() -> None:
    pace = InboundPace(serving, num_cores=2)
    now = 100.0
    while (delay := pace.delay_s(FRAME, now)) == 0.0:
        pass
    num_bytes = BURST_BYTES + FRAME
    for _ in range(1000):
        now += delay
        delay = pace.delay_s(FRAME, now)
        num_bytes += FRAME
    assert num_bytes - BURST_BYTES == pytest.approx(
        (now + delay - 100.0) * 2 * BYTES_PER_CORE_SECOND, rel=0.01
    )


def test_a_pause_earns_one_burst_and_no_more() -> None:
    pace = InboundPace(serving, num_cores=1)
    assert pace.delay_s(BURST_BYTES, 0.0) == 0.0
    assert pace.delay_s(BURST_BYTES, 1000.0) == 0.0
    assert pace.delay_s(FRAME, 1000.0) == pytest.approx(FRAME / BYTES_PER_CORE_SECOND)


def test_bytes_that_came_while_nobody_was_served_are_not_waited_for_later() -> None:
    has_requests = False
    pace = InboundPace(lambda: has_requests, num_cores=1)
    for _ in range(100):
        pace.delay_s(BURST_BYTES, 5.0)
    has_requests = True
    assert pace.delay_s(BURST_BYTES, 5.0) == 0.0


def test_more_cores_take_more() -> None:
    few, many = (InboundPace(serving, num_cores=cores) for cores in (1, 8))
    assert few.delay_s(3 * BURST_BYTES, 0.0) == pytest.approx(2 * BURST_BYTES / BYTES_PER_CORE_SECOND)
    assert many.delay_s(3 * BURST_BYTES, 0.0) == pytest.approx(2 * BURST_BYTES / (8 * BYTES_PER_CORE_SECOND))
