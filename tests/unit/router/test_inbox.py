"""Events on their way to one reader."""

import asyncio

import pytest

from router.inbox import Inbox


async def test_events_come_in_order_to_a_reader_that_waits_or_comes_late() -> None:
    inbox: Inbox[int] = Inbox()
    waiting = asyncio.ensure_future(inbox.get())
    await asyncio.sleep(0)
    inbox.put_nowait(1)
    inbox.put_nowait(2)
    assert await waiting == 1
    assert await inbox.get() == 2


async def test_a_cancelled_reader_takes_no_event_with_it() -> None:
    inbox: Inbox[int] = Inbox()
    waiting = asyncio.ensure_future(inbox.get())
    await asyncio.sleep(0)
    inbox.put_nowait(1)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert await inbox.get() == 1


async def test_what_is_there_can_be_taken_at_once() -> None:
    inbox: Inbox[int] = Inbox()
    assert inbox.take_all() == []
    inbox.put_nowait(1)
    inbox.put_nowait(2)
    assert inbox.take_all() == [1, 2]
    waiting = asyncio.ensure_future(inbox.get())
    await asyncio.sleep(0)
    inbox.put_nowait(3)
    assert await waiting == 3
