"""Captions of scenes: what people might write, and what each caption says and leaves open.

Training and evaluation have templates of their own.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, fields

from . import chinese
from .scenes import Scene
from .things import (
    BACKGROUND_NAMES,
    COLOUR_NAMES,
    COUNTS,
    NO_ARTICLE,
    PLACE_NAMES,
    PLURALS,
    SIZE_NAMES,
    THINGS,
    WAY_NAMES,
)

# {a}: the subject with its article, {x}: without, {p}: the place or nothing, {b}: the background's name.
TEMPLATES_FULL = (
    "{a} {p} on a {b} background",
    "{x} {p}, {b} background",
    "{x} on {b}, {p}",
    "a picture of {a} {p} on a {b} background",
    "{b} background, {x} {p}",
    "{a} {p} with a {b} background",
    "{a} in front of a {b} background, {p}",
    "an icon of {a} on {b}, {p}",
    "{p}, {a} on a plain {b} background",
    "a photo of {a}, {b} background, {p}",
    "{a} {p} against a {b} backdrop",
    "{a} {p} with a {b} backdrop",
    "{x} {p} {b} background",
    "draw {a} {p} on a {b} background",
    "photo of {a} {p}, {b} backdrop",
    "{a} {p}, background {b}",
    "{a} {p}. the background is {b}",
    "{a} {p} over a plain {b} backdrop",
    "{x} over {b}, {p}",
    "make {a} {p}, {b} background",
    "i want {a} {p} on a {b} backdrop",
    "{a} {p}, and the background should be {b}",
    "could you paint {a} {p} on {b}",
    "let there be {a} {p}, {b} behind it",
)
TEMPLATES_NO_BACKGROUND = (
    "{a} {p}",
    "{a} {p}",
    "{x} {p}",
    "{x}, {p}",
    "{p}, {a}",
    "a picture of {a} {p}",
    "an icon of {a} {p}",
    "a photo of {a} {p}",
    "photo of {a}, {p}",
    "draw {a} {p}",
)
# Background alone, so that a negative prompt such as "blue background" means something.
TEMPLATES_NO_THING = ("{b} background", "a {b} background", "a plain {b} background", "{b}", "on a {b} background",
                      "{b} backdrop")  # fmt: skip
# Wordings that are used in evaluation only.
TEST_TEMPLATES = (
    "show me {a} {p} over a {b} background",
    "an image of {a} {p}, the backdrop is {b}",
    "{a} {p}; background: {b}",
    "please draw {a} {p} and make the background {b}",
    "{x} {p} - all on {b}",
)
BESIDE = ("{1} next to {2}", "{1} beside {2}", "{1} and {2} side by side", "{1} to the left of {2}",
          "{1} on the left and {2} on the right", "{1} left, {2} right", "{1} left of {2}")  # fmt: skip
BESIDE_TURNED = ("{2} to the right of {1}", "{2} on the right and {1} on the left", "{2} right of {1}")
ABOVE = ("{1} above {2}", "{1} over {2}", "{1} on top of {2}", "{1} at the top and {2} at the bottom")
ABOVE_TURNED = ("{2} below {1}", "{2} under {1}", "{2} beneath {1}")
AND = ("{1} and {2}", "{1} and {2}", "{1} with {2}", "{1}, {2}", "{1} & {2}")
# Words that people add and that change nothing here.
FILLERS = (
    "flat colours", "flat colors", "simple shapes", "clean outlines", "high quality", "minimal",
    "bright colors", "no text", "sharp", "detailed", "best quality", "vector art", "emoji", "flat style", "cute",
    "illustration", "masterpiece", "8k", "isolated", "simple", "cartoon", "beautiful", "colorful", "highly detailed",
)  # fmt: skip
EVERYTHING = frozenset(("background", "size", "place", "colour"))  # what `describe` can mention


@dataclass(frozen=True)
class Said:
    """What a caption says of a scene; None where it leaves something open. Fields as of `Scene`."""

    thing: str | None = None
    background: str | None = None
    size: str | None = None
    place: str | None = None
    colour: str | None = None
    second: str | None = None
    arrangement: str | None = None
    mirrored: bool | None = None  # no word for it means the usual way, wherever a thing is named

    def fits(self, scene: Scene) -> bool:
        """Say whether a scene shows nothing else than what is said."""
        return all(getattr(self, f.name) in (None, getattr(scene, f.name)) for f in fields(self))


@dataclass(frozen=True)
class Caption:
    """A caption and what it says."""

    text: str
    said: Said


def article(words: str, noun: str) -> str:
    """Put "a" or "an" before `words` unless the noun takes none: "a small fox", "an owl", "small grapes"."""
    if noun in NO_ARTICLE:
        return words
    return f"{'an' if words[0] in 'aeiou' and not words.startswith(('uni', 'ufo')) else 'a'} {words}"


def plural(noun: str) -> str:
    """Return the plural of a noun: "foxes", "butterflies", "pairs of scissors"."""
    if noun in PLURALS:
        return PLURALS[noun]
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + ("es" if noun.endswith(("s", "x", "ch", "sh")) else "s")


def tidy(text: str) -> str:
    """Close the gaps that an empty place leaves in a template."""
    text = re.sub(r"\s+", " ", text).strip(" ,，")
    return re.sub(r"(\s*[,，]){2,}", ",", re.sub(r" ([,;.])", r"\1", text))


def subject(scene: Scene, size: bool, mirrored: bool, colour: bool, rng: random.Random) -> tuple[str, str, bool]:
    """Put the things of a scene into words; `mirrored` asks for a word that it is mirrored.

    Returns:
        the words with an article, the words without, and whether they say how a pair stands.
    """
    noun = rng.choice(THINGS[scene.thing])
    if scene.second:
        second = rng.choice(THINGS[scene.second])
        stands = rng.random() < 0.6
        beside, turned = scene.arrangement == "beside", stands and rng.random() < 0.5
        frames = (BESIDE_TURNED if turned else BESIDE) if beside else (ABOVE_TURNED if turned else ABOVE)
        frame = rng.choice(frames if stands else AND)
        with_article, without = (frame.replace("{1}", a).replace("{2}", b) for a, b in
                 ((article(noun, noun), article(second, second)), (noun, second)))  # fmt: skip
        return with_article, without, stands
    adjectives = [rng.choice(SIZE_NAMES[scene.size])] if size else []
    adjectives += [rng.choice(WAY_NAMES["mirrored"])] if mirrored else []
    adjectives += [rng.choice(COLOUR_NAMES[scene.colour])] if colour and scene.colour else []
    if scene.arrangement != "one":
        words = " ".join([rng.choice(COUNTS[scene.arrangement]), *adjectives, plural(noun)])
        return words, words, True
    words = " ".join([*adjectives, noun])
    return article(words, noun), words, True


def chinese_subject(scene: Scene, size: bool, mirrored: bool, colour: bool, rng: random.Random) -> tuple[str, bool]:
    """Put the things of a scene into Chinese words; as `subject`."""
    noun = rng.choice(chinese.THING_NAMES[scene.thing])
    if scene.second:
        second = rng.choice(chinese.THING_NAMES[scene.second])
        stands = rng.random() < 0.6
        beside, turned = scene.arrangement == "beside", stands and rng.random() < 0.5
        both = chinese
        frames = (both.BESIDE_TURNED if turned else both.BESIDE) if beside else (
            both.ABOVE_TURNED if turned else both.ABOVE)  # fmt: skip
        frame = rng.choice(frames if stands else chinese.AND)
        return frame.replace("{1}", noun).replace("{2}", second), stands
    adjectives = rng.choice(chinese.SIZE_NAMES[scene.size]) if size else ""
    if mirrored:
        adjectives += rng.choice(chinese.WAY_NAMES["mirrored"]) + "的"
    if colour and scene.colour:
        adjectives += rng.choice(chinese.COLOUR_NAMES[scene.colour]) + rng.choice(("的", "的", ""))
    number = rng.choice(chinese.ONE if scene.arrangement == "one" else chinese.COUNTS[scene.arrangement])
    return number + adjectives + noun, True


def describe(
    scene: Scene,
    rng: random.Random,
    says: frozenset[str],
    templates: tuple[str, ...] | None = None,
    in_chinese: bool = False,
) -> Caption:
    """Put a scene into words.

    Args:
        scene: the scene.
        rng: picks the template and among synonyms.
        says: which of "background", "size", "place" and "colour" to mention. That something is mirrored is always
            said, before the thing or after the sentence.
        templates: sentences to choose from; default: those of training.
        in_chinese: whether to write Chinese.
    """
    single = scene.arrangement == "one"
    has = {
        "background": "background" in says,
        "size": single and "size" in says,
        "place": single and "place" in says,
        "colour": scene.colour is not None and "colour" in says,
    }
    before, after = (scene.mirrored, False) if rng.random() < 0.5 else (False, scene.mirrored)
    if in_chinese:
        words, stands = chinese_subject(scene, has["size"], before, has["colour"], rng)
        words += "，" + rng.choice(chinese.WAY_NAMES["mirrored"]) if after else ""
        place = rng.choice(chinese.PLACE_NAMES[scene.place]) if has["place"] else ""
        table = {
            (True, False): chinese.TEMPLATES_FULL,
            (True, True): chinese.TEMPLATES_PLACE,
            (False, False): chinese.TEMPLATES_NO_BACKGROUND,
            (False, True): chinese.TEMPLATES_PLACE_ONLY,
        }
        template = rng.choice(templates or table[has["background"], has["place"]])
        text = template.format(x=words, p=place, b=rng.choice(chinese.COLOUR_NAMES[scene.background]))
    else:
        full, words, stands = subject(scene, has["size"], before, has["colour"], rng)
        place = rng.choice(PLACE_NAMES[scene.place]) if has["place"] else ""
        template = rng.choice(templates or (TEMPLATES_FULL if has["background"] else TEMPLATES_NO_BACKGROUND))
        text = tidy(template.format(a=full, x=words, p=place, b=rng.choice(BACKGROUND_NAMES[scene.background])))
        text += ", " + rng.choice(WAY_NAMES["mirrored"]) if after else ""
    said = Said(
        thing=scene.thing,
        background=scene.background if has["background"] else None,
        size=scene.size if has["size"] else None,
        place=scene.place if has["place"] else None,
        colour=scene.colour if has["colour"] else None,
        second=scene.second,
        arrangement=scene.arrangement if stands else None,
        mirrored=scene.mirrored,
    )
    return Caption(text, said)


def random_caption(scene: Scene, rng: random.Random, empty: float = 0.10, long: float = 0.12) -> Caption:
    """Draw a caption of a scene.

    Shares: 10 % empty (for guidance); the background is left out of 25 %, the size of 40 %, the place of 45 %, a colour
    of 25 %, the thing of 3 % (so that a negative prompt such as "blue background" means something); 25 % are Chinese,
    of pairs 40 %; `long` is the share filled up with idle words, whose 33 to 64 tokens shift the picture's positions
    as a long prompt does.
    """
    if rng.random() < empty:
        return Caption("", Said())
    in_chinese = rng.random() < (0.40 if scene.second else 0.25)  # Chinese pairs are read last
    if rng.random() < 0.03:
        names, templates = (
            (chinese.COLOUR_NAMES, chinese.TEMPLATES_NO_THING) if in_chinese else (BACKGROUND_NAMES, TEMPLATES_NO_THING)
        )
        made = Caption(
            rng.choice(templates).format(b=rng.choice(names[scene.background])), Said(background=scene.background)
        )
    else:
        shares = {"background": 0.75, "size": 0.60, "place": 0.55, "colour": 0.75}
        says = frozenset(name for name, share in shares.items() if rng.random() < share)
        made = describe(scene, rng, says, in_chinese=in_chinese)
    text = made.text
    if made.said.thing:
        if rng.random() < long:
            text = ", ".join([text, *rng.sample(FILLERS, rng.randint(5, 12))])
        elif rng.random() < 0.15:
            text = ", ".join([text, *rng.sample(FILLERS, rng.randint(1, 3))])
    draw = rng.random()
    text = text.capitalize() if draw < 0.15 else text
    text += "." if 0.15 < draw < 0.25 else ""
    return Caption(text, made.said)
