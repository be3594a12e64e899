"""The page where proxies are: one that the environment names, which it must not ask, and one in front of it."""

import re
import urllib.request
from collections.abc import Iterator
from urllib.parse import urljoin, urlsplit

import pytest
from gradio_client import Client

from tests.helpers.proxying import Proxy, running
from tests.helpers.serving import Server, server

NAMES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
SOCKS = "socks5://127.0.0.1:9"
# What nobody listens to, what a package lacks for, what is no address; and an exception that httpx cannot read.
UNUSABLE = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "foo://x:y", "all_proxy": SOCKS, "no_proxy": "fe80::/10"}


@pytest.mark.parametrize("upper", [True, False])
def test_the_page_starts_whatever_proxy_the_environment_names(upper: bool) -> None:
    named = {name.upper() if upper else name: value for name, value in UNUSABLE.items()}
    url = server(environment=tuple(named.items())).url
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url) as page:
        assert page.status == 200


@pytest.fixture(scope="module")
def behind() -> Server:
    return server("--allow-host", "studio.example", environment=(("GRADIO_ROOT_PATH", "/studio/"),))


def fetch(url: str, host: str | None = None) -> bytes:
    asked = urllib.request.Request(url, headers={"Host": host} if host else {})
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(asked) as answer:
        data: bytes = answer.read()
        return data


@pytest.fixture(scope="module", params=["strips", "keeps"])
def front(request: pytest.FixtureRequest, behind: Server) -> Iterator[Proxy]:
    """A reverse proxy that serves the page under /studio/, with and without the prefix on the way."""
    port = urlsplit(behind.url).port
    assert port is not None
    with running(Proxy(port, "/studio" if request.param == "strips" else "")) as proxy:
        yield proxy


def test_a_page_under_a_path_has_all_that_it_is_made_of(front: Proxy) -> None:
    page = f"{front.url}/studio/"
    text = fetch(page).decode()
    assert f'"root":"{front.url}/studio"' in text
    parts = set(re.findall(r'(?:src|href)="(\./[^"]+)"', text)) | set(re.findall(r"studio-assets/[\w./-]+", text))
    assert {"studio-assets/page.js", "studio-assets/mosaic/0.webp"} < parts
    parts |= {"theme.css", "config", "favicon.ico"}
    assert [part for part in parts if not fetch(urljoin(page, part))] == []
    (font, *_) = re.findall(r"url\('([^']+woff2)'\)", fetch(urljoin(page, "theme.css")).decode())
    assert fetch(urljoin(page, font)).startswith(b"wOF2")


def test_a_picture_is_streamed_and_fetched_under_a_path(front: Proxy) -> None:
    client = Client(f"{front.url}/studio/", verbose=False)
    job = client.submit("a fox", steps=1, api_name="/generate")
    assert job.result(timeout=120)
    assert not [path for path in front.asked if not path.startswith("/studio/")]
    assert [path for path in front.asked if "/gradio_api/queue/data" in path]


def test_the_visitors_name_makes_the_addresses_where_the_proxy_passes_it_on(front: Proxy) -> None:
    assert b'"root":"http://studio.example/studio"' in fetch(f"{front.url}/studio/", "studio.example")
