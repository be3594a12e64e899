"""Who may come in: where the password is read from, and how often one may be tried."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from core.errors import RequestError
from web.client_limits import Allowance
from web.clients import sender

VARIABLE = "Z_IMAGE_AUTH"
FORM = "user:password"
# Failures: what forgetful people need, and what many addresses together may try of all passwords.
OF_ONE, OF_ALL, SECONDS = 10, 300, 600
MAX_FILE = 4096  # bytes


def account(auth: str | None, auth_file: str | None, environ: Mapping[str, str] = os.environ) -> str | None:
    """Return "user:password" as visitors must give it; None where they need none.

    Args:
        auth: the text itself, as on the command line, where others on this machine can read it.
        auth_file: a file whose first line it is.
        environ: its Z_IMAGE_AUTH is the text where neither is given.

    Raises:
        RequestError: it is malformed, or cannot be read; what it is, is not repeated.
    """
    name, given = "auth", auth
    if given is None and auth_file is not None:
        name, given = "auth_file", _first_line(auth_file)
    if given is None and environ.get(VARIABLE):
        name, given = VARIABLE, environ[VARIABLE]
    if given is not None:
        parts(given, name)
    return given


def parts(given: str, name: str = "auth") -> tuple[str, str]:
    """Return the user and the password that a text holds.

    Raises:
        RequestError: it holds none; the text is not repeated, for it may be a password.
    """
    user, colon, password = given.partition(":")
    if not (user and colon and password):
        raise RequestError(name, "***", FORM)
    return user, password


def _first_line(path: str) -> str:
    try:
        with Path(path).open("rb") as file:
            return file.read(MAX_FILE).decode().partition("\n")[0].rstrip("\r")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise RequestError(
            "auth_file", path, f"a file that can be read, whose first line is {FORM} ({reason})"
        ) from None


class LoginLimits:
    """ASGI middleware that lets a password be tried only so often: from one address, and from all of them.

    An attempt counts when it begins, or many at once would count as none, and not any more when it was right.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._own, self._all = Allowance(OF_ONE, SECONDS), Allowance(OF_ALL, SECONDS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http" or scope["method"] != "POST" or not re.search(r"/login/?$", scope["path"]):
            await self._app(scope, receive, send)
            return
        client = sender(scope, Headers(scope=scope))
        wait = self._own.seconds_for(client, 1)
        if not wait and (wait := self._all.seconds_for("", 1)):
            self._own.give_back(client, 1)
        if wait:
            text = "Too many passwords were tried; try again later.\n"
            await PlainTextResponse(text, 429, {"retry-after": str(math.ceil(wait))})(scope, receive, send)
            return

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] < 400:
                self._own.give_back(client, 1)
                self._all.give_back("", 1)
            await send(message)

        await self._app(scope, receive, answer)
