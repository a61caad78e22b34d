"""A decode server that is gone for good, and that nobody sends to any more."""

import asyncio
import logging
from pathlib import Path
from unittest.mock import create_autospec

import pytest

from baton_kv_transfer.transports.pair import link as pair_link
from baton_kv_transfer.transports.pair.link import Pair, PairLink
from tests.services.cluster import until


async def test_nobody_looks_for_a_pair_that_nobody_wants(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(pair_link, "RETRY_DELAYS_S", (0.02, 0.02))
    caplog.set_level(logging.WARNING)
    link = PairLink(f"unix:{tmp_path}/gone", (), 1 << 20, 1.0, None)
    try:
        for num_wanted in (1, 2):
            assert link.pair(1, "cpu") is None
            await until(lambda: len(caplog.records) == num_wanted)  # noqa: B023 - awaited in this round
            await asyncio.sleep(0.2)  # ten times the longest delay between two tries
            assert len(caplog.records) == num_wanted
    finally:
        await link.close()


@pytest.mark.parametrize("is_whole", [True, False])
async def test_a_pair_that_has_broken_is_not_offered_while_it_closes(tmp_path: Path, is_whole: bool) -> None:
    """An attempt that is given it fails at once: all three of a request are over before it is closed."""
    link = PairLink(f"unix:{tmp_path}/gone", (), 1 << 20, 1.0, None)
    try:
        link.pair(1, "cpu")
        pair = link._pair = create_autospec(Pair, instance=True, is_whole=is_whole)
        assert link.pair(1, "cpu") is (pair if is_whole else None)
    finally:
        await link.close()
