"""What the page does for a visitor beyond one prompt and one picture, in a real browser with the real miniature."""

import io
import json
from pathlib import Path

import axe_playwright_python
import pytest
from PIL import Image, PngImagePlugin
from playwright.sync_api import expect
from serving import server
from test_page import (  # noqa: F401 (fixtures)
    DESKTOP,
    PATIENCE,
    PHONE,
    PROMPT,
    Open,
    browser,
    choose,
    finished,
    generate,
    open_page,
    picture_bytes,
    reload,
    set_seed,
    set_steps,
    shoot,
    start_long_work,
    write,
)

pytestmark = pytest.mark.browser

SIZES = pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])


def advanced(page):
    page.locator("#generate-controls").get_by_role("button", name="Advanced").click()


def prompt_of(page):
    return page.get_by_label("Prompt", exact=False).first


def settled(page) -> None:
    """Wait until the page has been filled in, and so keeps what is typed."""
    page.wait_for_function("window.studioReady === true")


def seed_in(page) -> str:
    return page.locator("#generate-controls").get_by_label("Seed").input_value()


@SIZES
def test_the_picture_emerges(open_page: Open, size) -> None:  # noqa: F811
    page = open_page(size)
    start_long_work(page)
    emerging = page.locator("#generate-emerging img")
    emerging.wait_for()
    first = emerging.get_attribute("src")
    expect(emerging).not_to_have_attribute("src", first)
    place, frame = emerging.bounding_box(), page.locator("#generate-picture").bounding_box()
    assert abs(place["width"] - frame["width"]) < 4  # it lies where the picture will
    assert abs(place["x"] - frame["x"]) < 4
    shoot(page, "30-emerging")
    page.get_by_role("button", name="Cancel").click()
    expect(emerging).to_have_count(0)


@SIZES
def test_several_pictures_with_consecutive_seeds_and_a_strip(open_page: Open, size) -> None:  # noqa: F811
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
    shoot(page, "31-strip")
    page.locator("#generate-output .label-wrap").click()
    thumbs.last.click()
    expect(page.locator("#generate-parameters")).to_contain_text('"seed": 41')
    assert '"seed": 41' in Image.open(io.BytesIO(picture_bytes(page))).info["z-image-studio"]
    reload(page)
    page.locator("#generate-status p").wait_for()
    expect(thumbs).to_have_count(0)


def test_dice_and_reuse_last(open_page: Open) -> None:  # noqa: F811
    page = open_page()
    write(page, PROMPT)
    set_steps(page, 1)
    generate(page)
    finished(page)
    used = page.locator("#generate-status b").inner_text()
    advanced(page)
    page.locator("#generate-controls").get_by_role("button", name="Reuse last").click()
    expect(page.locator("#generate-controls").get_by_label("Seed")).to_have_value(used)
    page.locator("#generate-controls").get_by_role("button", name="Roll the dice").click()
    expect(page.locator("#generate-controls").get_by_label("Seed")).not_to_have_value(used)
    assert int(seed_in(page)) > 0


def test_the_form_survives_a_reload_in_this_browser_only(open_page: Open) -> None:  # noqa: F811
    page = open_page()
    settled(page)
    choose(page, "Base")
    write(page, PROMPT)
    page.get_by_label("Negative prompt").fill("blue")
    set_steps(page, 17)
    page.wait_for_timeout(500)  # the browser keeps the last change when it has happened
    reload(page)
    expect(prompt_of(page)).to_have_value(PROMPT)
    expect(page.get_by_label("Negative prompt")).to_have_value("blue")
    expect(page.get_by_label("number input for Steps")).to_have_value("17")
    other = open_page()
    settled(other)
    assert prompt_of(other).input_value() == ""


def test_a_link_carries_a_form(open_page: Open) -> None:  # noqa: F811
    page = open_page(query="?prompt=a+red+apple&seed=42&steps=3&width=1000&unknown=1")
    expect(prompt_of(page)).to_have_value("a red apple")
    expect(page.get_by_label("number input for Steps")).to_have_value("3")
    expect(page.locator("#restored")).to_contain_text("Not restored: width: 1000")
    advanced(page)
    assert seed_in(page) == "42"


