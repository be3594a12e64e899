"""Small proxies on loopback, both ways: the one that a client is told to ask, and the one in front of a server."""

from __future__ import annotations

import contextlib
import http.client
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

OWN_HEADERS = {"connection", "transfer-encoding", "keep-alive", "proxy-connection"}  # of one leg alone (RFC 9110)


@dataclass
class Proxy:
    """A proxy that passes everything on to one port of 127.0.0.1.

    Attributes:
        target: that port.
        prefix: what every path must begin with, and loses on the way; empty for a client's proxy.
        headers: what is added to each request; a `Host` replaces the visitor's.
        asked: the addresses asked for so far, as they came.
    """

    target: int
    prefix: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@contextlib.contextmanager
def running(proxy: Proxy) -> Iterator[Proxy]:
    """Run a proxy meanwhile."""
    listener = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"proxy": proxy}))
    listener.daemon_threads = True
    proxy.port = listener.server_address[1]
    threading.Thread(target=listener.serve_forever, args=[0.01], daemon=True).start()
    try:
        yield proxy
    finally:
        listener.shutdown()
        listener.server_close()


class _Handler(BaseHTTPRequestHandler):
    proxy: Proxy

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._pass_on()

    def do_HEAD(self) -> None:
        self._pass_on()

    def do_POST(self) -> None:
        self._pass_on()

    def _pass_on(self) -> None:
        self.proxy.asked.append(self.path)
        address = urlsplit(self.path)
        path = address.path + (f"?{address.query}" if address.query else "")
        if not path.startswith(self.proxy.prefix):
            self.send_error(404)
            return
        headers = {name: value for name, value in self.headers.items() if name.lower() not in OWN_HEADERS}
        headers |= self.proxy.headers
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        onward = http.client.HTTPConnection("127.0.0.1", self.proxy.target)
        try:
            onward.request(self.command, path.removeprefix(self.proxy.prefix), body or None, headers)
            answer = onward.getresponse()
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in OWN_HEADERS:
                    self.send_header(name, value)
            self.end_headers()
            while self.command != "HEAD" and (piece := answer.read1(1 << 16)):  # a stream's pieces as they come
                self.wfile.write(piece)
                self.wfile.flush()
        except (OSError, http.client.HTTPException):  # one of the two has gone
            pass
        finally:
            onward.close()
            self.close_connection = True
