"""What the page does for a visitor beyond one prompt and one picture, in a real browser with the real miniature."""

import io
import json
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import Browser, expect

from diffusion import measure
from hub import parts
from tests.helpers import sparse
from tests.helpers.browsing import (
    ARTIFACTS,
    DESKTOP,
    PATIENCE,
    PROMPT,
    SIZES,
    Open,
    advanced,
    finished,
    generate,
    picture_bytes,
    reload,
    seed_field,
    set_seed,
    set_steps,
    settled,
    shoot,
    start_long_work,
    wait_for_quiet,
    write,
)
from tests.helpers.serving import server

pytestmark = pytest.mark.browser


@SIZES
def test_the_picture_emerges(open_page: Open, size: tuple[int, int]) -> None:
    page = open_page(size)
    start_long_work(page)
    emerging = page.locator("#generate-emerging img")
    emerging.wait_for()
    first = emerging.get_attribute("src")
    assert first
    expect(emerging).not_to_have_attribute("src", first)
    place, frame = emerging.bounding_box(), page.locator("#generate-picture").bounding_box()
    assert place
    assert frame
    assert abs(place["width"] - frame["width"]) < 4  # it lies where the picture will
    assert abs(place["x"] - frame["x"]) < 4
    expect(page.locator("#generate-status")).to_contain_text("left")
    shoot(page, "30-emerging")
    page.get_by_role("button", name="Cancel").click()
    expect(emerging).to_have_count(0)


@SIZES
def test_several_pictures_with_consecutive_seeds_and_a_strip(open_page: Open, size: tuple[int, int]) -> None:
    page = open_page(size)
    write(page, PROMPT)
    set_seed(page, "41")
    page.locator("#generate-controls .count").get_by_role("radio", name="3").check()
    set_steps(page, 2)
    generate(page)
    finished(page)
    expect(page.locator("#generate-status b")).to_have_text("43")
    thumbs = page.locator("#generate-strip button.thumbnail-item")
    expect(thumbs).to_have_count(3)
    expect(thumbs.last).to_have_accessible_name(f"{PROMPT}, seed 41")
    strip = page.locator("#generate-strip").bounding_box()
    assert strip
    assert strip["height"] < 250  # one row of small pictures
    shoot(page, "31-strip")
    wait_for_quiet(page)
    thumbs.last.click()
    page.get_by_role("button", name="More", exact=True).click()
    expect(page.locator("#generate-parameters")).to_contain_text('"seed": 41')
    assert '"seed": 41' in Image.open(io.BytesIO(picture_bytes(page))).info["z-image-studio"]
    reload(page)
    page.locator("#generate-status p").wait_for()
    expect(thumbs).to_have_count(0)


@SIZES
def test_an_error_comes_with_a_button_that_fixes_it(open_page: Open, size: tuple[int, int]) -> None:
    page = open_page(size)
    write(page, PROMPT)
    set_seed(page, "1.5")
    generate(page)
    expect(page.locator("#generate-status .failed")).to_contain_text("Possible: a whole number")
    shoot(page, "33-fix")
    page.get_by_role("button", name="Use a random seed").click()
    advanced(page)
    expect(seed_field(page)).to_have_value("0")
    expect(page.get_by_role("button", name="Use a random seed")).to_be_hidden()
    set_steps(page, 1)
    generate(page)
    finished(page)


def test_a_picture_is_copied_and_enlarged(open_page: Open) -> None:
    page = open_page(permissions=["clipboard-read", "clipboard-write"])
    write(page, PROMPT)
    set_steps(page, 2)
    generate(page)
    finished(page)
    copy = page.get_by_role("button", name="Copy", exact=True)
    wide = copy.bounding_box()
    copy.click()
    expect(page.locator("#said")).to_have_text("Copied")  # which a screen reader reads aloud
    expect(copy).to_contain_class("copied")
    assert copy.bounding_box() == wide
    kinds = page.evaluate("navigator.clipboard.read().then((items) => items.flatMap((item) => item.types))")
    assert kinds == ["image/png"]
    page.locator("#generate-picture img").click()
    large = page.locator("dialog.viewer img")
    expect(large).to_be_visible()
    assert large.bounding_box() == {"x": 0, "y": 0, "width": DESKTOP[0], "height": DESKTOP[1]}  # all of the screen
    page.screenshot(path=ARTIFACTS / "desktop-12-viewer.png")
    large.click()  # for its real size, which the file has: it takes the enlargement's place when it is decoded
    expect(large).to_have_js_property("naturalWidth", 128)
    box = large.bounding_box()
    assert box
    assert box["width"] == 128
    page.keyboard.press("Escape")
    expect(large).to_have_count(0)


