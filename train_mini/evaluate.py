"""Measures the exported miniature through DiffSynth's real pipeline, on combinations held out of all training.

Writes the figures into the model card and contact sheets beside the training's other files.
"""

from __future__ import annotations

import json
import logging
import random
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import mini

from .data import PICTURE_SIDE, Combination, Painter, caption, split
from .things import BACKGROUNDS, SIZES, THINGS

logger = logging.getLogger(__name__)

MODES = {"turbo": {"steps": 8, "cfg": 1.0}, "base": {"steps": 25, "cfg": 4.0}}
TEMPLATE = "{a} on a {b} background"
THRESHOLDS = {"retrieval": 0.95, "background": 0.98, "size": 0.90}
RETRIEVAL_SIDE = 32  # pixels: outlines and colours, not single pixels
FRAME = 8  # pixels of the border that no icon reaches


class Pipelines:
    """DiffSynth's pipeline on the exported files, with one transformer or the other."""

    def __init__(self, folder: Path = mini.FOLDER, device: str = "cpu") -> None:
        from diffsynth.models.model_loader import ModelPool
        from diffsynth.pipelines.z_image import ZImagePipeline
        from transformers import AutoTokenizer

        from pipeline import follow_weight_dtype

        mini.register()
        turbo, base = folder / mini.TURBO_FOLDER.name, folder / mini.BASE_FOLDER.name
        stages = ("onload", "preparing", "computation")
        config = {"offload_dtype": None, "offload_device": None}
        config |= {f"{s}_dtype": torch.float32 for s in stages} | {f"{s}_device": device for s in stages}
        pool = ModelPool()
        for path in (turbo / mini.TRANSFORMER_FILE, turbo / mini.TEXT_ENCODER_FILE, turbo / mini.VAE_FILE):
            pool.auto_load_model(str(path), config)
        second = ModelPool()
        second.auto_load_model(str(base / mini.TRANSFORMER_FILE), config)
        self.transformers = {"turbo": pool.fetch_model("z_image_dit"), "base": second.fetch_model("z_image_dit")}
        for transformer in self.transformers.values():
            follow_weight_dtype(transformer.t_embedder)
        self.pipe = ZImagePipeline(device=device, torch_dtype=torch.float32)
        self.pipe.text_encoder = pool.fetch_model("z_image_text_encoder")
        self.pipe.vae_encoder = pool.fetch_model("flux_vae_encoder")
        self.pipe.vae_decoder = pool.fetch_model("flux_vae_decoder")
        self.pipe.tokenizer = AutoTokenizer.from_pretrained(str(turbo / mini.TOKENIZER_FOLDER))

    def paint(self, mode: str, prompt: str, seed: int, negative: str = "", **changes) -> np.ndarray:
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
            height=mini.NATIVE_SIZE,
            width=mini.NATIVE_SIZE,
            progress_bar_cmd=lambda steps: steps,
        )
        return np.asarray(picture)


# ---- measures --------------------------------------------------------------------------------------------------------


def shrink(picture: np.ndarray) -> np.ndarray:
    """uint8 [128, 128, 3] -> float32 [32 * 32 * 3], box-filtered."""
    k = PICTURE_SIDE // RETRIEVAL_SIDE
    return picture.astype(np.float32).reshape(RETRIEVAL_SIDE, k, RETRIEVAL_SIDE, k, 3).mean((1, 3)).ravel()


def frame_colour(picture: np.ndarray) -> np.ndarray:
    """Median colour of the border, float [3]."""
    inside = np.zeros(picture.shape[:2], bool)
    inside[FRAME:-FRAME, FRAME:-FRAME] = True
    return np.median(picture[~inside], axis=0)


def background_of(picture: np.ndarray) -> str:
    """Name of the background colour nearest to the border's."""
    colour = frame_colour(picture)
    return min(BACKGROUNDS, key=lambda name: float(np.square(colour - BACKGROUNDS[name]).sum()))


def extent(picture: np.ndarray) -> float:
    """Longer side in pixels of the box around everything that differs clearly from the border's colour."""
    foreground = np.abs(picture.astype(np.float32) - frame_colour(picture)).max(-1) > 40
    rows, columns = np.flatnonzero(foreground.any(1)), np.flatnonzero(foreground.any(0))
    if not len(rows):
        return 0.0
    return float(max(rows[-1] - rows[0], columns[-1] - columns[0]) + 1)


class Truth:
    """The rendered pictures to compare with; each background and size is rendered once."""

    def __init__(self, work: Path) -> None:
        self.painter = Painter(work)
        self.galleries: dict[tuple[str, str], np.ndarray] = {}

    def distances(self, picture: np.ndarray, c: Combination) -> np.ndarray:
        """Return the RMS distance, of 255, to every thing on the prompted background at that size: float [N]."""
        key = c.background, c.size
        if key not in self.galleries:
            pictures = [np.asarray(self.painter.paint(Combination(t, *key))) for t in THINGS]
            self.galleries[key] = np.stack([shrink(p) for p in pictures])
        return np.sqrt(np.square(self.galleries[key] - shrink(picture)).mean(1))

    def margin(self, picture: np.ndarray, c: Combination) -> float:
        """Return by how much the prompted thing is nearer than the nearest other one, in RMS of 255."""
        distances, thing = self.distances(picture, c), list(THINGS).index(c.thing)
        return float(np.delete(distances, thing).min() - distances[thing])

    def judge(self, picture: np.ndarray, c: Combination) -> dict[str, bool]:
        """Return whether thing, background and size of a picture are those of the prompt."""
        nearest = self.distances(picture, c).argmin()
        sides = {s: extent(np.asarray(self.painter.paint(Combination(c.thing, c.background, s)))) for s in SIZES}
        side = extent(picture)
        return {
            "retrieval": list(THINGS)[nearest] == c.thing,
            "background": background_of(picture) == c.background,
            "size": min(sides, key=lambda s: abs(sides[s] - side)) == c.size,
        }


