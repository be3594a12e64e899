"""Measures the exported miniature through DiffSynth's real pipeline, on scenes and wordings held out of all training.

Every picture is judged by rendered scenes: the nearest of those that differ in one thing says what the picture shows.
Writes the figures, and contact sheets beside the training's other files.
"""

from __future__ import annotations

import json
import logging
import random
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import mini.config
from mini.prompt import complete

from . import chinese
from .captions import EVERYTHING, TEST_TEMPLATES, describe
from .scenes import LAYOUTS, PICTURE_SIDE, Painter, Scene, contact_sheet, kind_of, test_scenes
from .things import BACKGROUNDS, COLOURABLE, COLOURS, COUNTS, THINGS

logger = logging.getLogger(__name__)

MODES = {"turbo": {"steps": 8, "cfg": 1.0}, "base": {"steps": 25, "cfg": 4.0}}
KINDS = ("single", "coloured", "pair", "count")
# wording -> templates for scenes with and without a place, and whether they are Chinese
WORDINGS = {
    "usual": (("{a} {p} on a {b} background",), ("{a} on a {b} background",), False),
    "held out": (TEST_TEMPLATES, TEST_TEMPLATES, False),
    "Chinese": (chinese.TESTS_PLACE, chinese.TESTS_FULL, True),
}
# What held-out scenes must reach in usual words, on Turbo and on Base.
THRESHOLDS = {
    "single": {"thing": 0.95, "background": 0.98, "size": 0.90, "place": 0.90, "mirrored": 0.90},
    "coloured": {"colour": 0.90},
}
WORDING_LOSS = 0.05  # by how much held-out wordings may be worse
RETRIEVAL_SIDE = 32  # pixels: outlines and colours, not single pixels
SYMMETRIC = 8.0  # of 255: below this mean difference from its mirror image an icon looks the same both ways round


class Pipelines:
    """DiffSynth's pipeline on the exported files, with one transformer or the other."""

    def __init__(self, folder: Path = mini.config.FOLDER, device: str = "cpu") -> None:
        from diffsynth.models.model_loader import ModelPool
        from diffsynth.pipelines.z_image import ZImagePipeline
        from transformers import AutoTokenizer

        from diffusion.pipeline import follow_weight_dtype

        mini.config.register()
        turbo, base = folder / mini.config.TURBO_FOLDER.name, folder / mini.config.BASE_FOLDER.name
        stages = ("onload", "preparing", "computation")
        config: dict[str, torch.dtype | str | None] = {"offload_dtype": None, "offload_device": None}
        config |= {f"{s}_dtype": torch.float32 for s in stages}
        config |= {f"{s}_device": device for s in stages}
        pool = ModelPool()
        for path in (
            turbo / mini.config.TRANSFORMER_FILE,
            turbo / mini.config.TEXT_ENCODER_FILE,
            turbo / mini.config.VAE_FILE,
        ):
            pool.auto_load_model(str(path), config)
        second = ModelPool()
        second.auto_load_model(str(base / mini.config.TRANSFORMER_FILE), config)
        self.transformers = {"turbo": pool.fetch_model("z_image_dit"), "base": second.fetch_model("z_image_dit")}
        for transformer in self.transformers.values():
            follow_weight_dtype(transformer.t_embedder)
        self.pipe = ZImagePipeline(device=device, torch_dtype=torch.float32)
        self.pipe.text_encoder = pool.fetch_model("z_image_text_encoder")
        self.pipe.vae_encoder = pool.fetch_model("flux_vae_encoder")
        self.pipe.vae_decoder = pool.fetch_model("flux_vae_decoder")
        self.pipe.tokenizer = AutoTokenizer.from_pretrained(str(turbo / mini.config.TOKENIZER_FOLDER))

    def paint(self, mode: str, prompt: str, seed: int, negative: str = "", **changes: float) -> np.ndarray:
        """Return one picture, uint8 [128, 128, 3]; `changes` may override `steps` and `cfg`."""
        settings = MODES[mode] | changes
        self.pipe.dit = self.transformers[mode]
        picture = self.pipe(
            prompt=prompt,
            negative_prompt=negative,
            cfg_scale=settings["cfg"],
            num_inference_steps=settings["steps"],
            seed=seed,
            rand_device="cpu",
            height=mini.config.NATIVE_SIZE,
            width=mini.config.NATIVE_SIZE,
            progress_bar_cmd=lambda steps: steps,
        )
        return np.asarray(picture)


