"""Prompts for the miniature, completed by the seed: "a fox" becomes "a small mirrored fox, on the left".

The model itself chooses backgrounds and colours that are not named, from the noise. It is too small to choose sizes,
places and directions, and would draw a blend of several.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from mini.config import traits, vocabulary

SIZES_WEIGHED = ("small", "small", "medium", "large")  # only small things can be anywhere

# Of 255: a size in which Turbo's picture of a thing is further than this from its icon is drawn only where it is asked
# for. Looked at side by side: below, edges are soft; above, shapes melt.
WELL_DRAWN = 10.0


@dataclass(frozen=True)
class Completed:
    """A completed prompt; `size` and `place` are usual names, None where nothing had to be chosen.

    `mirrored` is whether the seed mirrored the thing; every other seed does, where the prompt does not.
    `words` are those that were put into `text`, in its language.
    """

    text: str
    size: str | None = None
    place: str | None = None
    mirrored: bool = False
    words: tuple[str, ...] = ()


def complete(prompt: str, seed: int, known: Mapping[str, Any] | None = None) -> Completed:
    """Return a prompt with size, place and direction of the one thing in it, as far as they are open.

    Args:
        prompt: English or Chinese. One that names no known thing, or several, is left alone.
        seed: decides; the same seed always gives the same prompt.
        known: a vocabulary; by default that of the miniature.
    """
    for language in _languages(known):
        thing = language.the_one_thing(prompt)
        if thing is not None:
            return _complete(prompt, seed, language, thing)
    return Completed(prompt)


def foreign_colours(prompt: str) -> list[tuple[str, str]]:
    """Return the things of a prompt that it gives colours which they cannot have, with these, by their usual names."""
    found = [pair for language in _ours() for pair in language.coloured(prompt)]
    return [
        (thing, colour)
        for thing, colour in dict.fromkeys(found)
        if not traits()[thing]["colourable"] and colour not in traits()[thing]["own_colours"]
    ]


def _complete(prompt: str, seed: int, language: _Language, thing: re.Match[str]) -> Completed:
    own_size, own_place = language.stated(prompt, language.sizes), language.stated(prompt, language.places)
    chance = random.Random(seed)
    size, place = _choose(
        own_size, own_place, _sizes_of(language.usual[thing[0].casefold()]), list(language.places), chance
    )
    mirrored = chance.random() < 0.5 and not language.stated(prompt, language.ways)
    before = [language.sizes[size][0]] if size is not None else []
    way = [language.ways["mirrored"][0]] if mirrored else []
    where = [language.places[place][0]] if place is not None else []
    return Completed(
        language.completed(prompt, thing, before, way, where), size, place, mirrored, (*before, *way, *where)
    )


def _sizes_of(thing: str) -> list[str]:
    """Return the sizes to choose among for a thing, as often as they are chosen: those it is drawn well in."""
    measured = traits().get(thing)  # none of what a training's vocabulary alone has
    return [size for size in SIZES_WEIGHED if measured is None or measured["errors"][size] <= WELL_DRAWN] or ["small"]


def _choose(
    size: str | None, place: str | None, sizes: list[str], places: list[str], chance: random.Random
) -> tuple[str | None, str | None]:
    """Return the size and the place to add; None for what the prompt states."""
    draws = chance.random(), chance.random()  # always both: what one decides does not depend on the other
    added_size = None
    if size is None:
        free = place in (None, "centre")
        added_size = size = sizes[int(draws[0] * len(sizes))] if free else "small"
    if place is not None:
        return added_size, None
    return added_size, places[int(draws[1] * len(places))] if size == "small" else "centre"


class _Language:
    """The words of one language, and their places in a sentence."""

    def __init__(
        self,
        names: Mapping[str, Any],
        article: str,
        border: str,
        space: str,
        comma: str,
        locative: str = "",
        way_follows: bool = False,
    ) -> None:
        self.sizes: Mapping[str, list[str]] = names["sizes"]
        self.ways: Mapping[str, list[str]] = names["ways"]
        self.places: Mapping[str, list[str]] = names["places"]
        self._article, self._border, self._space, self._comma = article, border, space, comma
        self._locative, self._way_follows = locative, way_follows  # what a place needs; a way is a clause of its own
        colours = _flat(names["colours"])
        self.colours: Mapping[str, list[str]] = names["colours"]
        self.usual = {name.casefold(): usual for usual, every in names["things"].items() for name in every}
        self._things = self._any(_flat(names["things"]))
        self._counts = self._any(_flat(names["counts"]))
        # "orange" is a fruit as well
        self._also_colours = frozenset(colours)
        self._before = re.compile(rf"({article})?({border}(?:{_alternatives(colours)})的?\s*)?$", re.IGNORECASE)

    def _any(self, names: Iterable[str]) -> re.Pattern[str]:
        return re.compile(f"{self._border}(?:{_alternatives(names)}){self._border}", re.IGNORECASE)

    def the_one_thing(self, prompt: str) -> re.Match[str] | None:
        """Find the thing that a prompt names; None where it names none, or several."""
        found = list(self._things.finditer(prompt))
        found = [match for match in found if match[0].casefold() not in self._also_colours] or found[:1]
        return found[0] if len(found) == 1 and not self._counts.search(prompt) else None

    def coloured(self, prompt: str) -> list[tuple[str, str]]:
        """Return the things of a prompt that have a colour right before them: their usual names, and the colour's."""
        named = {name: usual for usual, names in self.colours.items() for name in names}
        pairs = []
        for match in self._things.finditer(prompt):
            before = self._before.search(prompt[: match.start()])
            word = (before[2] or "").strip().removesuffix("的").strip().casefold() if before else ""
            if word:
                pairs.append((self.usual[match[0].casefold()], named[word]))
        return pairs

    def stated(self, prompt: str, table: Mapping[str, list[str]]) -> str | None:
        """Return the usual name of the first size or place, as `table` has them, that a prompt states."""
        found = self._any(_flat(table)).search(self._things.sub(" ", prompt))  # an elephant, 大象, is no large 象
        return next((key for key, names in table.items() if found and found[0].casefold() in names), None)

    def completed(self, text: str, thing: re.Match[str], sizes: list[str], ways: list[str], places: list[str]) -> str:
        """Return a sentence with words of size, direction and place where they belong; lists of one word or none."""
        before, after = (sizes, ways) if self._way_follows else ([*sizes, *ways], [])
        after = [*after, *(self._locative + place for place in places)]
        text = "".join([text.rstrip(" .,。，"), *(self._comma + word for word in after)]) if after else text
        return self._insert(text, thing, self._space.join(before)) if before else text

    def _insert(self, text: str, thing: re.Match[str], words: str) -> str:
        """Return a sentence with words before a thing and its colour."""
        before, after = text[: thing.start()], text[thing.start() :]
        found = self._before.search(before)
        assert found is not None  # it matches an empty string too
        article, colour = found[1] or "", found[2] or ""
        if article.strip().casefold() == "an":  # "an owl", but "a small owl"
            article = article[0] + article[2:]
        return before[: found.start()] + article + words + self._space + colour + after


def _alternatives(names: Iterable[str]) -> str:
    return "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))


def _flat(table: Mapping[str, list[str]]) -> list[str]:
    return [name for names in table.values() for name in names]


def _languages(known: Mapping[str, Any] | None) -> tuple[_Language, _Language]:
    return _make(known) if known is not None else _ours()


@cache
def _ours() -> tuple[_Language, _Language]:
    return _make(vocabulary())


def _make(known: Mapping[str, Any]) -> tuple[_Language, _Language]:
    return (
        _Language(known["chinese_names"], article="", border="", space="", comma="，", locative="在", way_follows=True),
        _Language(known, article=r"\ban?\s+|\bthe\s+", border=r"\b", space=" ", comma=", "),
    )
