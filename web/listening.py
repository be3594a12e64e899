"""Where the server can listen: found out before anything else is done, for Gradio tells too little and too late.

Gradio tries a port on 127.0.0.1 whatever the address is, and gives its server 5 seconds to fail.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import re
import socket

from core.errors import RequestError

HOSTS = "an address or a name of this machine, such as 127.0.0.1, ::1, localhost, or 0.0.0.0 for all of its addresses"
PORTS = (
    "a port from 1 to 65535 that nothing else listens on and that this user may take (some systems keep those below "
    "1024), given with --port; 0 takes any free one"
)


def in_url(host: str) -> str:
    """Return an address or a name as it stands in a URL: IPv6 in brackets.

    Raises:
        RequestError: it is neither.
    """
    bare = _bare(host)
    with contextlib.suppress(ValueError):
        return f"[{bare}]" if ipaddress.ip_address(bare).version == 6 else bare
    # What has only digits and points is never asked for as a name; a system may read it as some other address.
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,253}", bare) or re.fullmatch(r"[0-9.]+|0[xX].*", bare):
        raise RequestError("host", host, HOSTS)
    return bare


def place(host: str, port: int) -> tuple[str, int]:
    """Return the address or the name, as in a URL, and the port to listen on, which can be had at this moment.

    Args:
        host: an address or a name. Of a name with an address that this machine lacks (many containers call `localhost`
            ::1 too, and have no IPv6), one that it has is returned.
        port: the port; any free one where it is 0.

    Raises:
        RequestError: this machine has no such address, or the port is taken or none.
    """
    name = in_url(host)
    if not 0 <= port <= 65535:
        raise RequestError("port", port, PORTS)
    try:
        found = socket.getaddrinfo(_bare(host), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise RequestError("host", host, HOSTS) from error
    free: list[str] = []
    for family, kind, protocol, _, address in found:
        try:
            with socket.socket(family, kind, protocol) as probe:
                if os.name == "posix":  # elsewhere it would take a port away from who has it
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((address[0], port, *address[2:]))
                port = probe.getsockname()[1]
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                raise RequestError("port", port, PORTS) from error
        else:
            free.append(in_url(str(address[0])))
    if not free:
        raise RequestError("host", host, HOSTS)
    return (name if len(free) == len(found) else free[0]), port


def _bare(host: str) -> str:
    return host[1:-1] if host.startswith("[") and host.endswith("]") else host
