"""Who asks, and how much of it they may: a real server behind a proxy that names its visitors."""

from __future__ import annotations

import base64
import json
import time

import gradio as gr
import httpx
import pytest
from starlette.datastructures import Headers

from core.errors import RequestError
from engine.fair_queue import UNLIMITED
from tests.helpers.command_line import Command
from tests.helpers.serving import ROOT, Server, server
from web.client_limits import Allowance, ClientLimits
from web.clients import caller, client_of
from web.readers import HAS_GONE, NEVER_CAME, Readers

FIELDS = ["a fox", "base", "", 100, None, None, None, 7, None, 0.8, "auto", 0, ""]


@pytest.fixture(scope="module")
def limited() -> Server:
    return server("--client-waiting", "1", "--client-requests", "6", "--client-gb", "0.001")


def post(running: Server, path: str, client: str, body: dict[str, object] | bytes) -> httpx.Response:
    headers = {"X-Forwarded-For": f"203.0.113.7, {client}"}  # what stands first, anybody may have written
    given = {"content": body} if isinstance(body, bytes) else {"json": body}
    return httpx.post(f"{running.url}gradio_api/{path}", headers=headers, **given, timeout=60)


def test_a_client_has_as_many_places_as_it_may(limited: Server) -> None:
    drawn = [post(limited, "call/generate", "192.0.2.1", {"data": FIELDS}) for _ in range(2)]
    assert [answer.status_code for answer in drawn] == [200, 200]
    while (answer := post(limited, "call/generate", "192.0.2.2", {"data": FIELDS})).status_code == 200:
        pass  # until it waits behind the others
    assert int(answer.headers["retry-after"]) > 0
    assert "waiting already" in answer.text
    for event in drawn:  # one who comes and goes ends the run
        with httpx.stream("GET", f"{limited.url}gradio_api/call/generate/{event.json()['event_id']}"):
            pass


def test_a_client_sends_as_much_as_it_may(limited: Server) -> None:
    many = [post(limited, "reset", "192.0.2.3", {"event_id": "x"}) for _ in range(9)]
    assert sorted({answer.status_code for answer in many}) == [200, 429]
    assert all(0 < int(answer.headers["retry-after"]) <= 60 for answer in many if answer.status_code == 429)
    sizes = [post(limited, "reset", "192.0.2.4", bytes(900_000)).status_code for _ in range(2)]
    assert sizes == [422, 429]
    assert post(limited, "reset", "127.0.0.1", {"event_id": "x"}).status_code == 200


def test_nothing_goes_around_the_queue(limited: Server) -> None:
    assert post(limited, "run/generate", "192.0.2.5", {"data": FIELDS}).status_code == 404


def test_an_allowance_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    allowed = Allowance(10, 60)
    assert [allowed.seconds_for("a", 5) for _ in range(3)] == [0, 0, 30]
    assert allowed.seconds_for("b", 5) == 0
    now[0] += 30
    assert allowed.seconds_for("a", 5) == 0
    assert Allowance(0, 60).seconds_for("a", 10**9) == 0
    assert Allowance(10, 60).seconds_for("a", 11) == 0  # or it would never be possible


@pytest.mark.parametrize(
    ("address", "client"),
    [
        ("127.0.0.1", UNLIMITED),
        ("::1", UNLIMITED),
        ("::ffff:127.0.0.1", UNLIMITED),
        ("192.0.2.1", "192.0.2.1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("2001:db8:1:2:3::4", "2001:db8:1:2::/64"),
        ("testclient", "unknown"),
        ("", "unknown"),
    ],
)
def test_an_address_is_a_client(address: str, client: str) -> None:
    assert client_of(address, Headers({"x-forwarded-for": "192.0.2.9", "x-ip-token": token({"user": "ann"})})) == client


def token(claims: object) -> str:
    return f"a.{base64.urlsafe_b64encode(json.dumps(claims).encode()).decode().rstrip('=')}.c"


def test_on_a_space_the_platforms_user_is_a_client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPACE_ID", "someone/z-image-studio")
    forwarded = {"x-forwarded-for": "10.0.0.1, 192.0.2.9"}
    assert client_of("10.1.1.1", Headers(forwarded | {"x-ip-token": token({"user": "ann"})})) == "user ann"
    for wrong in ("", "a.b", token([]), token({"user": 7}), "a.\xff.c", "a." + "A" * 5000 + ".c"):
        assert client_of("10.1.1.1", Headers(forwarded | {"x-ip-token": wrong})) == "192.0.2.9"


def test_a_call_without_a_session_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert caller(gr.Request(session_hash="x")) == (UNLIMITED, "x")
    from starlette.requests import Request

    scope = {"type": "http", "method": "POST", "path": "/", "headers": [], "client": ("192.0.2.1", 1)}
    asked = Request(scope)
    assert caller(gr.Request(asked, session_hash="x")) == ("192.0.2.1", "x")
    event = gr.context.LocalContext.event_id.set("x")
    try:
        assert caller(gr.Request(asked, session_hash="x")) == ("192.0.2.1", "")
    finally:
        gr.context.LocalContext.event_id.reset(event)


def test_readers_come_and_go(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    readers, since = Readers(), now[0]
    assert not readers.have_gone(["a", "b"], since)
    now[0] += NEVER_CAME + 1
    assert readers.have_gone(["a", "b"], since)
    readers.come("b")
    readers.come("b")
    assert not readers.have_gone(["a", "b"], since)
    readers.leave("b")
    assert not readers.have_gone(["a", "b"], since)
    readers.leave("b")
    assert not readers.have_gone(["a", "b"], since)
    now[0] += HAS_GONE + 1
    assert readers.have_gone(["a", "b"], since)
    assert not readers.have_gone(["a", "b"], now[0])  # one who asks again is waited for


def test_limits_are_settings_that_are_checked(command_here: Command) -> None:
    assert ClientLimits.of(None, 2.5) == ClientLimits(gigabytes=2.5)
    for wrong in (-1.0, float("nan"), float("inf")):
        with pytest.raises(RequestError, match=r"client_gb: .* a number, 0 for no limit"):
            ClientLimits.of(None, wrong)
    done = command_here("serve", "--client-waiting", "-1", cwd=ROOT)
    assert (done.returncode, done.stderr.startswith("client_waiting: -1 is not possible")) == (2, True)
