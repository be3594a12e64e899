"""Which pages may send: a real server, asked as pages of other sites make a browser ask it."""

from __future__ import annotations

import http.client
from urllib.parse import urlsplit

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

import web.server
from tests.helpers.serving import server
from web.origins import Origins

EVIL = "https://evil.example"
FORM = {"Content-Type": "multipart/form-data; boundary=x"}


def send(path: str, headers: dict[str, str], announced: int = 2) -> tuple[int, str]:
    """Post the head of a request whose body never comes; return what is answered."""
    connection = http.client.HTTPConnection(urlsplit(server().url).netloc, timeout=20)
    connection.putrequest("POST", path)
    for name, value in (headers | {"Content-Length": str(announced)}).items():
        connection.putheader(name, value)
    connection.endheaders()
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, text


@pytest.mark.parametrize(
    "path", ["/gradio_api/upload", "/gradio_api/queue/join", "/gradio_api/call/generate", "/login"]
)
def test_other_sites_send_nothing_and_are_refused_before_their_body(path: str) -> None:
    status, text = send(path, {**FORM, "Origin": EVIL, "Sec-Fetch-Site": "cross-site"}, announced=10**9)
    assert status == 403
    assert text.endswith("start the server with --allow-host evil.example.\n")


ALLOWED = [
    {},
    {"origin": "http://localhost"},
    {"origin": "http://localhost:80", "host": "localhost"},
    {"origin": "https://studio.example", "host": "studio.example"},
    {"origin": "https://studio.example:8443"},
    {"origin": "http://[fd00::5]:1"},
    {"origin": "http://127.0.0.1:7860", "host": "127.0.0.1:7860"},
    {"origin": "https://front.example", "sec-fetch-site": "same-origin"},
    {"sec-fetch-site": "none"},
]
REFUSED = [
    {"origin": EVIL},
    {"origin": "null"},
    {"origin": ""},
    {"origin": "http://localhost:3000"},
    {"origin": "http://127.0.0.1", "host": "localhost"},
    {"origin": "https://localhost.evil.example"},
    {"origin": "http://localhost@evil.example"},
    {"origin": "http://localhost:99999"},
    {"origin": "http://[::1"},
    {"sec-fetch-site": "cross-site"},
    {"sec-fetch-site": "same-site"},
    {"origin": "http://localhost", "host": "a b"},
]


@pytest.mark.parametrize(("headers", "status"), [(case, 200) for case in ALLOWED] + [(case, 403) for case in REFUSED])
def test_own_pages_allowed_names_and_programs_may_send(headers: dict[str, str], status: int) -> None:
    async def page(_: Request) -> PlainTextResponse:
        return PlainTextResponse("the page")

    routes = [Route("/", page, methods=["GET", "POST"])]
    client = TestClient(Origins(Starlette(routes=routes), ["studio.example", "fd00::5"]))
    given = {"host": "localhost", **headers}
    assert client.post("/", headers=given).status_code == status
    assert client.get("/", headers=given).status_code == 200


def names_of(monkeypatch: pytest.MonkeyPatch, root_path: str) -> list[list[str]]:
    monkeypatch.setenv("GRADIO_ROOT_PATH", root_path)
    options = web.server.launch_options("127.0.0.1", 7860, None, False, ["a.example"])
    return [one.kwargs["names"] for one in options["app_kwargs"]["middleware"] if one.cls is Origins]


def test_the_address_of_a_proxy_in_front_is_an_own_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPACE_ID", raising=False)
    assert names_of(monkeypatch, "https://b.example/studio") == [["a.example", "b.example"]]
    assert names_of(monkeypatch, "/studio") == [["a.example"]]


def test_a_space_is_for_pages_of_any_site(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPACE_ID", "someone/z-image-studio")
    options = web.server.launch_options("127.0.0.1", 7860, None, False)
    assert Origins not in [one.cls for one in options["app_kwargs"]["middleware"]]
