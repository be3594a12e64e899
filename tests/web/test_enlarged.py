"""A small picture is shown enlarged; what can be taken away is the file as it is."""

import io
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import expect

from engine import Engine
from tests.helpers.browsing import (
    PHONE,
    Open,
    draw_seed,
    finished,
    generate,
    picture_bytes,
    reload,
    set_seed,
    set_steps,
    shoot,
)


def test_small_pictures_are_enlarged_by_four(engine: Engine, tmp_path: Path) -> None:
    Image.new("RGB", (40, 24), (200, 30, 30)).save(tmp_path / "red.png")
    large = engine.shown_large(tmp_path / "red.png")
    assert large.size == (160, 96)
    red, green, blue = large.convert("RGB").resize((1, 1)).getpixel((0, 0))  # type: ignore[misc]  # a tuple
    assert abs(red - 200) < 12
    assert abs(green - 30) < 12
    assert abs(blue - 30) < 12


@pytest.mark.browser
def test_a_small_picture_is_shown_enlarged_and_kept_as_it_is(open_page: Open) -> None:
    page = open_page(PHONE)
    draw_seed(page, "5")
    enlarged, picture = page.locator("#generate-enlarged"), page.locator("#generate-picture img")
    enlarged.locator("img").wait_for()
    assert enlarged.locator("img").evaluate("image => image.decode().then(() => image.naturalWidth)") == 512
    assert enlarged.locator("img").bounding_box() == picture.bounding_box()
    expect(enlarged).to_contain_text("Shown enlarged; the file is 128 × 128.")
    assert Image.open(io.BytesIO(picture_bytes(page))).size == (128, 128)
    with page.expect_download() as download:
        page.locator("#generate-actions .download").click()
    assert Image.open(io.BytesIO(download.value.path().read_bytes())).size == (128, 128)

    picture.click()  # the viewer shows the enlargement too, and in its real size the file
    viewed = page.locator(".viewer img")
    expect(viewed).to_have_js_property("naturalWidth", 512)
    viewed.click()
    expect(viewed).to_have_js_property("naturalWidth", 128)
    page.keyboard.press("Escape")

    enlarged.get_by_role("button", name="Show the file").click()
    enlarged.get_by_role("button", name="Show it enlarged").wait_for()
    expect(enlarged.locator("img")).to_have_count(0)
    reload(page)  # the choice is kept
    draw_seed(page, "6")
    enlarged.get_by_role("button", name="Show it enlarged").click()
    enlarged.locator("img").wait_for()
    before = enlarged.locator("img").get_attribute("src")
    set_seed(page, "7")
    generate(page)
    finished(page)
    expect(enlarged.locator("img")).not_to_have_attribute("src", before or "")
    page.locator("#generate-strip button.thumbnail-item").nth(1).click()  # an earlier one, enlarged before
    expect(enlarged.locator("img")).to_have_attribute("src", before or "")


@pytest.mark.browser
def test_several_pictures_lie_side_by_side_and_more_follow(open_page: Open) -> None:
    page = open_page(PHONE)
    page.locator("#prompt textarea").fill("a fox")
    set_steps(page, 1)
    set_seed(page, "20")
    page.locator("#generate-controls .count").get_by_role("radio", name="2").check()
    generate(page)
    place = page.locator("#generate-enlarged")
    expect(place.locator(".grid span")).to_have_text(["seed 20", "seed 21"])
    shoot(page, "14-grid")
    place.locator(".grid").get_by_role("button", name="a fox, seed 20").click()
    expect(page.locator("#generate-status b")).to_have_text("20")
    expect(place).to_contain_text("Shown enlarged")
    place.get_by_role("button", name="Show all 2").click()
    expect(place.locator(".grid span")).to_have_count(2)

    place.locator(".grid button").first.click()
    expect(place.locator(".grid")).to_have_count(0)
    page.locator("#prompt textarea").fill("something else")
    page.locator("#generate-actions .again").click()  # with the picture's own settings, after the last of its press
    expect(place.locator(".grid span")).to_have_text(["seed 22", "seed 23"])
    expect(page.locator("#prompt textarea")).to_have_value("a fox")
    expect(page.locator("#generate-controls .chip")).to_contain_text("seed 22")