def measure(pipelines: Pipelines, truth: Truth, mode: str, count: int) -> tuple[dict, list[np.ndarray]]:
    """Return the shares of right things, backgrounds and sizes over the first held-out combinations, and pictures."""
    wins: dict[str, list[bool]] = {key: [] for key in THRESHOLDS}
    pictures, start = [], time.time()
    for seed, c in enumerate(split()[1][:count], 1000):
        prompt = caption(c, TEMPLATE)
        picture = pipelines.paint(mode, prompt, seed)
        verdict = truth.judge(picture, c)
        for key, value in verdict.items():
            wins[key].append(value)
        if not all(verdict.values()):
            logger.info("%s seed %d %r wrong in %s", mode, seed, prompt, [k for k, v in verdict.items() if not v])
        pictures.append(picture)
    figures = {key: round(float(np.mean(values)), 4) for key, values in wins.items()}
    return figures | {"pictures": count, "seconds_each": round((time.time() - start) / count, 2)}, pictures


def measure_steering(pipelines: Pipelines, truth: Truth, count: int) -> dict:
    """Return how Base answers to guidance and to the negative prompt, and how far Turbo differs from it.

    `negative_moves`: prompts that leave the background open are painted, then again with the same seed and the colour
    that came out as negative prompt; the share of pictures whose background then is another one.
    """
    things, rng = list(THINGS), random.Random(7)
    moved = kept = 0
    difference, guided, margins = [], {1.0: [], 4.0: []}, {1.0: [], 4.0: []}
    for i in range(count):
        thing = rng.choice(things)
        prompt = caption(Combination(thing, "white", "large"), "{a}")
        plain = pipelines.paint("base", prompt, 2000 + i)
        colour = background_of(plain)
        steered = pipelines.paint("base", prompt, 2000 + i, negative=f"{colour} background")
        moved += background_of(steered) != colour
        repeated = pipelines.paint("base", prompt, 2000 + i, negative="")
        kept += bool((repeated == plain).all())
    for seed, c in enumerate(split()[1][:count], 1000):
        prompt = caption(c, TEMPLATE)
        base = {cfg: pipelines.paint("base", prompt, seed, cfg=cfg) for cfg in guided}
        for cfg, picture in base.items():
            rendered = np.asarray(truth.painter.paint(c), dtype=np.float32)
            guided[cfg].append(float(np.abs(picture.astype(np.float32) - rendered).mean()))
            margins[cfg].append(truth.margin(picture, c))
        turbo = pipelines.paint("turbo", prompt, seed).astype(np.float32)
        difference.append(float(np.abs(turbo - base[4.0]).mean()))
    return {
        "negative_moves": round(moved / count, 3),
        "same_without_negative": round(kept / count, 3),
        "error_cfg_1": round(float(np.mean(guided[1.0])), 2),
        "error_cfg_4": round(float(np.mean(guided[4.0])), 2),
        "margin_cfg_1": round(float(np.mean(margins[1.0])), 2),
        "margin_cfg_4": round(float(np.mean(margins[4.0])), 2),
        "turbo_base_difference": round(float(np.mean(difference)), 2),
        "pictures": count,
    }


def contact_sheet(pictures: list[np.ndarray], target: Path, columns: int = 10, scale: int = 1) -> None:
    """Write pictures as one PNG, row by row, without their prompts."""
    rows = -(-len(pictures) // columns)
    sheet = np.full((rows * PICTURE_SIDE, columns * PICTURE_SIDE, 3), 255, np.uint8)
    for i, picture in enumerate(pictures):
        y, x = divmod(i, columns)
        sheet[y * PICTURE_SIDE :, x * PICTURE_SIDE :][:PICTURE_SIDE, :PICTURE_SIDE] = picture
    Image.fromarray(sheet).resize((sheet.shape[1] * scale, sheet.shape[0] * scale), Image.Resampling.NEAREST).save(
        target
    )


def evaluate(work: Path, turbo_count: int = 300, base_count: int = 150, steering_count: int = 24) -> dict:
    """Measure everything, write sheets with their prompts apart into `work`, return the figures."""
    pipelines, truth = Pipelines(), Truth(work)
    figures: dict = {}
    for mode, count in (("turbo", turbo_count), ("base", base_count)):
        figures[mode], pictures = measure(pipelines, truth, mode, count)
        contact_sheet(pictures[:50], work / f"contact_{mode}.png")
        prompts = [f"{i + 1}. {caption(c, TEMPLATE)}" for i, c in enumerate(split()[1][:50])]
        (work / f"contact_{mode}_prompts.txt").write_text("\n".join(prompts) + "\n")
        logger.info("%s %s", mode, figures[mode])
    figures["steering"] = measure_steering(pipelines, truth, steering_count)
    logger.info("steering %s", figures["steering"])
    (work / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    return figures
