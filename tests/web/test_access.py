"""The page for everyone: screen readers, the keyboard, forced colours, less motion."""

from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import Page, expect

from core import metadata
from tests.helpers.accessibility import violations
from tests.helpers.browsing import (
    DESKTOP,
    PHONE,
    PROMPT,
    Open,
    advanced,
    choose,
    finished,
    prompt_of,
    shoot,
    start_long_work,
    wait_for_quiet,
    write,
)

pytestmark = pytest.mark.browser


@pytest.mark.parametrize(("size", "language"), [(DESKTOP, "en-US"), (PHONE, "zh-CN")], ids=["desktop", "phone"])
def test_axe_finds_no_violation(open_page: Open, size: tuple[int, int], language: str, tmp_path: Path) -> None:
    Image.new("RGB", (48, 48), "white").save(tmp_path / "white.png")
    page = open_page(size, locale=language)
    page.emulate_media(reduced_motion="reduce")
    choose(page, "Base")
    assert violations(page) == []
    page.locator("#generate-controls .label-wrap").click()
    page.locator("#guidance textarea").wait_for()
    assert violations(page) == []
    write_in(page, "#prompt")
    page.locator("#model input").first.check()
    page.locator("#generate-controls .count input").nth(1).check()
    page.locator("#generate").click()
    page.locator("#generate-status .working").wait_for()
    assert violations(page) == []
    finished(page)
    expect(page.locator("#generate-enlarged .grid img")).to_have_count(2)  # which then covers the picture
    page.locator("#generate-picture button").press("Enter")
    page.locator("dialog.viewer").wait_for()
    assert violations(page) == []
    page.keyboard.press("Escape")
    page.locator("#generate-output .label-wrap").click()
    page.locator("#generate-strip").wait_for()
    assert violations(page) == []
    page.get_by_role("tab").nth(1).click()
    page.locator("#controlnet-status p").wait_for()
    page.locator("#controlnet-controls .label-wrap").click()
    page.locator("#controlnet-controls .use-lora input").check()
    page.locator("#controlnet-image input[type=file]").first.set_input_files(tmp_path / "white.png")
    page.locator("#preview img").wait_for()
    assert violations(page) == []
    page.get_by_role("tab").nth(2).click()
    page.locator("#upscale-status p").wait_for()
    page.locator("#upscale-image input[type=file]").first.set_input_files(tmp_path / "white.png")
    page.locator("#upscale-estimate p").wait_for()
    assert violations(page) == []
    page.locator("#weights summary").click()
    assert violations(page) == []


def write_in(page: Page, field: str) -> None:
    page.locator(f"{field} textarea").fill(PROMPT)


def tab_to(page: Page, selector: str, key: str = "Tab") -> None:
    """Go with the keyboard until something that the selector names has the focus."""
    for _ in range(60):
        if page.evaluate("(wanted) => document.activeElement.matches(wanted)", selector):
            return
        page.keyboard.press(key)
    raise AssertionError(f"the keyboard does not reach {selector}")


def test_an_expert_never_touches_the_mouse(open_page: Open, tmp_path: Path) -> None:
    page = open_page()
    expect(page.locator("#prompt textarea")).to_be_focused()
    page.keyboard.type(PROMPT)
    page.keyboard.press("Control+Enter")
    finished(page)
    seed = page.locator("#generate-status b").inner_text()

    tab_to(page, "#generate-actions :is(button, a)")  # save
    with page.expect_download() as download:
        page.keyboard.press("Enter")
    download.value.save_as(tmp_path / "saved.png")
    assert metadata.read_picture(tmp_path / "saved.png").values["seed"] == int(seed)

    tab_to(page, "#prompt textarea", "Shift+Tab")  # draw more than is wanted, and cancel
    page.keyboard.press("Control+A")
    page.keyboard.type("something else")
    tab_to(page, "#model input")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#generate-controls .drawer > .label-wrap")).to_contain_text("Base, 25 steps")
    tab_to(page, "#generate-controls .drawer > .label-wrap")
    page.keyboard.press("Enter")
    tab_to(page, '[aria-label="number input for Steps"]')
    page.keyboard.press("Control+A")
    page.keyboard.type("100")
    page.keyboard.press("Tab")
    page.keyboard.press("Control+Enter")
    page.locator("#generate-status .bar").wait_for()
    page.keyboard.press("Escape")
    expect(page.locator("#generate-status")).to_contain_text("Cancelled")

    restore = page.locator("#generate-actions").get_by_text("Restore")
    for _ in range(60):
        if restore.evaluate("(element) => element === document.activeElement"):
            break
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(prompt_of(page)).to_have_value(PROMPT)
    expect(page.get_by_role("radio", name="Turbo")).to_be_checked()

    tab_to(page, '[role="tab"][data-tab-id="controlnet"]', "Shift+Tab")
    page.keyboard.press("Enter")
    page.locator("#controlnet-status p").wait_for()
    expect(page.get_by_role("tab", name="ControlNet")).to_have_attribute("aria-selected", "true")


