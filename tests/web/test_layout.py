"""What the first screen shows: a large picture, and with it the prompt and the button, on every tab in every state."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from playwright.sync_api import Page, expect

from tests.helpers.browsing import (
    LAPTOP,
    NAMES,
    PHONE,
    PROMPT,
    UPRIGHT,
    WIDE,
    Open,
    advanced,
    finished,
    prompt_of,
    set_seed,
    shoot,
    start_long_work,
    write,
)

pytestmark = pytest.mark.browser

SIZES = pytest.mark.parametrize("size", [LAPTOP, UPRIGHT, PHONE], ids=NAMES.get)
SMALLEST = {LAPTOP: 560, UPRIGHT: 700, PHONE: 360}  # pixels a side of a finished square picture

# The prompt and the button of the open tab that are not wholly on the screen, or under something else.
HIDDEN = """() => [...document.querySelectorAll(".controls .prompt textarea, .controls .go")]
    .filter((part) => part.checkVisibility())
    .filter((part) => {
        const { left, top, right, bottom } = part.getBoundingClientRect();
        const over = document.elementFromPoint((left + right) / 2, (top + bottom) / 2);
        return left < 0 || top < 0 || right > innerWidth || bottom > innerHeight || !part.contains(over);
    })
    .map((part) => part.outerHTML.slice(0, 80))"""

# A picture's sides as they are drawn: its box may be larger.
DRAWN = """(image) => {
    const { width, height } = image.getBoundingClientRect();
    const scale = Math.min(width / image.naturalWidth, height / image.naturalHeight);
    return [scale * image.naturalWidth, scale * image.naturalHeight];
}"""

SHIFTS = """async () => {
    const entries = [];
    const observer = new PerformanceObserver((list) => entries.push(...list.getEntries()));
    observer.observe({ type: "layout-shift", buffered: true });
    for (let frame = 0; frame < 3; frame++) await new Promise(requestAnimationFrame);
    entries.push(...observer.takeRecords());
    return entries.filter((entry) => !entry.hadRecentInput).map((entry) => [
        entry.value, entry.sources.map(({ node }) => node?.outerHTML?.slice(0, 80) ?? node?.nodeName).join(" | ")]);
}"""


def drawn(page: Page, selector: str) -> float:
    """The shorter side of a picture on the screen, in pixels."""
    page.locator(selector).last.wait_for()
    page.wait_for_function(
        "(selector) => [...document.querySelectorAll(selector)].at(-1).naturalWidth > 0", arg=selector
    )
    sides: list[float] = page.locator(selector).last.evaluate(DRAWN)
    return min(sides)


def in_sight(page: Page) -> None:
    assert page.evaluate(HIDDEN) == []
    assert page.evaluate("scrollY") == 0
    assert page.locator(".controls .go:visible").count() == 1
    assert page.locator(".controls .prompt textarea:visible").count() == 1


@SIZES
def test_prompt_and_button_are_on_the_first_screen(open_page: Open, size: tuple[int, int], tmp_path: Path) -> None:
    Image.new("RGB", (96, 96), "red").save(tmp_path / "red.png")
    page = open_page(size)
    in_sight(page)
    advanced(page)
    in_sight(page)
    start_long_work(page)
    in_sight(page)
    shoot(page, "50-drawing")
    page.get_by_role("button", name="Cancel").click()
    expect(page.locator("#generate-status")).to_contain_text("Cancelled")
    in_sight(page)
    page.locator("#model").get_by_role("radio", name="Turbo").check()
    expect(page.locator("#generate-controls .drawer > .label-wrap")).to_contain_text("Turbo, 8 steps")
    page.locator("#generate").click()
    page.locator("#generate-strip button.thumbnail-item").nth(3).wait_for()
    in_sight(page)
    assert drawn(page, "#generate-picture img") >= SMALLEST[size]
    shoot(page, "51-finished")

    page.get_by_role("tab", name="ControlNet").click()
    page.locator("#controlnet-status p").wait_for()
    in_sight(page)
    page.locator("#controlnet-image input[type=file]").first.set_input_files(tmp_path / "red.png")
    page.locator("#preview img").wait_for()
    in_sight(page)
    page.locator("#controlnet-prompt textarea").fill(PROMPT)
    page.locator("#controlnet-generate").click()
    page.locator("#controlnet-status b").wait_for()
    in_sight(page)
    assert drawn(page, "#controlnet-picture img") >= SMALLEST[size]
    shoot(page, "52-controlnet")

    page.get_by_role("tab", name="Upscale").click()
    page.locator("#upscale-status p").wait_for()
    in_sight(page)
    page.locator("#upscale-image input[type=file]").first.set_input_files(tmp_path / "red.png")
    page.locator("#upscale-estimate p").wait_for()
    in_sight(page)
    page.locator("#upscaler").get_by_role("radio", name="Fast").check()
    page.locator("#upscale-start").click()
    page.locator("#upscale-status b").wait_for()
    in_sight(page)
    assert drawn(page, "#compared img") >= SMALLEST[size]
    shoot(page, "53-upscale")


def test_the_stage_takes_most_of_a_laptops_screen(open_page: Open) -> None:
    page = open_page(LAPTOP)
    for tab in ("generate", "controlnet", "upscale"):
        page.locator(f'[role="tab"][data-tab-id="{tab}"]').click()
        page.locator(f"#{tab}-status p").wait_for()
        stage: Any = page.locator(f"#{tab}-output").bounding_box()
        assert stage["width"] * stage["height"] >= 0.55 * LAPTOP[0] * LAPTOP[1]


@pytest.mark.parametrize(
    ("size", "language"),
    [(LAPTOP, "en-US"), (LAPTOP, "zh-CN"), (UPRIGHT, "zh-CN"), (PHONE, "en-US"), (PHONE, "zh-CN"), (WIDE, "en-US")],
    ids=lambda value: NAMES.get(value, value),
)
def test_nothing_shifts_from_the_first_paint_to_the_picture(
    open_page: Open, size: tuple[int, int], language: str
) -> None:
    page = open_page(size, locale=language)
    page.locator("#prompt textarea").fill(PROMPT)
    page.keyboard.press("Control+Enter")
    finished(page)
    assert drawn(page, "#generate-picture img") > 0
    shifts = page.evaluate(SHIFTS)
    assert sum(value for value, _ in shifts) <= 0.05, shifts


@pytest.mark.parametrize("size", [LAPTOP, PHONE], ids=NAMES.get)
def test_the_headers_place_is_kept_until_it_comes(open_page: Open, size: tuple[int, int]) -> None:
    page = open_page(size)
    tabs = page.locator(".tab-wrapper").first
    place = tabs.bounding_box()
    page.evaluate("document.querySelector('#top').remove()")
    assert tabs.bounding_box() == place


def test_the_closed_drawer_says_what_is_set(open_page: Open) -> None:
    page = open_page(PHONE)
    fold, chip = page.locator("#generate-controls .drawer > .label-wrap"), page.locator("#generate-controls .chip")
    expect(fold).to_have_text("Turbo, 8 steps, 128 × 128, seed random ▼")
    expect(chip).to_be_hidden()
    set_seed(page, "42")
    page.locator("#generate-controls .count").get_by_role("radio", name="2").check()
    page.keyboard.press("Escape")
    expect(fold).to_have_attribute("aria-expanded", "false")
    expect(fold).to_have_text("Turbo, 8 steps, 128 × 128, 2 pictures ▼")
    expect(chip).to_have_text("seed 42 ×")
    chip.click()
    expect(chip).to_be_hidden()
    expect(fold).to_contain_text("seed random")


def test_a_seed_from_a_link_is_a_chip(open_page: Open) -> None:
    page = open_page(LAPTOP, query="?prompt=a+red+apple&seed=42")
    expect(page.locator("#generate-controls .chip")).to_have_text("seed 42 ×")
    expect(page.locator("#restored")).to_contain_text("The link has filled in the form.")
    page.locator("#generate").click()
    expect(page.locator("#restored")).to_be_hidden()  # it has been read
    finished(page)
    expect(page.locator("#generate-status b")).to_have_text("42")


def test_a_long_prompt_takes_no_room_from_the_picture(open_page: Open) -> None:
    page = open_page(LAPTOP)
    stage = page.locator("#generate-stage").bounding_box()
    write(page, "a red apple on a blue background, " * 40)
    assert prompt_of(page).bounding_box()["height"] > 100  # type: ignore[index]  # it is there
    assert page.locator("#generate-stage").bounding_box() == stage
    page.locator("#model input").first.focus()
    assert prompt_of(page).bounding_box()["height"] < 60  # type: ignore[index]


def test_what_can_be_touched_is_large_enough_for_a_finger(open_page: Open) -> None:
    page = open_page(PHONE, has_touch=True, is_mobile=True)
    small = page.evaluate("""
        [...document.querySelectorAll("main button, main summary, main label:has(input[type=radio])")]
        .filter((part) => part.checkVisibility({ visibilityProperty: true }) && !part.closest("[aria-hidden=true]"))
        .filter((part) => part.getBoundingClientRect().height < 44)
        .map((part) => part.outerHTML.slice(0, 120))
    """)
    assert small == []


def test_radio_buttons_are_one_group_with_a_name(open_page: Open) -> None:
    page = open_page()
    group = page.get_by_role("radiogroup", name="Model")
    assert len(set(group.locator("input").evaluate_all("all => all.map((radio) => radio.name)"))) == 1
    expect(group.get_by_role("radio")).to_have_count(2)


def test_the_button_says_when_it_is_busy(open_page: Open) -> None:
    page = open_page()
    start_long_work(page)
    expect(page.locator("#generate")).to_have_attribute("aria-disabled", "true")
    page.get_by_role("button", name="Cancel").click()
    expect(page.locator("#generate-status")).to_contain_text("Cancelled")
    expect(page.locator("#generate")).to_have_attribute("aria-disabled", "false")
