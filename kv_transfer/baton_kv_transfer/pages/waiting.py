"""Waiting for what can't be called back."""

import asyncio
import contextlib
from typing import Any


async def settled(future: asyncio.Future[Any]) -> None:
    """Wait for `future`, whatever comes; for those who are cancelled already."""
    while not future.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait([future])
    if not future.cancelled():
        future.exception()  # seen
