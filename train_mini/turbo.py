"""Distils Base into Turbo: one pass of Turbo gives what Base gives with guidance, on the noise levels of 8 steps."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from . import autoencoder, text_encoder
from .text_encoder import matrix_dtype
from .transformer import (
    Probe,
    build,
    caption_pools,
    draw_sigma,
    forward,
    nearest_share,
    rope_table,
    stack_words,
    write_sheet,
)

logger = logging.getLogger(__name__)

GUIDANCE = 2.0  # half of what Base uses: with 4 the eight steps overshoot the colours
TURBO_STEPS, SHIFT = 8, 3.0  # the official Turbo settings


@dataclass(frozen=True)
class Schedule:
    """How long and how fast."""

    steps: int = 220
    batch: int = 24
    rate: float = 4e-4
    on_grid: float = 0.7  # share of the batches on the eight noise levels that Turbo visits
    average: float = 0.98  # of the weights, over the second half
    seed: int = 8


def turbo_sigmas() -> torch.Tensor:
    """The noise levels of 8 steps at shift 3, float32 [8] from 1 downwards."""
    u = torch.linspace(1, 0, TURBO_STEPS + 1)[:-1]
    return SHIFT * u / (1 + (SHIFT - 1) * u)


def train_turbo(work: Path, device: torch.device, s: Schedule | None = None) -> Path:
    """Train Turbo from `work/base.pt`, save `work/turbo.pt`; a finished file is kept."""
    s = s or Schedule()
    target = work / "turbo.pt"
    if target.exists():
        return target
    dtype = matrix_dtype(device)
    latents = autoencoder.encode_all(work, device).to(device)
    pools, probe = caption_pools(work, device), Probe.make(work, latents, device)
    tables = {length: rope_table(build(), length, 8, 8, device) for length in pools}
    teacher, model = build().to(device).eval().requires_grad_(False), build().to(device)
    state = torch.load(work / "base.pt", map_location=device, weights_only=True)
    teacher.load_state_dict(state)
    model.load_state_dict(state)
    average = {k: v.clone() for k, v in state.items()}
    encoder, tokenizer = text_encoder.load(work, device), text_encoder.load_tokenizer(work)
    empty, empty_length = (x.to(device) for x in stack_words(text_encoder.embed(encoder, tokenizer, [""], device)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=s.rate, betas=(0.9, 0.95), weight_decay=0.0)
    generator = torch.Generator().manual_seed(s.seed)
    grid, start = turbo_sigmas(), time.time()

    def predict(x, sigma, words, lengths, who=model):
        return forward(who, x, sigma, words, lengths, tables[words.shape[1]], dtype)

    smooth = None
    for step in range(s.steps):
        for group in optimizer.param_groups:
            group["lr"] = s.rate * min(1.0, (step + 1) / 20) * min(1.0, 2.05 - 2 * step / s.steps)
        words, lengths, rows = pools[64 if step % 8 == 7 else 32].draw(s.batch, generator, device)
        noise = torch.randn((s.batch, *latents.shape[1:]), generator=generator).to(device)
        if torch.rand((), generator=generator) < s.on_grid:
            sigma = grid[torch.randint(TURBO_STEPS, (s.batch,), generator=generator)].to(device)
        else:
            sigma = draw_sigma(s.batch, False, generator).to(device)
        level = sigma.view(-1, 1, 1, 1)
        x = (1 - level) * latents[rows] + level * noise
        with torch.no_grad():
            free = predict(x, sigma, empty.expand(s.batch, -1, -1), empty_length.expand(s.batch), teacher)
            wanted = free + GUIDANCE * (predict(x, sigma, words, lengths, teacher) - free)
        loss = (predict(x, sigma, words, lengths) - wanted).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        for key, value in model.state_dict().items():
            average[key].lerp_(value, 1.0 if step < s.steps // 2 else 1 - s.average)
        smooth = loss.item() if smooth is None else smooth + 0.03 * (loss.item() - smooth)
        if (step + 1) % 50 == 0:
            samples = probe.sample(predict)
            right = nearest_share(samples, probe.latents, latents)
            error = (samples - probe.latents).square().mean().item()
            message = "turbo step %d/%d loss %.4f mse %.4f retrieval %.3f, %.0f s"
            logger.info(message, step + 1, s.steps, smooth, error, right, time.time() - start)
    model.load_state_dict(average)
    write_sheet(work, probe.sample(predict), work / "sheet_turbo.png", device)
    torch.save(average, target)
    return target
