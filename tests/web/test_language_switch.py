"""The page in other languages than English."""

import json
import shutil
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.helpers.browsing import (
    SIZES,
    Open,
    draw_seed,
    finished,
    reload,
    shoot,
    start_long_work,
)
from tests.helpers.serving import ROOT, server

pytestmark = pytest.mark.browser


@SIZES
def test_the_page_speaks_chinese(open_page: Open, size: tuple[int, int]) -> None:
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


def choose_language(page: Page, name: str) -> None:
    page.locator("#languages").get_by_role("button", name=name).click()


def test_the_language_can_be_changed_and_what_is_shown_changes_too(open_page: Open) -> None:
    page = open_page()
    draw_seed(page, "7")
    expect(page.locator("#generate-controls .block.tokens")).to_contain_text("of 512 tokens")
    expect(page.get_by_role("button", name="English")).to_have_attribute("aria-pressed", "true")
    page.get_by_role("button", name="More", exact=True).click()
    expect(page.locator("#generate-parameters dl")).to_contain_text("Seed7")
    choose_language(page, "中文")
    expect(page.locator("#generate")).to_have_text("生成")
    expect(page.get_by_role("button", name="中文")).to_have_attribute("aria-pressed", "true")
    expect(page.get_by_role("button", name="English")).to_have_attribute("aria-pressed", "false")
    assert "studio-language=zh" in page.evaluate("document.cookie")
    expect(page.locator("#generate-status")).to_contain_text("2 步")
    expect(page.locator("#generate-status b")).to_have_text("7")
    expect(page.locator("#weights")).to_contain_text("迷你模型")
    expect(page.locator("#generate-controls .block.tokens")).to_contain_text("512 个词元")
    expect(page.locator("#generate-controls .drawer > .label-wrap")).to_contain_text("2 步")
    expect(page.locator("#generate-controls .chip")).to_have_text("种子 7 ×")
    expect(page.locator("#generate-parameters dl")).to_contain_text("种子7")
    expect(page.get_by_role("tab", name="放大")).to_be_visible()
    page.locator("#generate-controls").get_by_label("种子").first.fill("1.5")
    page.locator("#generate").click()
    expect(page.locator("#generate-fix")).to_have_text("使用随机种子")
    choose_language(page, "English")
    expect(page.locator("#generate-status .failed")).to_contain_text("Possible: a whole number")
    expect(page.locator("#generate-fix")).to_have_text("Use a random seed")


def test_a_chosen_language_stays(open_page: Open) -> None:
    page = open_page()
    choose_language(page, "中文")
    expect(page.locator("#generate")).to_have_text("生成")
    expect(page.locator("#word-copied")).to_have_text("已复制", use_inner_text=False)
    reload(page)
    expect(page.locator("#generate")).to_have_text("生成")
    expect(page.locator("#generate-controls .drawer > .label-wrap")).to_contain_text("随机种子")


def test_escape_closes_what_lies_over_the_page_first_and_then_cancels(open_page: Open) -> None:
    page = open_page()
    start_long_work(page)
    page.locator("#weights summary").click()
    expect(page.locator("#weights details p").first).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#weights details p").first).to_be_hidden()
    expect(page.locator("#weights summary")).to_be_focused()
    expect(page.locator("#generate-status .working")).to_be_visible()  # it goes on
    page.keyboard.press("Escape")
    expect(page.locator("#generate-status")).to_contain_text("Cancelled")


def test_another_language_is_one_more_file(browser: Browser, tmp_path: Path) -> None:
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    for face in ROOT.glob("*/__init__.py"):
        shutil.copytree(face.parent, tmp_path / face.parent.name)
    (tmp_path / "weights").symlink_to(ROOT / "weights")
    texts = {"Generate": "Zeichnen", "What should the picture show? The prompt takes {allowed}.": "Was denn? {allowed}"}
    german = {"name": "Deutsch", "tags": ["de", "de-DE"], "texts": texts}
    (tmp_path / "web" / "locales" / "de.json").write_text(json.dumps(german), encoding="utf-8")
    context = browser.new_context(locale="de-DE")
    page = context.new_page()
    page.goto(server(root=tmp_path).url)
    expect(page.locator("#generate")).to_have_text("Zeichnen")
    page.locator("#generate").click()
    expect(page.locator("#generate-status .failed")).to_contain_text("Was denn? some text of up to 10000 characters")
    context.close()
