"""Distils Base into Turbo: one step of Turbo replaces several steps of Base with guidance.

Progressive distillation (Salimans and Ho, 2022) on the noise levels of Turbo's eight steps: from each of them the
teacher goes to the next one in small guided steps, and the student learns the straight path there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from core.whole_file import replacing

from . import text_encoder
from .loop import Training, trained
from .pools import Pictures
from .probe import STEPS as TURBO_STEPS
from .probe import Probe, turbo_sigmas, write_sheet
from .text_encoder import matrix_dtype
from .transformer import build, predictor, stack_words

logger = logging.getLogger(__name__)

GUIDANCE = 2.0  # half of what Base uses: with 4 the eight steps overshoot the colours
TEACHER_STEPS = 3  # for each of Turbo's eight: about Base's 25


@dataclass(frozen=True)
class Schedule:
    """How long and how fast."""

    steps: int = 360
    batch: int = 24
    rate: float = 4e-4
    average: float = 0.98  # of the weights, over the second half
    seed: int = 8


def walk(
    guided: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    start: torch.Tensor,
    end: torch.Tensor,
    steps: int,
) -> torch.Tensor:
    """Return the mean velocity of `steps` Euler steps of `guided(x, sigma)` from noise level `start` to `end`, [B]."""
    here = x
    for i in range(steps):
        sigma, following = (start + (end - start) * (i + k) / steps for k in (0, 1))
        here = here + (following - sigma).view(-1, 1, 1, 1) * guided(here, sigma)
    return (here - x) / (end - start).view(-1, 1, 1, 1)


def train_turbo(work: Path, device: torch.device, s: Schedule | None = None) -> None:
    """Train Turbo from `work/base.pt`, save `work/turbo.pt`; a finished file is kept."""
    s = s or Schedule()
    target = work / "turbo.pt"
    if target.exists():
        return
    dtype = matrix_dtype(device)
    pictures, probe = Pictures(work, device, s.seed), Probe.make(work, device)
    teacher, model = build().to(device).eval().requires_grad_(False), build().to(device)
    for transformer in (teacher, model):
        transformer.load_state_dict(torch.load(work / "base.pt", map_location=device, weights_only=True))
    teach, predict = predictor(teacher, device, dtype), predictor(model, device, dtype)
    encoder, tokenizer = text_encoder.load(work, device), text_encoder.load_tokenizer(work)
    empty, empty_length = (x.to(device) for x in stack_words(text_encoder.embed(encoder, tokenizer, [""], device)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=s.rate, betas=(0.9, 0.95), weight_decay=0.0)
    grid = turbo_sigmas()

    def loss(step: int) -> torch.Tensor:
        words, lengths, x0, noise = pictures.draw(s.batch, 64 if step % 8 == 7 else 32)
        stage = torch.randint(TURBO_STEPS, (s.batch,), generator=pictures.generator)
        sigma, following = grid[stage].to(device), grid[stage + 1].to(device)
        level = sigma.view(-1, 1, 1, 1)
        x = (1 - level) * x0 + level * noise

        def guided(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
            free = teach(x, sigma, empty.expand(s.batch, -1, -1), empty_length.expand(s.batch))
            return free + GUIDANCE * (teach(x, sigma, words, lengths) - free)

        with torch.no_grad():
            wanted = walk(guided, x, sigma, following, TEACHER_STEPS)
        return (predict(x, sigma, words, lengths) - wanted).square().mean()

    def rate(step: int) -> float:
        return s.rate * min(1.0, (step + 1) / 20) * min(1.0, 2.05 - 2 * step / s.steps)

    training = Training(
        target, model, [(optimizer, rate)], s.steps, loss, random_sources=[pictures.generator],
        average=lambda step: 1.0 if step < s.steps // 2 else 1 - s.average,
        report=lambda done: logger.info("turbo probe %s", probe.judge(probe.sample(predict))), report_every=60,
    )  # fmt: skip
    with trained(training):
        write_sheet(work, probe.sample(predict), work / "sheet_turbo.png", device)
        with replacing(target) as file:
            torch.save(model.state_dict(), file)
