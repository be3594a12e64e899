"""How far apart seeds are with Variety, and whether what was asked for is still there.

    pip install -r train_mini/requirements.txt
    .venv/bin/python bench/variety.py [--work FOLDER] [--scenes 24] [--seeds 4]

Held-out scenes of the miniature, described in full, so that nothing but the noise is left to the seed. `distance` is
the mean difference, of 255, between two seeds' pictures of a prompt; `thing` is the share of pictures that the
training's own judge recognises. Prints a table, and the figures as JSON on the last line.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from core import environment

environment.prepare_environment(os.environ)

import numpy as np
from PIL import Image

from core.request import TextToImage
from engine import Engine, Settings
from train_mini.evaluate import Judge, prompt_of
from train_mini.scenes import Painter, test_scenes

VARIETIES = (0.0, 0.25, 0.5, 1.0)


def drawn(engine: Engine, request: TextToImage) -> np.ndarray:
    """Return a picture, uint8 [height, width, 3]."""
    return np.asarray(Image.open(io.BytesIO(engine.draw(request).png)).convert("RGB"))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("work"), help="where the training keeps its icons")
    parser.add_argument("--scenes", type=int, default=24)
    parser.add_argument("--seeds", type=int, default=4, help="pictures of each scene")
    args = parser.parse_args()
    engine, judge = Engine(Settings(weights="mini", device="cpu")), Judge(Painter(args.work))
    found = []
    for variety in VARIETIES:
        distances, right = [], []
        for number, scene in enumerate(test_scenes("single", args.scenes)):
            prompt = prompt_of(scene, "usual", number)
            pictures = [
                drawn(engine, TextToImage.parse(prompt=prompt, seed=seed, variety=variety))
                for seed in range(1, args.seeds + 1)
            ]
            pairs = itertools.combinations([picture.astype(float) for picture in pictures], 2)
            distances += [np.abs(first - second).mean() for first, second in pairs]
            right += [judge.verdict(picture, scene)["thing"] for picture in pictures]
        row = {"variety": variety, "distance": float(np.mean(distances)), "thing": float(np.mean(right))}
        print("variety {variety:4}  distance {distance:5.2f}  thing {thing:.3f}".format(**row), flush=True)
        found.append(row)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
