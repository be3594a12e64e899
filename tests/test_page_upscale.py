"""The Upscale tab as a visitor meets it, and its endpoint as programs do: a real browser, server and miniature."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image
from playwright.sync_api import Browser, Page, expect
from serving import Server, server
from test_page import DESKTOP, NARROW, PATIENCE, PHONE, browser, shoot  # noqa: F401 (a fixture)

from bench.upscale import photograph

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def served() -> Server:
    return server()


@pytest.fixture
def visit(browser: Browser, served: Server) -> Iterator:  # noqa: F811
    """Open the page as a new visitor; afterwards nothing may have failed in the console."""
    contexts, complaints = [], []

    def open_page(size: tuple[int, int] = DESKTOP) -> Page:
        contexts.append(browser.new_context(viewport={"width": size[0], "height": size[1]}))
        page = contexts[-1].new_page()
        page.set_default_timeout(PATIENCE)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda said: complaints.append(said.text) if said.type == "error" else None)
        page.goto(served.url)
        page.locator("#generate-status p").wait_for()
        return page

    expect.set_options(timeout=PATIENCE)
    yield open_page
    for context in contexts:
        context.close()
    assert not complaints


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    photograph("chelsea", 48).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def enter(page: Page) -> None:
    page.get_by_role("tab", name="Upscale").click()
    page.locator("#upscale-status p").wait_for()


def choose(page: Page, photo: Path) -> None:
    page.locator("#upscale-image input[type=file]").set_input_files(photo)


def test_a_picture_is_foreseen_enlarged_and_compared(visit, photo: Path) -> None:
    page = visit()
    enter(page)
    start = page.locator("#upscale-start")
    expect(start).to_be_disabled()
    choose(page, photo)
    expect(page.locator("#upscale-estimate")).to_contain_text("48 × 48 becomes 96 × 96")
    expect(page.locator("#upscale-estimate")).to_contain_text("about")
    start.click()
    expect(page.locator("#upscale-status")).to_contain_text("96 × 96")
    expect(page.locator("#upscale-status")).to_contain_text("Not refined: the miniature")
    slider = page.locator("#compared")
    expect(slider.locator("img")).to_have_count(2)
    sizes = slider.locator("img").evaluate_all("all => all.map(one => [one.naturalWidth, one.naturalHeight])")
    assert sizes == [[96, 96], [96, 96]]
    shoot(page, "upscale")


def test_the_prompt_belongs_to_the_refinement(visit) -> None:
    page = visit(NARROW)
    enter(page)
    expect(page.locator("#upscale-prompt")).to_have_count(0)
    page.locator("#denoise input[type=number]").fill("0.33")
    page.locator("#denoise input[type=number]").blur()
    expect(page.locator("#upscale-prompt")).to_be_visible()


def test_a_picture_that_is_too_large_is_refused_before_it_is_pressed(visit, tmp_path: Path) -> None:
    Image.new("RGB", (2049, 8)).save(tmp_path / "large.png")
    page = visit(PHONE)
    enter(page)
    choose(page, tmp_path / "large.png")
    expect(page.locator("#upscale-estimate")).to_contain_text("2048 pixels a side")
    expect(page.locator("#upscale-start")).to_be_disabled()


def test_a_result_is_upscaled_further(visit) -> None:
    page = visit()
    page.locator("#prompt textarea").first.fill("a red apple on a blue background")
    page.locator("#generate").click()
    page.get_by_role("button", name="Upscale this").click()
    expect(page.get_by_role("tab", name="Upscale")).to_have_attribute("aria-selected", "true")
    expect(page.locator("#upscale-estimate")).to_contain_text("128 × 128 becomes 256 × 256")


def test_programs_call_it_by_name(served: Server, photo: Path, tmp_path: Path) -> None:
    client = Client(served.url, verbose=False, download_files=str(tmp_path))
    picture, parameters = client.predict(image=handle_file(photo), upscaler="fast", api_name="/upscale")
    with Image.open(picture) as made:
        assert made.size == (96, 96)
    assert parameters["mode"] == "upscale" and parameters["request"]["denoise"] == 0
    with pytest.raises(AppError, match="denoise"):
        client.predict(image=handle_file(photo), denoise=2, api_name="/upscale")
