"""The server's options, its password, and what it serves besides the page."""

import subprocess
import sys
import urllib.error
import urllib.request

import pytest

import web.server
from core.errors import RequestError
from tests.helpers.serving import ROOT, server
from web import theme


def test_importing_the_app_and_building_the_page_load_no_torch() -> None:
    code = """
import sys, app
assert app.demo is app.demo
print(sorted({"torch", "diffsynth", "transformers", "diffusers", "cv2"} & set(sys.modules)))
"""
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "[::1]", "127.0.0.5"])
def test_this_machine_alone_needs_no_password(host: str) -> None:
    assert web.server.launch_options(host, 7860, None, False)["server_name"] == host.replace("[::1]", "::1").replace(
        "::1", "[::1]"
    )


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "studio.example"])
def test_other_machines_need_a_password_or_consent(host: str) -> None:
    with pytest.raises(RequestError, match="--auth USER:PASSWORD"):
        web.server.launch_options(host, 7860, None, False)
    assert web.server.launch_options(host, 7860, "ann:secret", False)["auth"] == ("ann", "secret")
    assert "auth" not in web.server.launch_options(host, 7860, None, True)


@pytest.mark.parametrize("auth", ["ann", ":secret", "ann:", ""])
def test_a_malformed_password_is_refused_and_not_repeated(auth: str) -> None:
    with pytest.raises(RequestError, match="allowed: user:password") as refusal:
        web.server.launch_options("127.0.0.1", 7860, auth, False)
    assert "secret" not in str(refusal.value)


def test_a_space_decides_where_to_listen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPACE_ID", "someone/z-image-studio")
    assert not {"server_name", "server_port"} & set(web.server.launch_options("127.0.0.1", 7860, None, False))


def status_of(url: str) -> int:
    try:
        with urllib.request.urlopen(url) as answer:
            status: int = answer.status
            return status
    except urllib.error.HTTPError as refused:
        return refused.code


def test_a_password_guards_everything_but_the_look() -> None:
    url = server("--auth", "ann:secret").url
    assert status_of(url + "config") == 401
    assert status_of(url + "gradio_api/info") == 401
    assert status_of(url + "v1/models") == 403  # programs need a key
    assert status_of(url + theme.ASSETS_URL + "/inter-latin.woff2") == 200


def test_assets_are_all_that_is_served() -> None:
    base = server().url + theme.ASSETS_URL
    assert status_of(base + "/page.js") == 200
    for path in ("/../app.py", "/%2e%2e/app.py", "/", "/nothing"):
        assert status_of(base + path) in (403, 404)
