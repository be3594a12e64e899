"""Everyday words for things that the miniature has under another name: "a tree" is understood as "a fir tree"."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from mini.config import vocabulary

# By a thing's usual name, the words that it is drawn for. A word stands here only where the picture is one of what was
# asked for, or of something that goes by the same name at a glance; docs/nouns.md lists what this leaves unknown.
ENGLISH: Mapping[str, str] = {
    "fir tree": "tree, evergreen, spruce",
    "tulip": "flower, blossom",
    "maple leaf": "leaf",
    "clover": "four-leaf clover, shamrock",
    "cat": "kitty, pussycat, tomcat",
    "dog": "doggy, hound, pup",
    "rabbit": "hare",
    "horse": "pony, foal, stallion",
    "cow": "bull, calf, ox",
    "pig": "piglet, hog",
    "bear": "bear cub, grizzly",
    "monkey": "ape, chimpanzee, chimp",
    "llama": "alpaca",
    "camel": "dromedary",
    "frog": "toad",
    "rooster": "chicken, hen, cock",
    "chick": "baby chicken",
    "duck": "duckling",
    "swan": "goose",
    "parrot": "bird",
    "dinosaur": "dino, brontosaurus",
    "whale": "orca",
    "fish": "goldfish",
    "ladybug": "beetle, bug",
    "bee": "insect, wasp, bumblebee",
    "snake": "serpent, viper",
    "lizard": "gecko",
    "shrimp": "scampi",
    "car": "automobile",
    "taxi": "cab",
    "bus": "coach",
    "truck": "lorry, van",
    "racing car": "formula one car",
    "bicycle": "pushbike",
    "motorcycle": "moped",
    "steam train": "locomotive",
    "tram": "streetcar, trolley",
    "airplane": "aeroplane, aircraft, jet plane",
    "helicopter": "chopper",
    "rocket": "spaceship, spacecraft",
    "flying saucer": "alien spaceship",
    "sailboat": "boat, yacht, sailing boat",
    "ship": "ocean liner, cruise ship, ferry",
    "house": "cottage, building",
    "castle": "fortress, palace",
    "church": "chapel",
    "ferris wheel": "big wheel",
    "light bulb": "bulb, lightbulb",
    "alarm clock": "clock",
    "candle": "candlelight",
    "fire": "campfire, bonfire",
    "sun": "sunshine",
    "moon": "crescent, crescent moon",
    "telephone": "landline",
    "television": "television set, telly",
    "guitar": "acoustic guitar",
    "violin": "fiddle",
    "soccer ball": "ball",
    "sneaker": "shoe, trainer",
    "t-shirt": "shirt, tee, tee shirt",
    "top hat": "hat",
    "glasses": "spectacles, eyeglasses",
    "backpack": "rucksack, bag, schoolbag",
    "diamond": "gem, jewel, gemstone",
    "umbrella": "parasol",
    "gift": "gift box, parcel",
    "axe": "hatchet",
    "teddy bear": "teddy, plush bear, stuffed bear",
    "ghost": "spook, phantom",
    "space invader": "alien, monster",
    "skull": "death's head",
    "corn": "maize, sweetcorn, corncob",
    "chili pepper": "pepper, chilli",
    "pizza": "pizza slice",
    "hamburger": "cheeseburger",
    "ice cream": "gelato, sundae",
    "candy": "bonbon",
    "cookie": "biscuit",
    "cup of coffee": "cup, mug, espresso, cappuccino, tea cup, teacup",
    "teapot": "kettle, pot of tea",
    "glass of wine": "wine, red wine",
    "cupcake": "muffin",
    "croissant": "pastry",
    "donut": "bagel",
}
ONE_OF_MANY: Mapping[str, str] = {"cherry": "pair of cherries", "grape": "bunch of grapes"}  # drawn together only
CHINESE: Mapping[str, str] = {
    "fir tree": "树",
    "tulip": "花 花朵 鲜花",
    "maple leaf": "叶子 树叶",
    "rabbit": "野兔",
    "rooster": "鸡 母鸡",
    "parrot": "鸟 小鸟",
    "swan": "鹅",
    "car": "车 轿车",
    "steam train": "蒸汽机车",
    "airplane": "客机 喷气机",
    "rocket": "宇宙飞船 飞船",
    "sailboat": "船 小船",
    "house": "家 屋子 小屋",
    "alarm clock": "钟 时钟",
    "soccer ball": "球",
    "sneaker": "鞋 鞋子",
    "t-shirt": "衬衫",
    "top hat": "帽子",
    "backpack": "书包 包",
    "diamond": "宝石",
    "gift": "礼盒",
    "space invader": "怪物 外星人",
    "cup of coffee": "杯子",
    "ice cream": "雪糕",
    "light bulb": "灯",
}
# What may stand right before and after a Chinese everyday word: numbers, measure words, sizes, the ends of colours.
BEFORE = "一两二三四只棵朵条艘辆个架颗双顶件座匹把盏杯片台大小色的和与画"
AFTER = "和与在的，、"

# Measure words that the miniature was not taught say nothing but what is counted: "一棵树" is "一个树" to it.
_MEASURE_WORDS = re.compile("([一两三四])(?:棵|朵|条|艘|辆|架|颗|顶|双|件|座|匹|把|盏|台|头)")


@dataclass(frozen=True)
class Understood:
    """A prompt in words that the miniature knows, and what was said with what it is drawn as, each once."""

    text: str
    instead: Mapping[str, str]


def understood(prompt: str) -> Understood:
    """Return a prompt with its everyday words put as the miniature knows them, plurals as plurals."""
    instead: dict[str, str] = {}

    def put(match: re.Match[str]) -> str:
        said = (match["word"] or match["term"] or "").casefold()
        drawn = _everyday().get(said)
        if drawn is None:  # a name that the miniature knows, which may hold an everyday word: "police car"
            return match[0]
        instead[said] = drawn
        article = match["article"] or ""
        if article:
            vowel = drawn[0] in "aeiou"
            article = article[0] + ("n" if vowel else "") + article.lstrip("aAnN")
        return article + drawn

    return Understood(_names().sub(put, _MEASURE_WORDS.sub(r"\1个", prompt)), instead)


@cache
def _everyday() -> dict[str, str]:
    known, chinese = vocabulary()["things"], vocabulary()["chinese_names"]["things"]
    taken = {name for names in (*known.values(), *chinese.values()) for name in names}
    table: dict[str, str] = {}
    for thing, words in ENGLISH.items():
        many = known[thing][len(known[thing]) // 2]
        for word in words.split(", "):
            table |= {_plural(word): many, word: thing}
    table |= ONE_OF_MANY
    for thing, words in CHINESE.items():
        table |= dict.fromkeys(words.split(), chinese[thing][0])
    return {word: drawn for word, drawn in table.items() if word not in taken}


@cache
def _names() -> re.Pattern[str]:
    """Match everyday words and the miniature's own names, of which the longest counts; an English one may have "a"."""
    own = [
        name for key in ("things", "backgrounds", "colours") for names in vocabulary()[key].values() for name in names
    ]
    words = sorted({*own, *_everyday()}, key=len, reverse=True)
    english = "|".join(re.escape(word) for word in words if word.isascii())
    known = "|".join(re.escape(term) for term in sorted(vocabulary()["chinese"], key=len, reverse=True))
    chinese = "|".join(re.escape(word) for word in words if not word.isascii() and word in _everyday())
    # Chinese has no spaces: a word is one where what stands beside it ends one ("地球" is no "球").
    chinese = rf"(?<![^\W{BEFORE}])(?:{chinese})(?![^\W{AFTER}])"
    return re.compile(rf"(?P<article>\ban?\s+)?\b(?P<word>{english})\b|(?P<term>{chinese})|{known}", re.IGNORECASE)


def _plural(word: str) -> str:
    if re.search(r"(?:s|x|ch|sh)$", word):
        return word + "es"
    if re.search(r"[^aeiou]y$", word):
        return word[:-1] + "ies"
    irregular = {"goose": "geese", "ox": "oxen", "calf": "calves", "leaf": "leaves", "aircraft": "aircraft"}
    return irregular.get(word, word + "s")
