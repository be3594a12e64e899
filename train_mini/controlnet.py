"""Trains the miniature's ControlNet on Turbo, measures it and writes it: `python -m train_mini.controlnet`.

A control image decides where things are and how they are shaped, the caption what they are; what neither says
(background, colour) the noise decides, as in the training of Base (see `pools`). Control images are painted and
encoded as they are drawn: edges, gray and scribbles by the app's own preprocessors, some of them altered, so that
hand-made drawings are followed too.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

import mini.config
from core.whole_file import replacing
from hub.checkpoint import fingerprint
from images import preprocess

from . import autoencoder
from .captions import Said
from .control_forward import build, forward
from .export import write_weights
from .loop import WORK, Training, plateau, trained
from .muon import muon_and_adamw
from .pools import CANDIDATES, Pictures, couple
from .scenes import PICTURE_SIDE, Painter, Scene, training_scenes
from .text_encoder import matrix_dtype
from .things import BACKGROUNDS
from .transformer import build as build_transformer
from .transformer import rope_tables

logger = logging.getLogger(__name__)

KINDS = {"canny": 0.6, "scribble": 0.2, "gray": 0.2}  # shares; the names are `mini.config.CONTROLS`
OPEN = 0.8  # the share of captions that leave size and place to the control image
WARPED = 0.3  # the share of pictures stretched, sheared and moved off the grid: shapes that no icon has
OUTLINE, THICK, GAPS = 0.3, 0.25, 0.15  # shares of edge images: outer outlines only, thicker lines, gaps in lines


@dataclass(frozen=True)
class Schedule:
    """How long and how fast; the shares are of all steps."""

    steps: int = 2800
    batch: int = 16
    muon: float = 0.01
    adamw: float = 1e-3
    falling_share: float = 0.40
    average_share: float = 0.10
    seed: int = 12


Structure = tuple[str, str | None, str, str, str, bool]


# ---- data ------------------------------------------------------------------------------------------------------------


class Controlled:
    """Draws batches of captions, noises, pictures and the control images that belong to them."""

    def __init__(self, work: Path, device: torch.device, seed: int) -> None:
        self.pictures, self.scenes = Pictures(work, device, seed), training_scenes()
        self.painter, self.vae, self.device = Painter(work), autoencoder.load(work, device), device
        self.rng = np.random.default_rng(seed)
        self.pools = self.pictures.pools
        rows: dict[Structure, list[int]] = {}
        for row, scene in enumerate(self.scenes):
            rows.setdefault(_structure(scene), []).append(row)
        self.alike = {key: np.array(found) for key, found in rows.items()}
        self.open = {
            length: np.flatnonzero([said.size is None and said.place is None for said in pool.said])
            for length, pool in self.pools.items()
        }
        with torch.no_grad():
            self.blank = self.vae.encoder(torch.zeros(1, 3, PICTURE_SIDE, PICTURE_SIDE, device=device))

    def draw(self, count: int, length: int) -> tuple[torch.Tensor, ...]:
        """Return words, lengths, latents, noise (as `Pictures.draw`) and control [count, 33, h, w], all float32."""
        pool, pictures = self.pools[length], self.pictures
        chosen = pool.pick(count, pictures.generator).numpy()
        left = self.rng.random(count) < OPEN
        chosen[left] = self.rng.choice(self.open[length], int(left.sum()))
        noise = torch.randn((count, *pictures.latents.shape[1:]), generator=pictures.generator)
        candidates = np.stack([self._fitting(pool.said[number]) for number in chosen])
        latents = pictures.latents[torch.from_numpy(candidates)].float()
        best = couple(latents.flatten(2), noise.flatten(1)).numpy()
        latents = latents[torch.arange(count), torch.from_numpy(best)]
        controls, warped = [], {}
        for i, row in enumerate(candidates[np.arange(count), best]):
            scene = self.scenes[row]
            picture = np.asarray(self.painter.paint(scene))
            if self.rng.random() < WARPED:
                picture = warp(picture, BACKGROUNDS[scene.background], self.rng)
                warped[i] = picture
            controls.append(control_image(picture, BACKGROUNDS[scene.background], self.rng))
        if warped:
            latents[list(warped)] = self._encode(list(warped.values())).cpu()
        control = with_mask(self._encode(controls), self.blank)
        words = torch.as_tensor(pool.words[chosen]).float()
        tensors = (words, pool.lengths[chosen], latents, noise)
        return (*(x.to(self.device) for x in tensors), control)

    def _fitting(self, said: Said) -> np.ndarray:
        """Return rows of scenes that fit a caption, all of one random structure: int64 [CANDIDATES]."""
        meanings = self.pictures.meanings
        fitting = meanings.rows(replace(said, mirrored=None))  # the control image says which way round
        alike = self.alike[_structure(self.scenes[self.rng.choice(fitting)])]
        for field in ("background", "colour"):
            if (value := getattr(said, field)) is not None:
                number = list(meanings.values).index(field)
                alike = alike[meanings.columns[number, alike] == meanings.values[field][value]]
        return self.rng.choice(alike, CANDIDATES)

    @torch.no_grad()
    def _encode(self, pictures: list[np.ndarray]) -> torch.Tensor:
        latents: torch.Tensor = self.vae.encoder(autoencoder.to_tensor(np.stack(pictures), self.device)).float()
        return latents


def _structure(scene: Scene) -> Structure:
    """Return what a control image says of a scene."""
    return scene.thing, scene.second, scene.arrangement, scene.size, scene.place, scene.mirrored


def with_mask(control: torch.Tensor, blank: torch.Tensor) -> torch.Tensor:
    """Join control latents [B, 16, h, w] with an empty mask and the latents of a mid-gray picture: [B, 33, h, w]."""
    mask = torch.zeros_like(control[:, :1])
    return torch.cat([control, mask, blank.expand_as(control)], 1)


def warp(picture: np.ndarray, ground: tuple[int, int, int], rng: np.random.Generator) -> np.ndarray:
    """Stretch, shear and move a picture a little on its background; uint8 [H, W, 3]."""
    import cv2

    middle = np.full(2, PICTURE_SIDE / 2)
    matrix = np.diag(rng.uniform(0.75, 1.25, 2)) + np.array([[0, rng.uniform(-0.2, 0.2)], [0, 0]])
    move = middle - matrix @ middle + rng.uniform(-8, 8, 2)
    size = (PICTURE_SIDE, PICTURE_SIDE)
    return cv2.warpAffine(
        picture,
        np.column_stack([matrix, move]),
        size,
        flags=cv2.INTER_AREA,
        borderMode=cv2.BORDER_CONSTANT,
        borderValue=tuple(map(int, ground)),
    )


def control_image(picture: np.ndarray, ground: tuple[int, int, int], rng: np.random.Generator) -> np.ndarray:
    """Return a random control image of a picture; both uint8 [H, W, 3]."""
    import cv2

    kind = rng.choice(list(KINDS), p=list(KINDS.values()))
    image = Image.fromarray(picture)
    if kind != "canny":
        made = preprocess.make(image, kind)
        assert made is not None
        return np.asarray(made)
    if rng.random() < OUTLINE:
        away = np.abs(picture.astype(int) - np.array(ground)).max(-1) > 24
        image = Image.fromarray((away * np.uint8(255))[..., None].repeat(3, -1))
    low = rng.uniform(60, 140)
    lines = np.array(preprocess.canny(image, int(low), int(2 * low)))
    if rng.random() < THICK:
        lines = cv2.dilate(lines, cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3)))
    if rng.random() < GAPS:
        for y, x in rng.integers(0, PICTURE_SIDE - 12, (4, 2)):
            lines[y : y + 12, x : x + 12] = 0
    return lines


# ---- training --------------------------------------------------------------------------------------------------------


def draw_sigma(count: int, generator: torch.Generator) -> torch.Tensor:
    """Return stratified noise levels [count], sigmoid(1.1 N + 1.3): structure is decided at high ones."""
    u = ((torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)) / count).clamp(
        1e-4, 1 - 1e-4
    )
    return torch.sigmoid(1.1 * math.sqrt(2) * torch.erfinv(2 * u - 1) + 1.3)


def train(work: Path, device: torch.device, turbo: Path, s: Schedule | None = None) -> None:
    """Train from an exported Turbo's file and save `work/controlnet.pt`; a finished file is kept."""
    s = s or Schedule()
    target = work / "controlnet.pt"
    if target.exists():
        return
    dtype = matrix_dtype(device)
    model = build_transformer()
    model.load_state_dict({name: tensor.float() for name, tensor in load_file(turbo).items()})
    net = build(model).to(device)
    model = model.to(device).eval().requires_grad_(False)
    data, generator = Controlled(work, device, s.seed), torch.Generator().manual_seed(s.seed)
    tables = rope_tables(model, device)

    def loss(step: int) -> torch.Tensor:
        words, lengths, x0, noise, control = data.draw(s.batch, 64 if step % 8 == 7 else 32)
        sigma = draw_sigma(s.batch, generator).to(device)
        level = sigma.view(-1, 1, 1, 1)

        def error(scale: float) -> torch.Tensor:
            x, rope = (1 - level) * x0 + level * noise, tables[words.shape[1]]
            predicted = forward(model, net, x, sigma, words, lengths, rope, control, scale, dtype)
            return (predicted - (noise - x0)).square().mean()

        led = error(1.0)
        if step % 50 == 0:  # the number to watch: how much of the error the control image takes away
            with torch.no_grad():
                free = error(0.0)
            logger.info("controlnet error %.4f with the control images, %.4f without", led.item(), free.item())
        return led

    def falling(step: int) -> float:
        return plateau(step, s.steps, s.falling_share)

    optimizers = muon_and_adamw(net, lambda name: "adaLN" not in name, s.muon, s.adamw, falling, dtype)
    training = Training(
        target, net, optimizers, s.steps, loss, random_sources=[data.pictures.generator, data.rng, generator],
        average=lambda step: 0.01 if step >= (1 - s.average_share) * s.steps else 1.0,
    )  # fmt: skip
    with trained(training), replacing(target) as file:
        torch.save(net.state_dict(), file)


