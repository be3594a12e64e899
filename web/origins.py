"""Which pages may send to the server: its own. Any page may make a browser send a form, or a file, to any address.

A browser names the page that sends in `Origin`, and says in `Sec-Fetch-Site` how it is related to the server; no script
can change either. Programs send neither. What a page of another site sends is refused before any of it is read.
"""

from __future__ import annotations

from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from web.allowed_hosts import SHOWN, shown, without_port

SAFE_METHODS = {"GET", "HEAD", "OPTIONS"}  # which change nothing; a page of another site cannot read the answers
_PORTS = {"http": 80, "https": 443}


class Origins:
    """ASGI middleware that answers its own pages, programs, and pages of `names`; other pages can only look."""

    def __init__(self, app: ASGIApp, names: Iterable[str] = ()) -> None:
        self._app = app
        bare = [name.strip("[]") for name in names]
        self._names = {without_port(f"[{name}]" if ":" in name else name) for name in bare}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or a websocket."""
        if scope["type"] == "websocket" or (scope["type"] == "http" and scope["method"] not in SAFE_METHODS):
            headers = Headers(scope=scope)
            if not self._is_ours(headers):
                # Closed, or the server would read what is still to come only to throw it away.
                answer = PlainTextResponse(_refusal(headers.get("origin", "")), 403, {"connection": "close"})
                await answer(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _is_ours(self, headers: Headers) -> bool:
        site, origin = headers.get("sec-fetch-site"), headers.get("origin")
        if site in ("same-origin", "none"):  # also where a proxy has changed the Host on the way
            return True
        if origin is None:
            return site is None
        try:
            asked = urlsplit(origin)
            port = asked.port or _PORTS.get(asked.scheme)
        except ValueError:
            return False
        name = without_port(asked.netloc)
        if name is None:  # "null" too, which a page of no site sends
            return False
        return name in self._names or f"{name}:{port}" in _own(headers.get("host", ""), asked.scheme)


def _own(host: str, scheme: str) -> set[str]:
    """Return what a page of this server calls it, by the Host header: a name and a port, where none is the scheme's."""
    name = without_port(host)
    if name is None:
        return set()
    port = host.rpartition(":")[2] if not host.endswith("]") else ""
    return {f"{name}:{port if port.isdigit() else _PORTS.get(scheme)}"}


def _refusal(origin: str) -> str:
    try:
        name = without_port(urlsplit(origin).netloc)
    except ValueError:
        name = None
    return (
        f"The page {shown(origin)} belongs to another site, and may not send anything to this server. If it is yours, "
        f"start the server with --allow-host {name if name and len(origin) <= SHOWN else 'NAME'}.\n"
    )
