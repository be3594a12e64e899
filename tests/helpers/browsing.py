"""A real Chromium on the real server, and what a visitor does there: fixtures, which `conftest` hands on, and steps.

Screenshots go to artifacts/, to be looked at; none is compared by pixel.
"""

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, BrowserContext, Locator, Page, expect, sync_playwright

from tests.helpers.serving import ROOT, server

ARTIFACTS = ROOT / "artifacts"
PROMPT = "a fox on a black background"
PATIENCE = 120_000  # ms; a machine may be busy
DESKTOP, TABLET, PHONE, NARROW = (1280, 800), (768, 1024), (390, 844), (320, 640)
LAPTOP, UPRIGHT, WIDE = (1280, 720), (820, 1180), (1920, 1080)
NAMES = {DESKTOP: "desktop", TABLET: "tablet", PHONE: "phone", NARROW: "narrow"}
NAMES |= {LAPTOP: "laptop", UPRIGHT: "upright", WIDE: "wide"}
SIZES = pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]

Open = Callable[..., Page]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    assert path, f"none of {', '.join(names)} is installed"
    ARTIFACTS.mkdir(exist_ok=True)
    expect.set_options(timeout=PATIENCE)
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield started
        started.close()


# Counts the page's events: those asked for, and those that have ended. Whether an answer is still open says less: now
# and then Gradio's page opens one too many, which stays open until the next event.
COUNT_EVENTS = """(() => {
    window.events = { asked: 0, ended: 0 };
    const ask = window.fetch;
    const follow = async (stream) => {
        const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
        for (let text = "", read; !(read = await reader.read()).done;) {
            const lines = (text + read.value).split("\\n");
            text = lines.pop();
            window.events.ended += lines.filter((line) => /"msg": ?"process_completed"/.test(line)).length;
        }
    };
    window.fetch = async (...about) => {
        const url = `${about[0]?.url ?? about[0]}`;
        const joins = url.includes("/queue/join");
        if (joins) window.events.asked += 1;
        const answer = await ask(...about);
        if (joins && !answer.ok) window.events.ended += 1;
        if (url.includes("/queue/data")) follow(answer.clone().body).catch(() => {}); // broken off
        return answer;
    };
})()"""


class Contexts:
    """A browser's contexts, which serve one visitor after another.

    The files of the page stay in a context's cache, compiled, which halves the time until it can be used; what it has
    kept of a visitor goes.
    """

    def __init__(self, browser: Browser) -> None:
        self.browser = browser
        self.free: dict[str, list[BrowserContext]] = {}
        self.used: list[tuple[str, BrowserContext]] = []

    def page(self, **settings: Any) -> Page:
        """Return a blank page of a new visitor whose browser has these settings."""
        key, origin = repr(sorted(settings.items())), server().url.rstrip("/")
        free = self.free.get(key)
        context = free.pop() if free else self.browser.new_context(**settings)
        self.used.append((key, context))
        page = context.new_page()
        devtools = context.new_cdp_session(page)
        devtools.send("Storage.clearDataForOrigin", {"origin": origin, "storageTypes": "all"})
        devtools.detach()
        return page

    def close_pages(self) -> None:
        """End every visit; the contexts are free again."""
        while self.used:
            key, context = self.used.pop()
            for page in context.pages:
                page.close()
            self.free.setdefault(key, []).append(context)


@pytest.fixture(scope="module")
def contexts(browser: Browser) -> Contexts:
    return Contexts(browser)


@pytest.fixture
def open_page(contexts: Contexts) -> Iterator[Open]:
    """Open the page as a new visitor; afterwards, nothing may have gone to another host or failed in the console."""
    asked: set[str] = set()
    complaints: list[str] = []

    def visit(size: tuple[int, int] = DESKTOP, query: str = "", **settings: Any) -> Page:
        page = contexts.page(viewport={"width": size[0], "height": size[1]}, **settings)
        page.set_default_timeout(PATIENCE)
        page.on("request", lambda request: asked.add(request.url))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda line: complaints.append(line.text) if line.type == "error" else None)
        page.add_init_script(COUNT_EVENTS)
        page.goto(server().url + query)
        page.locator("#generate").wait_for()
        page.locator("#generate-status p").wait_for()
        settled(page)  # until then the page still fills its form and words its examples
        return page

    yield visit
    heard = list(complaints)  # what closing breaks off, Gradio calls an error too
    contexts.close_pages()
    hosts = {urlsplit(url).netloc for url in asked if urlsplit(url).scheme not in ("data", "blob")}
    assert hosts == {urlsplit(server().url).netloc}
    assert not heard


