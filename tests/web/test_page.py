"""The page as a visitor meets it: a real Chromium, a real server, the real miniature."""

import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from playwright.sync_api import Browser, expect

from core import metadata
from core.events import Result
from core.request import TextToImage
from tests.helpers import loras
from tests.helpers.browsing import (
    ARTIFACTS,
    DESKTOP,
    NAMES,
    NARROW,
    PHONE,
    PROMPT,
    TABLET,
    Open,
    advanced,
    choose,
    finished,
    generate,
    picture_bytes,
    prompt_of,
    seed_field,
    set_seed,
    set_steps,
    shoot,
    start_long_work,
    write,
)
from tests.helpers.serving import server
from web import theme

pytestmark = pytest.mark.browser


@pytest.mark.parametrize("size", [DESKTOP, TABLET, PHONE], ids=NAMES.get)
def test_prompt_to_picture(open_page: Open, size: tuple[int, int]) -> None:
    page = open_page(size)
    shoot(page, "1-empty")
    place = page.locator("#generate-picture").bounding_box()
    write(page, PROMPT)
    generate(page)
    # Frame by frame: a locator looks again after up to half a second, when the picture may be there already.
    page.wait_for_function(
        "document.querySelector('#generate-status [role=progressbar]')"
        " && document.querySelector('#generate-cancel').checkVisibility()"
    )
    shoot(page, "2-working")
    finished(page)
    expect(page.get_by_role("button", name="Cancel")).to_be_hidden()
    picture = page.locator("#generate-picture img")
    expect(picture).to_have_attribute("alt", PROMPT)
    shoot(page, "3-picture")
    shown, now = picture.bounding_box(), page.locator("#generate-picture").bounding_box()
    assert shown
    assert now
    assert place
    assert (now["width"], now["height"]) == (place["width"], place["height"])
    assert now["x"] == place["x"]
    native = Image.open(io.BytesIO(picture_bytes(page))).width
    assert native == 128
    assert shown["width"] > 2 * native


def test_the_picture_is_our_file_byte_for_byte(open_page: Open, draw: Callable[..., Result], tmp_path: Path) -> None:
    page = open_page()
    write(page, PROMPT)
    set_seed(page, "7")
    generate(page)
    finished(page)
    expect(page.locator("#generate-status b")).to_have_text("7")
    made = draw(prompt=PROMPT, seed=7).png
    assert picture_bytes(page) == made
    with page.expect_download() as download:
        page.get_by_role("button", name="Download", exact=True).click()
    saved = tmp_path / download.value.suggested_filename
    assert saved.name == "z-image-7.png"
    download.value.save_as(saved)
    assert saved.read_bytes() == made
    assert metadata.read_picture(saved).values["prompt"] == PROMPT
    page.get_by_role("button", name="More", exact=True).click()
    with page.expect_download() as download:
        page.get_by_role("button", name="Download parameters").click()
    assert download.value.suggested_filename == "z-image-7.json"
    facts = page.locator("#generate-parameters dl")
    expect(facts).to_contain_text("Seed7")
    expect(facts).not_to_contain_text("fingerprints")
    page.get_by_text("All parameters").click()
    expect(page.locator("#generate-parameters pre")).to_contain_text("fingerprints")
    expect(page.locator("#generate-parameters pre")).to_be_visible()
    shoot(page, "4-parameters")