def export(work: Path, turbo: Path, folder: Path = mini.config.CONTROLNET_FOLDER) -> Path:
    """Write the ControlNet in bfloat16; its file names the transformer that it was trained on."""
    state = torch.load(work / "controlnet.pt", map_location="cpu", weights_only=True)
    path = folder / mini.config.CONTROLNET_FILE
    trained_on = f"{mini.config.TURBO_FOLDER.name}/{mini.config.TRANSFORMER_FILE}"
    write_weights(path, state, trained_on=trained_on, trained_on_fingerprint=fingerprint([turbo]))
    return path


def main() -> None:
    """Train what is not trained yet, write it and measure it."""
    parser = argparse.ArgumentParser(prog="python -m train_mini.controlnet", description=__doc__)
    parser.add_argument("--work", type=Path, default=WORK, help="the training's folder (default: %(default)s)")
    parser.add_argument("--turbo", type=Path, default=mini.config.TURBO_FOLDER / mini.config.TRANSFORMER_FILE,
                        help="the exported transformer to train on (default: %(default)s)")  # fmt: skip
    parser.add_argument(
        "--folder", type=Path, default=mini.config.CONTROLNET_FOLDER, help="where to write (%(default)s)"
    )
    parser.add_argument("--steps", type=int, default=Schedule.steps)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--pictures", type=int, default=60, help="held-out scenes to measure with; 0: do not measure")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    train(arguments.work, torch.device(arguments.device), arguments.turbo, Schedule(steps=arguments.steps))
    logger.info("wrote %s", export(arguments.work, arguments.turbo, arguments.folder))
    if arguments.pictures:
        from .evaluate_control import evaluate

        logger.info("%s", json.dumps(evaluate(arguments.work, arguments.pictures)))


if __name__ == "__main__":
    main()
