"""Runs followed from an event loop: the engine's generators work in threads of their own, one for each run.

The engine's queue bounds how many there are, also of those that wait: each waits in the queue's own lock.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Generator
from contextlib import closing

from core.events import Event


async def follow(events: Generator[Event, None, None]) -> AsyncGenerator[Event, None]:
    """Yield the events of a run, which works in a thread; closing it closes the run at its next event.

    Raises:
        Exception: whatever the run raises, which is a fault of ours.
    """
    loop = asyncio.get_running_loop()
    arrived: asyncio.Queue[Event | Exception | None] = asyncio.Queue()
    closed = threading.Event()

    def hand_over(event: Event | Exception | None) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(arrived.put_nowait, event)

    def work() -> None:
        try:
            with closing(events):
                for event in events:
                    if closed.is_set():
                        return
                    hand_over(event)
        except Exception as error:
            hand_over(error)
        else:
            hand_over(None)

    threading.Thread(target=work, name="run", daemon=True).start()
    try:
        while (event := await arrived.get()) is not None:
            if isinstance(event, Exception):
                raise event
            yield event
    finally:
        closed.set()
