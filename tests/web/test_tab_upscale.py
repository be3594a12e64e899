"""The Upscale tab as a visitor meets it, and its endpoint as programs do: a real browser, server and miniature."""

import functools
from pathlib import Path

import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image
from playwright.sync_api import Page, expect

from bench.upscale import photograph
from core.request import Upscale
from engine import Engine
from tests.helpers.browsing import DESKTOP, DROP, NARROW, PHONE, Open, advanced, kept, reload, shoot
from tests.helpers.serving import server

pytestmark = pytest.mark.browser


@pytest.fixture
def visit(open_tab: Open) -> Open:
    return functools.partial(open_tab, "Upscale")


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    photograph("chelsea", 48).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def choose(page: Page, photo: Path) -> None:
    page.locator("#upscale-image input[type=file]").set_input_files(photo)


def sizes_compared(page: Page) -> list[list[int]]:
    slider = page.locator("#compared img")
    sizes: list[list[int]] = slider.evaluate_all("all => all.map(image => [image.naturalWidth, image.naturalHeight])")
    return sizes


def press(page: Page, size: str) -> None:
    """Upscale, and wait for a picture of this size, in words and beside what it was made from."""
    page.locator("#upscale-start").click()
    expect(page.locator("#upscale-status b")).to_be_visible()
    expect(page.locator("#upscale-status")).to_contain_text(size)
    expect(page.locator("#compared img")).to_have_count(2)
    side = int(size.split()[0])
    page.wait_for_function(
        "side => [...document.querySelectorAll('#compared img')].every(image => image.naturalWidth === side)", arg=side
    )


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_a_picture_is_foreseen_enlarged_and_compared(visit: Open, photo: Path, size: tuple[int, int]) -> None:
    page = visit(size)
    start = page.locator("#upscale-start")
    expect(start).to_be_disabled()
    shoot(page, "40-upscale-empty")
    choose(page, photo)
    expect(page.locator("#upscale-estimate")).to_contain_text("48 × 48 becomes 96 × 96")
    expect(page.locator("#upscale-estimate")).to_contain_text("about")
    press(page, "96 × 96")
    expect(page.locator("#upscale-status")).to_contain_text("Not refined: the miniature")
    expect(page.locator("#upscale-status")).not_to_contain_text("Seed")  # which means nothing here
    assert sizes_compared(page) == [[96, 96], [96, 96]]
    assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
    shoot(page, "41-upscale")


def refine(page: Page) -> None:
    """Ask for a refinement, of one step."""
    page.locator("#denoise input[type=number]").fill("0.33")
    page.locator("#denoise input[type=number]").blur()
    advanced(page, "upscale")
    steps = page.locator("#upscale-controls").get_by_label("number input for Steps")
    steps.fill("1")
    steps.press("Tab")


def test_dice_last_seed_and_a_strip_of_results(visit: Open, photo: Path, tmp_path: Path) -> None:
    page = visit()
    controls, seed = page.locator("#upscale-controls"), page.locator("#upscale-controls").get_by_label("Seed")
    choose(page, photo)
    refine(page)
    controls.get_by_role("button", name="Roll the dice").click()
    expect(seed).not_to_have_value("0")
    rolled = seed.input_value()
    press(page, "96 × 96")
    expect(page.locator("#upscale-status b")).to_have_text(rolled)

    seed.fill("5")
    seed.press("Tab")
    controls.get_by_role("button", name="Reuse last").click()
    expect(seed).to_have_value(rolled)

    photograph("coffee", 40).save(tmp_path / "other.png")
    page.locator("#upscale-image").get_by_label("Remove Image").click()
    choose(page, tmp_path / "other.png")
    expect(page.locator("#upscale-estimate")).to_contain_text("40 × 40 becomes 80 × 80")
    press(page, "80 × 80")
    thumbs = page.locator("#upscale-strip button.thumbnail-item")
    expect(thumbs).to_have_count(2)
    shoot(page, "42-upscale-strip")
    thumbs.last.click()
    page.wait_for_function("document.querySelector('#compared img').naturalWidth === 96")
    assert sizes_compared(page) == [[96, 96], [96, 96]]  # each beside what it was made from
    expect(page.locator("#upscale-status")).to_contain_text("96 × 96")


