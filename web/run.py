"""Unchecked forms carried out, as events; a form that is wrong is a failure like any other."""

from collections.abc import Generator
from contextlib import closing
from dataclasses import replace
from html import escape
from typing import Any

import gradio as gr

from core.errors import StudioError
from core.events import Event, Failure
from core.request import SEED_MAX, DrawRequest, random_seed
from core.sizes import smaller
from engine import Engine
from hub import fine_tunes
from web.language import say_to
from web.situation import Situation
from web.words import KEPT

FAULT = "That did not work; the server's log says why."


def carry_out(
    engine: Engine, mode: type[DrawRequest], visitor: gr.Request, fields: dict[str, Any], count: int = 1
) -> Generator[Event, None, None]:
    """Carry out an unchecked form; a form that is wrong is a failure like any other. Closing it cancels the work.

    `count` pictures are drawn, one after the other, with consecutive seeds; a failure ends them.
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
    for _ in range(count):
        failed = False
        with closing(engine.run(request, client=visitor.session_hash or "")) as events:
            for event in events:
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
