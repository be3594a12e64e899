"""Trains Base: flow matching on embedded captions and encoded pictures, resumable at any time."""

from __future__ import annotations

import json
import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from core.whole_file import replacing

from .muon import Muon
from .pools import Pictures
from .probe import Predict, Probe, write_sheet
from .text_encoder import matrix_dtype
from .transformer import build, forward, rope_table

logger = logging.getLogger(__name__)


class Falling(Protocol):
    """A schedule whose rates fall over its last part."""

    @property
    def steps(self) -> int: ...

    @property
    def falling_share(self) -> float: ...


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


def rate(step: int, s: Falling) -> float:
    """Return the factor on both learning rates: a short rise, a plateau, a fall to 5 %."""
    rest = (s.steps - step) / (s.falling_share * s.steps)
    return min(1.0, (step + 1) / 50) * min(1.0, 0.05 + 0.95 * rest)


def draw_sigma(count: int, high: int, generator: torch.Generator) -> torch.Tensor:
    """Return stratified noise levels [count]: `high` of them uniform 0.88..1, the rest sigmoid(1.1 N + 0.4)."""
    u = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    highest = 0.88 + 0.12 * u[:high] * count / high
    # sampling starts at sigma 1, where the sigmoid alone would hardly ever train
    u = u[torch.randperm(count, generator=generator)][high:].clamp(1e-4, 1 - 1e-4)
    return torch.cat([highest, torch.sigmoid(1.1 * math.sqrt(2) * torch.erfinv(2 * u - 1) + 0.4)])


def optimisers(model: torch.nn.Module, s: Schedule, dtype: torch.dtype) -> list[torch.optim.Optimizer]:
    """Muon for the matrices, AdamW for everything else."""
    blocks = ("layers.", "noise_refiner.", "context_refiner.")
    ends = ("all_x_embedder.2-1.weight", "cap_embedder.1.weight", "all_final_layer.2-1.linear.weight")
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and (n.startswith(blocks) or n in ends)]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [
        Muon(matrices, lr=s.muon, dtype=dtype),
        torch.optim.AdamW(rest, lr=s.adamw, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def train_base(work: Path, device: torch.device, s: Schedule | None = None) -> Path:
    """Train Base and save `work/base.pt`; a finished file is kept.

    Resumes from `work/base_state.pt`; a new run starts from `work/start.pt` where that exists.
    """
    s = s or Schedule()
    target, resume, start_file = work / "base.pt", work / "base_state.pt", work / "start.pt"
    if target.exists():
        return target
    dtype = matrix_dtype(device)
    model, probe = build().to(device), Probe.make(work, device)
    pictures = Pictures(work, device, s.seed)
    if start_file.exists() and not resume.exists():
        model.load_state_dict(torch.load(start_file, map_location=device, weights_only=True))
    average = {k: v.clone() for k, v in model.state_dict().items()}
    optimizers = optimisers(model, s, dtype)
    tables = {length: rope_table(model, length, 8, 8, device) for length in pictures.pools}
    first = 0
    if resume.exists():
        saved = torch.load(resume, map_location=device, weights_only=True)
        model.load_state_dict(saved["model"])
        average, first = saved["average"], saved["step"]
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        pictures.generator.set_state(saved["generator"].cpu())
        logger.info("resumed at step %d", first)

    def predict(x: torch.Tensor, sigma: torch.Tensor, words: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        return forward(model, x, sigma, words, lengths, tables[words.shape[1]], dtype)

    start, smooth = time.time(), 1.0
    for step in range(first, s.steps):
        for optimizer, base_rate in zip(optimizers, (s.muon, s.adamw), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = base_rate * rate(step, s)
        # every eighth batch has long captions, which shift the picture's positions
        words, lengths, x0, noise = pictures.draw(s.batch, 64 if step % 8 == 7 else 32)
        high = s.batch * 3 // 4 if step < s.high_noise_share * s.steps else s.batch // 8
        sigma = draw_sigma(s.batch, high, pictures.generator).to(device)
        level = sigma.view(-1, 1, 1, 1)
        loss = (predict((1 - level) * x0 + level * noise, sigma, words, lengths) - (noise - x0)).square().mean()
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        smooth += 0.02 * (loss.item() - smooth)
        follow(average, model, step, s)
        if (step + 1) % 25 == 0 or step < first + 3:
            speed = (step + 1 - first) * s.batch / (time.time() - start)
            logger.info("base step %d/%d loss %.4f, %.1f samples/s", step + 1, s.steps, smooth, speed)
        if (step + 1) % 250 == 0 or step + 1 == s.steps:
            report(work, predict, probe, device, step + 1, s.steps)
            saved = {"model": model.state_dict(), "average": average, "step": step + 1}
            saved |= {"optimizers": [o.state_dict() for o in optimizers], "generator": pictures.generator.get_state()}
            with replacing(resume) as file:
                torch.save(saved, file)
    with replacing(target) as file:
        torch.save(average, file)
    return target


def follow(average: dict[str, torch.Tensor], model: torch.nn.Module, step: int, s: Schedule) -> None:
    """Bring the average to the weights after a step: a mean over the last steps, before that a copy."""
    begins = (1 - s.average_share) * s.steps
    for key, value in model.state_dict().items():
        if step >= begins:
            average[key].lerp_(value, 0.005)
        elif step % 50 == 0 or step + 1 >= begins:
            average[key].copy_(value)


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
