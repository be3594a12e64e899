"""Distils Base into Turbo: one step of Turbo goes where several steps of Base with guidance go.

Progressive distillation (Salimans and Ho, 2022) on the noise levels of Turbo's eight steps: from each of them the
teacher walks to the next one in small guided steps, and the student learns the straight way there.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from core.whole_file import replacing

from . import text_encoder
from .pools import Pictures
from .probe import SHIFT, Probe, write_sheet
from .probe import STEPS as TURBO_STEPS
from .text_encoder import matrix_dtype
from .transformer import build, forward, rope_table, stack_words

if TYPE_CHECKING:
    from diffsynth.models.z_image_dit import ZImageDiT

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


def turbo_sigmas() -> torch.Tensor:
    """The noise levels of 8 steps at shift 3 and the end, float32 [9] from 1 down to 0."""
    u = torch.linspace(1, 0, TURBO_STEPS + 1)
    return SHIFT * u / (1 + (SHIFT - 1) * u)


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


def train_turbo(work: Path, device: torch.device, s: Schedule | None = None) -> Path:
    """Train Turbo from `work/base.pt`, save `work/turbo.pt`; a finished file is kept."""
    s = s or Schedule()
    target = work / "turbo.pt"
    if target.exists():
        return target
    dtype = matrix_dtype(device)
    pictures, probe = Pictures(work, device, s.seed), Probe.make(work, device)
    teacher, model = build().to(device).eval().requires_grad_(False), build().to(device)
    tables = {length: rope_table(model, length, 8, 8, device) for length in pictures.pools}
    state = torch.load(work / "base.pt", map_location=device, weights_only=True)
    teacher.load_state_dict(state)
    model.load_state_dict(state)
    average = {k: v.clone() for k, v in state.items()}
    encoder, tokenizer = text_encoder.load(work, device), text_encoder.load_tokenizer(work)
    empty, empty_length = (x.to(device) for x in stack_words(text_encoder.embed(encoder, tokenizer, [""], device)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=s.rate, betas=(0.9, 0.95), weight_decay=0.0)
    grid, start = turbo_sigmas(), time.time()

    def predict(
        x: torch.Tensor, sigma: torch.Tensor, words: torch.Tensor, lengths: torch.Tensor, who: ZImageDiT = model
    ) -> torch.Tensor:
        return forward(who, x, sigma, words, lengths, tables[words.shape[1]], dtype)

    smooth = None
    for step in range(s.steps):
        for group in optimizer.param_groups:
            group["lr"] = s.rate * min(1.0, (step + 1) / 20) * min(1.0, 2.05 - 2 * step / s.steps)
        words, lengths, x0, noise = pictures.draw(s.batch, 64 if step % 8 == 7 else 32)
        stage = torch.randint(TURBO_STEPS, (s.batch,), generator=pictures.generator)
        sigma, following = grid[stage].to(device), grid[stage + 1].to(device)
        level = sigma.view(-1, 1, 1, 1)
        x = (1 - level) * x0 + level * noise

        def guided(
            x: torch.Tensor, sigma: torch.Tensor, words: torch.Tensor = words, lengths: torch.Tensor = lengths
        ) -> torch.Tensor:
            free = predict(x, sigma, empty.expand(s.batch, -1, -1), empty_length.expand(s.batch), teacher)
            return free + GUIDANCE * (predict(x, sigma, words, lengths, teacher) - free)

        with torch.no_grad():
            wanted = walk(guided, x, sigma, following, TEACHER_STEPS)
        loss = (predict(x, sigma, words, lengths) - wanted).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        for key, value in model.state_dict().items():
            average[key].lerp_(value, 1.0 if step < s.steps // 2 else 1 - s.average)
        smooth = loss.item() if smooth is None else smooth + 0.03 * (loss.item() - smooth)
        if (step + 1) % 60 == 0:
            judged = probe.judge(probe.sample(predict))
            logger.info("turbo step %d/%d loss %.4f %s, %.0f s", step + 1, s.steps, smooth, judged, time.time() - start)
    model.load_state_dict(average)
    write_sheet(work, probe.sample(predict), work / "sheet_turbo.png", device)
    with replacing(target) as file:
        torch.save(average, file)
    return target
