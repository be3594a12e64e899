"""Whatever is dropped on the page goes where it belongs."""

from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import Page, expect

from mini.config import FOLDER
from tests.helpers.browsing import DESKTOP, DROP, PHONE, Open, shoot

pytestmark = pytest.mark.browser

GOLD = FOLDER / "loras" / "gold.safetensors"


def drop(page: Page, path: Path) -> None:
    page.evaluate(DROP, [path.name, list(path.read_bytes())])


@pytest.fixture
def red(tmp_path: Path) -> Path:
    Image.new("RGB", (96, 96), "red").save(tmp_path / "red.png")
    return tmp_path / "red.png"


@pytest.mark.parametrize("size", [DESKTOP, PHONE])
def test_a_picture_and_a_lora_find_their_places(open_page: Open, size: tuple[int, int], red: Path) -> None:
    page = open_page(size)
    drop(page, red)  # nothing here starts from a picture, so it is asked once
    restored = page.locator("#restored")
    expect(restored.get_by_role("button")).to_have_text(["Use as control", "Upscale this"])
    shoot(page, "33-asked")
    restored.get_by_role("button", name="Use as control").click()
    expect(page.get_by_role("tab", name="ControlNet")).to_have_attribute("aria-selected", "true")
    page.locator("#preview img").wait_for()
    expect(restored).to_be_hidden()

    drop(page, GOLD)  # this tab has a slot for it
    expect(page.locator("#controlnet-controls .block.lora-about")).to_contain_text("layers matched")
    expect(page.locator("#controlnet-controls .use-lora input")).to_be_checked()

    page.get_by_role("tab", name="Upscale").click()
    page.locator("#upscale-status p").wait_for()
    drop(page, red)  # this tab starts from a picture, so it goes there
    expect(page.locator("#upscale-estimate")).to_contain_text("96 × 96 becomes 192 × 192")
    drop(page, GOLD)  # this one takes none: the first tab does
    expect(page.get_by_role("tab", name="Text to Image")).to_have_attribute("aria-selected", "true")
    expect(page.locator("#generate-controls .block.lora-about")).to_contain_text("layers matched")


def test_what_fits_nowhere_is_refused(open_page: Open, tmp_path: Path) -> None:
    page = open_page()
    (tmp_path / "notes.txt").write_text("no picture")
    drop(page, tmp_path / "notes.txt")
    expect(page.locator("#restored .failed")).to_have_text(
        "This file cannot be opened as a picture. PNG, JPEG and WebP work."
    )


def test_the_target_shows_while_dragging_and_a_bad_file_leaves_no_broken_image(open_page: Open, tmp_path: Path) -> None:
    page = open_page()
    drag = """(kind) => document.querySelector("main").dispatchEvent(new DragEvent(kind, {
        dataTransfer: (() => { const d = new DataTransfer(); d.items.add(new File(["x"], "x.png")); return d; })(),
        bubbles: true, cancelable: true }))"""
    hint = "() => getComputedStyle(document.body, '::after').content"
    page.evaluate(drag, "dragover")
    assert page.evaluate(hint) == '"Drop a picture or a LoRA anywhere"'
    page.evaluate(drag, "dragleave")
    assert page.evaluate(hint) == "none"

    page.get_by_role("tab", name="Upscale").click()
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n no picture")
    page.locator("#upscale-image input[type=file]").first.set_input_files(tmp_path / "bad.png")
    expect(page.locator("#upscale-estimate .failed")).to_be_visible()
    expect(page.locator("#upscale-image img.unseen")).to_be_hidden()