def test_the_form_survives_a_reload(visit: Open) -> None:
    page = visit()
    with kept(page, "upscale"):
        page.locator("#upscaler").get_by_role("radio", name="Fast").check()
    with kept(page, "upscale"):
        refine(page)
    with kept(page, "upscale"):
        page.locator("#upscale-prompt textarea").fill("fine fur")
    reload(page)
    page.get_by_role("tab", name="Upscale").click()
    expect(page.locator("#upscaler").get_by_role("radio", name="Fast")).to_be_checked()
    expect(page.locator("#denoise input[type=number]")).to_have_value("0.33")
    expect(page.locator("#upscale-prompt textarea")).to_have_value("fine fur")
    advanced(page, "upscale")
    expect(page.locator("#upscale-controls").get_by_label("number input for Steps")).to_have_value("1")


def test_a_dropped_result_restores_the_form(open_page: Open, engine: Engine, photo: Path) -> None:
    values = {"upscaler": "fast", "denoise": 0.4, "steps": 2, "seed": 77, "prompt": "fine fur"}
    made = engine.draw(Upscale.parse(image=str(photo), **values)).png
    page = open_page()
    page.evaluate(DROP, ["made.png", list(made)])
    page.locator("#restored").get_by_role("button", name="Restore settings").click()
    expect(page.get_by_role("tab", name="Upscale")).to_have_attribute("aria-selected", "true")
    expect(page.locator("#restored")).to_contain_text("Not restored: Image: photo.png")
    expect(page.locator("#upscaler").get_by_role("radio", name="Fast")).to_be_checked()
    expect(page.locator("#denoise input[type=number]")).to_have_value("0.4")
    expect(page.locator("#upscale-prompt textarea")).to_have_value("fine fur")
    advanced(page, "upscale")
    expect(page.locator("#upscale-controls").get_by_label("number input for Steps")).to_have_value("2")
    expect(page.locator("#upscale-controls").get_by_label("Seed")).to_have_value("77")


def test_an_error_comes_with_a_button_that_fixes_it(visit: Open, photo: Path) -> None:
    page = visit()
    choose(page, photo)
    refine(page)
    seed = page.locator("#upscale-controls").get_by_label("Seed")
    seed.fill("1.5")
    seed.press("Tab")
    page.locator("#upscale-start").click()
    expect(page.locator("#upscale-status .failed")).to_contain_text("Possible: a whole number")
    page.locator("#upscale-output").get_by_role("button", name="Use a random seed").click()
    expect(seed).to_have_value("0")
    press(page, "96 × 96")


def test_the_prompt_belongs_to_the_refinement(visit: Open) -> None:
    page = visit(NARROW)
    prompt, drawer = page.locator("#upscale-prompt textarea"), page.locator("#upscale-controls .drawer")
    expect(prompt).to_be_disabled()  # in its place, as on every tab, and it says why
    expect(drawer).to_be_hidden()  # nothing is drawn, so there is no seed
    expect(page.locator("#upscale-controls")).to_contain_text("no prompt is needed")
    page.locator("#denoise input[type=number]").fill("0.33")
    page.locator("#denoise input[type=number]").blur()
    expect(prompt).to_be_enabled()
    expect(drawer).to_contain_text("5 steps, seed random")
    expect(page.locator("#upscale-controls")).not_to_contain_text("no prompt is needed")


def test_a_picture_that_is_too_large_is_refused_before_it_is_pressed(visit: Open, tmp_path: Path) -> None:
    Image.new("RGB", (2049, 8)).save(tmp_path / "large.png")
    page = visit(PHONE)
    choose(page, tmp_path / "large.png")
    expect(page.locator("#upscale-estimate")).to_contain_text("2048 pixels a side")
    expect(page.locator("#upscale-start")).to_be_disabled()


def test_a_result_is_upscaled_further(visit: Open) -> None:
    page = visit()
    page.get_by_role("tab", name="Text to Image").click()
    page.locator("#prompt textarea").first.fill("a red apple on a blue background")
    page.locator("#generate").click()
    page.get_by_role("button", name="Upscale this").click()
    expect(page.get_by_role("tab", name="Upscale")).to_have_attribute("aria-selected", "true")
    expect(page.locator("#upscale-estimate")).to_contain_text("128 × 128 becomes 256 × 256")


def test_programs_call_it_by_name(photo: Path, tmp_path: Path) -> None:
    client = Client(server().url, verbose=False, download_files=str(tmp_path))
    picture, parameters = client.predict(image=handle_file(photo), upscaler="fast", api_name="/upscale")
    with Image.open(picture) as made:
        assert made.size == (96, 96)
    assert parameters["mode"] == "upscale"
    assert parameters["request"]["denoise"] == 0
    with pytest.raises(AppError, match="denoise"):
        client.predict(image=handle_file(photo), denoise=2, api_name="/upscale")
