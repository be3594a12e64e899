"""Unchecked forms carried out, as events; a form that is wrong is a failure like any other."""

import asyncio
import functools
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterator
from contextlib import aclosing, closing
from contextvars import ContextVar
from dataclasses import dataclass, replace
from html import escape
from typing import Any, ParamSpec, TypeVar

import anyio
import anyio.to_thread
import gradio as gr

from core.errors import StudioError
from core.events import Event, Failure, Queued
from core.request import SEED_MAX, DrawRequest, random_seed
from core.sizes import smaller
from engine import Engine
from engine.engine import POLL_SECONDS
from hub import fine_tunes
from web.language import say_to
from web.readers import READERS
from web.situation import Situation
from web.words import KEPT

FAULT = "That did not work; the server's log says why."
THREADS = 40  # for what runs do besides waiting, one of which draws; and as many for all other listeners
LONGEST_PAUSE = 2.0  # seconds after which a request far behind looks for its turn

Given = ParamSpec("Given")
Shown = TypeVar("Shown")


@dataclass
class _Turn:
    """How many requests come before a run, as it was last told."""

    ahead: int = 0


_turn: ContextVar[_Turn | None] = ContextVar("turn", default=None)


@functools.cache
def _threads() -> anyio.CapacityLimiter:
    return anyio.CapacityLimiter(THREADS)


async def stepped(shown: Iterator[Shown], is_read: Callable[[], bool] = lambda: True) -> AsyncGenerator[Shown]:
    """Yield what carries a run out, in threads: one while a step is worked on, none while the run waits for its turn.

    A place in the queue is shown once. Closing or cancelling it ends the run after the step that is under way.

    Args:
        shown: what carries the run out, by `carry_out`.
        is_read: whether anybody reads on; asked after each step.

    Raises:
        Exception: whatever the run raises, which is a fault of ours.
    """
    turn, told, end, stepping = _Turn(), 0, object(), threading.Lock()

    def step() -> Any:
        with stepping:
            return next(shown, end)

    def close() -> None:
        with stepping:  # a caller that cancels does not wait for the step that is under way
            if isinstance(shown, Generator):
                shown.close()

    try:
        while True:
            _turn.set(turn)
            update: Any = await anyio.to_thread.run_sync(step, limiter=_threads())
            if update is end or not is_read():
                return
            if not turn.ahead or turn.ahead != told:
                yield update
            told = turn.ahead
            if turn.ahead:
                await asyncio.sleep(min(LONGEST_PAUSE, POLL_SECONDS * max(1, turn.ahead / 8)))
    finally:
        with anyio.CancelScope(shield=True):  # what cancelled the caller would cancel this too
            await anyio.to_thread.run_sync(close)


def unhurried(listener: Callable[Given, Iterator[Shown]]) -> Callable[Given, AsyncIterator[Shown]]:
    """Return a listener that carries a run out, `stepped`, and ends it when nobody on the page reads it any more."""

    @functools.wraps(listener)
    async def listen(*given: Given.args, **named: Given.kwargs) -> AsyncIterator[Shown]:
        since, context = time.monotonic(), gr.context.LocalContext
        request, event = context.request.get(None), context.event_id.get(None)
        readers = {name for name in (event, getattr(request, "session_hash", None)) if name}
        run = stepped(iter(listener(*given, **named)), lambda: not (readers and READERS.have_gone(readers, since)))
        async with aclosing(run):
            async for update in run:
                yield update

    return listen


def carry_out(
    engine: Engine, mode: type[DrawRequest], asker: tuple[str, str], fields: dict[str, Any], count: int = 1
) -> Generator[Event, None, None]:
    """Carry out an unchecked form; a form that is wrong is a failure like any other. Closing it cancels the work.

    `count` pictures are drawn, one after the other, with consecutive seeds; a failure ends them.

    Args:
        engine: what draws.
        mode: the form's request.
        asker: who asks, and in which session, as `web.clients.caller`; the queue is fair among both.
        fields: the form.
        count: how many pictures.
    """
    try:
        if fields.get("checkpoint"):
            fine_tunes.offered(fields["checkpoint"])
        request = mode.parse(**fields)
    except StudioError as error:
        yield Failure.of(error)
        return
    if count > 1 and not request.seed:
        request = request.model_copy(update={"seed": random_seed()})
    turn, (client, session) = _turn.get(), asker
    patience = POLL_SECONDS if turn is None else 0
    for _ in range(count):
        failed = False
        with closing(engine.run(request, client, session, patience)) as events:
            for event in events:
                if turn is not None:
                    turn.ahead = event.ahead if isinstance(event, Queued) else 0
                failed = isinstance(event, Failure)
                yield pointed(event, engine, request) if isinstance(event, Failure) else event
        if failed:
            return
        request = request.model_copy(update={"seed": request.seed % SEED_MAX + 1})


def pointed(failure: Failure, engine: Engine, request: DrawRequest) -> Failure:
    """Return a failure with the change that likely fixes it, where it names none itself: a smaller size, or no LoRA."""
    found: dict[str, Any] = {}
    if failure.code in ("out_of_memory", "broken_picture") and request.lora_name:
        found = {"field": "lora"}
    if failure.code in ("out_of_memory", "gpu_aborted") and request.sides is not None:
        sizes = Situation.of(engine, type(request), request.model, request.checkpoint_name).sizes
        width, height = (side or sizes.native for side in request.sides)
        if less := smaller(width, height, sizes):
            found = {"field": "size", "nearest": f"{less[0]} x {less[1]}"}
    return replace(failure, values={**found, **failure.values})


def broken(visitor: gr.Request) -> str:
    """Return the text for a listener that failed itself, which is a fault of ours."""
    say = say_to(visitor)
    return f'<p class="failed">{escape(say(FAULT))} {escape(say(KEPT))}</p>'
