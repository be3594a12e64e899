"""The names that the server answers to: any web page may let a name of its own lead to this machine (DNS rebinding).

A browser then takes that page and this server for one site, and lets the page read and send what it likes; the name
in the request's Host header is what gives it away. Starlette's TrustedHostMiddleware knows patterns of names, not the
loopback addresses (127.0.0.0/8), and its answer does not say what to do, so this one is ours.

Gradio adds its own middleware around it, which answers a browser's question before a request from another site (CORS
preflight) and reaches nothing behind.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable

from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from core.errors import RequestError

SHOWN = 100  # characters of a refused name that are repeated


class AllowedHosts:
    """ASGI middleware that answers what asks for a loopback name or one of `names`, and refuses everything else."""

    def __init__(self, app: ASGIApp, names: Iterable[str] = ()) -> None:
        self._app = app
        self._names = {_same(name) for name in names}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or a websocket."""
        if scope["type"] in ("http", "websocket"):
            hosts = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
            if len(hosts) != 1 or not self._is_ours(hosts[0]):
                await PlainTextResponse(_refusal(hosts), status_code=421)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _is_ours(self, host: str) -> bool:
        name = without_port(host)
        return name is not None and (is_local(name) or name in self._names)


def without_port(host: str) -> str | None:
    """Return the name or the address in a Host header, in one spelling; None where it is none."""
    found = re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:\d*)?", host)
    return _same(found[1]) if found else None


def is_loopback(host: str) -> bool:
    """Whether a name or an address is this machine's, and no other machine's."""
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def is_local(name: str) -> bool:
    """Whether a browser that asks for a name, as `without_port` spells it, asks this machine."""
    return is_loopback(name) or name.endswith(".localhost")


def checked(name: str) -> str:
    """Return a name that somebody allows, once it is one.

    Raises:
        RequestError: it is something else, such as an address with a port or a path.
    """
    plain = re.fullmatch(r"\[?[0-9A-Fa-f:]*:[0-9A-Fa-f:.]*\]?|[A-Za-z0-9._-]+", name)
    if not plain or (":" in name and not _address(name)):
        raise RequestError(
            "allow_host", name, "a host name or address alone, without http:// or a port, such as studio.example"
        )
    return name


def _same(name: str) -> str:
    """Return a name or an address in the spelling that all its spellings share."""
    return _address(name) or name.lower().removesuffix(".")


def _address(name: str) -> str:
    try:
        return str(ipaddress.ip_address(name.strip("[]")))
    except ValueError:
        return ""


def shown(name: str) -> str:
    """Return a refused name as a sentence repeats it: cut to SHOWN characters, and nothing but ASCII."""
    return ascii(name) if len(name) <= SHOWN else ascii(name[:SHOWN]) + "..."


def _refusal(hosts: list[str]) -> str:
    asked = " and ".join(hosts)
    name = without_port(hosts[0]) if len(hosts) == 1 and len(asked) <= SHOWN else None
    return (
        f"This server does not answer to the name {shown(asked)}, which may be another site's trick. If the name is "
        f"yours, start the server with --allow-host {name or 'NAME'}.\n"
    )
