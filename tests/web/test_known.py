"""What the miniature knows is there to search, and what it does not know is said while it is typed."""

import pytest
from playwright.sync_api import expect

import mini.config
from engine.mode_generate import known_things, unknown_words
from mini.notes import completed
from tests.helpers.browsing import DESKTOP, PHONE, Open, finished, shoot
from web.language import say_in


def test_things_are_listed_in_the_visitors_language() -> None:
    assert "fox" in known_things("mini", "en")
    chinese = known_things("mini", "zh-CN")
    assert "狐狸" in chinese
    assert len(chinese) == len(known_things("mini", "en")) == len(mini.config.known_things())
    assert not any(unknown_words(name, "mini") for name in chinese)
    assert known_things("full", "en") == unknown_words("a zeppelin", "full") == []


def test_what_the_seed_chose_is_said_in_the_visitors_language() -> None:
    chinese = say_in("zh-CN")
    for seed in range(40):
        (note,) = completed("a fox", seed, "mini")[1]
        said = chinese(note).partition("：")[2]
        assert said.isascii() is False
        assert not any(letter.isascii() and letter.isalpha() for letter in said), said
        assert "; " not in str(note)


@pytest.mark.browser
@pytest.mark.parametrize(
    ("size", "locale", "known", "part"), [(DESKTOP, "en-US", "fox", "FO"), (PHONE, "zh-CN", "狐狸", "狐")]
)
def test_known_things_are_searched_and_put_into_the_prompt(
    open_page: Open, size: tuple[int, int], locale: str, known: str, part: str
) -> None:
    page = open_page(size, locale=locale)
    page.locator("#prompt textarea").fill("a zeppelin and a")
    line = page.locator("#generate-controls .tokens")
    expect(line.locator("b")).to_contain_text("zeppelin")
    page.locator("#weights summary").click()
    page.locator(".known input").fill(part)
    thing = page.locator(".known button:visible").get_by_text(known, exact=True)
    expect(page.locator(".known button:visible")).not_to_have_count(192)
    shoot(page, "13-known")
    thing.click()
    expect(page.locator("#prompt textarea")).to_have_value(f"a zeppelin and a {known}")
    page.locator("#prompt textarea").fill(f"a {known}")
    expect(line.locator("b")).to_have_count(0)
    page.keyboard.press("Control+Enter")
    finished(page)
