"""Addresses and ports: each that can be listened on, and a sentence for each that cannot, before anything else."""

import socket
from collections.abc import Iterator

import pytest

import web.server
from core.errors import RequestError
from web import listening


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


def _has_ipv6() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False
