"""Uploads of any size, whole and broken off: a real server, and what its folder holds afterwards."""

from __future__ import annotations

import errno
import http.client
import socket
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

import web.upload_limits
from tests.helpers.serving import Server, server
from web.upload_limits import MAX_LORA, MAX_PICTURE, UploadLimits

PATH = "/gradio_api/upload"


def head(name: str) -> bytes:
    """Return what stands before a file in the form that a browser sends."""
    return f'--x\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'.encode()


END = b"\r\n--x--\r\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("uploads")


@pytest.fixture(scope="module")
def running(folder: Path) -> Server:
    return server(environment=(("GRADIO_TEMP_DIR", str(folder)),))


def connect(running: Server) -> http.client.HTTPConnection:
    return http.client.HTTPConnection(urlsplit(running.url).netloc, timeout=30)


def begin(running: Server, length: int | None, start: bytes) -> http.client.HTTPConnection:
    """Send the beginning of an upload, of a length that is announced unless it is None."""
    connection = connect(running)
    connection.putrequest("POST", PATH)
    connection.putheader("Content-Type", "multipart/form-data; boundary=x")
    if length is None:
        connection.putheader("Transfer-Encoding", "chunked")
    else:
        connection.putheader("Content-Length", str(length))
    connection.endheaders()
    connection.send(start)
    return connection


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("name", "length", "told"),
    [
        ("a.png", MAX_PICTURE + 10**6, "a picture may have up to 100 MB"),
        ("a.safetensors", MAX_LORA + 10**6, "a LoRA file may have up to 4 GiB"),
    ],
)
def test_what_is_announced_as_too_large_is_refused_before_it_comes(
    running: Server, folder: Path, name: str, length: int, told: str
) -> None:
    connection = begin(running, length, head(name))
    answer = connection.getresponse()
    assert (answer.status, told in answer.read().decode()) == (413, True)
    connection.close()
    assert files(folder) == []


def test_what_turns_out_too_large_is_cut_off_and_removed(running: Server, folder: Path) -> None:
    block = b"100000\r\n" + bytes(1 << 20) + b"\r\n"
    start = head("a.png")
    connection = begin(running, None, f"{len(start):x}\r\n".encode() + start + b"\r\n")
    try:
        for _ in range(2 * MAX_PICTURE >> 20):
            connection.send(block)
    except OSError:  # the server has closed
        pass
    try:
        answer = connection.getresponse()
        assert answer.status == 413
        assert b"a picture may have up to 100 MB" in answer.read()
    except OSError:  # what was still on its way took the answer along
        pass
    connection.close()
    assert files(folder) == []


def test_an_upload_that_is_broken_off_leaves_nothing(running: Server, folder: Path) -> None:
    connection = begin(running, 10**7, head("a.png") + bytes(1 << 20))
    assert connection.sock is not None
    while not files(folder):
        pass
    connection.sock.shutdown(socket.SHUT_RDWR)
    connection.close()
    while files(folder):
        pass
    assert "Traceback" not in running.log.read_text()


def test_an_upload_arrives(running: Server, folder: Path) -> None:
    body = head("a.png") + b"pixels" + END
    connection = begin(running, len(body), body)
    answer = connection.getresponse()
    assert answer.status == 200
    answer.read()
    connection.close()
    (found,) = files(folder)
    assert found.read_bytes() == b"pixels"


@pytest.fixture
def inside(tmp_path: Path) -> TestClient:
    """A page behind the limits, which reads the whole body and fails like a full disk where it is asked to."""

    async def page(request: Request) -> PlainTextResponse:
        body = await request.body()
        if b"full" in body:
            raise OSError(errno.ENOSPC, "No space left on device", "/secret/place")
        return PlainTextResponse(str(len(body)))

    limits = Middleware(UploadLimits, folder=lambda: str(tmp_path / "a"), apart="/v1")
    return TestClient(Starlette(routes=[Route("/", page, methods=["POST"])], middleware=[limits]))


def test_a_request_without_files_is_short(inside: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web.upload_limits, "MAX_TEXT", 1000)
    assert inside.post("/", content=b"a" * 1000).text == "1000"
    assert inside.post("/", content=b"a" * 1001).status_code == 413
    assert inside.post("/", content=iter([b"a" * 600, b"a" * 600])).status_code == 413


def test_a_full_disk_is_one_sentence_without_a_place(inside: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    body = {"files": ("a.png", b"full")}
    answer = inside.post("/", files=body)
    assert (answer.status_code, "/secret" in answer.text, answer.text.count("\n")) == (507, False, 1)
    monkeypatch.setattr(web.upload_limits, "MAX_TEXT", 1)
    monkeypatch.setattr(web.upload_limits, "KEPT_FREE", 1 << 60)
    assert inside.post("/", files={"files": ("a.png", b"pixels")}).status_code == 507
