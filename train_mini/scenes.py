"""Scenes: what a picture shows, which scenes are held out of training, and how they are painted.

A picture is one flat background colour with one icon, or a few, on it; the corners of icons lie on the 16-px grid of
the transformer's patches.
"""

from __future__ import annotations

import io
import json
import random
import re
import subprocess
import tarfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from core.whole_file import replacing, write_whole

from .things import ARRANGEMENTS, BACKGROUNDS, CLASHES, COLOURABLE, COLOURS, COUNTS, PLACES, SIZES, THINGS

PICTURE_SIDE = 128  # pixels; 8 x 8 patches of 16 px
ICON_PACKAGES = {
    # MIT licence, Microsoft: everything that the miniature draws
    "fluent": "@iconify-json/fluent-emoji-flat@1.2.6",
    # Apache-2.0 licence, Google: extra variety for the autoencoder only
    "noto": "@iconify-json/noto@1.2.9",
}
MIN_SATURATION, HUE_WIDTH = 0.30, 0.09  # what counts as a colour, and as the same one (of a full turn)
HELD_OUT_OF = 10  # one in so many combinations is kept out of all training
COLOURED_EACH, PAIRS = 60, 32_000  # how many pictures of a thing in one colour, and of pairs, are painted
WAYS = (False, True)  # which ways round single things are shown; several always the usual one


@dataclass(frozen=True)
class Scene:
    """What one picture shows.

    Args:
        thing: an icon's name.
        background: a key of `BACKGROUNDS`.
        size: a key of `SIZES`; several icons are small.
        place: a key of `PLACES`; several icons are in the centre.
        colour: a key of `COLOURS`, or None for the icon's own colours.
        second: the other thing of a pair.
        arrangement: "one", or a key of `ARRANGEMENTS`.
        mirrored: whether the icon is flipped left to right; of single things.
    """

    thing: str
    background: str
    size: str = "small"
    place: str = "centre"
    colour: str | None = None
    second: str | None = None
    arrangement: str = "one"
    mirrored: bool = False


# Only small things have room to be anywhere.
LAYOUTS = [(size, place) for size in SIZES for place in PLACES if size == "small" or place == "centre"]


def corners(arrangement: str, size: str, place: str) -> list[tuple[int, int]]:
    """Return where the icons of a layout have their top left corners, (x, y) in pixels."""
    if arrangement != "one":
        return list(ARRANGEMENTS[arrangement])
    room = (PICTURE_SIDE - SIZES[size]) // 2
    x, y = PLACES[place]
    return [(room * x, room * y)]


def kind_of(scene: Scene) -> str:
    """Return "single", "coloured", "pair" or "count"."""
    if scene.second:
        return "pair"
    if scene.arrangement != "one":
        return "count"
    return "coloured" if scene.colour else "single"


def held_out(scene: Scene) -> bool:
    """Say whether a scene belongs to the combinations kept out of all training.

    Held out are: of single things, combinations of thing, background, size and place; of coloured things, thing and
    colour; of pairs, the two things in either order; of counts, thing and number.
    """
    key = {
        "single": (scene.thing, scene.background, scene.size, scene.place),
        "coloured": (scene.thing, scene.colour),
        "pair": tuple(sorted((scene.thing, scene.second or ""))),
        "count": (scene.thing, scene.arrangement),
    }[kind_of(scene)]
    return zlib.crc32(repr(key).encode()) % HELD_OUT_OF == 0


def singles() -> list[Scene]:
    """Every thing in its own colours, on every background, at every size and place, both ways round."""
    return [
        Scene(thing, background, size, place, mirrored=mirrored)
        for thing in THINGS
        for size, place in LAYOUTS
        for background in BACKGROUNDS
        for mirrored in WAYS
    ]


def coloured(each: int, seed: int = 21) -> list[Scene]:
    """`each` random scenes of every colourable thing in every colour."""
    rng, scenes = random.Random(seed), []
    for thing, but in COLOURABLE.items():
        for colour in COLOURS:
            if colour in but:
                continue
            backgrounds = [name for name in BACKGROUNDS if (colour, name) not in CLASHES]
            for _ in range(each):
                size, place = rng.choice(LAYOUTS)
                scenes.append(Scene(thing, rng.choice(backgrounds), size, place, colour, mirrored=rng.choice(WAYS)))
    return scenes


