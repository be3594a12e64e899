"""The names that the server answers to: a real server, asked as a page of another site would ask it."""

import asyncio
import http.client
from typing import Any
from urllib.parse import urlsplit

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route, WebSocketRoute
from starlette.testclient import TestClient
from starlette.types import Message, Receive, Scope, Send
from starlette.websockets import WebSocket, WebSocketDisconnect

import web.server
from core import environment
from core.errors import RequestError
from tests.helpers.command_line import Command
from tests.helpers.serving import ROOT, server
from web.allowed_hosts import AllowedHosts, checked, is_loopback, without_port

LOOPBACK = [
    "127.0.0.1",
    "localhost",
    "LocalHost",
    "localhost.",
    "127.8.9.10",
    "[::1]",
    "[0:0:0:0:0:0:0:1]",
    "a.localhost",
]
FOREIGN = [
    "evil.example",
    "localhost.evil.example",
    "127.0.0.1.evil.example",
    "evillocalhost",
    "evil.example@localhost",
    "localhost@evil.example",
    "192.168.1.5",
    "0.0.0.0",
    "[::2]",
    "[::1].evil.example",
    "::1",
    "localhost, evil.example",
]


def ask(host: str | None, path: str = "/", method: str = "GET", body: str | None = None) -> tuple[int, str]:
    """Ask the real server for something, by a name."""
    # One of its own, by a flag that changes nothing here: requests that are cut off leave errors in a server's log.
    connection = http.client.HTTPConnection(urlsplit(server("-v").url).netloc, timeout=60)
    connection.putrequest(method, path, skip_host=True)
    if host is not None:
        connection.putheader("Host", host)
    connection.putheader("Content-Type", "application/json")
    connection.putheader("Content-Length", str(len(body or "")))
    connection.endheaders((body or "").encode())
    response = connection.getresponse()
    status = response.status
    text = response.read().decode() if status != 200 else ""  # an event stream does not end
    connection.close()
    return status, text


@pytest.mark.parametrize("port", ["", ":7860", ":"])
def test_names_of_this_machine_are_answered(port: str) -> None:
    assert {host: ask(host + port)[0] for host in LOOPBACK} == dict.fromkeys(LOOPBACK, 200)


def test_other_names_are_refused_with_what_to_do() -> None:
    for host in FOREIGN:
        status, text = ask(host)
        assert (host, status) == (host, 421)
        assert repr(host) in text
        assert "--allow-host" in text
    assert ask("evil.example:7860")[1].endswith("start the server with --allow-host evil.example.\n")
    assert ask("")[0] in (400, 421)  # the HTTP parser may come first
    assert ask(None)[0] in (400, 421)


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "/config", None),
        ("HEAD", "/", None),
        ("GET", "/gradio_api/info", None),
        ("GET", "/gradio_api/startup-events", None),
        ("GET", "/gradio_api/queue/data?session_hash=x", None),  # an event stream
        ("POST", "/gradio_api/queue/join", '{"data": [], "fn_index": 0, "session_hash": "x"}'),
        ("POST", "/gradio_api/call/generate", '{"data": ["a fox"]}'),
        ("POST", "/gradio_api/upload", ""),
        ("GET", "/gradio_api/file=README.md", None),
        ("GET", "/nowhere", None),
    ],
)
def test_every_route_is_behind_it(method: str, path: str, body: str | None) -> None:
    assert ask("evil.example", path, method, body)[0] == 421
    assert ask("localhost", path, method, body)[0] != 421


def inside(*names: str) -> TestClient:
    """A page and a websocket behind the middleware."""

    async def page(_: Request) -> PlainTextResponse:
        return PlainTextResponse("the page")

    async def socket(connected: WebSocket) -> None:
        await connected.accept()
        await connected.send_text("the page")
        await connected.close()

    routes = [Route("/", page), WebSocketRoute("/socket", socket)]
    return TestClient(AllowedHosts(Starlette(routes=routes), names))


def test_websockets_are_refused_too() -> None:
    with inside().websocket_connect("/socket", headers={"host": "localhost"}) as socket:
        assert socket.receive_text() == "the page"
    with (
        pytest.raises(WebSocketDisconnect),
        inside().websocket_connect("/socket", headers={"host": "evil.example"}) as socket,
    ):
        socket.receive_text()


async def no_message() -> Message:
    raise AssertionError


async def nowhere(_: Message) -> None:
    raise AssertionError


async def behind_it(scope: Scope, receive: Receive, send: Send) -> None:
    """An app that no request may reach."""
    raise AssertionError