# ---- measures --------------------------------------------------------------------------------------------------------


def shrink(picture: np.ndarray) -> np.ndarray:
    """Return a uint8 picture [128, 128, 3] as float32 [32 * 32 * 3], box-filtered."""
    k = PICTURE_SIDE // RETRIEVAL_SIDE
    blocks = picture.astype(np.float32).reshape(RETRIEVAL_SIDE, k, RETRIEVAL_SIDE, k, 3)
    small: np.ndarray = blocks.mean((1, 3)).ravel()
    return small


class Judge:
    """Says what a picture shows, by comparing it with rendered scenes."""

    def __init__(self, painter: Painter) -> None:
        self.painter = painter

    def distances(self, picture: np.ndarray, scenes: list[Scene]) -> np.ndarray:
        """Return the RMS distance, of 255, to each scene, the nearer of both ways round: float [N]."""
        small = shrink(picture)
        nearest = (
            min(float(np.sqrt(np.square(small - way).mean())) for way in self._both_ways(scene)) for scene in scenes
        )
        return np.array(list(nearest))

    def _both_ways(self, scene: Scene) -> list[np.ndarray]:
        """Return a scene the usual way round and mirrored, shrunk."""
        return [shrink(np.asarray(self.painter.paint(replace(scene, mirrored=way)))) for way in (False, True)]

    def nearest(self, picture: np.ndarray, scenes: list[Scene]) -> Scene:
        """Return the scene that a picture resembles most."""
        return scenes[int(self.distances(picture, scenes).argmin())]

    def background(self, picture: np.ndarray, scene: Scene) -> str:
        """Return the name of the background colour nearest to the picture's, where the scene has no icon."""
        painted = [np.asarray(self.painter.paint(replace(scene, background=name))) for name in ("white", "black")]
        bare = np.all([painted[i] == BACKGROUNDS[name] for i, name in enumerate(("white", "black"))], axis=(0, 3))
        colour = np.median(picture[bare], axis=0)
        return min(BACKGROUNDS, key=lambda name: float(np.square(colour - BACKGROUNDS[name]).sum()))

    def mirrored(self, picture: np.ndarray, scene: Scene) -> bool | None:
        """Say whether a picture shows a scene's thing mirrored; None where that thing is symmetric."""
        sides = [self.painter.icon(scene.thing, 64, mirrored=way) for way in (False, True)]
        if np.abs(np.subtract(*(np.asarray(side, dtype=np.float32) for side in sides))).mean() < SYMMETRIC:
            return None
        usual, turned = (np.square(shrink(picture) - way).sum() for way in self._both_ways(scene))
        return bool(turned < usual)

    def verdict(self, picture: np.ndarray, scene: Scene) -> dict[str, bool]:
        """Return what is right about a picture of a scene; the keys depend on the kind of scene.

        A thing may have any colour where the scene names none: then the seed decides it.
        """
        kind = kind_of(scene)
        things = [replace(scene, thing=t) for t in THINGS if not scene.colour or t in COLOURABLE]
        if kind == "single":
            things += [
                replace(scene, thing=thing, colour=colour)
                for thing, but in COLOURABLE.items()
                for colour in COLOURS
                if colour not in but
            ]
        right = {
            "thing": self.nearest(picture, things).thing == scene.thing,
            "background": self.background(picture, scene) == scene.background,
        }
        if kind in ("single", "coloured"):
            layout = self.nearest(picture, [replace(scene, size=size, place=place) for size, place in LAYOUTS])
            right |= {"size": layout.size == scene.size, "place": layout.place == scene.place}
            if (mirrored := self.mirrored(picture, scene)) is not None:
                right["mirrored"] = mirrored == scene.mirrored
        if kind == "coloured":
            colours = [replace(scene, colour=colour) for colour in COLOURS if colour not in COLOURABLE[scene.thing]]
            right["colour"] = self.nearest(picture, colours) == scene
        if kind == "pair":
            right["second"] = self.nearest(picture, [replace(scene, second=t) for t in THINGS]) == scene
            stands = [scene, replace(scene, thing=scene.second or "", second=scene.thing)]
            stands += [replace(s, arrangement={"beside": "above", "above": "beside"}[s.arrangement]) for s in stands]
            right["arrangement"] = self.nearest(picture, stands) == scene
        if kind == "count":
            numbers = [replace(scene, arrangement=number) for number in COUNTS]
            numbers += [replace(scene, arrangement="one", size=size) for size in ("small", "medium", "large")]
            right["count"] = self.nearest(picture, numbers) == scene
        return right


