"""Runs followed from the event loop: the engine's generators work in threads of their own, one for each run.

The engine's queue bounds how many there are, also of those that wait: each waits in the queue's own lock.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Awaitable, Generator
from contextlib import closing
from typing import Any, TypeVar

from starlette.requests import Request

from core.errors import GpuNoVisitor
from core.events import Event
from core.request import DrawRequest
from engine import Engine, zerogpu
from web.api_errors import ApiError
from web.run import carry_out

T = TypeVar("T")


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


def begin(
    engine: Engine, request: Request, mode: type[DrawRequest], fields: dict[str, Any], count: int = 1
) -> AsyncGenerator[Event, None]:
    """Return the events of what a program asks for; its fields are unchecked. Each key, or address, is one client.

    Raises:
        ApiError: this is a Space that draws on the quota of its visitors.
    """
    if zerogpu.ACTIVE:  # they come by Gradio's own events only
        raise ApiError.of(GpuNoVisitor())
    return follow(carry_out(engine, mode, (request.state.client, ""), fields, count))


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


async def while_connected(request: Request, work: Awaitable[T]) -> T:
    """Await work that a client waits for, and cancel it when the client goes. The request's body has been read.

    Raises:
        ClientGone: the client went first.
    """
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        watching.cancel()
        working.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
