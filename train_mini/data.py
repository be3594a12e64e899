"""Icons to pictures, captions and the held-out split.

A picture is one flat background colour with one icon centred on it; icon and picture edges lie on the 16-px grid of
the transformer's patches. Knows nothing about models: pixels and words only.
"""

from __future__ import annotations

import io
import json
import random
import re
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from .things import BACKGROUND_NAMES, BACKGROUNDS, NO_ARTICLE, SIZE_NAMES, SIZES, THINGS

PICTURE_SIDE = 128  # pixels; 8 x 8 patches of 16 px
ICON_PACKAGES = {
    # MIT licence, Microsoft: everything that the miniature draws
    "fluent": "@iconify-json/fluent-emoji-flat@1.2.6",
    # Apache-2.0 licence, Google: extra variety for the autoencoder only
    "noto": "@iconify-json/noto@1.2.9",
}
HELD_OUT_SHARE = 0.10
SPLIT_SEED = 20

# {a}: "a small fox", {x}: "small fox", {b}: background name; the second and third lists leave something out.
TEMPLATES_FULL = (
    "{a} on a {b} background",
    "{x}, {b} background",
    "{x} on {b}",
    "a picture of {a} on a {b} background",
    "{b} background, {x}",
    "{a} with a {b} background",
    "{a} in front of a {b} background",
    "an icon of {a} on {b}",
    "{a} on a plain {b} background",
    "a photo of {a}, {b} background",
    "{a} against a {b} backdrop",
    "{x} {b} background",
    "draw {a} on a {b} background",
)
TEMPLATES_NO_BACKGROUND = ("{a}", "{x}", "a picture of {a}", "an icon of {a}", "a photo of {a}", "draw {a}")
# Background alone, so that a negative prompt such as "blue background" means something.
TEMPLATES_NO_THING = ("{b} background", "a {b} background", "a plain {b} background", "{b}", "on a {b} background")
# Words that people add and that change nothing here.
FILLERS = (
    "flat colours", "flat colors", "simple shapes", "clean outlines", "high quality", "centered", "centred", "minimal",
    "bright colors", "no text", "sharp", "detailed", "best quality", "vector art", "emoji", "flat style", "cute",
    "illustration", "masterpiece", "8k", "isolated", "simple", "cartoon", "beautiful", "colorful", "highly detailed",
)  # fmt: skip


@dataclass(frozen=True)
class Combination:
    """One picture's content: a thing (icon name), a background and a size."""

    thing: str
    background: str
    size: str


def all_combinations() -> list[Combination]:
    """Every thing on every background at every size, in a fixed order."""
    return [Combination(t, b, s) for t in THINGS for b in BACKGROUNDS for s in SIZES]


def split() -> tuple[list[Combination], list[Combination]]:
    """Return (training, held out): a fixed tenth of the whole combinations never enters any training."""
    combinations = all_combinations()
    random.Random(SPLIT_SEED).shuffle(combinations)
    count = round(HELD_OUT_SHARE * len(combinations))
    return combinations[count:], combinations[:count]


# ---- icons -----------------------------------------------------------------------------------------------------------


def fetch_icons(work: Path, which: str) -> dict[str, str]:
    """Return icon name -> SVG text of one npm package, fetched by `npm pack` into `work` on the first call."""
    target = work / "icons" / f"{which}.json"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        packed = subprocess.run(
            ["npm", "pack", "--silent", ICON_PACKAGES[which]],
            cwd=target.parent,
            check=True,
            capture_output=True,
            text=True,
        ).stdout.split()[-1]
        with tarfile.open(target.parent / packed) as archive:
            member = archive.extractfile("package/icons.json")
            assert member is not None
            target.write_bytes(member.read())
    data = json.loads(target.read_text())
    width, height = data.get("width", 32), data.get("height", 32)
    head = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return {
        name: f'{head} viewBox="0 0 {icon.get("width", width)} {icon.get("height", height)}">{icon["body"]}</svg>'
        for name, icon in data["icons"].items()
    }


def render_icon(svg: str, side: int) -> Image.Image:
    """Render an SVG to an RGBA image of side x side pixels."""
    import resvg_py

    png = resvg_py.svg_to_bytes(svg_string=svg, width=side, height=side, skip_system_fonts=True)
    image = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    return image if image.size == (side, side) else image.resize((side, side), Image.Resampling.LANCZOS)