def a1111_file(path: Path) -> Path:
    chunks = PngImagePlugin.PngInfo()
    text = (
        "a fox\nNegative prompt: rain\nSteps: 21, Sampler: DPM++ 2M, CFG scale: 7, Seed: 99, Size: 512x768, Model: sdxl"
    )
    chunks.add_text("parameters", text)
    Image.new("RGB", (8, 8)).save(path, pnginfo=chunks)
    return path


DROP = """([name, bytes]) => {
    const data = new DataTransfer();
    data.items.add(new File([new Uint8Array(bytes)], name, { type: "image/png" }));
    document.querySelector("main").dispatchEvent(
        new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true }));
}"""


@SIZES
def test_a_dropped_picture_restores_the_form(open_page: Open, size, tmp_path: Path) -> None:  # noqa: F811
    page = open_page(size)
    settled(page)
    page.evaluate(DROP, ["other.png", list(a1111_file(tmp_path / "other.png").read_bytes())])
    expect(prompt_of(page)).to_have_value("a fox")
    expect(page.get_by_role("radio", name="Base")).to_be_checked()
    expect(page.get_by_label("Negative prompt")).to_have_value("rain")
    expect(page.get_by_label("number input for Steps")).to_have_value("21")
    for said in ("Sampler: DPM++ 2M", "Model: sdxl", "width: 512", "height: 768"):
        expect(page.locator("#restored")).to_contain_text(said)
    shoot(page, "32-restored")
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    page.evaluate(DROP, ["plain.png", list((tmp_path / "plain.png").read_bytes())])
    expect(page.locator("#restored .failed")).to_contain_text("a PNG with its parameters inside")
    expect(prompt_of(page)).to_have_value("a fox")


def test_settings_of_a_result_come_back(open_page: Open) -> None:  # noqa: F811
    page = open_page()
    write(page, PROMPT)
    set_steps(page, 2)
    set_seed(page, "5")
    generate(page)
    finished(page)
    write(page, "something else")
    set_steps(page, 9)
    page.locator("#generate-output").get_by_role("button", name="Restore settings").click()
    expect(prompt_of(page)).to_have_value(PROMPT)
    expect(page.get_by_label("number input for Steps")).to_have_value("2")
    assert seed_in(page) == "5"


def test_the_prompt_is_counted(open_page: Open) -> None:  # noqa: F811
    page = open_page()
    settled(page)
    write(page, PROMPT)
    counter = page.locator("#generate-controls .block.tokens")
    expect(counter).to_contain_text("of 512 tokens")
    below = page.locator("#prompt").bounding_box()
    assert counter.locator("p").bounding_box()["y"] >= below["y"] + below["height"] - 2  # and not hidden behind it
    write(page, "apple " * 600)
    expect(counter.locator(".failed")).to_contain_text("The end of the prompt will be cut.")


@SIZES
def test_an_error_comes_with_a_button_that_mends_it(open_page: Open, size) -> None:  # noqa: F811
    page = open_page(size)
    write(page, PROMPT)
    set_seed(page, "1.5")
    generate(page)
    expect(page.locator("#generate-status .failed")).to_contain_text("Seed takes a whole number")
    shoot(page, "33-mend")
    page.get_by_role("button", name="Use a random seed").click()
    expect(page.locator("#generate-controls").get_by_label("Seed")).to_have_value("0")
    expect(page.get_by_role("button", name="Use a random seed")).to_be_hidden()
    set_steps(page, 1)
    generate(page)
    finished(page)


def test_a_picture_is_copied_and_enlarged(open_page: Open) -> None:  # noqa: F811
    page = open_page(permissions=["clipboard-read", "clipboard-write"])
    write(page, PROMPT)
    set_steps(page, 2)
    generate(page)
    finished(page)
    page.get_by_role("button", name="Copy picture").click()
    expect(page.locator(".copy")).to_have_text("✓")
    kinds = page.evaluate("navigator.clipboard.read().then((items) => items.flatMap((item) => item.types))")
    assert kinds == ["image/png"]
    page.locator("#generate-picture img").click()
    large = page.locator("dialog.enlarged img")
    expect(large).to_be_visible()
    assert large.bounding_box()["width"] == 128  # its real size
    page.keyboard.press("Escape")
    expect(large).to_have_count(0)


