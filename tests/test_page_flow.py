"""What the page does for a visitor beyond one prompt and one picture, in a real browser with the real miniature."""

import io
import json
import shutil
from pathlib import Path

import axe_playwright_python
import pytest
import sparse
from PIL import Image, PngImagePlugin
from playwright.sync_api import expect
from serving import ROOT, server
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
    wait_for_quiet,
    write,
)

import metadata
import weights

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
    expect(page.locator("#generate-status")).to_contain_text("left")
    shoot(page, "30-emerging")
    page.get_by_role("button", name="Cancel").click()
    expect(emerging).to_have_count(0)


@SIZES
def test_several_pictures_with_consecutive_seeds_and_a_strip(open_page: Open, size) -> None:  # noqa: F811
    page = open_page(size)
    write(page, PROMPT)
    set_seed(page, "41")
    page.locator("#generate-controls .count").get_by_role("radio", name="3").check()
    set_steps(page, 20)  # of pictures that come faster than a busy browser paints, the strip misses some
    generate(page)
    finished(page)
    expect(page.locator("#generate-status b")).to_have_text("43")
    thumbs = page.locator("#generate-strip button.thumbnail-item")
    expect(thumbs).to_have_count(3)
    assert page.locator("#generate-strip").bounding_box()["height"] < 250  # one row of small pictures
    shoot(page, "31-strip")
    wait_for_quiet(page)
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
    expect(page.locator("#restored")).to_contain_text("Not restored: Width: 1000")
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
    for said in ("Sampler: DPM++ 2M", "Model: sdxl", "Width: 512", "Height: 768"):
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


def test_an_enlarged_picture_is_copied(open_page: Open, tmp_path: Path) -> None:  # noqa: F811
    Image.new("RGB", (32, 32), "red").save(tmp_path / "red.png")
    page = open_page(permissions=["clipboard-read", "clipboard-write"])
    page.get_by_role("tab", name="Upscale").click()
    page.locator("#upscale-image input[type=file]").first.set_input_files(tmp_path / "red.png")
    page.get_by_role("radio", name="Fast").check()
    page.locator("#upscale-start").click()
    expect(page.locator("#compared img")).to_have_count(2)
    page.locator("#upscale-downloads .copy").click()
    expect(page.locator("#upscale-downloads .copy")).to_have_text("✓")
    width = page.evaluate("""async () => {
        const [item] = await navigator.clipboard.read();
        return (await createImageBitmap(await item.getType("image/png"))).width;
    }""")
    assert width == 64  # the enlarged one, not the one that it is compared with


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


def choose_chinese(page) -> None:
    page.get_by_role("button", name="Language").click()
    page.locator(".api-docs .banner-wrap input:not([type=checkbox])").first.click()
    page.get_by_role("option", name="简体中文").click()
    expect(page.locator("#generate")).to_have_text("生成")
    page.keyboard.press("Escape")
    expect(page.locator(".api-docs")).to_have_count(0)


def test_the_language_can_be_changed_and_what_was_said_changes_too(open_page: Open) -> None:  # noqa: F811
    page = open_page()
    settled(page)
    write(page, PROMPT)
    set_steps(page, 2)
    set_seed(page, "7")
    generate(page)
    finished(page)
    expect(page.locator("#generate-controls .block.tokens")).to_contain_text("of 512 tokens")
    choose_chinese(page)
    assert "studio-language=zh" in page.evaluate("document.cookie")
    expect(page.locator("#generate-status")).to_contain_text("2 步")
    expect(page.locator("#generate-status b")).to_have_text("7")
    expect(page.locator("#weights")).to_contain_text("迷你模型")
    expect(page.locator("#generate-controls .block.tokens")).to_contain_text("512 个词元")
    expect(page.get_by_role("tab", name="放大")).to_be_visible()
    page.locator("#generate-controls").get_by_label("种子").fill("1.5")
    page.locator("#generate").click()
    expect(page.locator("#generate-mend")).to_have_text("使用随机种子")
    page.get_by_role("button", name="Language").click()
    page.locator(".api-docs .banner-wrap input:not([type=checkbox])").first.click()
    page.get_by_role("option", name="English").click()
    expect(page.locator("#generate-status .failed")).to_contain_text("Seed takes a whole number")
    expect(page.locator("#generate-mend")).to_have_text("Use a random seed")
    shoot(page, "36-language-dialog")


def test_escape_closes_the_dialog_first_and_then_cancels(open_page: Open) -> None:  # noqa: F811
    page = open_page()
    start_long_work(page)
    page.get_by_role("button", name="Language").click()
    page.locator(".api-docs").wait_for()
    page.keyboard.press("Escape")
    expect(page.locator(".api-docs")).to_have_count(0)
    expect(page.get_by_role("button", name="Language")).to_be_focused()
    expect(page.locator("#generate-status .working")).to_be_visible()  # it goes on
    page.keyboard.press("Escape")
    expect(page.locator("#generate-status")).to_contain_text("Cancelled")


