"""Runs of programs: begun for their key or address, and cancelled when the client that waits for them goes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable
from contextlib import aclosing
from typing import Any, TypeVar

import anyio
from starlette.requests import Request

from core.errors import GpuNoVisitor
from core.events import Event
from core.request import DrawRequest
from engine import Engine, zerogpu
from web.api_errors import ApiError
from web.run import carry_out, stepped

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
    return stepped(carry_out(engine, mode, (request.state.client, ""), fields, count))


async def unheld(first: T, events: AsyncGenerator[T]) -> AsyncGenerator[T]:
    """Yield a run's `first` event and the others, which come read or not: a slow reader keeps nobody else waiting."""
    arrived: asyncio.Queue[T | None] = asyncio.Queue()
    arrived.put_nowait(first)

    async def work() -> None:
        try:
            async with aclosing(events):
                async for event in events:
                    arrived.put_nowait(event)
        finally:
            arrived.put_nowait(None)

    working = asyncio.create_task(work())
    try:
        while (event := await arrived.get()) is not None:
            yield event
        await working  # which raises what the run has raised
    finally:
        working.cancel()
        with anyio.CancelScope(shield=True):
            await asyncio.wait({working})


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
