"""What the miniature knows, in words: the file that the app reads."""

from __future__ import annotations

import re
from typing import Any

from . import captions, chinese
from .captions import plural
from .things import BACKGROUND_NAMES, BACKGROUNDS, COLOUR_NAMES, COUNTS, PLACE_NAMES, SIZE_NAMES, THINGS, WAY_NAMES


def vocabulary() -> dict[str, Any]:
    """Return what the miniature knows: names of things, colours, sizes and places, and the words around them."""
    return {
        "things": {names[0]: list(dict.fromkeys((*names, *map(plural, names)))) for names in THINGS.values()},
        "counts": COUNTS,
        "backgrounds": BACKGROUND_NAMES,
        "colours": COLOUR_NAMES,
        "sizes": SIZE_NAMES,
        "ways": WAY_NAMES,
        "places": PLACE_NAMES,
        "background_colours": {name: list(rgb) for name, rgb in BACKGROUNDS.items()},
        "other_words": other_words(),
        "chinese": chinese_terms(),
        "chinese_names": {
            "things": {names[0]: chinese.THING_NAMES[thing] for thing, names in THINGS.items()},
            "counts": chinese.COUNTS,
            "colours": chinese.COLOUR_NAMES,
            "sizes": chinese.SIZE_NAMES,
            "ways": chinese.WAY_NAMES,
            "places": chinese.PLACE_NAMES,
        },
    }


def other_words() -> list[str]:
    """Return the words of the English sentences around the names, and numbers."""
    sentences = (
        *captions.TEMPLATES_FULL, *captions.TEMPLATES_NO_BACKGROUND, *captions.TEMPLATES_NO_THING,
        *captions.TEST_TEMPLATES, *captions.BESIDE, *captions.BESIDE_TURNED, *captions.ABOVE, *captions.ABOVE_TURNED,
        *captions.AND,
    )  # fmt: skip
    joined = " ".join((re.sub(r"{\w}", " ", " ".join(sentences)), *captions.FILLERS))
    words = set(re.findall(r"[a-z0-9]+", joined))
    numbers = {name for names in COUNTS.values() for name in names}
    return sorted(words | numbers | {"a", "an", "the", "one"})


def chinese_terms() -> list[str]:
    """Return the Chinese names and the pieces of the Chinese sentences."""
    names = (chinese.THING_NAMES, chinese.COLOUR_NAMES, chinese.SIZE_NAMES, chinese.WAY_NAMES, chinese.PLACE_NAMES,
             chinese.COUNTS)  # fmt: skip
    terms = {name for group in names for all_names in group.values() for name in all_names} | set(chinese.ONE)
    sentences = " ".join(
        value if isinstance(value, str) else " ".join(value)
        for name, value in vars(chinese).items()
        if name.startswith(("TEMPLATES", "TESTS", "BESIDE", "ABOVE", "AND"))
    )
    terms |= set(re.sub(r"{\w}|[，、]", " ", sentences).split())
    return sorted(terms - {""})
