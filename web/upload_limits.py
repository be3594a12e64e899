"""How large a request may be: refused at once where it says so itself, and cut off where it turns out to be.

Gradio takes files of any kind at one address, and has one limit for them. It leaves behind what it has of a file whose
sender goes away; told that the file is wrong, it does not.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from starlette.datastructures import Headers
from starlette.formparsers import MultiPartException
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from web.clients import announced_length

log = logging.getLogger(__name__)

MAX_PICTURE = 100_000_000  # bytes
MAX_LORA = 4 << 30
MAX_TEXT = 4 << 20  # bytes of a request without files; a form with everything in it has some kilobytes
FRAME = 1 << 16  # bytes around a file: its name, and boundaries
KEPT_FREE = 1 << 28  # bytes of the disk that uploads leave to everything else

_LORA_NAME = re.compile(rb'filename="[^"\r\n]*\.safetensors"', re.IGNORECASE)


class UploadLimits:
    """ASGI middleware that passes on requests of a possible size.

    Args:
        app: what is behind it.
        folder: returns where uploads are written.
        apart: where the paths begin of routes that have limits of their own, and answer in their own way.
    """

    def __init__(self, app: ASGIApp, folder: Callable[[], str], apart: str) -> None:
        self._app = app
        self._folder = folder
        self._apart = f"{apart}/"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        unread = scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS")
        if unread or scope["path"].startswith(self._apart):
            await self._app(scope, receive, send)
            return
        body = _Body(receive, Headers(scope=scope))
        refused = await body.begin() or self._no_room(body.announced)
        if refused is None:
            answer = _Answer(send, body)
            try:
                await self._app(scope, body.receive, answer.send)
            except (OSError, MultiPartException) as error:  # the disk is full, and like faults; or nobody took ours
                if answer.begun or not (body.refused or (body.with_files and isinstance(error, OSError))):
                    raise
                log.warning("an upload was not written: %s", error)
                refused = 507, "The file could not be written on the server's disk; try again later.\n"
            refused = None if answer.begun else body.refused or refused
        if refused is not None:
            status, text = refused
            # Closed, or the server would read what is still to come only to throw it away.
            await PlainTextResponse(text, status, {"connection": "close"})(scope, receive, send)

    def _no_room(self, announced: int) -> tuple[int, str] | None:
        try:
            free = shutil.disk_usage(Path(self._folder()).parent).free
        except OSError:
            return None
        if announced <= max(MAX_TEXT, free - KEPT_FREE):
            return None
        return 507, "There is no room for this file on the server's disk; try again later, or with a smaller one.\n"


class _Body:
    """A request's body on its way: what it is, and how much of it has come."""

    def __init__(self, receive: Receive, headers: Headers) -> None:
        self._receive = receive
        self.with_files = headers.get("content-type", "").lower().startswith("multipart/")
        self.announced = announced_length(headers)
        self.refused: tuple[int, str] | None = None
        self._limit, self._what = MAX_TEXT, "a request without files"
        self._come, self._ended = 0, False
        self._held: list[Message] = []

    async def begin(self) -> tuple[int, str] | None:
        """Find out how long it may be, by its first file's name; return why it is refused, None where it is not."""
        if self.with_files:
            self._limit, self._what = MAX_LORA + FRAME, "a LoRA file"
            if self.announced <= self._limit:
                await self._find_name()
        return self._too_large(self.announced)

    async def _find_name(self) -> None:
        start = b""
        while len(start) < FRAME and b"\r\n\r\n" not in start:
            message = await self._receive()
            self._held.append(message)
            start += message.get("body", b"")
            if not message.get("more_body"):
                break
        if not _LORA_NAME.search(start.partition(b"\r\n\r\n")[0]):
            self._limit, self._what = MAX_PICTURE + FRAME, "a picture"

    async def receive(self) -> Message:
        """Return the next message.

        Raises:
            MultiPartException: the body is too large, or its sender has gone: what has come of it is removed.
        """
        message = self._held.pop(0) if self._held else await self._receive()
        if self._ended:
            return message
        if message["type"] == "http.disconnect":
            self._ended = True
            if self.with_files:
                raise MultiPartException("The upload was not completed.")
            return message
        self._come += len(message.get("body", b""))
        self._ended = not message.get("more_body")
        self.refused = self._too_large(self._come)
        if self.refused is not None:
            self._ended = True
            raise MultiPartException(self.refused[1])
        return message

    def _too_large(self, size: int) -> tuple[int, str] | None:
        if size <= self._limit:
            return None
        allowed = self._limit - (FRAME if self.with_files else 0)
        shown = f"{allowed / 1e6:.0f} MB" if allowed < 1e9 else f"{allowed >> 30} GiB"
        return 413, f"This is too large: {self._what} may have up to {shown}.\n"


class _Answer:
    """What goes back, unless the body was refused on its way."""

    def __init__(self, send: Send, body: _Body) -> None:
        self._send, self._body, self.begun = send, body, False

    async def send(self, message: Message) -> None:
        if self._body.refused is None or self.begun:
            self.begun = True
            await self._send(message)
