"""Measures the miniature's ControlNet through the app's own pipeline, on scenes held out of all training.

Edge F1 with a tolerance of two pixels says whether the picture has the lines of the control image; retrieval says
whether it still shows what the prompt names. Drawings that no icon has tell whether it follows hand-made ones.
"""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

import mini.config
from core.request import CONTROLNET_STEPS
from diffusion.memory import GIB, memory_plan
from diffusion.pipeline import Pipeline
from hub import inventory
from images import preprocess

from .captions import describe
from .evaluate import Judge
from .lora import finished, start
from .scenes import PICTURE_SIDE, Painter, contact_sheet, test_scenes
from .things import THINGS

TOLERANCE = 2  # pixels
# Things that can have any outline, drawn in shapes that theirs is not: 40 drawings.
DRAWN_THINGS = (
    *("tangerine", "red-apple", "lemon", "watermelon", "tomato", "cookie", "pizza", "doughnut", "balloon"),
    *("soccer-ball", "lady-beetle", "red-heart", "sun", "snowflake", "jack-o-lantern", "strawberry"),
)
SHAPES = ("square", "triangle", "diamond", "ellipse", "star", "hexagon", "drop", "arch")
DRAWINGS = 40


class Controlled:
    """The app's pipeline with the miniature's ControlNet."""

    def __init__(self, device: str = "cpu") -> None:
        self.pipeline = Pipeline(device, torch.float32, memory_plan("cpu", GIB, None, GIB, "controlnet", "mini"))
        for _ in self.pipeline.load(inventory.choose("mini", "controlnet", "turbo"), "turbo"):
            pass

    def paint(self, prompt: str, seed: int, control: Image.Image, scale: float) -> np.ndarray:
        """Return one picture, uint8 [128, 128, 3]."""
        drawing = start(self.pipeline, prompt, seed, CONTROLNET_STEPS, control=(control, scale))
        return np.asarray(finished(drawing))


def edges(picture: np.ndarray) -> np.ndarray:
    """Return where the Canny edges of a picture, uint8 [H, W, 3], are: bool [H, W]."""
    return np.asarray(preprocess.canny(Image.fromarray(picture), 100, 200))[..., 0] > 0


def f1(wanted: np.ndarray, found: np.ndarray, tolerance: int = TOLERANCE) -> float:
    """Return the harmonic mean of precision and recall of edges, bool [H, W], each within `tolerance` of the other."""
    import cv2

    if not (wanted.any() and found.any()):
        return float(wanted.any() == found.any())
    away = [cv2.distanceTransform((~lines).astype(np.uint8), cv2.DIST_L2, 5) for lines in (wanted, found)]
    precision = float((away[0][found] <= tolerance).mean())
    recall = float((away[1][wanted] <= tolerance).mean())
    return 2 * precision * recall / max(precision + recall, 1e-9)


def drawing(shape: str, rng: random.Random, side: int = PICTURE_SIDE) -> Image.Image:
    """Draw the outline of a shape as a hand does, unevenly, in white on black."""
    centre, size = (side / 2 + rng.uniform(-10, 10), side / 2 + rng.uniform(-10, 10)), side * rng.uniform(0.26, 0.38)
    turn, bend, phase = rng.uniform(-0.2, 0.2), rng.uniform(0.01, 0.03), rng.uniform(0, 2 * math.pi)
    points = []
    for step in range(180):
        angle = 2 * math.pi * step / 180
        radius = size * _radius(shape, angle) * (1 + bend * math.sin(5 * angle + phase))
        points.append((centre[0] + radius * math.cos(angle + turn), centre[1] + 0.95 * radius * math.sin(angle + turn)))
    image = Image.new("RGB", (4 * side, 4 * side))
    ImageDraw.Draw(image).line([(4 * x, 4 * y) for x, y in (*points, points[0])], (255, 255, 255), 7, "curve")
    return image.resize((side, side), Image.Resampling.BOX).point(lambda value: 255 if value > 90 else 0)


