"""Addresses and ports: each that can be listened on, and a sentence for each that cannot, before anything else."""

import os
import re
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

import web.server
from core.errors import RequestError
from web import listening

ROOT = Path(__file__).parent.parent.parent


def _has_ipv6() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


@pytest.fixture
def taken() -> Iterator[int]:
    """A port of 127.0.0.1 that somebody else listens on."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        yield other.getsockname()[1]


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "[::1]", "0.0.0.0", "::", "127.0.0.5"])
def test_port_0_takes_a_free_one_at_any_address(host: str) -> None:
    if ":" in host and not _has_ipv6():
        pytest.skip("a machine without IPv6")
    name, port = listening.place(host, 0)
    assert 1024 <= port <= 65535
    assert listening.place(host, port) == (name, port)
    assert name.startswith("[") == (":" in host)


@pytest.mark.parametrize("port", [-1, 65536, 70000, 10**30])
def test_what_is_no_port_is_refused(port: int) -> None:
    with pytest.raises(RequestError, match=rf"^port: {port} is not possible; allowed: a port from 1 to 65535"):
        web.server.serve(port=port)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0"])
def test_a_port_that_is_taken_is_refused(host: str, taken: int) -> None:
    with pytest.raises(RequestError, match=rf"^port: {taken} is not possible; allowed: .*that nothing else listens on"):
        web.server.serve(host=host, port=taken, insecure=True)


MALFORMED = ["256.1.1.1", "1", "127.1", "0x7f000001", "1.2.3.4.5", "", " ", ":1", "::g", "http://localhost", "a b"]
MALFORMED += ["localhost:7860", "[127.0.0.1"]
# Those kept for documentation and for nobody (RFC 5737, 3849 and 2606).
OF_NOBODY = ["192.0.2.1", "2001:db8::1", "nowhere.invalid", "a..b", "-"]


@pytest.mark.parametrize(
    ("host", "auth"), [(host, None) for host in MALFORMED] + [(host, "ann:secret") for host in OF_NOBODY]
)
def test_what_is_no_address_of_this_machine_is_refused(host: str, auth: str | None) -> None:
    with pytest.raises(RequestError, match=r"^host: .* is not possible; allowed: an address or a name of this machine"):
        web.server.serve(host=host, auth=auth)


@pytest.mark.skipif(not _has_ipv6(), reason="a machine without IPv6")
def test_the_page_stands_on_ipv6_at_a_free_port(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "cli.py"), "serve", "--weights", "mini", "--host", "::1", "--port", "0"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            told = re.search(r"http://\[::1\]:\d+/", process.stdout.readline())
            assert told is not None
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(told[0]) as page:
                assert page.status == 200
        finally:
            process.terminate()


@pytest.mark.parametrize(
    ("given", "path"),
    [
        ("", ""),
        ("/", ""),
        ("/studio", "/studio"),
        ("/a/studio/", "/a/studio"),
        ("https://studio.example", "https://studio.example"),
        ("https://studio.example:8443/studio/", "https://studio.example:8443/studio"),
    ],
)
def test_a_root_path_is_a_path_or_an_address(given: str, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADIO_ROOT_PATH", given)
    assert web.server.launch_options("127.0.0.1", 7860, None, False)["root_path"] == path


@pytest.mark.parametrize("given", ["studio", "ftp://x/y", "/a b", "/a?b", "https:///x", "http:/x"])
def test_any_other_root_path_is_refused_in_a_sentence(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADIO_ROOT_PATH", given)
    with pytest.raises(RequestError, match=r"^GRADIO_ROOT_PATH: .* is not possible; allowed: a path such as /studio"):
        web.server.serve()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux's own folders")
@pytest.mark.parametrize("folder", ["/proc", "/proc/nowhere", "/sys/kernel"])
def test_a_folder_for_uploads_that_cannot_be_written_to_is_refused(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", folder)
    with pytest.raises(RequestError, match=rf"^GRADIO_TEMP_DIR: '{folder}' is not possible; allowed: a folder that"):
        web.server.serve(port=0)


def test_what_a_space_starts_ends_in_a_sentence_too() -> None:
    environ = os.environ | {"GRADIO_ROOT_PATH": "studio"}
    done = subprocess.run([sys.executable, ROOT / "app.py"], env=environ, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("GRADIO_ROOT_PATH: 'studio' is not possible")
    assert len(done.stderr.splitlines()) == 1
