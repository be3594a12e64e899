"""Trains Base: flow matching on embedded captions and encoded pictures, resumable at any time."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from core.whole_file import replacing

from .loop import Training, plateau, trained
from .muon import muon_and_adamw
from .pools import Pictures
from .probe import Probe, write_sheet
from .text_encoder import matrix_dtype
from .transformer import Predict, build, predictor

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Schedule:
    """How long and how fast; the shares are of all steps."""

    steps: int = 7000
    batch: int = 24
    muon: float = 0.03
    adamw: float = 3e-3
    high_noise_share: float = 0.30  # first mostly sigma 0.88..1: plain text-to-picture regression
    falling_share: float = 0.40  # the rates fall to 5 % over the last part
    average_share: float = 0.10  # an exponential average over the very last part
    seed: int = 5


def draw_sigma(count: int, high: int, generator: torch.Generator) -> torch.Tensor:
    """Return stratified noise levels [count]: `high` of them uniform 0.88..1, the rest sigmoid(1.1 N + 0.4)."""
    u = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    highest = 0.88 + 0.12 * u[:high] * count / high
    # sampling starts at sigma 1, where the sigmoid alone would hardly ever train
    u = u[torch.randperm(count, generator=generator)][high:].clamp(1e-4, 1 - 1e-4)
    return torch.cat([highest, torch.sigmoid(1.1 * math.sqrt(2) * torch.erfinv(2 * u - 1) + 0.4)])


def is_matrix(name: str) -> bool:
    """Say whether Muon trains the matrix of this name."""
    blocks = ("layers.", "noise_refiner.", "context_refiner.")
    ends = ("all_x_embedder.2-1.weight", "cap_embedder.1.weight", "all_final_layer.2-1.linear.weight")
    return name.startswith(blocks) or name in ends


def train_base(work: Path, device: torch.device, s: Schedule | None = None) -> None:
    """Train Base, from `work/start.pt` where that exists, and save `work/base.pt`; a finished file is kept."""
    s = s or Schedule()
    target, start_file = work / "base.pt", work / "start.pt"
    if target.exists():
        return
    dtype = matrix_dtype(device)
    model, probe = build().to(device), Probe.make(work, device)
    pictures = Pictures(work, device, s.seed)
    if start_file.exists():
        model.load_state_dict(torch.load(start_file, map_location=device, weights_only=True))
    predict = predictor(model, device, dtype)

    def loss(step: int) -> torch.Tensor:
        # every eighth batch has long captions, which shift the picture's positions
        words, lengths, x0, noise = pictures.draw(s.batch, 64 if step % 8 == 7 else 32)
        high = s.batch * 3 // 4 if step < s.high_noise_share * s.steps else s.batch // 8
        sigma = draw_sigma(s.batch, high, pictures.generator).to(device)
        level = sigma.view(-1, 1, 1, 1)
        return (predict((1 - level) * x0 + level * noise, sigma, words, lengths) - (noise - x0)).square().mean()

    def falling(step: int) -> float:
        return plateau(step, s.steps, s.falling_share)

    training = Training(
        target, model, muon_and_adamw(model, is_matrix, s.muon, s.adamw, falling, dtype), s.steps, loss,
        random_sources=[pictures.generator],
        average=lambda step: 0.005 if step >= (1 - s.average_share) * s.steps else 1.0,
        report=lambda done: report(work, predict, probe, device, done, s.steps), report_every=250,
    )  # fmt: skip
    with trained(training), replacing(target) as file:
        torch.save(model.state_dict(), file)


def report(work: Path, predict: Predict, probe: Probe, device: torch.device, step: int, steps: int) -> None:
    """Log the numbers that tell whether it learns, and write a sheet of samples."""
    right, wrong = probe.gap(predict)
    samples = probe.sample(predict)
    line = {"step": step, "of": steps, "x0_right": round(right, 3), "x0_wrong": round(wrong, 3)}
    line |= probe.judge(samples)
    write_sheet(work, samples, work / f"sheet_{step:05d}.png", device)
    logger.info("base probe %s", json.dumps(line))
    with open(work / "history.jsonl", "a") as log:
        log.write(json.dumps(line) + "\n")
