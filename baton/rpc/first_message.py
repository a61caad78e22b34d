"""What a call from another server says first."""

import asyncio
from collections.abc import AsyncIterator
from typing import TypeVar

FIRST_MESSAGE_TIMEOUT_S = 10.0

Message = TypeVar("Message")


async def first_message(messages: AsyncIterator[Message]) -> Message | None:
    """None where the caller hangs up, or has said nothing for `FIRST_MESSAGE_TIMEOUT_S`."""
    try:
        async with asyncio.timeout(FIRST_MESSAGE_TIMEOUT_S):
            return await anext(messages, None)
    except TimeoutError:
        return None