def prompt_of(scene: Scene, wording: str, number: int) -> str:
    """Describe a scene in full, in one of the `WORDINGS`."""
    with_place, without, in_chinese = WORDINGS[wording]
    templates = with_place if scene.arrangement == "one" else without
    return describe(scene, random.Random(number), EVERYTHING, templates, in_chinese).text


def measure(
    pipelines: Pipelines, judge: Judge, mode: str, kind: str, wording: str, count: int
) -> tuple[dict[str, float], list[np.ndarray]]:
    """Return the shares of what is right over the first held-out scenes of a kind, and the pictures."""
    wins: dict[str, list[bool]] = {}
    pictures, start = [], time.time()
    for number, scene in enumerate(test_scenes(kind, count)):
        prompt = prompt_of(scene, wording, number)
        picture = pipelines.paint(mode, prompt, 1000 + number)
        verdict = judge.verdict(picture, scene)
        if kind == "pair" and not says_how_it_stands(scene, wording, number):
            del verdict["arrangement"]
            if not (verdict["thing"] and verdict["second"]):  # it may stand the other way
                other = {"beside": "above", "above": "beside"}[scene.arrangement]
                turned = judge.verdict(picture, replace(scene, arrangement=other))
                verdict = {key: verdict[key] or turned[key] for key in verdict}
        for key, value in verdict.items():
            wins.setdefault(key, []).append(value)
        if not all(verdict.values()):
            logger.info("%s %r wrong in %s", mode, prompt, [key for key, value in verdict.items() if not value])
        pictures.append(picture)
    figures = {key: round(float(np.mean(values)), 4) for key, values in wins.items()}
    return figures | {"pictures": len(pictures), "seconds_each": round((time.time() - start) / count, 2)}, pictures


def says_how_it_stands(scene: Scene, wording: str, number: int) -> bool:
    """Say whether the prompt of a pair says which thing stands where."""
    _, without, in_chinese = WORDINGS[wording]
    return describe(scene, random.Random(number), EVERYTHING, without, in_chinese).said.arrangement is not None


def measure_diversity(
    pipelines: Pipelines, judge: Judge, mode: str, things: int = 12, seeds: int = 12
) -> dict[str, float]:
    """Return what the seed decides where the prompt says no more than "a fox", in words or by its noise.

    Each picture counts as the nearest of all scenes of that thing. `backgrounds` and `layouts` are the mean
    numbers of different ones among the pictures of one prompt; `mirrored` the share turned round, of things that are
    not symmetric; `thing` the share whose prompted thing is the nearest of all things at that layout.
    """
    rng = random.Random(9)
    found: dict[str, list[int]] = {"backgrounds": [], "layouts": [], "mirrored": [], "thing": []}
    for thing in rng.sample([t for t in THINGS if t not in COLOURABLE], things):
        seen = []
        for seed in range(seeds):
            prompt = describe(Scene(thing, "white"), rng, frozenset(), ("{a}",)).text
            picture = pipelines.paint(mode, complete(prompt, seed).text, seed)
            backgrounds = [Scene(thing, name, size, place) for name in BACKGROUNDS for size, place in LAYOUTS]
            nearest = judge.nearest(picture, backgrounds)
            seen.append(nearest)
            found["thing"].append(judge.nearest(picture, [replace(nearest, thing=t) for t in THINGS]).thing == thing)
            if (mirrored := judge.mirrored(picture, nearest)) is not None:
                found["mirrored"].append(mirrored)
        found["backgrounds"].append(len({scene.background for scene in seen}))
        found["layouts"].append(len({(scene.size, scene.place) for scene in seen}))
    return {key: round(float(np.mean(values)), 3) for key, values in found.items()} | {
        "things": things,
        "seeds": seeds,
    }


