"""When a server makes itself ready: a browser that shows the page begins it, and whoever only fetches it does not."""

import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from gradio_client import Client
from playwright.sync_api import Browser, Page

from tests.helpers.browsing import PATIENCE, PROMPT, settled
from tests.helpers.serving import Server, server
from web import theme

TORCH = "libtorch"

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="what a process has loaded is read from /proc"),
]


@pytest.fixture(scope="module")
def untouched() -> Server:
    """A server of its own, which logs what it does."""
    return server("--verbose")


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    context = browser.new_context()
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    yield page
    context.close()


def wait_for(server: Server, line: str) -> None:
    deadline = time.monotonic() + PATIENCE / 1000
    while line not in server.log.read_text():
        assert time.monotonic() < deadline, server.log.read_text()
        time.sleep(0.05)


def test_fetching_the_page_imports_nothing_and_showing_it_warms_up(untouched: Server, page: Page) -> None:
    for path in ("", "", "config", "gradio_api/info", f"{theme.ASSETS_URL}/page.js", "?mode=upscale"):
        with urllib.request.urlopen(untouched.url + path) as answer:
            answer.read()
    client = Client(untouched.url, verbose=False)
    assert not untouched.has_mapped(TORCH)
    assert "warmed up" not in untouched.log.read_text()

    page.goto(untouched.url)
    wait_for(untouched, "warmed up")
    assert untouched.has_mapped(TORCH)
    settled(page)
    page.reload()  # another visit
    settled(page)

    _, sidecar = client.predict(prompt=PROMPT, steps=1, seed=7, api_name="/generate")
    client.close()
    assert not {"starting", "loading"} & set(sidecar["seconds"])
    assert untouched.log.read_text().count("warmed up") == 1
