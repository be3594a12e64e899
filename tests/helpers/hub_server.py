"""A small hub on loopback: as much of the Hugging Face Hub's protocol as listing and downloading need, and its faults.

Large files are redirected to a second address, as the real hub redirects to its storage; small ones are answered
directly. What the client asked for is kept, for tests to look at.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

LIE = b"written where it should not be"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def digest(content: bytes, *, large: bool) -> str:
    """Return the hub's digest: SHA-256 of a large file, Git's hash of a small one."""
    if large:
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


def is_large(name: str) -> bool:
    return name.endswith((".safetensors", ".pth"))


@dataclass
class Fault:
    """What goes wrong with a file's content, how many times.

    `kind`: "cut" (half of what is left, then the line breaks), "short" (half, claimed to be all), "long" (more than
    announced), "wrong" (right length, other content), "slow" (nothing after the head), or an HTTP status.
    """

    kind: str | int
    times: int = 1_000_000


@dataclass
class Hub:
    """A running hub. `repos`: repository -> file name -> content. `refused`: repository -> status, error code.

    A hub may also lie: `marks` are what it answers as a file's etags in place of the right one, each once and the last
    ever after; `listed` are names that it lists besides those of its files, which it then has as well.
    """

    repos: Mapping[str, Mapping[str, bytes]]
    faults: dict[str, Fault] = field(default_factory=dict)
    refused: dict[str, tuple[int, str]] = field(default_factory=dict)
    ranges: bool = True
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    sent: int = 0
    commit: str = COMMIT
    marks: dict[str, list[str]] = field(default_factory=dict)
    listed: list[str] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def start(self) -> Hub:
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._ended = threading.Event()
        threading.Thread(target=self._server.serve_forever, args=[0.01], daemon=True).start()
        return self

    def stop_waiting(self) -> None:
        """Let go of the requests that are held up."""
        self.faults.clear()
        self._ended.set()

    def stop(self) -> None:
        self._ended.set()
        self._server.shutdown()
        self._server.server_close()

    @property
    def port(self) -> int:
        return self._server.server_address[1]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def asked(self, method: str, start: str = "") -> list[dict[str, str]]:
        """Return the headers of the requests so far, of a method and the beginning of a path."""
        return [headers for way, path, headers in self.requests if way == method and path.startswith(start)]

    def take(self, name: str) -> str | int | None:
        with self._lock:
            fault = self.faults.get(name)
            if fault is None or fault.times == 0:
                return None
            fault.times -= 1
            return fault.kind


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path, {k.lower(): v for k, v in self.headers.items()}))
        if path.startswith("/api/v1/models/"):
            return self._modelscope(path.removeprefix("/api/v1/models/"))
        if path.startswith("/api/models/"):
            return self._list(path.removeprefix("/api/models/").removesuffix("/revision/main"))
        if path.startswith("/storage/"):
            repo, name = _split(path.removeprefix("/storage/"))
            return self._content(name, self.hub.repos[repo][name], {})
        repo, _, rest = path.strip("/").partition("/resolve/")
        name = rest.partition("/")[2]
        if repo in self.hub.refused:
            return self._refuse(*self.hub.refused[repo])
        if name in self.hub.listed:
            return self._content(name, LIE, {"X-Repo-Commit": self.hub.commit, "ETag": f'"{digest(LIE, large=False)}"'})
        if repo not in self.hub.repos or name not in self.hub.repos[repo]:
            return self._refuse(404, "EntryNotFound" if repo in self.hub.repos else "RepoNotFound")
        content = self.hub.repos[repo][name]
        headers = {"X-Repo-Commit": self.hub.commit}
        marks = self.hub.marks.get(name, [f'"{digest(content, large=is_large(name))}"'])
        mark = marks.pop(0) if len(marks) > 1 else marks[0]
        if not is_large(name):
            return self._content(name, content, headers | {"ETag": mark})
        # Another host name, so another origin: a token must not follow.
        place = f"http://localhost:{self.hub.port}/storage/{repo}/{name}"
        headers |= {"X-Linked-Etag": mark, "X-Linked-Size": str(len(content)), "Location": place}
        self._head(302, headers | {"Content-Length": "0"})
        return None

    def _list(self, repo: str) -> None:
        if repo in self.hub.refused:
            return self._refuse(*self.hub.refused[repo])
        if repo not in self.hub.repos:
            return self._refuse(404, "RepoNotFound")
        names = [{"rfilename": name} for name in (*self.hub.repos[repo], *self.hub.listed)]
        body = json.dumps({"id": repo, "sha": self.hub.commit, "siblings": names}).encode()
        self._head(200, {"Content-Length": str(len(body)), "Content-Type": "application/json"})
        self.wfile.write(body)
        return None

    def _modelscope(self, path: str) -> None:
        """Answer as ModelScope: `<repo>/repo/files` lists, `<repo>/repo?FilePath=…` is a file."""
        repo = "/".join(path.split("/")[:2])
        if repo not in self.hub.repos:
            return self._refuse(404, "")
        if not path.endswith("/files"):
            (name,) = parse_qs(urlsplit(self.path).query)["FilePath"]
            return self._content(name, self.hub.repos[repo].get(name, LIE), {})
        held = {**self.hub.repos[repo], **dict.fromkeys(self.hub.listed, LIE)}
        files = [
            {
                "Path": name,
                "Size": len(content),
                "Type": "blob",
                "Sha256": self.hub.marks.get(name, [digest(content, large=True)])[0],
            }
            for name, content in held.items()
        ]
        body = json.dumps({"Code": 200, "Success": True, "Data": {"Files": files}}).encode()
        self._head(200, {"Content-Length": str(len(body)), "Content-Type": "application/json"})
        self.wfile.write(body)
        return None

    def _content(self, name: str, content: bytes, headers: dict[str, str]) -> None:
        fault = self.hub.take(name) if self.command == "GET" else None
        if isinstance(fault, int):
            return self._refuse(fault, "")
        start = 0
        if self.hub.ranges and (asked := self.headers.get("Range")):
            start = int(asked.removeprefix("bytes=").split("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        body = content[start:]
        if fault == "wrong":
            body = bytes(byte ^ 1 for byte in body)
        elif fault == "short":
            body = body[: len(body) // 2]
            if "Content-Range" in headers:
                headers["Content-Range"] = f"bytes {start}-{start + len(body) - 1}/{start + len(body)}"
        elif fault == "long":
            body += b"more"
        self._head(206 if start else 200, headers | {"Content-Length": str(len(body)), "Accept-Ranges": "bytes"})
        if self.command == "HEAD":
            return None
        if fault == "slow":
            self.hub._ended.wait(30)
        if fault in ("cut", "slow"):
            body = body[: len(body) // 2 if fault == "cut" else 0]
            self.close_connection = True
        try:
            for begin in range(0, len(body), 1 << 16):
                self.hub.sent += self.wfile.write(body[begin : begin + (1 << 16)])
        except OSError:  # the client has gone
            self.close_connection = True

    def _refuse(self, status: int, code: str) -> None:
        self._head(status, {"X-Error-Code": code, "X-Error-Message": code or "refused", "Content-Length": "0"})

    def _head(self, status: int, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()


def _split(path: str) -> tuple[str, str]:
    owner, repo, name = path.split("/", 2)
    return f"{owner}/{repo}", name