def _radius(shape: str, angle: float) -> float:
    """Return the radius of a shape of about unit size at an angle (0 is right, clockwise)."""

    def polygon(corners: int, first: float) -> float:
        within = (angle - first) % (2 * math.pi / corners) - math.pi / corners
        return math.cos(math.pi / corners) / math.cos(within) * 1.15

    match shape:
        case "square":
            return polygon(4, math.pi / 4)
        case "triangle":
            return polygon(3, -math.pi / 2)
        case "diamond":
            return polygon(4, 0.0)
        case "hexagon":
            return polygon(6, 0.0)
        case "ellipse":
            return 1 / math.hypot(math.cos(angle) / 1.25, math.sin(angle) / 0.65)
        case "star":
            return 0.8 + 0.25 * math.cos(5 * (angle + math.pi / 2))
        case "drop":
            return 0.75 + 0.5 * max(0.0, math.cos(angle + math.pi / 2)) ** 3
        case "arch":
            return polygon(4, math.pi / 4) if math.sin(angle) > 0 else 1.0
    raise ValueError(shape)


def drawings() -> list[tuple[str, Image.Image]]:
    """Return (thing, outline) of every drawing, always the same."""
    rng = random.Random(31)
    pairs = [(thing, shape) for thing in DRAWN_THINGS for shape in SHAPES]
    return [(thing, drawing(shape, rng)) for thing, shape in rng.sample(pairs, DRAWINGS)]


def evaluate(work: Path, count: int = 60) -> dict[str, dict[str, float]]:
    """Measure, write contact sheets (control image, without, with) into `work`, return the figures.

    `canny`, `scribble` and `gray` give for held-out single things the edge F1 at scale 1 and 0, and the share of
    pictures at scale 1 that show the right thing at the given size and place; `drawn` gives F1 on drawings.
    """
    paint, painter = Controlled().paint, Painter(work)
    judge = Judge(painter)
    figures: dict[str, dict[str, float]] = {}
    for kind in mini.config.CONTROLS:
        rows: list[np.ndarray] = []
        scores: dict[str, list[float]] = {"f1": [], "f1_free": [], "thing": []}
        for number, scene in enumerate(test_scenes("single", count if kind == "canny" else count // 2)):
            original = painter.paint(scene)
            control = preprocess.make(original, kind)
            assert control is not None
            says = frozenset(("background",))
            prompt = describe(scene, random.Random(number), says, ("{a} on a {b} background",)).text
            led, free = (paint(prompt, 3000 + number, control, scale) for scale in (1.0, 0.0))
            wanted = edges(np.asarray(original))
            scores["f1"].append(f1(wanted, edges(led)))
            scores["f1_free"].append(f1(wanted, edges(free)))
            scores["thing"].append(float(judge.verdict(led, scene)["thing"]))
            rows += [np.asarray(control), free, led]
        figures[kind] = {name: round(float(np.mean(values)), 3) for name, values in scores.items()}
        figures[kind]["pictures"] = len(scores["f1"])
        contact_sheet(rows[:90], work / f"contact_control_{kind}.png", columns=9)
    rows, led_scores, free_scores = [], [], []
    for number, (thing, outline) in enumerate(drawings()):
        prompt = f"a {THINGS[thing][0]}"
        led, free = (paint(prompt, 4000 + number, outline, scale) for scale in (1.0, 0.0))
        wanted = np.asarray(outline)[..., 0] > 0
        led_scores.append(f1(wanted, edges(led)))
        free_scores.append(f1(wanted, edges(free)))
        rows += [np.asarray(outline), free, led]
    figures["drawn"] = {
        "f1": round(float(np.mean(led_scores)), 3),
        "f1_free": round(float(np.mean(free_scores)), 3),
        "pictures": len(led_scores),
    }
    contact_sheet(rows, work / "contact_control_drawn.png", columns=12)
    (work / "control_figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    return figures