def pairs(count: int, seed: int = 22) -> list[Scene]:
    """Random scenes of two different things."""
    rng, things, scenes = random.Random(seed), list(THINGS), []
    for _ in range(count):
        first, second = rng.sample(things, 2)
        arrangement = rng.choice(("beside", "above"))
        scenes.append(Scene(first, rng.choice(list(BACKGROUNDS)), second=second, arrangement=arrangement))
    return scenes


def counts() -> list[Scene]:
    """Two, three and four of every thing on every background."""
    return [
        Scene(thing, background, arrangement=number)
        for thing in THINGS
        for number in COUNTS
        for background in BACKGROUNDS
    ]


def training_scenes() -> list[Scene]:
    """All scenes that training sees, in a fixed order, each once."""
    scenes = [*singles(), *coloured(COLOURED_EACH), *pairs(PAIRS), *counts()]
    return list(dict.fromkeys(scene for scene in scenes if not held_out(scene)))


def test_scenes(kind: str, count: int, seed: int = 24) -> list[Scene]:
    """Return the first `count` held-out scenes of a kind, "single", "coloured", "pair" or "count", in a fixed order.

    Of pairs there are some 400 at most.
    """
    every: dict[str, Iterable[Scene]] = {
        "single": singles(),
        "coloured": coloured(6, seed),
        "pair": pairs(4000, seed),
        "count": counts(),
    }
    found = [scene for scene in dict.fromkeys(every[kind]) if held_out(scene)]
    random.Random(seed).shuffle(found)
    return found[:count]


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
            write_whole(target, member.read())
    data = json.loads(target.read_text())
    width, height = data.get("width", 32), data.get("height", 32)
    head = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return {
        name: f'{head} viewBox="0 0 {icon.get("width", width)} {icon.get("height", height)}">{icon["body"]}</svg>'
        for name, icon in data["icons"].items()
    }


def render_icon(svg: str, side: int) -> Image.Image:
    """Render an SVG to an RGBA image of side x side pixels."""
    import resvg_py  # type: ignore[import-not-found]  # a package of the training alone

    png = resvg_py.svg_to_bytes(svg_string=svg, width=side, height=side, skip_system_fonts=True)
    image = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    return image if image.size == (side, side) else image.resize((side, side), Image.Resampling.LANCZOS)


def leading_hue(icon: Image.Image) -> tuple[np.ndarray, float]:
    """Return the mask [H, W] of the pixels of an icon's commonest hue, and their share of the icon's area."""
    hue, saturation, _ = (
        np.asarray(band, dtype=np.float32) / 255 for band in icon.convert("RGB").convert("HSV").split()
    )
    alpha = np.asarray(icon.getchannel("A"), dtype=np.float32) / 255
    clear = alpha * (saturation > MIN_SATURATION)
    histogram, _ = np.histogram(hue, bins=36, range=(0, 1), weights=clear)
    smooth = histogram + np.roll(histogram, 1) + np.roll(histogram, -1)
    away = np.abs((hue - (smooth.argmax() + 0.5) / 36 + 0.5) % 1 - 0.5)
    mask = (away < HUE_WIDTH) & (clear > 0)
    return mask, float((alpha * mask).sum() / alpha.sum())


def tint(icon: Image.Image, colour: str) -> Image.Image:
    """Give the commonest hue of an icon another colour and leave its other hues alone; RGBA in, RGBA out."""
    mask, _ = leading_hue(icon)
    pixels = np.asarray(icon).astype(np.float32) / 255
    lightness = (pixels[..., :3].max(-1) + pixels[..., :3].min(-1)) / 2
    middle = float(np.median(lightness[mask]))
    ratio = (lightness / middle)[..., None]
    target = np.array(COLOURS[colour], dtype=np.float32) / 255
    darker = target * (0.35 + 0.65 * ratio)
    lighter = target + (1 - target) * 0.8 * ((ratio - 1) * middle / max(1 - middle, 0.05)).clip(0, 1)
    pixels[..., :3] = np.where(mask[..., None], np.where(ratio <= 1, darker, lighter), pixels[..., :3])
    return Image.fromarray((pixels.clip(0, 1) * 255).round().astype(np.uint8), "RGBA")


