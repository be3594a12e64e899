"""Passwords: where they come from, that nothing repeats them, and how often one may be tried on a real server."""

from __future__ import annotations

import os
import time
from pathlib import Path

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from core.errors import RequestError
from tests.helpers.command_line import Command
from tests.helpers.serving import ROOT, server
from web.logins import OF_ALL, OF_ONE, SECONDS, LoginLimits, account


def test_a_password_opens_a_real_server(tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text("ann:sec:ret\n")
    running = server("--auth-file", str(file))
    answers = [
        httpx.post(f"{running.url}login", data={"username": "ann", "password": password}, timeout=60).status_code
        for password in ["wrong"] * 3 + ["sec:ret"] * OF_ONE + ["wrong"] * (OF_ONE - 3 + 5)
    ]
    assert answers[: 3 + OF_ONE] == [400] * 3 + [200] * OF_ONE  # the right one counts never
    assert answers[-1] == 429


def test_passwords_are_tried_only_so_often(monkeypatch: pytest.MonkeyPatch) -> None:
    async def login(request: Request) -> PlainTextResponse:
        return PlainTextResponse("", 200 if await request.body() == b"right" else 400)

    app = LoginLimits(Starlette(routes=[Route("/login", login, methods=["POST"])]))

    def tried(client: str, password: bytes = b"wrong") -> int:
        return TestClient(app, client=(client, 1)).post("/login", content=password).status_code

    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    assert [tried("192.0.2.1") for _ in range(OF_ONE + 2)] == [400] * OF_ONE + [429] * 2
    assert tried("192.0.2.1", b"right") == 429
    assert {tried("192.0.2.2", b"right") for _ in range(OF_ONE + 1)} == {200}
    others = [tried(f"198.51.100.{number // OF_ONE}") for number in range(OF_ALL - OF_ONE + 1)]
    assert others == [400] * (OF_ALL - OF_ONE) + [429]
    assert tried("192.0.2.2", b"right") == 429
    now[0] += SECONDS / OF_ALL + 1
    assert tried("192.0.2.2", b"right") == 200


def test_a_password_comes_from_a_file_or_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_bytes("ann:sécret \r\nmore".encode())
    assert account(None, str(file), {"Z_IMAGE_AUTH": "bob:other"}) == "ann:sécret "
    assert account("cid:third", str(file), {}) == "cid:third"
    assert account(None, None, {"Z_IMAGE_AUTH": "bob:other"}) == "bob:other"
    assert account(None, None, {"Z_IMAGE_AUTH": ""}) is None


@pytest.mark.parametrize("content", [b"", b"secret", b"ann:\n", b"\xff:secret", None])
def test_a_file_without_a_password_is_refused_and_not_repeated(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "password"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(RequestError, match=r"auth_file: .*user:password") as refused:
        account(None, str(file), {})
    assert "secret" not in str(refused.value)


def test_the_command_line_repeats_no_password(command_here: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "Z_IMAGE_AUTH", "secret")
    done = command_here("serve", cwd=ROOT)
    assert (done.returncode, done.stderr) == (2, "Z_IMAGE_AUTH: '***' is not possible; allowed: user:password\n")