def test_another_language_is_one_more_file(browser, tmp_path: Path) -> None:  # noqa: F811
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    for name in ("assets", "weights", "theme.css"):
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "locales", tmp_path / "locales")
    texts = {"Generate": "Zeichnen", "What should the picture show? The prompt takes {allowed}.": "Was denn? {allowed}"}
    german = {"name": "Deutsch", "tags": ["de", "de-DE"], "texts": texts}
    (tmp_path / "locales" / "de.json").write_text(json.dumps(german), encoding="utf-8")
    context = browser.new_context(locale="de-DE")
    page = context.new_page()
    page.goto(server(root=tmp_path).url)
    expect(page.locator("#generate")).to_have_text("Zeichnen")
    page.locator("#generate").click()
    expect(page.locator("#generate-status .failed")).to_contain_text("Was denn? some text of up to 10000 characters")
    context.close()


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


def test_a_hopeless_request_offers_the_nearest_size_that_fits(
    browser,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for part in ("turbo", "text_encoder", "vae", "tokenizer"):
        sparse.write_part(tmp_path / weights.PARTS[part].repo, part)
    monkeypatch.setenv("Z_IMAGE_MODELS", str(tmp_path))
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


@pytest.mark.parametrize("language", ["en-US", "zh-CN"])
@SIZES
def test_axe_finds_no_serious_violation(open_page: Open, size, language: str, tmp_path: Path) -> None:  # noqa: F811
    Image.new("RGB", (48, 48), "white").save(tmp_path / "white.png")
    page = open_page(size, locale=language)
    settled(page)
    page.emulate_media(reduced_motion="reduce")
    choose(page, "Base")
    page.locator("#generate-controls .label-wrap").click()
    page.locator("#guidance textarea").wait_for()
    assert violations(page) == []
    write_in(page, "#prompt")
    page.locator("#model input").first.check()
    page.locator("#generate-controls .count input").nth(1).check()
    page.locator("#generate").click()
    finished(page)
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
    page.locator(".language").click()
    page.locator(".api-docs").wait_for()
    page.keyboard.press("Escape")


def write_in(page, field: str) -> None:
    page.locator(f"{field} textarea").fill(PROMPT)


def tab_to(page, selector: str, key: str = "Tab") -> None:
    """Go with the keyboard until something that the selector names has the focus."""
    for _ in range(60):
        if page.evaluate("(wanted) => document.activeElement.matches(wanted)", selector):
            return
        page.keyboard.press(key)
    raise AssertionError(f"the keyboard does not reach {selector}")


def test_an_expert_never_touches_the_mouse(open_page: Open, tmp_path: Path) -> None:  # noqa: F811
    page = open_page()
    settled(page)
    expect(page.locator("#prompt textarea")).to_be_focused()
    page.keyboard.type(PROMPT)
    page.keyboard.press("Control+Enter")
    finished(page)
    seed = page.locator("#generate-status b").inner_text()

    tab_to(page, "#generate-downloads :is(button, a)")  # save
    with page.expect_download() as download:
        page.keyboard.press("Enter")
    download.value.save_as(tmp_path / "saved.png")
    assert metadata.read_png(tmp_path / "saved.png").values["seed"] == int(seed)

    tab_to(page, "#prompt textarea", "Shift+Tab")  # draw more than is wanted, and cancel
    page.keyboard.press("Control+A")
    page.keyboard.type("something else")
    tab_to(page, "#model input")
    page.keyboard.press("ArrowRight")
    expect(page.get_by_label("number input for Steps")).to_have_value("25")
    tab_to(page, '[aria-label="number input for Steps"]')
    page.keyboard.press("Control+A")
    page.keyboard.type("100")
    page.keyboard.press("Tab")
    page.keyboard.press("Control+Enter")
    page.locator("#generate-status .bar[aria-valuenow]").wait_for()
    page.keyboard.press("Escape")
    expect(page.locator("#generate-status")).to_contain_text("Cancelled")

    restore = page.locator("#generate-downloads").get_by_text("Restore settings")
    for _ in range(60):
        if restore.evaluate("(one) => one === document.activeElement"):
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
def test_what_is_chosen_shows_where_the_system_forces_its_colours(open_page: Open, size) -> None:  # noqa: F811
    page = open_page(size, forced_colors="active", color_scheme="light")
    settled(page)
    for control in ("#model input", "#generate-controls .use-lora input", "#generate-controls input[type=range]"):
        assert page.locator(control).first.evaluate("(one) => getComputedStyle(one).appearance") == "auto"
    shoot(page, "38-forced-colours")


def test_nothing_moves_when_a_picture_arrives(open_page: Open) -> None:  # noqa: F811
    page = open_page()
    settled(page)
    write(page, PROMPT)
    page.wait_for_timeout(700)  # what is typed is counted
    page.evaluate("""() => {
        window.moved = [];
        new PerformanceObserver((list) => list.getEntries().forEach((entry) => entry.sources.forEach((source) => {
            const one = source.node?.nodeType === 1 ? source.node : source.node?.parentElement;
            const inside = one?.closest(".stage, .bar, [id$=-controls], #header, #above");
            if (inside) window.moved.push(one.outerHTML.slice(0, 120));
        }))).observe({ type: "layout-shift" });
    }""")  # fmt: skip
    page.keyboard.press("Control+Enter")
    finished(page)
    page.wait_for_timeout(300)
    assert page.evaluate("window.moved") == []


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