def test_what_is_not_a_request_passes() -> None:
    seen = []

    async def behind(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope["type"])

    asyncio.run(AllowedHosts(behind)({"type": "lifespan"}, no_message, nowhere))
    assert seen == ["lifespan"]


def test_names_that_are_allowed_are_answered_besides() -> None:
    client = inside("Studio.example", "fd00::5", "192.168.1.5")
    for host in (
        "studio.example",
        "STUDIO.example:443",
        "studio.example.",
        "[fd00:0::5]:80",
        "192.168.1.5",
        "localhost",
    ):
        assert client.get("/", headers={"host": host}).status_code == 200, host
    for host in ("x.studio.example", "studio.example.evil", "[fd00::6]", "192.168.1.6"):
        assert client.get("/", headers={"host": host}).status_code == 421, host


def test_two_names_at_once_are_refused() -> None:
    async def receive() -> Message:
        return {"type": "http.request"}

    sent = []

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "http", "headers": [(b"host", b"localhost"), (b"host", b"evil.example")]}
    asyncio.run(AllowedHosts(behind_it)(scope, receive, send))
    assert sent[0]["status"] == 421
    assert b"'localhost and evil.example'" in sent[1]["body"]


def test_a_long_or_strange_name_is_shown_in_part_and_escaped() -> None:
    async def refuse(host: bytes) -> str:
        sent = []

        async def send(message: Message) -> None:
            sent.append(message)

        await AllowedHosts(behind_it)({"type": "http", "headers": [(b"host", host)]}, no_message, send)
        body: bytes = sent[1]["body"]
        return body.decode("ascii")

    assert len(asyncio.run(refuse(b"a" * 10_000))) < 400
    text = asyncio.run(refuse(b"<b>\r\n\xe9"))
    assert r"'<b>\r\n\xe9'" in text
    assert text.endswith("--allow-host NAME.\n")


def test_hosts_are_taken_apart() -> None:
    assert [without_port(host) for host in LOOPBACK[:3]] == ["127.0.0.1", "localhost", "localhost"]
    assert without_port("[::0001]:7860") == "::1"
    assert without_port("a b") is None
    assert without_port("localhost:80:80") is None
    assert without_port("[::1") is None
    assert is_loopback("[::1]")
    assert is_loopback("::1")
    assert is_loopback("127.0.0.5")
    assert is_loopback("localhost")
    assert not any(is_loopback(host) for host in ("a.localhost", "0.0.0.0", "::", "studio.example"))


@pytest.mark.parametrize(
    "name", ["http://a.example", "a.example:80", "a.example/x", "*", "*.example", "", "a b", "[::1]:80"]
)
def test_a_name_that_is_none_is_refused_with_an_example(name: str) -> None:
    with pytest.raises(RequestError, match=r"allow_host: .* without http:// or a port, such as studio\.example"):
        web.server.launch_options("127.0.0.1", 7860, None, False, [name])


@pytest.mark.parametrize("name", ["studio.example", "a-b_c", "192.168.1.5", "fd00::5", "[fd00::5]"])
def test_names_and_addresses_may_be_allowed(name: str) -> None:
    assert checked(name) == name


def names_of(options: dict[str, Any]) -> list[str] | None:
    """Return the names that a server with these options answers to besides its own; None where it answers to all."""
    found = [one.kwargs["names"] for one in options["app_kwargs"]["middleware"] if one.cls is AllowedHosts]
    return found[0] if found else None


def test_where_other_machines_come_in_names_are_known_only_where_they_are_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("SPACE_ID", raising=False)
    assert names_of(web.server.launch_options("127.0.0.1", 7860, None, False)) == ["127.0.0.1"]
    assert names_of(web.server.launch_options("0.0.0.0", 7860, "ann:secret", False)) is None
    assert names_of(web.server.launch_options("192.168.1.5", 7860, None, True)) is None
    given = web.server.launch_options("192.168.1.5", 7860, None, True, ["studio.example"])
    assert names_of(given) == ["studio.example", "192.168.1.5"]  # Gradio asks itself by that address


def test_a_space_is_asked_by_names_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPACE_ID", "someone/z-image-studio")
    assert environment.on_space()
    assert names_of(web.server.launch_options("127.0.0.1", 7860, None, False)) is None


def test_the_command_line_takes_several_names_and_refuses_what_is_none(command_here: Command) -> None:
    done = command_here("serve", "--allow-host", "a.example", "--allow-host", "http://b.example", cwd=ROOT)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("allow_host: 'http://b.example' is not possible; allowed: a host name")
    helped = command_here("serve", "--help", cwd=ROOT)
    assert "--allow-host NAME" in helped.stdout
