"""What holds of each thing, measured: how well the weights draw it in each size, and the colours that it has itself.

`python -m train_mini.traits` draws every thing in every size and writes the file that the app reads
(`mini.config.traits`); it takes some minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
from pathlib import Path
from typing import Any

import numpy as np

import mini.config
from core.whole_file import write_whole

from .captions import EVERYTHING, TEMPLATES_FULL, describe
from .evaluate import Pipelines
from .loop import WORK
from .scenes import Painter, Scene
from .things import COLOURABLE, COLOURS, SIZES, THINGS

OWN_SHARE = 0.15  # of an icon's area: what is named after a colour has at least so much of it
BACKGROUNDS_DRAWN = ("blue", "yellow")  # a dark and a light one
WAYS_DRAWN = (False, True)

logger = logging.getLogger(__name__)


def own_colours(painter: Painter, thing: str) -> list[str]:
    """Return the names of the colours that an icon has, those with the most of it first."""
    pixels = np.asarray(painter.icon(thing, 64)).astype(np.float32)
    opaque = pixels[pixels[..., 3] > 127][:, :3]
    names, values = list(COLOURS), np.array(list(COLOURS.values()), dtype=np.float32)
    nearest = np.square(opaque[:, None] - values).sum(-1).argmin(-1)
    shares = np.bincount(nearest, minlength=len(names)) / len(nearest)
    return [names[index] for index in np.argsort(-shares) if shares[index] >= OWN_SHARE]


def errors(pipelines: Pipelines, painter: Painter, thing: str) -> dict[str, float]:
    """Return by size the mean difference, of 255, of Turbo's pictures of a thing from the rendered ones."""
    found = {}
    for size in SIZES:
        apart = []
        for number, background in enumerate(BACKGROUNDS_DRAWN):
            scene = Scene(thing, background, size, "centre", mirrored=WAYS_DRAWN[number])
            prompt = describe(scene, random.Random(number), EVERYTHING, TEMPLATES_FULL[:1], False).text
            drawn = pipelines.paint("turbo", prompt, number + 1).astype(np.float32)
            apart.append(np.abs(drawn - np.asarray(painter.paint(scene), dtype=np.float32)).mean())
        found[size] = round(float(np.mean(apart)), 1)
    return found


def measure(pipelines: Pipelines, painter: Painter) -> dict[str, dict[str, Any]]:
    """Return what the file holds: by a thing's usual name its errors, its own colours, and whether it takes others."""
    traits = {}
    for thing, names in THINGS.items():
        traits[names[0]] = {
            "errors": errors(pipelines, painter, thing),
            "own_colours": own_colours(painter, thing),
            "colourable": thing in COLOURABLE,
        }
        logger.info("%s %s", names[0], traits[names[0]])
    return traits


def main() -> None:
    """Measure everything and write the file."""
    parser = argparse.ArgumentParser(prog="python -m train_mini.traits", description=__doc__)
    parser.add_argument("--work", type=Path, default=WORK, help="the training's folder (default: %(default)s)")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    traits = measure(Pipelines(), Painter(parser.parse_args().work))
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(trait)}" for name, trait in traits.items())
    write_whole(mini.config.FOLDER / mini.config.TRAITS_FILE, f"{{\n{lines}\n}}\n".encode())


if __name__ == "__main__":
    main()
