"""Prompts for the miniature are completed by the seed with size, place and direction."""

from collections import Counter

import pytest

import mini.config
from mini.prompt import WELL_DRAWN, Completed, complete

PLACES = list(mini.config.vocabulary()["places"])


@pytest.mark.parametrize(
    "prompt",
    [
        "a plain blue background",
        "a fox and a lion",
        "three apples, blue background",
        "狐狸和狮子",
        "三只苹果",
        "a large mirrored fox in the middle",
        "a fox in the middle, big, flipped",
        "左上角的小狐狸，左右翻转",
        "镜像的小狐狸在左边",
        "something that nobody knows",
        "",
    ],
)
def test_a_prompt_that_states_everything_or_names_not_one_thing_is_left_alone(prompt: str) -> None:
    assert all(complete(prompt, seed) == Completed(prompt) for seed in range(1, 30))


def drawn_well(thing: str) -> set[str]:
    return {size for size, error in mini.config.traits()[thing]["errors"].items() if error <= WELL_DRAWN}


def test_an_open_prompt_gets_every_place_and_every_size_that_is_drawn_well() -> None:
    made = [complete("a fox", seed) for seed in range(1, 600)]
    sizes = Counter(prompt.size for prompt in made)
    assert set(sizes) == drawn_well("fox") == {"small", "medium"}
    assert sizes["small"] > sizes["medium"] > 120
    assert {prompt.place for prompt in made if prompt.size == "small"} == set(PLACES)
    assert {prompt.place for prompt in made if prompt.size != "small"} == {"centre"}
    assert complete("a fox", 5) == complete("a fox", 5)


@pytest.mark.parametrize(
    ("prompt", "starts"),
    [
        ("an owl", "a {words} owl, "),
        ("An Owl.", "A {words} Owl, "),
        ("the red apple on a blue background", "the {words} red apple on a blue background, "),
        ("an orange on an orange background", "a {words} orange on an orange background, "),
        ("photo of fries, 8k", "photo of {words} fries, 8k, "),
        ("a fire engine", "a {words} fire engine, "),
        ("a mirrored fox", "a mirrored {words} fox, "),
        ("一只狐狸", "一只{size}狐狸，{way}在"),
        ("红色的汽车，蓝色背景", "{size}红色的汽车，蓝色背景，{way}在"),
        ("大象", "{size}大象，{way}在"),
    ],
)
def test_words_go_where_the_miniature_reads_them(prompt: str, starts: str) -> None:
    for seed in range(1, 30):
        made = complete(prompt, seed)
        size, *way, place = made.words
        assert bool(way) == made.mirrored
        words, clause = " ".join((size, *way)), "".join(f"{word}，" for word in way)
        assert made.text == starts.format(words=words, size=size, way=clause) + place
        assert mini.config.unknown_words(made.text) == []


def test_every_other_seed_mirrors_a_thing() -> None:
    turned = [complete("a large fox in the middle", seed) for seed in range(1, 400)]
    assert 0.4 < sum(prompt.mirrored for prompt in turned) / len(turned) < 0.6
    assert {prompt.text for prompt in turned} == {"a large fox in the middle", "a large mirrored fox in the middle"}
    assert all((prompt.words == ("mirrored",)) == prompt.mirrored for prompt in turned)
    # the direction does not depend on size and place: those stay what they were
    pinned = [complete("a flipped fox", seed) for seed in range(1, 40)]
    assert [(prompt.size, prompt.place) for prompt in pinned] == [
        (prompt.size, prompt.place) for prompt in (complete("a fox", seed) for seed in range(1, 40))
    ]
    assert not any(prompt.mirrored for prompt in pinned)


def test_what_is_stated_stays_and_decides_the_rest() -> None:
    for seed in range(1, 60):
        small, large = complete("a small fox", seed), complete("a large fox", seed)
        assert small.size is None
        assert small.place in PLACES
        assert small.text.startswith("a small mirrored fox, " if small.mirrored else "a small fox, ")
        assert (large.size, large.place) == (None, "centre")
        left = complete("a fox on the left side", seed)
        way = "mirrored " if left.mirrored else ""
        assert (left.size, left.place, left.text) == ("small", None, f"a small {way}fox on the left side")
        assert complete("a fox in the middle", seed).place is None
        assert complete("小鸡在左边", seed).size == "small"
    assert {complete("a fox in the middle", seed).size for seed in range(1, 60)} == drawn_well("fox")


def test_no_seed_asks_for_a_size_that_is_drawn_badly() -> None:
    for thing in mini.config.vocabulary()["things"]:
        sizes = {complete(f"a {thing}", seed).size for seed in range(1, 30)}
        assert sizes == (drawn_well(thing) or {"small"}), thing
