"""Malformed requests at every route of a real server: 4xx, one line in the log, and the next request as before."""

from __future__ import annotations

import json
import random
import secrets
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from gradio.utils import get_upload_folder

from tests.helpers.effort import effort
from tests.helpers.serving import Server, server
from web.malformed import NOT_UNDERSTOOD

DEEP = b"[" * 5000 + b"]" * 5000
BODIES = (
    b"",
    b"{",
    b"null",
    b'"x"',
    b"\xff\xfe",
    b'{"data":' + DEEP + b"}",
    b'{"data":"x"}',
    b'{"data":[]}',
    b'{"data":[],"fn_index":99999,"session_hash":"a"}',
    b'{"data":[],"fn_index":' + b"9" * 5000 + b',"session_hash":"a"}',
    b'{"data":[],"fn_index":0,"session_hash":{}}',
    b'{"data":[1e999],"fn_index":0,"session_hash":"a","event_data":5}',
    b'{"fn_index":0,"session_hash":NaN}',
    b'{"session_hash":[],"fn_index":"x","event_id":null}',
    b'--x\r\nContent-Disposition: form-data; name="files"; filename="a\0b.png"\r\n\r\nxx\r\n--x--\r\n',
    b'--x\r\nContent-Disposition: form-data; name="files"; filename="' + b"a" * 3000 + b'"\r\n\r\nxx\r\n--x--\r\n',
    b'--x\r\nContent-Disposition: form-data; name="image"; filename="\xff"\r\n\r\nxx\r\n--x--\r\n',
    b"--x\r\n\r\n",
)
KINDS = ("application/json", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x")
POSTED = (
    *(f"gradio_api/{route}" for route in ("queue/join", "run/predict", "api/x", "cancel", "reset", "upload")),
    *(f"gradio_api/{route}" for route in ("call/generate", "call/nothing", "call/v2/generate", "call/v2/nothing")),
    *(f"gradio_api/{route}" for route in ("stream/a", "stream/a/close", "component_server", "process_recording")),
    *(f"v1/{route}" for route in ("images/generations", "images/edits", "models")),
    "login",
)
READ = (
    *(f"gradio_api/file={path}" for path in ("", "%00", "/etc/passwd", "%ff%fe", "a" * 5000, "https://[")),
    *(f"gradio_api/{route}" for route in ("proxy=%00", "proxy=http://[", "queue/data", "queue/data?session_hash=x")),
    *(f"gradio_api/{route}" for route in ("call/generate/x", "call/v2/generate/x", "upload_progress", "nothing")),
    *(f"gradio_api/{route}" for route in ("stream/a/b/c/playlist.m3u8", "stream/a/1/1/s.ts", "info?page=%00")),
    *("static/%00", "assets/%ff", "svelte/%00", "%00", "?deep_link=..%2f..", "config?page=x", "pwa_icon/%00"),
    *("v1/models/%00", "v1/files/..%2f..%2fx", "v1/files/%ff", "v1/%00"),
)
HEADERS: tuple[dict[bytes, bytes], ...] = (
    {},
    {b"cookie": b"\xff", b"accept-language": b",;" + b"x" * 3000},
    {b"range": b"bytes=-" + b"9" * 5000, b"x-forwarded-for": b"\xff,,,", b"x-forwarded-host": b"["},
)

_FILE = {"meta": {"_type": "gradio.FileData"}}
_PATHS = (None, "\0", "a\0b", "/etc/passwd", "/tmp/gradio", "/tmp/gradio/nothing.png")
VALUES: tuple[Any, ...] = (
    *(None, 0, -1, 1e308, 10**30, True, "", "x" * 1000, "\0", "\ud800", "2", "base", "canny"),
    *([], {}, [[]], [None], [{"path": 5}], {"value": 1}, {"a": {"b": {"c": [1]}}}),
    *({"path": path} for path in _PATHS),
    *({"path": path, **_FILE} for path in _PATHS),
    {"url": "http://127.0.0.1:1/", "path": "x", **_FILE},
)
EVENTS: tuple[Any, ...] = (
    None,
    0,
    "x",
    [],
    {},
    {"index": None},
    {"index": 99, "value": 5},
    {"mode": []},
    {"value": {}},
)


@pytest.fixture(scope="module")
def running() -> Server:
    return server()


@pytest.fixture
def told(running: Server) -> Iterator[list[str]]:
    """What the server logged during a test: no traceback, and each line of a bounded length."""
    before, lines = running.log.stat().st_size, list[str]()
    yield lines
    lines += running.log.read_bytes()[before:].decode().splitlines()
    assert not [line for line in lines if "Traceback" in line or len(line) > 700]


@pytest.fixture(scope="module")
def client(running: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=running.url, timeout=60) as client:
        yield client


@pytest.mark.parametrize("route", POSTED)
def test_what_makes_no_sense_is_refused(route: str, client: httpx.Client, told: list[str]) -> None:
    for body in BODIES:
        for kind in KINDS:
            answer = client.post(route, content=body, headers={"content-type": kind})
            assert answer.status_code < 500, (body[:80], kind)
            assert "Error" not in answer.text or answer.headers["content-type"] == "application/json"


@pytest.mark.parametrize("headers", HEADERS, ids=["", "cookies", "numbers"])
def test_what_is_not_there_is_refused(headers: dict[bytes, bytes], client: httpx.Client, told: list[str]) -> None:
    for route in READ:
        with client.stream("GET", route, headers=headers) as answer:  # some would never end
            assert answer.status_code < 500, route


def test_a_stream_for_nobody_ends(client: httpx.Client, told: list[str]) -> None:
    assert '"session_not_found":true' in client.get("gradio_api/queue/data?session_hash=nobody").text
    assert "error" in client.get("gradio_api/call/generate/nothing").text


def test_no_listener_shows_what_it_failed_on(client: httpx.Client, told: list[str]) -> None:
    rnd = random.Random(22)
    listeners = client.get("config").json()["dependencies"]
    for listener in rnd.choices(listeners, k=effort(60, 10_000)):
        count = len(listener["inputs"])
        data = [rnd.choice(VALUES) for _ in range(count if rnd.random() < 0.9 else rnd.randrange(count + 3))]
        session = secrets.token_hex(5)
        called = {"fn_index": listener["id"], "session_hash": session, "trigger_id": rnd.choice((None, 1, 10**9, -1))}
        call = {"data": data, "event_data": rnd.choice(EVENTS), **called}
        asked = client.post("gradio_api/queue/join", content=json.dumps(call), headers={"content-type": KINDS[0]})
        assert asked.status_code < 500
        if asked.status_code == 200:
            with client.stream("GET", f"gradio_api/queue/data?session_hash={session}") as answer:
                events = (json.loads(line[5:]) for line in answer.iter_lines() if line.startswith("data:"))
                last = next(event for event in events if event["msg"] == "process_completed")
            assert "File " not in str(last["output"].get("error")), call


def test_a_folder_is_not_taken_for_a_file(client: httpx.Client, told: list[str]) -> None:
    # Gradio would note it among the files to delete, and never delete one again.
    folder = {"path": get_upload_folder(), **_FILE}
    fields = ["a fox", "base", "", 1, None, None, None, 7, folder, 0.8, "auto", 0, ""]
    event = client.post("gradio_api/call/generate", json={"data": fields}).json()["event_id"]
    assert NOT_UNDERSTOOD in client.get(f"gradio_api/call/generate/{event}").text


def test_after_all_that_a_picture_is_drawn_as_ever(client: httpx.Client) -> None:
    drawn = [
        client.post("v1/images/generations", json={"prompt": "a fox", "seed": 7, "size": "128x128"}).json()["data"]
        for _ in range(2)
    ]
    assert drawn[0] == drawn[1]
