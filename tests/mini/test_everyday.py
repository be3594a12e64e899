"""Everyday words, and colours that things do not have: what the miniature makes of them, and what it says."""

import re
from pathlib import Path

import pytest

import mini.config
from mini import everyday
from mini.everyday import understood
from mini.notes import in_known_words

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("a tree", "a fir tree"),
        ("An insect on a yellow background", "A bee on a yellow background"),
        ("a cherry", "a pair of cherries"),
        ("two boats, red background", "two sailboats, red background"),
        ("Geese", "swans"),
        ("one aircraft", "one airplane"),
        ("a tea cup", "a cup of coffee"),
        ("一棵大树", "一个大松树"),
        ("三朵玫瑰", "三个玫瑰"),
        ("左上角的船，蓝色背景", "左上角的帆船，蓝色背景"),
    ],
)
def test_an_everyday_word_is_put_as_the_miniature_knows_it(prompt: str, text: str) -> None:
    assert understood(prompt).text == text
    assert mini.config.unknown_words(text) == []


@pytest.mark.parametrize(
    "prompt",
    [
        "a palm tree",
        "a police car and a kitten",
        "a top hat",
        "treetop",
        "圣诞树",
        "火鸡",
        "地球",
        "企鹅",
        "a zeppelin",
        "",
    ],
)
def test_a_name_that_holds_an_everyday_word_stays(prompt: str) -> None:
    assert understood(prompt) == everyday.Understood(prompt, {})


def test_no_everyday_word_has_two_meanings() -> None:
    words = [word for group in everyday.ENGLISH.values() for word in group.split(", ")]
    words += [word for group in everyday.CHINESE.values() for word in group.split()]
    assert len(words) == len(set(words))
    for word in words:
        assert mini.config.unknown_words(word), f"{word} is known by itself"


def test_the_list_of_nouns_is_true() -> None:
    text = (ROOT / "docs" / "nouns.md").read_text()
    drawn, near, unknown = (part.split("\n\n")[-1].replace("\n", " ") for part in re.split(r"\n## ", text)[1:])
    assert len(re.split(r", ", f"{drawn}, {near}, {unknown}")) >= 300
    for word in drawn.strip().split(", "):
        assert (understood(word).instead, mini.config.unknown_words(word)) == ({}, []), word
    for pair in near.strip().split(", "):
        word, _, thing = pair.partition(" → ")
        assert understood(word).text == thing, word
        assert mini.config.unknown_words(thing) == [], word
    for word in unknown.strip().split(", "):
        assert mini.config.unknown_words(understood(word).text) == [word]


def test_what_is_drawn_instead_is_named() -> None:
    text, (note,) = in_known_words("a tree and a bird, blue background", "mini")
    assert text == "a fir tree and a parrot, blue background"
    assert str(note) == "Drawn as what the miniature knows: tree → fir tree, bird → parrot."
    assert in_known_words("a tree", "full") == ("a tree", [])


@pytest.mark.parametrize(
    ("prompt", "told"),
    [
        ("a red fox and a black cat, white background", [("fox", "red"), ("cat", "black")]),
        ("红色的狐狸", [("fox", "red")]),
        ("a pink tree", [("fir tree", "pink")]),
        ("an orange fox", []),
        ("a purple umbrella", []),  # one of those that were taught in every colour
        ("a fox on a red background", []),
        ("an orange", []),
        ("a green apple", []),
    ],
)
def test_a_colour_that_a_thing_cannot_have_is_named(prompt: str, told: list[tuple[str, str]]) -> None:
    notes = [note for note in in_known_words(prompt, "mini")[1] if note.code == "own_colours"]
    assert [(str(note.values["thing"]), str(note.values["colour"])) for note in notes] == told


def test_every_thing_was_measured() -> None:
    traits = mini.config.traits()
    assert set(traits) == set(mini.config.vocabulary()["things"])
    for trait in traits.values():
        assert set(trait["errors"]) == set(mini.config.vocabulary()["sizes"])
        assert set(trait["own_colours"]) <= set(mini.config.vocabulary()["colours"])