@pytest.mark.parametrize("size", [DESKTOP, (320, 640)], ids=["desktop", "narrow"])
def test_what_is_chosen_shows_where_the_system_forces_its_colours(open_page: Open, size: tuple[int, int]) -> None:
    page = open_page(size, forced_colors="active", color_scheme="light")
    advanced(page)
    for control in ("#model input", "#generate-controls .use-lora input", "#generate-controls input[type=range]"):
        assert page.locator(control).first.evaluate("(element) => getComputedStyle(element).appearance") == "auto"
    shoot(page, "38-forced-colours")


def test_nothing_moves_when_a_picture_arrives(open_page: Open) -> None:
    page = open_page()
    write(page, PROMPT)
    expect(page.locator("#generate-controls .block.tokens")).to_contain_text("of 512 tokens")
    wait_for_quiet(page)
    page.evaluate("""() => {
        window.moved = [];
        const look = (entries) => entries.forEach((entry) => entry.sources.forEach((source) => {
            const element = source.node?.nodeType === 1 ? source.node : source.node?.parentElement;
            const inside = element?.closest(".stage, .bar, [id$=-controls], #top");
            if (inside) window.moved.push(element.outerHTML.slice(0, 120));
        }));
        const watching = new PerformanceObserver((list) => look(list.getEntries()));
        watching.observe({ type: "layout-shift" });
        window.allMoved = async () => {
            // A shift is known once the frame with it has been drawn.
            for (let frame = 0; frame < 3; frame++) await new Promise(requestAnimationFrame);
            look(watching.takeRecords());
            return window.moved;
        };
    }""")  # fmt: skip
    page.keyboard.press("Control+Enter")
    finished(page)
    page.wait_for_function("document.querySelector('#generate-picture img')?.naturalWidth > 0")
    wait_for_quiet(page)
    assert page.evaluate("allMoved()") == []


def test_every_step_of_the_way_with_the_keyboard(open_page: Open) -> None:
    page = open_page()
    order = []
    prompt_of(page).focus()
    for _ in range(40):
        order.append(page.evaluate("document.activeElement.closest('[id]')?.id ?? ''"))
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline != "none" or order[-1] == "", order
        page.keyboard.press("Tab")
        if "generate" in order:
            break
    assert "generate" in order  # the button, after every field of the form
    assert (
        page.evaluate('document.querySelectorAll(\'[tabindex]:not([tabindex="0"]):not([tabindex="-1"])\').length') == 0
    )


def test_motion_stops_for_those_who_ask(open_page: Open) -> None:
    page = open_page(reduced_motion="reduce")
    start_long_work(page)
    moving = page.evaluate(
        "document.getAnimations()"
        ".filter((animation) => animation.playState === 'running' && animation.effect.target.closest('main')).length"
    )
    assert moving == 0
    page.get_by_role("button", name="Cancel").click()


def test_progress_and_messages_are_live_regions(open_page: Open) -> None:
    page = open_page()
    expect(page.locator("#generate-status [role=status]")).to_have_count(1)
    expect(page.locator("#restored [role=status], #restored[role=status]")).to_have_count(1)