@SIZES
def test_the_page_speaks_chinese(open_page: Open, size) -> None:  # noqa: F811
    page = open_page(size, locale="zh-CN")
    expect(page.get_by_role("tab", name="文生图")).to_be_visible()
    expect(page.locator("#generate")).to_have_text("生成")
    expect(page.locator("#weights")).to_contain_text("迷你模型")
    page.locator("#generate").click()
    expect(page.locator("#generate-status .failed")).to_contain_text(
        "画面中应该有什么？提示词需要一段不超过 10000 个字符的文字。"
    )
    page.locator("#prompt textarea").fill("a zeppelin-shaped gramophone")
    page.locator("#generate").click()
    finished(page)
    expect(page.locator("#generate-status")).to_contain_text("8 步")
    expect(page.locator("#generate-status .note").first).to_contain_text("迷你模型不认识：")
    shoot(page, "34-chinese")


def test_the_language_can_be_changed(open_page: Open) -> None:  # noqa: F811
    page = open_page()
    page.get_by_role("button", name="Language").click()
    page.locator(".api-docs .banner-wrap input:not([type=checkbox])").first.click()
    page.get_by_role("option", name="简体中文").click()
    expect(page.locator("#generate")).to_have_text("生成")
    assert "studio-language=zh" in page.evaluate("document.cookie")


def test_shapes_with_the_real_weights_sizes(browser) -> None:  # noqa: F811
    served = server("--weights", "full", "--offline")
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    page = context.new_page()
    expect.set_options(timeout=PATIENCE)
    page.goto(served.url)
    page.locator("#generate-status p").wait_for()
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


def test_nothing_of_the_form_leaves_but_to_this_server(open_page: Open) -> None:  # noqa: F811
    page = open_page()  # whose fixture fails if any other host was asked
    settled(page)
    write(page, PROMPT)
    page.wait_for_timeout(500)
    kept = json.loads(json.dumps(page.evaluate("Object.keys(localStorage)")))
    assert "studio-generate" in kept


# --- access


AXE = Path(axe_playwright_python.__file__).parent / "axe.min.js"
# Gradio's own, which its components leave no way to change; each with where it is. Empty is the goal.
ELSEWHERE: dict[str, str] = {}


def violations(page) -> list[str]:
    """Return what axe-core finds that keeps people out."""
    page.evaluate(AXE.read_text(encoding="utf-8"))
    found = page.evaluate("axe.run(document, { resultTypes: ['violations'] }).then((done) => done.violations)")
    return [
        f"{one['id']}: {node['target']} {node['html'][:160]} {node['failureSummary'][:200]}"
        for one in found
        if one["impact"] in ("serious", "critical") and one["id"] not in ELSEWHERE
        for node in one["nodes"]
    ]


@SIZES
def test_axe_finds_no_serious_violation(open_page: Open, size) -> None:  # noqa: F811
    page = open_page(size)
    page.emulate_media(reduced_motion="reduce")
    choose(page, "Base")
    advanced(page)
    page.get_by_label("Negative prompt").wait_for()
    assert violations(page) == []
    write(page, PROMPT)
    set_steps(page, 1)
    page.locator("#generate-controls .count").get_by_role("radio", name="2").check()
    generate(page)
    finished(page)
    page.locator("#generate-output .label-wrap").click()
    page.locator("#generate-strip").wait_for()
    assert violations(page) == []
    page.get_by_role("tab", name="ControlNet").click()
    page.locator("#controlnet-status p").wait_for()
    page.locator("#controlnet-controls").get_by_role("button", name="Advanced").click()
    page.locator("#controlnet-controls").get_by_label("Use a LoRA").check()
    assert violations(page) == []


def test_every_step_of_the_way_with_the_keyboard(open_page: Open) -> None:  # noqa: F811
    page = open_page()
    settled(page)
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


def test_motion_stops_for_those_who_ask(open_page: Open) -> None:  # noqa: F811
    page = open_page(reduced_motion="reduce")
    start_long_work(page)
    moving = page.evaluate(
        "document.getAnimations()"
        ".filter((one) => one.playState === 'running' && one.effect.target.closest('main')).length"
    )
    assert moving == 0
    page.get_by_role("button", name="Cancel").click()


def test_progress_and_messages_are_live_regions(open_page: Open) -> None:  # noqa: F811
    page = open_page()
    expect(page.locator("#generate-status [role=status]")).to_have_count(1)
    expect(page.locator("#restored [role=status], #restored[role=status]")).to_have_count(1)
