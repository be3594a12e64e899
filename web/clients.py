"""Who asks, as far as it can be told: what the queue is fair among, and what limits are counted for."""

from __future__ import annotations

import base64
import binascii
import ipaddress
import re

import gradio as gr
from starlette.datastructures import Headers
from starlette.types import Scope

from core import bounded, environment
from engine.fair_queue import UNLIMITED
from web.allowed_hosts import is_loopback

MAX_TOKEN = 4096  # characters; the platform's have some hundred


def sender(scope: Scope, headers: Headers) -> str:
    """Return the name of the client that sent a request, as `client_of`."""
    return client_of((scope.get("client") or ("",))[0], headers)


def announced_length(headers: Headers) -> int:
    """Return how many bytes of a body a request announces, by the first 19 digits; 0 where it gives no number."""
    length = headers.get("content-length", "")
    return int(length[:19]) if re.fullmatch(r"[0-9]+", length) else 0


def client_of(address: str, headers: Headers) -> str:
    """Return a name for who sent a request: their address, or on a Space the platform's user.

    IPv6 addresses count by their first 64 bits, of which one household has all the rest. UNLIMITED is on this machine.

    Args:
        address: where it came from; what a proxy on this machine says stands for the proxy (uvicorn's proxy headers).
        headers: what it came with.
    """
    if environment.on_space():
        if user := _user(headers.get("x-ip-token", "")):
            return user
        # The last one is the platform's own word; what stands before it, anybody may have written.
        address = headers.get("x-forwarded-for", address).rpartition(",")[2].strip()
    if is_loopback(address):
        return UNLIMITED
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return "unknown"
    if isinstance(found, ipaddress.IPv6Address):
        if found.ipv4_mapped:
            return UNLIMITED if found.ipv4_mapped.is_loopback else str(found.ipv4_mapped)
        return str(ipaddress.ip_network((found, 64), strict=False))
    return str(found)


def _user(token: str) -> str:
    """Return the user whom the platform's token names, unchecked: the platform checks it before it lends a GPU."""
    parts = token.split(".")
    if len(token) > MAX_TOKEN or len(parts) != 3:
        return ""
    try:
        claims = bounded.loads(base64.urlsafe_b64decode(parts[1] + "==").decode())
    except (binascii.Error, ValueError):
        return ""
    user = claims.get("user") if isinstance(claims, dict) else None
    return f"user {user}" if isinstance(user, str) and user else ""


def caller(visitor: gr.Request) -> tuple[str, str]:
    """Return the client that a listener is called for, and which of its sessions: none where it gave itself no name."""
    request, session = visitor.request, visitor.session_hash or ""
    if request is None:  # called from Python
        return UNLIMITED, session
    # Gradio names a session that was given no name after the event.
    named = session != gr.context.LocalContext.event_id.get(None)
    address = request.client.host if request.client else ""
    return client_of(address, Headers(raw=request.headers.raw)), session if named else ""
