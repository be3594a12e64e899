"""Who still reads what comes of a request: a run whose reader has gone, or never came, is not carried on.

Gradio notices a reader who goes while something is read. A program that asks and never reads, it works for to the end.
"""

from __future__ import annotations

import re
import threading
import time
from collections import Counter
from collections.abc import Iterable
from urllib.parse import parse_qs

from starlette.types import ASGIApp, Receive, Scope, Send

NEVER_CAME = 60.0  # seconds after asking in which somebody has to begin to read
HAS_GONE = 2.0  # seconds after the last reader has gone
_STREAM = re.compile(r"/gradio_api/(?:queue/data|call/(?:v2/)?[^/]+/([^/]+))/?$")


class Readers:
    """The readers of sessions and of single events, by what they ask for."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._reading: Counter[str] = Counter()
        self._left: dict[str, float] = {}

    def come(self, name: str) -> None:
        """Note that somebody has begun to read."""
        with self._lock:
            self._reading[name] += 1

    def leave(self, name: str) -> None:
        """Note that somebody has stopped reading."""
        with self._lock:
            now = time.monotonic()
            self._reading[name] -= 1
            if not self._reading[name]:
                del self._reading[name]
                self._left = {key: at for key, at in self._left.items() if now - at < NEVER_CAME} | {name: now}

    def have_gone(self, names: Iterable[str], since: float) -> bool:
        """Whether nobody reads what was asked for at a time, by one of its names, and nobody is expected to."""
        with self._lock:
            names = list(names)
            if any(name in self._reading for name in names):
                return False
            left = max((self._left.get(name, 0.0) for name in names), default=0.0)
            return time.monotonic() - max(left, since) > (HAS_GONE if left > since else NEVER_CAME)


READERS = Readers()  # of this process, which serves one page


class Reading:
    """ASGI middleware that notes who reads a stream of events."""

    def __init__(self, app: ASGIApp, readers: Readers = READERS) -> None:
        self._app = app
        self._readers = readers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        found = _STREAM.search(scope["path"]) if scope["type"] == "http" and scope["method"] == "GET" else None
        if found is None:
            await self._app(scope, receive, send)
            return
        name = found[1] or parse_qs(scope["query_string"].decode("latin-1")).get("session_hash", [""])[-1]
        self._readers.come(name)
        try:
            await self._app(scope, receive, send)
        finally:
            self._readers.leave(name)