@pytest.fixture
def open_tab(open_page: Open) -> Open:
    """Open the page as a new visitor, at one of its other tabs."""

    def visit(name: str, size: tuple[int, int] = DESKTOP, **settings: Any) -> Page:
        page = open_page(size, **settings)
        page.get_by_role("tab", name=name).click()
        page.locator(f"#{name.lower()}-status p").wait_for()
        return page

    return visit


def shoot(page: Page, name: str) -> None:
    size = page.viewport_size
    assert size is not None
    page.screenshot(path=ARTIFACTS / f"{NAMES[size['width'], size['height']]}-{name}.png", full_page=True)


def wait_for_quiet(page: Page) -> None:
    """Wait until no event has been under way for a while: one leads to another, and each may redraw what it changes."""
    quiet, deadline = 0, time.monotonic() + PATIENCE / 1000
    while quiet < 20:
        events = page.evaluate("window.events")
        assert time.monotonic() < deadline, events
        page.wait_for_timeout(20)
        quiet = quiet + 1 if events["asked"] == events["ended"] else 0


def reload(page: Page) -> None:
    """Reload a page once it is quiet: what leaving breaks off is called an error; wait until it is filled in again."""
    wait_for_quiet(page)
    page.reload()
    settled(page)


def write(page: Page, prompt: str) -> None:
    prompt_of(page).fill(prompt)


def set_seed(page: Page, seed: str) -> None:
    advanced(page)
    field = seed_field(page)
    field.wait_for()
    wait_for_quiet(page)  # the fields have only just been made
    field.fill(seed)
    field.press("Tab")
    wait_for_quiet(page)


def generate(page: Page) -> None:
    page.get_by_role("button", name="Generate").click()


def choose(page: Page, model: str) -> None:
    page.get_by_role("radio", name=model).check()


def set_steps(page: Page, steps: int) -> None:
    advanced(page)
    field = page.get_by_label("number input for Steps")
    field.fill(str(steps))
    field.press("Tab")


def start_long_work(page: Page) -> None:
    """Ask for as much as the page allows, and wait until it is being drawn."""
    advanced(page)
    choose(page, "Base")
    expect(page.get_by_label("number input for Steps")).to_have_value("25")
    set_steps(page, 100)
    page.locator("#generate-controls .count").get_by_role("radio", name="4").check()
    write(page, PROMPT)
    generate(page)
    page.locator("#generate-status .bar[aria-valuenow]").wait_for()


def picture_bytes(page: Page) -> bytes:
    source = page.locator("#generate-picture img").get_attribute("src")
    assert source is not None
    return page.request.get(source).body()


def finished(page: Page) -> None:
    page.locator("#generate-status b").wait_for()


def draw_seed(page: Page, seed: str) -> None:
    """Draw the usual prompt in two steps, and wait for the image."""
    write(page, PROMPT)
    set_steps(page, 2)
    set_seed(page, seed)
    generate(page)
    finished(page)


def advanced(page: Page, mode: str = "generate") -> None:
    """Open the drawer of a tab, where it is closed."""
    fold = page.locator(f"#{mode}-controls .drawer > .label-wrap")
    if fold.get_attribute("aria-expanded") != "true":
        fold.click()
    expect(fold).to_have_attribute("aria-expanded", "true")


def prompt_of(page: Page) -> Locator:
    return page.get_by_label("Prompt", exact=False).first


def settled(page: Page) -> None:
    """Wait until the page has been filled in, and so keeps what is typed."""
    page.wait_for_function("window.studioReady === true")


def seed_field(page: Page) -> Locator:
    return page.locator("#generate-controls").get_by_label("Seed")


@contextmanager
def kept(page: Page, mode: str = "generate") -> Iterator[None]:
    """Change a tab's form inside the block; afterwards, wait until the browser has kept it.

    Gradio encrypts what it keeps, with another salt each time: whatever is written differs from what was there.
    """
    wait_for_quiet(page)  # what was changed before may still have the page change more
    name = f"studio-{mode}"
    before = page.evaluate("name => localStorage.getItem(name)", name)
    yield
    page.wait_for_function("([name, before]) => localStorage.getItem(name) !== before", arg=[name, before])


# Drops a PNG beside every field of the page: its name, and its bytes as a list.
DROP = """([name, bytes]) => {
    const data = new DataTransfer();
    data.items.add(new File([new Uint8Array(bytes)], name, { type: "image/png" }));
    document.querySelector("main").dispatchEvent(
        new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true }));
}"""