def test_choosing_a_model_moves_its_defaults(open_page: Open) -> None:
    page = open_page()
    advanced(page)
    steps, cfg = page.get_by_label("number input for Steps"), page.get_by_label("number input for CFG")
    expect(steps).to_have_value("8")
    expect(cfg).to_be_hidden()
    choose(page, "Base")
    expect(steps).to_have_value("25")
    expect(cfg).to_have_value("4")
    page.get_by_label("Negative prompt").fill("black background")
    set_steps(page, 2)
    shoot(page, "5-base")
    write(page, PROMPT)
    generate(page)
    finished(page)
    expect(page.locator("#generate-status")).to_contain_text("Base, 2 steps, 128 × 128")
    choose(page, "Turbo")
    expect(steps).to_have_value("8")
    expect(page.get_by_label("Negative prompt")).to_be_hidden()
    generate(page)  # what was written for Base is not sent with Turbo, which would refuse it
    expect(page.locator("#generate-status")).to_contain_text("Turbo, 8 steps, 128 × 128")


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=NAMES.get)
def test_a_lora_is_looked_at_on_upload_and_used(open_page: Open, size: tuple[int, int], tmp_path: Path) -> None:
    told = {"modelspec.trigger_phrase": "neon", "modelspec.title": "Neon & more"}
    path = loras.write(tmp_path / "style.safetensors", loras.kohya(loras.random_pairs()), told)
    page = open_page(size)
    form = page.locator("#generate-controls")
    slot, about = form.locator(".lora-file"), form.locator(".block.lora-about")
    expect(slot).to_be_hidden()
    advanced(page)
    form.get_by_label("Use a LoRA").check()
    expect(slot).to_contain_text("LoRA for Z-Image Turbo")
    box = slot.bounding_box()
    assert box
    assert box["height"] < 150
    slot.locator("input[type=file]").set_input_files(path)
    exact, slider = form.get_by_label("As a number"), form.get_by_label("range slider for LoRA strength")
    expect(form.get_by_label("number input for LoRA strength")).to_be_hidden()
    slider.fill("1.25")
    expect(exact).to_have_value("1.25")
    for strength, reached in (("3", "1.5"), ("-2.5", "0")):
        exact.fill(strength)
        exact.blur()
        expect(slider).to_have_value(reached)
        expect(exact).to_have_value(strength)
    expect(about).to_contain_text("Neon & more")
    expect(about).to_contain_text("42 of 42 layers matched, rank 4, trained on unknown")
    write(page, "a fox on a black background")
    form.locator(".trigger-words").get_by_text("neon").click()
    expect(prompt_of(page)).to_have_value("a fox on a black background, neon")
    choose(page, "Base")
    expect(slot).to_contain_text("LoRA for Z-Image")
    choose(page, "Turbo")
    set_steps(page, 2)
    generate(page)
    finished(page)
    shoot(page, "lora")
    with Image.open(io.BytesIO(picture_bytes(page))) as picture:
        assert '"name": "style", "strength": -2.5' in picture.info["z-image-studio"]


def test_a_file_that_is_no_lora_is_refused_at_once(open_page: Open, tmp_path: Path) -> None:
    path = loras.write(tmp_path / "flux.safetensors", {"double_blocks.0.img_attn.proj.lora_A.weight": torch.ones(2)})
    page = open_page()
    form = page.locator("#generate-controls")
    advanced(page)
    form.get_by_label("Use a LoRA").check()
    form.locator(".lora-file input[type=file]").set_input_files(path)
    expect(form.locator(".lora-about .failed")).to_contain_text("This LoRA cannot be used. Wanted: a LoRA for Z-Image;")
    expect(form.locator(".lora-about .failed")).to_contain_text("this looks like one for FLUX")
    write(page, PROMPT)
    generate(page)
    expect(page.locator("#generate-status .failed")).to_contain_text("this looks like one for FLUX")


@pytest.mark.parametrize("way", ["button", "key"])
def test_cancel(open_page: Open, way: str) -> None:
    page = open_page()
    start_long_work(page)
    if way == "button":
        page.get_by_role("button", name="Cancel").click()
    else:
        page.keyboard.press("Escape")
    expect(page.locator("#generate-status")).to_contain_text("Cancelled")
    expect(page.get_by_role("button", name="Cancel")).to_be_hidden()
    expect(prompt_of(page)).to_have_value(PROMPT)
    shoot(page, "6-cancelled")
    choose(page, "Turbo")
    expect(page.get_by_label("number input for Steps")).to_have_value("8")
    generate(page)
    finished(page)


def test_wrong_values_get_a_sentence_and_the_form_stays(open_page: Open) -> None:
    page = open_page()
    generate(page)
    expect(page.locator("#generate-status .failed")).to_contain_text("What should the picture show?")
    shoot(page, "7-error")
    write(page, PROMPT)
    set_seed(page, "1.5")
    generate(page)
    expect(page.locator("#generate-status .failed")).to_contain_text("Possible: a whole number from 0 to 4294967295")
    expect(prompt_of(page)).to_have_value(PROMPT)
    advanced(page)
    seed_field(page).fill("")  # empty is random
    generate(page)
    finished(page)


def test_unknown_words_are_named(open_page: Open) -> None:
    page = open_page()
    write(page, "a zeppelin-shaped gramophone")
    generate(page)
    finished(page)
    expect(page.locator("#generate-status .note").first).to_contain_text("gramophone")
    shoot(page, "8-note")


@pytest.mark.parametrize("locale", ["en-US", "zh-CN"])
def test_an_example_is_drawn_by_one_press(locale: str, open_page: Open) -> None:
    page = open_page(locale=locale)
    example = page.locator("#examples button").nth(3)
    text = example.get_attribute("aria-label")
    assert text
    assert ("乌龟" in text) == (locale == "zh-CN")
    example.click()
    finished(page)
    expect(page.locator("#prompt textarea")).to_have_value(text)
    expect(page.locator("#examples")).to_be_hidden()
    assert page.locator("#generate-picture img").get_attribute("alt") == text


def test_the_keyboard_generates(open_page: Open) -> None:
    page = open_page()
    write(page, PROMPT)
    prompt_of(page).press("Control+Enter")
    finished(page)
    expect(prompt_of(page)).to_have_value(PROMPT)  # the key made no line break


