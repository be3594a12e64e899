"""What fills the form, and keeps it: a reload, a link, a dropped picture, a result."""

from pathlib import Path

import pytest
from PIL import Image, PngImagePlugin
from playwright.sync_api import expect

from tests.helpers.browsing import (
    DROP,
    PROMPT,
    SIZES,
    Open,
    advanced,
    choose,
    draw_seed,
    finished,
    generate,
    kept,
    prompt_of,
    reload,
    seed_field,
    set_steps,
    settled,
    shoot,
    wait_for_quiet,
    write,
)

pytestmark = pytest.mark.browser


def test_the_form_survives_a_reload_in_this_browser_only(open_page: Open) -> None:
    page = open_page()
    with kept(page):
        choose(page, "Base")
    with kept(page):
        write(page, PROMPT)
    advanced(page)
    with kept(page):
        page.get_by_label("Negative prompt").fill("blue")
    with kept(page):
        set_steps(page, 17)
    reload(page)
    expect(prompt_of(page)).to_have_value(PROMPT)
    advanced(page)
    expect(page.get_by_label("Negative prompt")).to_have_value("blue")
    expect(page.get_by_label("number input for Steps")).to_have_value("17")
    other = open_page()
    assert prompt_of(other).input_value() == ""


def test_a_link_carries_a_form(open_page: Open) -> None:
    page = open_page(query="?prompt=a+red+apple&seed=42&steps=3&width=1000&unknown=1")
    expect(prompt_of(page)).to_have_value("a red apple")
    expect(page.locator("#restored")).to_be_visible()
    expect(page.locator("#restored")).to_contain_text("Not restored: Width: 1000")
    advanced(page)
    expect(page.get_by_label("number input for Steps")).to_have_value("3")
    assert seed_field(page).input_value() == "42"
    expect(page.locator("#restored")).to_be_hidden()  # what was said goes with what is done next
    with kept(page):
        set_steps(page, 5)
    wait_for_quiet(page)  # what leaving breaks off is called an error
    page.goto(f"{page.url.partition('?')[0]}?prompt=a+blue+house")
    settled(page)
    expect(prompt_of(page)).to_have_value("a blue house")
    advanced(page)
    expect(page.get_by_label("number input for Steps")).to_have_value("8")  # and not what the browser kept
    assert seed_field(page).input_value() == "0"


def a1111_file(path: Path) -> Path:
    chunks = PngImagePlugin.PngInfo()
    text = (
        "a fox\nNegative prompt: rain\nSteps: 21, Sampler: DPM++ 2M, CFG scale: 7, Seed: 99, Size: 512x768, Model: sdxl"
    )
    chunks.add_text("parameters", text)
    Image.new("RGB", (8, 8)).save(path, pnginfo=chunks)
    return path


@SIZES
def test_a_dropped_picture_restores_the_form(open_page: Open, size: tuple[int, int], tmp_path: Path) -> None:
    page = open_page(size)
    page.evaluate(DROP, ["other.png", list(a1111_file(tmp_path / "other.png").read_bytes())])
    page.locator("#restored").get_by_role("button", name="Restore settings").click()
    expect(prompt_of(page)).to_have_value("a fox")
    expect(page.get_by_role("radio", name="Base")).to_be_checked()
    advanced(page)
    expect(page.get_by_label("Negative prompt")).to_have_value("rain")
    expect(page.get_by_label("number input for Steps")).to_have_value("21")
    for text in ("Sampler: DPM++ 2M", "Model: sdxl", "Width: 512", "Height: 768"):
        expect(page.locator("#restored")).to_contain_text(text)
    shoot(page, "32-restored")
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    page.locator("#top input[accept]:not([accept=''])").set_input_files(tmp_path / "plain.png")
    expect(page.locator("#restored .failed")).to_contain_text("a PNG, JPEG or WebP with its parameters inside")
    expect(prompt_of(page)).to_have_value("a fox")


def test_settings_of_a_result_come_back(open_page: Open) -> None:
    page = open_page()
    draw_seed(page, "5")
    write(page, "something else")
    set_steps(page, 9)
    page.locator("#generate-output").get_by_role("button", name="Restore").click()
    expect(prompt_of(page)).to_have_value(PROMPT)
    advanced(page)
    expect(page.get_by_label("number input for Steps")).to_have_value("2")
    assert seed_field(page).input_value() == "5"


def test_the_prompt_is_counted(open_page: Open) -> None:
    page = open_page()
    write(page, PROMPT)
    counter = page.locator("#generate-controls .block.tokens")
    expect(counter).to_contain_text("of 512 tokens")
    below, line = page.locator("#prompt").bounding_box(), counter.locator("p").bounding_box()
    assert below
    assert line
    assert line["y"] >= below["y"] + below["height"] - 2  # and not hidden behind it
    write(page, "apple " * 600)
    expect(counter.locator(".failed")).to_contain_text("The end of the prompt will be cut.")


def test_nothing_of_the_form_leaves_but_to_this_server(open_page: Open) -> None:
    page = open_page()  # whose fixture fails if any other host was asked
    with kept(page):
        write(page, PROMPT)
    assert "studio-generate" in page.evaluate("Object.keys(localStorage)")


def test_dice_and_reuse_last(open_page: Open) -> None:
    page = open_page()
    write(page, PROMPT)
    set_steps(page, 1)
    generate(page)
    finished(page)
    used = page.locator("#generate-status b").inner_text()
    advanced(page)
    page.locator("#generate-controls").get_by_role("button", name="Reuse last").click()
    expect(seed_field(page)).to_have_value(used)
    page.locator("#generate-controls").get_by_role("button", name="Roll the dice").click()
    expect(seed_field(page)).not_to_have_value(used)
    assert int(seed_field(page).input_value()) > 0
