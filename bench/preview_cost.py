"""What the picture that emerges costs, and where the miniature's factors come from.

    .venv/bin/python bench/preview_cost.py [--runs 5] [--fit]

Why: a preview after every step must cost under 3 % of the request. It is measured as a share of the seconds between
asking and having the picture, and on its own at full size on a tensor like the real model's. `--fit` finds the factors
of the miniature's autoencoder: least squares over drawn pictures and the latents that they came from, each picture
averaged over 8 x 8 pixels. Prints all figures as JSON on the last line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from core.events import Preview
from core.request import TextToImage
from core.sizes import WeightsKind
from diffusion import preview
from diffusion.pipeline import Picture, Pipeline
from hub import inventory
from tests.helpers.plans import everything_stays

THINGS = ("apple", "fox", "house", "umbrella", "car", "tree", "turtle", "lion")
GROUNDS = ("blue", "green", "purple", "black", "white", "yellow", "red", "orange")


def built() -> Pipeline:
    """Return the miniature's pipeline."""
    pipeline = Pipeline("cpu", torch.float32, everything_stays())
    for _ in pipeline.load(inventory.choose("mini", TextToImage.mode, "turbo"), "turbo"):
        pass
    return pipeline


def drawn(pipeline: Pipeline, prompt: str, seed: int) -> Picture:
    """Draw an image to its end."""
    drawing = pipeline.text_to_image(
        prompt=prompt, negative_prompt="", steps=8, cfg=1.0, width=128, height=128, seed=seed
    )
    while True:
        try:
            next(drawing)
        except StopIteration as done:
            picture: Picture = done.value
            return picture


def fit(pipeline: Pipeline) -> preview.Factors:
    """Return the miniature's factors, and print how well they fit."""
    rows, colours = [], []
    for number, (thing, ground) in enumerate((thing, ground) for thing in THINGS for ground in GROUNDS):
        picture = drawn(pipeline, f"a {thing} on a {ground} background", number + 1)
        pixels = torch.from_numpy(np.array(picture.image)).float() / 127.5 - 1
        small = torch.nn.functional.avg_pool2d(pixels.permute(2, 0, 1)[None], 8)[0]
        colours.append(small.flatten(1).T)
        rows.append(picture.latents[0].float().flatten(1).T)
    inputs, wanted = torch.cat(rows), torch.cat(colours)
    inputs = torch.cat([inputs, torch.ones(len(inputs), 1)], 1)
    found = torch.linalg.lstsq(inputs, wanted).solution
    left = (inputs @ found - wanted).square().mean() / wanted.var(0).mean()
    print(f"explains {1 - left:.1%} of the colours' variance")
    *channels, bias = [tuple(round(value, 4) for value in row) for row in found.tolist()]
    return preview.Factors(tuple(channels), bias)


def cost(pipeline: Pipeline, runs: int) -> dict[str, float]:
    """Return the seconds of a request and of its previews, and their share."""
    project = preview.project
    spent: list[float] = []

    def timed(latents: torch.Tensor, kind: WeightsKind) -> Preview:
        started = time.perf_counter()
        made = project(latents, kind)
        spent.append(time.perf_counter() - started)
        return made

    preview.project = timed
    whole, parts = [], []
    for run in range(runs + 1):  # the first warms up
        spent.clear()
        started = time.perf_counter()
        drawn(pipeline, "a fox on a black background", run + 1)
        whole.append(time.perf_counter() - started)
        parts.append(sum(spent))
    preview.project = project
    large = torch.randn(1, 16, 128, 128)
    singles = []
    for _ in range(runs + 1):
        started = time.perf_counter()
        project(large, "full")
        singles.append(time.perf_counter() - started)
    request, previews = statistics.median(whole[1:]), statistics.median(parts[1:])
    return {
        "request_s": round(request, 4),
        "previews_s": round(previews, 4),
        "share": round(previews / request, 4),
        "one_at_1024_s": round(statistics.median(singles[1:]), 4),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--fit", action="store_true")
    options = parser.parse_args()
    engine = built()
    if options.fit:
        print(fit(engine))
    print(json.dumps(cost(engine, options.runs)))