def test_a_second_visitor_sees_its_place_and_then_its_picture(open_page: Open) -> None:
    first, second = open_page(), open_page(PHONE)
    start_long_work(first)
    write(second, PROMPT)
    generate(second)
    expect(second.locator("#generate-status")).to_contain_text("Waiting: one request comes before yours")
    expect(second.locator("#generate-picture")).to_have_css("animation-name", "breathe")  # where it will be
    shoot(second, "9-waiting")
    first.get_by_role("button", name="Cancel").click()
    finished(second)


def test_closing_the_tab_frees_the_worker(open_page: Open) -> None:
    first, second = open_page(), open_page()
    start_long_work(first)
    first.close()
    write(second, PROMPT)
    generate(second)
    finished(second)


def test_it_says_which_weights_draw_and_how_to_get_others(open_page: Open) -> None:
    page = open_page()
    line = page.locator("#weights")
    expect(line.locator("summary")).to_have_text("Embedded miniature")
    expect(line.locator("p").first).to_be_hidden()
    line.locator("summary").click()
    expect(line.locator("p").first).to_contain_text("knows small flat icons")
    expect(line.locator("p").first).to_contain_text("download")
    expect(line.locator("p").first).to_be_visible()
    shoot(page, "10-weights")


def test_it_is_dark_whatever_the_system_prefers(open_page: Open) -> None:
    colours = []
    for preference in ("light", "dark"):
        page = open_page(color_scheme=preference)
        page.locator("#prompt textarea").wait_for()
        colours.append(
            page.evaluate(
                "[document.body, document.querySelector('#prompt textarea')].map("
                "(part) => [getComputedStyle(part).backgroundColor, getComputedStyle(part).color])"
            )
        )
    assert colours[0] == colours[1]
    ground = tuple(int(theme.GROUND[i : i + 2], 16) for i in (1, 3, 5))
    assert colours[0][0][0] == f"rgb{ground}"


def test_the_brand_shows_before_any_script_has_run(browser: Browser) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(server().url)
    shown = page.evaluate("(({content, color}) => [content, color])(getComputedStyle(document.body, '::before'))")
    ink = tuple(int(theme.INK[i : i + 2], 16) for i in (1, 3, 5))
    assert shown == [f'"{theme.TITLE}"', f"rgb{ink}"]
    page.screenshot(path=ARTIFACTS / "desktop-0-first-paint.png")
    context.close()


def test_inter_comes_from_here(open_page: Open) -> None:
    page = open_page()
    assert page.evaluate("document.fonts.ready.then(() => document.fonts.check('16px Inter'))")
    loaded = page.evaluate("[...document.fonts].filter((face) => face.status === 'loaded').map((face) => face.family)")
    assert loaded == ["Inter"]
    assert page.evaluate("getComputedStyle(document.querySelector('#prompt textarea')).fontFamily").startswith("Inter")


@pytest.mark.parametrize("size", [NARROW, PHONE, TABLET, DESKTOP], ids=NAMES.get)
def test_it_fits_without_sideways_scrolling(open_page: Open, size: tuple[int, int]) -> None:
    page = open_page(size)
    choose(page, "Base")
    advanced(page)
    page.get_by_label("Negative prompt").wait_for()
    shoot(page, "11-everything")
    assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
    opened, stage = page.locator("#generate-controls .drawer > .open + *"), page.locator("#generate-stage")
    fields, picture = opened.bounding_box(), stage.bounding_box()
    assert fields
    assert picture
    if size == DESKTOP:
        assert fields["x"] + fields["width"] <= picture["x"]  # the picture makes room
    else:
        assert fields["y"] > picture["y"]  # over its lower part


def test_every_control_has_a_name(open_page: Open) -> None:
    page = open_page()
    choose(page, "Base")
    advanced(page)
    page.get_by_label("Negative prompt").wait_for()
    unnamed = page.evaluate("""
        [...document.querySelectorAll("main input, main textarea, main button, main select, main a")]
        .filter((field) => field.checkVisibility({ visibilityProperty: true }) && !field.closest("[aria-hidden=true]"))
        .filter((field) => !(field.ariaLabel || field.textContent.trim() || field.labels?.[0]?.textContent.trim()))
        .map((field) => field.outerHTML.slice(0, 120))
    """)
    assert unnamed == []
    expect(page.locator("#generate-status [role=status]")).to_have_count(1)


def test_the_page_is_about_what_a_request_takes(open_page: Open) -> None:
    page = open_page()
    advanced(page)
    for name, field in (
        ("prompt", "#prompt textarea"),
        ("model", "#model"),
        ("steps", "#generate-controls .drawer input >> nth=0"),
    ):
        description = TextToImage.model_fields[name].description
        assert description
        expect(page.locator(field)).to_have_accessible_description(description)
