"""Requests that no page and no client of ours sends: answered with 4xx, and with one line in the log.

Gradio reads requests trustingly: a wrong type, an unknown number or half a character becomes an exception of its own, a
status of 500 and a traceback. `Malformed` stands around its routes, `CheckedBlocks` around what its queue carries out,
where it is noted too whose files are whose.
"""

from __future__ import annotations

import logging
import os
import traceback
from typing import Any

import gradio as gr
import httpx
from gradio.block_function import BlockFunction
from gradio.route_utils import FnIndexInferError
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from core.errors import StudioError
from web.language import Say, say_to
from web.run import FAULT
from web.visits import SESSION, VISITS

log = logging.getLogger(__name__)

# What code that trusts its input raises where that is wrong; everything else is a fault of the server's.
WRONG_INPUT = (
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    ArithmeticError,
    RecursionError,
    httpx.InvalidURL,
    FnIndexInferError,
)
NOT_UNDERSTOOD = "The server could not make sense of this request."


class Malformed:
    """ASGI middleware that answers with 400 where a route fails on what it was sent.

    Args:
        app: what is behind it.
        apart: where the paths begin of routes that check what they are sent themselves.
    """

    def __init__(self, app: ASGIApp, apart: str) -> None:
        self._app, self._apart = app, f"{apart}/"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http" or scope["path"].startswith(self._apart):
            await self._app(scope, receive, send)
            return
        begun = False

        async def send_on(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._app(scope, receive, send_on)
        except Exception as error:
            status = _status(error)
            if status is None:
                raise
            log.debug("malformed", exc_info=error)
            log.warning("malformed: %s %s: %s", scope["method"], ascii(scope["path"][:200]), summary(error))
            if begun:  # a stream of events, which has told its reader
                await send({"type": "http.response.body", "body": b""})
            else:
                await PlainTextResponse(f"{NOT_UNDERSTOOD}\n", status)(scope, receive, send)


def _status(error: BaseException) -> int | None:
    """Return the status for what a route raised, None where it is a fault of the server's."""
    if isinstance(error, RuntimeError) and isinstance(error.__cause__, HTTPException):  # after a stream began
        error = error.__cause__
    if isinstance(error, HTTPException):
        return error.status_code
    return 400 if isinstance(error, WRONG_INPUT) else None


def summary(error: BaseException) -> str:
    """Return an exception and the place where it was raised, on one line of bounded length."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    return ascii(f"{type(error).__name__}: {str(error)[:200]}")[1:-1] + f" ({place.filename}:{place.lineno})"


class CheckedBlocks(gr.Blocks):
    """Gradio's page, which refuses input of the wrong kind in a sentence, and keeps to itself what failed inside."""

    async def process_api(self, *given: Any, **named: Any) -> dict[str, Any]:
        """Carry out a call, as Gradio does.

        Raises:
            gr.Error: it failed, in a sentence without anything of this machine.
        """
        session = named.get("session_hash") or ""
        SESSION.set(session)
        try:
            with VISITS.open(session):
                return await super().process_api(*given, **named)
        except gr.Error as error:
            error.print_exception = False
            raise
        except Exception as error:
            say = _say()
            if isinstance(error, StudioError):
                raise gr.Error(say(error.message), title=error.code, print_exception=False) from error
            if isinstance(error, WRONG_INPUT):
                log.warning("a listener failed, for its input or its own fault: %s", summary(error))
            else:
                log.exception("a listener failed")
            raise gr.Error(say(FAULT), print_exception=False) from error

    async def preprocess_data(self, block_fn: BlockFunction, inputs: list[Any], *given: Any, **named: Any) -> Any:
        """Make what a listener takes of what was sent, as Gradio does.

        Raises:
            gr.Error: that is not possible.
        """
        try:
            if _names_folder(inputs):
                raise ValueError("a folder in place of a file")
            VISITS.use(SESSION.get(), inputs)
            return await super().preprocess_data(block_fn, inputs, *given, **named)
        except gr.Error:
            raise
        except Exception as error:
            log.warning("malformed: input of %r: %s", block_fn.api_name, summary(error))
            raise gr.Error(_say()(NOT_UNDERSTOOD), print_exception=False) from error

    async def postprocess_data(self, *given: Any, **named: Any) -> list[Any]:
        """Make what is sent of what a listener returned, as Gradio does."""
        sent = await super().postprocess_data(*given, **named)
        VISITS.use(SESSION.get(), sent)
        return sent


def _say() -> Say:
    """Return what words a text for the visitor whose call is being carried out."""
    return say_to(gr.context.LocalContext.request.get(None))


def _names_folder(given: Any) -> bool:
    """Whether a folder is given for a file: Gradio would note it, and later fail to delete it and all after it."""
    level = [given]
    while level:
        value = level.pop()
        if isinstance(value, dict):
            path = value.get("path")
            if isinstance(path, str) and "\0" not in path and os.path.isdir(path):
                return True
            level += value.values()
        elif isinstance(value, list):
            level += value
    return False