def test_the_viewer_goes_through_the_pictures_of_this_visit(open_page: Open) -> None:
    page = open_page()
    write(page, PROMPT)
    set_steps(page, 1)
    page.locator("#generate-controls .count").get_by_role("radio", name="3").check()
    set_seed(page, "41")
    generate(page)
    finished(page)
    expect(page.locator("#generate-strip button.thumbnail-item")).to_have_count(3)
    expect(page.locator("#generate-enlarged .grid img")).to_have_count(3)  # none of them is the one on show
    page.locator("#generate-picture button").press("Enter")  # with the keyboard
    large = page.locator("dialog.viewer img")

    def seed() -> int:
        source = large.get_attribute("src")
        assert source
        return int(Path(source).stem.removeprefix("z-image-"))

    seeds = [seed()]
    for key in ("ArrowRight", "ArrowRight", "ArrowRight", "ArrowLeft"):
        page.keyboard.press(key)
        seeds.append(seed())
    assert seeds == [43, 42, 41, 43, 41]
    page.get_by_role("button", name="Previous picture").click()
    assert seed() == 42
    page.get_by_role("button", name="Close").click()
    expect(large).to_have_count(0)
    expect(page.locator("#generate-picture button")).to_be_focused()


def test_an_enlarged_picture_is_copied(open_page: Open, tmp_path: Path) -> None:
    Image.new("RGB", (32, 32), "red").save(tmp_path / "red.png")
    page = open_page(permissions=["clipboard-read", "clipboard-write"])
    page.get_by_role("tab", name="Upscale").click()
    page.locator("#upscale-image input[type=file]").first.set_input_files(tmp_path / "red.png")
    page.get_by_role("radio", name="Fast").check()
    page.locator("#upscale-start").click()
    expect(page.locator("#compared img")).to_have_count(2)
    page.locator("#upscale-actions .copy").click()
    expect(page.locator("#said")).to_have_text("Copied")
    width = page.evaluate("""async () => {
        const [item] = await navigator.clipboard.read();
        return (await createImageBitmap(await item.getType("image/png"))).width;
    }""")
    assert width == 64  # the enlarged one, not the one that it is compared with


def test_shapes_with_the_real_weights_sizes(browser: Browser) -> None:
    served = server("--weights", "full", "--offline")
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    page = context.new_page()
    expect.set_options(timeout=PATIENCE)
    page.goto(served.url)
    page.locator("#generate-status p").wait_for()
    settled(page)  # until then the page still fills its form
    advanced(page)
    page.locator("#shape").get_by_role("radio", name="16:9").check()
    width, height = (page.get_by_label(f"number input for {side}") for side in ("Width", "Height"))
    expect(width).to_have_value("1360")
    expect(height).to_have_value("768")
    width.fill("1024")
    width.press("Tab")
    height.fill("1024")
    height.press("Tab")
    expect(page.locator("#shape").get_by_role("radio", name="1:1")).to_be_checked()
    shoot(page, "35-shapes")
    context.close()


def test_a_hopeless_request_offers_the_nearest_size_that_fits(
    browser: Browser,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for part in ("turbo", "text_encoder", "vae", "tokenizer"):
        sparse.write_part(tmp_path / parts.PARTS[part].repo, part)
    monkeypatch.setenv("Z_IMAGE_MODELS", str(tmp_path))
    # The memory that a size needs follows from the dtype: as on a processor that is faster in fp32.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    even = {"float32": 100.0, "bfloat16": 100.0}
    figures = {measure.key(): dict.fromkeys(("products", "convolution", "attention"), even)}
    file = measure.cache_file()
    assert file is not None
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(figures), encoding="utf-8")
    served = server("--weights", "full", "--offline", "--memory", "4")
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    page.goto(served.url + "?width=2048&height=2048")
    settled(page)
    page.locator("#prompt textarea").fill(PROMPT)
    generate(page)
    failed = page.locator("#generate-status .failed")
    expect(failed).to_contain_text("up to about 1872 x 1872 with 4.0 GB of memory")
    shoot(page, "37-hopeless")
    page.get_by_role("button", name="Use 1872 x 1872").click()
    advanced(page)
    expect(page.get_by_label("number input for Width")).to_have_value("1872")
    expect(page.get_by_label("number input for Height")).to_have_value("1872")
    expect(page.locator("#prompt textarea")).to_have_value(PROMPT)
    context.close()
