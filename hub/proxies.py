"""What is wrong with the proxies that the environment or the system names, in a sentence.

The clients of both hubs take them from there; what they raise at one that they cannot use has no type of its own, and
may repeat a password.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Collection
from urllib.parse import urlsplit
from urllib.request import getproxies

from core.messages import Message


def fault(socks_package: tuple[str, str], socks: Collection[str]) -> Message | None:
    """Return what to do about a proxy that cannot be used; None where each can.

    Args:
        socks_package: the module that SOCKS proxies need, and the package that has it.
        socks: the kinds of SOCKS proxy that it knows.
    """
    module, package = socks_package
    named = getproxies()
    for scheme in ("http", "https", "all"):
        if not (address := named.get(scheme)):
            continue
        try:
            parts = urlsplit(address if "://" in address else f"http://{address}")
            whole = bool(parts.hostname) and parts.port != 0
        except ValueError:  # half of a bracket, a port that is none
            whole = False
        if not whole or parts.scheme not in ("http", "https", *socks):
            kinds = ["http://HOST:PORT", "socks5://HOST:PORT"]
            text = "{variable} names no proxy that can be asked: it takes {kinds}, with USER:PASSWORD@ before HOST"
            return Message("proxy_unusable", text, variable=_variable(scheme), kinds=kinds)
        if parts.scheme in socks and importlib.util.find_spec(module) is None:
            text = (
                "{variable} names a SOCKS proxy, for which the package {package} is missing: run `{command}` (pip "
                "itself needs a way around that proxy), or name an HTTP proxy"
            )
            command = f"{sys.executable} -m pip install {package}"
            return Message("socks_package", text, variable=_variable(scheme), package=package, command=command)
    return None


def _variable(scheme: str) -> str | Message:
    """Return the variable that names the proxy of a scheme, as it is spelled where it counts."""
    names = [f"{scheme}_proxy", *os.environ]
    found = next((name for name in names if name.lower() == f"{scheme}_proxy" and os.environ.get(name)), None)
    return found or Message("system_proxy", "the system's setting")