class Painter:
    """Paints scenes; keeps each icon in every size and colour that was asked for."""

    def __init__(self, work: Path) -> None:
        self.svgs = fetch_icons(work, "fluent")
        self.kept: dict[tuple[str, int, str | None, bool], Image.Image] = {}

    def plain(self, thing: str, side: int) -> Image.Image:
        """Return an icon in its own colours as an RGBA image of `side` pixels."""
        return render_icon(self.svgs[thing], side)

    def icon(self, thing: str, side: int, colour: str | None = None, mirrored: bool = False) -> Image.Image:
        """Return an icon as an RGBA image of `side` pixels."""
        key = thing, side, colour, mirrored
        if key not in self.kept:
            if mirrored:
                made = self.icon(thing, side, colour).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            elif colour:
                made = tint(self.icon(thing, side), colour)
            else:
                made = self.plain(thing, side)
            self.kept[key] = made
        return self.kept[key]

    def paint(self, scene: Scene) -> Image.Image:
        """Return the RGB picture of a scene, PICTURE_SIDE pixels a side."""
        picture = Image.new("RGB", (PICTURE_SIDE, PICTURE_SIDE), BACKGROUNDS[scene.background])
        side = SIZES[scene.size]
        for i, corner in enumerate(corners(scene.arrangement, scene.size, scene.place)):
            thing = scene.second if scene.second and i else scene.thing
            icon = self.icon(thing, side, scene.colour, scene.mirrored)
            picture.paste(icon, corner, icon)
        return picture

    def paint_all(self, scenes: Iterable[Scene]) -> np.ndarray:
        """Return uint8 pictures of shape [N, PICTURE_SIDE, PICTURE_SIDE, 3]."""
        return np.stack([np.asarray(self.paint(scene)) for scene in scenes])


class AtlasPainter(Painter):
    """Paints from small icons in one file instead of the icon package; good enough for comparing pictures."""

    SIDE, COLUMNS = 32, 16  # of an icon in the atlas, in pixels; icons in a row

    def __init__(self, atlas: Path) -> None:
        self.atlas = Image.open(atlas).convert("RGBA")
        self.kept = {}

    def plain(self, thing: str, side: int) -> Image.Image:
        """Return an icon in its own colours as an RGBA image of `side` pixels."""
        y, x = divmod(list(THINGS).index(thing), self.COLUMNS)
        box = (x * self.SIDE, y * self.SIDE, (x + 1) * self.SIDE, (y + 1) * self.SIDE)
        return self.atlas.crop(box).resize((side, side), Image.Resampling.BILINEAR)


def contact_sheet(pictures: list[np.ndarray], target: Path, columns: int = 10) -> None:
    """Write pictures as one PNG, row by row, without their prompts."""
    rows = -(-len(pictures) // columns)
    sheet = np.full((rows * PICTURE_SIDE, columns * PICTURE_SIDE, 3), 255, np.uint8)
    for i, picture in enumerate(pictures):
        y, x = divmod(i, columns)
        sheet[y * PICTURE_SIDE :, x * PICTURE_SIDE :][:PICTURE_SIDE, :PICTURE_SIDE] = picture
    Image.fromarray(sheet).save(target)


def autoencoder_icons(work: Path, side: int = 96) -> np.ndarray:
    """Return uint8 RGBA icons [N, side, side, 4] of both packages (without skin-tone variants), for the autoencoder."""
    cache = work / f"autoencoder_icons_{side}.npy"
    if not cache.exists():
        skin_tone = re.compile(r"(^|-)(light|medium|dark)(-|$)")
        # Fluent's flat set without a skin tone is complete; of Noto every third icon is enough variety.
        svgs = [svg for name, svg in sorted(fetch_icons(work, "fluent").items()) if not skin_tone.search(name)]
        svgs += [svg for name, svg in sorted(fetch_icons(work, "noto").items()) if not skin_tone.search(name)][::3]
        rendered = np.stack([np.asarray(render_icon(svg, side)) for svg in svgs])
        with replacing(cache) as file:
            np.save(file, rendered)
    icons: np.ndarray = np.load(cache)
    return icons
