"""How much one client may ask for: requests and bytes in a time, and places in the queue. Beyond that, 429.

Programs learn in `Retry-After` when to ask again. This machine's own requests are not counted: nothing tells its users
apart. Each limit is a setting, since a school has one address.
"""

from __future__ import annotations

import math
import re
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from core.errors import RequestError
from engine.fair_queue import UNLIMITED
from web.clients import announced_length, sender
from web.origins import SAFE_METHODS

QUEUE_SECONDS = 10  # after which another place may be free: about what a picture takes on a card
MOST_CLIENTS = 10_000  # that are remembered
_CALL = re.compile(r"/gradio_api/call/(?:v2/)?(\w+)/?$")


@dataclass(frozen=True)
class ClientLimits:
    """What one client may ask for; 0 for as much as it likes.

    Attributes:
        requests: how many requests that send something, in a minute. A page sends some while its visitor types.
        gigabytes: how many GB (10^9 bytes) it may send in an hour.
    """

    requests: int = 1200
    gigabytes: float = 8.0

    @classmethod
    def of(cls, requests: int | None, gigabytes: float | None) -> ClientLimits:
        """Return limits, the usual ones for None.

        Raises:
            RequestError: one is negative, or no number.
        """
        for name, value in (("client_requests", requests), ("client_gb", gigabytes)):
            if value is not None and not 0 <= value < math.inf:
                raise RequestError(name, value, "a number, 0 for no limit")
        return cls(cls.requests if requests is None else requests, cls.gigabytes if gigabytes is None else gigabytes)


class LimitsOfClients:
    """ASGI middleware that refuses what goes beyond a client's limits.

    Args:
        app: what is behind it.
        limits: these.
        modes: the endpoints whose requests wait in the queue.
        is_full: says whether the queue has no place for another request of a client.
    """

    def __init__(self, app: ASGIApp, limits: ClientLimits, modes: set[str], is_full: Callable[[str], bool]) -> None:
        self._app = app
        self._modes = modes
        self._is_full = is_full
        self._requests = Allowance(limits.requests, 60)
        self._bytes = Allowance(limits.gigabytes * 1e9, 3600)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] == "http" and scope["method"] not in SAFE_METHODS:
            headers = Headers(scope=scope)
            client = sender(scope, headers)
            refused = self._refused(client, scope["path"], announced_length(headers))
            if refused is not None:
                seconds, text = refused
                head = {"retry-after": str(math.ceil(seconds)), "connection": "close"}
                await PlainTextResponse(text, 429, head)(scope, receive, send)
                return
            if client != UNLIMITED and "content-length" not in headers:
                receive = self._counted(client, receive)
        await self._app(scope, receive, send)

    def _counted(self, client: str, receive: Receive) -> Receive:
        """Return what receives a body of unknown length; what comes is spent, and counts for the next request."""

        async def counting() -> Message:
            message = await receive()
            self._bytes.spend(client, len(message.get("body", b"")))
            return message

        return counting

    def _refused(self, client: str, path: str, announced: int) -> tuple[float, str] | None:
        """Return in how many seconds to ask again, and why; None where a request is not refused."""
        called = _CALL.search(path)
        if called and called[1] in self._modes and self._is_full(client):
            return QUEUE_SECONDS, "So many requests are waiting already; try again in a moment.\n"
        if client == UNLIMITED:
            return None
        if seconds := self._requests.seconds_for(client, 1):
            return seconds, "Too many requests have come from this address; try again in a moment.\n"
        if seconds := self._bytes.seconds_for(client, announced):
            return seconds, "Too much was uploaded from this address; try again later.\n"
        return None


class Allowance:
    """An amount that each client may spend in a time, and that comes back evenly (a token bucket); 0 has no bound."""

    def __init__(self, amount: float, seconds: float) -> None:
        self._amount, self._rate = amount, amount / seconds
        self._spent: OrderedDict[str, tuple[float, float]] = OrderedDict()  # client -> how much, at what time

    def seconds_for(self, client: str, amount: float) -> float:
        """Spend an amount; return 0, or after how many seconds that will be possible, with nothing spent."""
        if not self._amount:
            return 0.0
        spent = self._now_spent(client)
        beyond = spent + amount - self._amount
        if beyond > 0 and spent:  # what is larger than all that is allowed is possible when nothing else was spent
            return min(beyond, spent) / self._rate
        self.spend(client, amount)
        return 0.0

    def spend(self, client: str, amount: float) -> None:
        """Spend an amount, possible or not."""
        if self._amount:
            self._spent[client] = (min(self._now_spent(client) + amount, self._amount), time.monotonic())
            self._spent.move_to_end(client)
            if len(self._spent) > MOST_CLIENTS:
                self._spent.popitem(last=False)

    def give_back(self, client: str, amount: float) -> None:
        """Take back what was spent."""
        if self._amount:
            self._spent[client] = (max(0.0, self._now_spent(client) - amount), time.monotonic())

    def _now_spent(self, client: str) -> float:
        now = time.monotonic()
        spent, at = self._spent.get(client, (0.0, now))
        return max(0.0, spent - (now - at) * self._rate)