def measure_steering(pipelines: Pipelines, judge: Judge, count: int) -> dict[str, Any]:
    """Return how Base responds to guidance and to the negative prompt, and how far Turbo differs from it.

    `negative_moves`: prompts that leave the background open are painted, then again with the same seed and the colour
    that came out as negative prompt; the share of pictures whose background then is another one. `error`: the mean
    difference, of 255, from the rendered picture.
    """
    moved = 0
    errors: dict[str, list[float]] = {"turbo": [], "base, CFG 1": [], "base, CFG 4": []}
    for number, scene in enumerate(test_scenes("single", count)):
        open_prompt = describe(scene, random.Random(number), frozenset(("size", "place")), ("{a} {p}",)).text
        plain = judge.background(pipelines.paint("base", open_prompt, 2000 + number), scene)
        steered = pipelines.paint("base", open_prompt, 2000 + number, negative=f"{plain} background")
        moved += judge.background(steered, scene) != plain
        prompt = prompt_of(scene, "usual", number)
        for key, mode, cfg in (
            ("turbo", "turbo", MODES["turbo"]["cfg"]),
            ("base, CFG 1", "base", 1.0),
            ("base, CFG 4", "base", MODES["base"]["cfg"]),
        ):
            picture = pipelines.paint(mode, prompt, 1000 + number, cfg=cfg).astype(np.float32)
            ways = [np.asarray(judge.painter.paint(replace(scene, mirrored=way)), np.float32) for way in (False, True)]
            errors[key].append(min(float(np.abs(picture - way).mean()) for way in ways))
    means = {key: round(float(np.mean(values)), 2) for key, values in errors.items()}
    return {"negative_moves": round(moved / count, 3), "error": means, "pictures": count}


def evaluate(work: Path, turbo_count: int = 100, base_count: int = 40, steering_count: int = 24) -> dict[str, Any]:
    """Measure everything, write sheets and, in other files, their prompts into `work`, return the figures.

    Args:
        work: the training's folder.
        turbo_count: pictures of Turbo for every kind of scene in usual words; half as many in other wordings.
        base_count: the same of Base, in usual words only.
        steering_count: prompts for guidance and negative prompt.
    """
    pipelines, judge = Pipelines(), Judge(Painter(work))
    figures: dict[str, Any] = {"turbo": {}, "base": {}}
    for mode, wordings, count in (("turbo", WORDINGS, turbo_count), ("base", ("usual",), base_count)):
        sheet, prompts = [], []
        for kind in KINDS:
            for wording in wordings:
                number = count if wording == "usual" else count // 2
                found, pictures = measure(pipelines, judge, mode, kind, wording, number)
                figures[mode].setdefault(kind, {})[wording] = found
                logger.info("%s, %s, %s: %s", mode, kind, wording, found)
                if wording == "usual":
                    shown = {"single": 20, "coloured": 10, "pair": 10, "count": 10}[kind]
                    sheet += pictures[:shown]
                    prompts += [prompt_of(s, wording, i) for i, s in enumerate(test_scenes(kind, shown))]
        contact_sheet(sheet, work / f"contact_{mode}.png")
        lines = [f"{number}. {prompt}" for number, prompt in enumerate(prompts, 1)]
        (work / f"contact_{mode}_prompts.txt").write_text("\n".join(lines) + "\n")
    figures["diversity"] = measure_diversity(pipelines, judge, "turbo")
    figures["steering"] = measure_steering(pipelines, judge, steering_count)
    logger.info("diversity %s, steering %s", figures["diversity"], figures["steering"])
    (work / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    return figures