class Painter:
    """Renders combinations; keeps each icon in every size."""

    def __init__(self, work: Path) -> None:
        svgs = fetch_icons(work, "fluent")
        self.icons = {(t, s): render_icon(svgs[t], side) for t in THINGS for s, side in SIZES.items()}

    def paint(self, c: Combination) -> Image.Image:
        """Return the RGB picture of a combination, PICTURE_SIDE pixels a side."""
        picture = Image.new("RGB", (PICTURE_SIDE, PICTURE_SIDE), BACKGROUNDS[c.background])
        icon = self.icons[c.thing, c.size]
        offset = (PICTURE_SIDE - icon.width) // 2
        picture.paste(icon, (offset, offset), icon)
        return picture

    def paint_all(self, combinations: list[Combination]) -> np.ndarray:
        """Return uint8 pictures of shape [N, PICTURE_SIDE, PICTURE_SIDE, 3]."""
        return np.stack([np.asarray(self.paint(c)) for c in combinations])


def autoencoder_icons(work: Path, side: int = 96) -> np.ndarray:
    """Return uint8 RGBA icons [N, side, side, 4] of both packages (without skin-tone variants), for the autoencoder."""
    cache = work / f"autoencoder_icons_{side}.npy"
    if not cache.exists():
        skin_tone = re.compile(r"(^|-)(light|medium|dark)(-|$)")
        # Fluent's flat set without a skin tone is complete; of Noto every third icon is enough variety.
        svgs = [svg for name, svg in sorted(fetch_icons(work, "fluent").items()) if not skin_tone.search(name)]
        svgs += [svg for name, svg in sorted(fetch_icons(work, "noto").items()) if not skin_tone.search(name)][::3]
        np.save(cache, np.stack([np.asarray(render_icon(svg, side)) for svg in svgs]))
    return np.load(cache)


# ---- words -----------------------------------------------------------------------------------------------------------


def article(words: str, noun: str) -> str:
    """Put "a" or "an" before `words` unless the noun takes none: "a small fox", "an owl", "small grapes"."""
    if noun in NO_ARTICLE:
        return words
    return f"{'an' if words[0] in 'aeiou' and not words.startswith('uni') else 'a'} {words}"


def caption(c: Combination, template: str, size: bool = True, name: int = 0, rng: random.Random | None = None) -> str:
    """Fill a template with a combination; `rng` picks synonyms, otherwise the usual names are taken."""
    noun = rng.choice(THINGS[c.thing]) if rng else THINGS[c.thing][name]
    background = rng.choice(BACKGROUND_NAMES[c.background]) if rng else BACKGROUND_NAMES[c.background][0]
    adjective = rng.choice(SIZE_NAMES[c.size]) if rng else SIZE_NAMES[c.size][0]
    words = f"{adjective} {noun}" if size else noun
    return template.format(a=article(words, noun), x=words, b=background)


@dataclass(frozen=True)
class Caption:
    """A caption and what it says: None where it leaves the thing, the background or the size out."""

    text: str
    thing: str | None
    background: str | None
    size: str | None


def random_caption(c: Combination, rng: random.Random, empty: float = 0.10, long: float = 0.12) -> Caption:
    """Draw a caption of a combination.

    Shares: 10 % empty (for guidance), size left out of 30 %, background out of 10 %, thing out of 4 % (so that a
    negative prompt such as "blue background" means something); `long` is the share filled up with idle words, whose
    33 to 64 tokens shift the picture's positions as a long prompt does.
    """
    if rng.random() < empty:
        return Caption("", None, None, None)
    if rng.random() < 0.04:
        text = rng.choice(TEMPLATES_NO_THING).format(b=rng.choice(BACKGROUND_NAMES[c.background]))
        said = (None, c.background, None)
    else:
        size, background = rng.random() >= 0.30, rng.random() >= 0.10
        text = caption(c, rng.choice(TEMPLATES_FULL if background else TEMPLATES_NO_BACKGROUND), size, rng=rng)
        said = (c.thing, c.background if background else None, c.size if size else None)
        if rng.random() < long:
            text = ", ".join([text, *rng.sample(FILLERS, rng.randint(8, 14))])
        elif rng.random() < 0.15:
            text = ", ".join([text, *rng.sample(FILLERS, rng.randint(1, 3))])
    draw = rng.random()
    text = text.capitalize() if draw < 0.15 else text
    text += "." if 0.15 < draw < 0.25 else ""
    return Caption(text, *said)
