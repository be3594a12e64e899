"""Trains the miniature's autoencoder on crops of icons and checks its reconstructions."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from core.whole_file import replacing
from mini.models import MiniAutoencoder

from .loop import Training, load_rounded, trained
from .scenes import PICTURE_SIDE, Painter, Scene, autoencoder_icons, contact_sheet, training_scenes
from .things import BACKGROUNDS, THINGS

STEPS, BATCH, CROP = 5000, 12, 64  # crops of 64 px: about 6 minutes on two CPU cores
OWN_SHARE = 0.5  # half of the crops from the things that the miniature draws, the rest from all icons
LEARNING_RATE = 2e-3
LATENT_NOISE = 0.15  # the decoder must tolerate the transformer's small errors
EDGE_SHARE = 0.10  # white-on-black edge maps, so that control images survive the autoencoder


def _edges(pictures: torch.Tensor) -> torch.Tensor:
    """Turn pictures [B, 3, H, W] in -1..1 into white-on-black outlines of the same shape."""
    gray = pictures.mean(1, keepdim=True)
    dx = F.pad(gray[..., :, 1:] - gray[..., :, :-1], (0, 1, 0, 0))
    dy = F.pad(gray[..., 1:, :] - gray[..., :-1, :], (0, 0, 0, 1))
    return (((dx**2 + dy**2).sqrt() > 0.2).float() * 2 - 1).expand_as(pictures)


class Crops:
    """Draws random crops of icons on random flat backgrounds."""

    def __init__(self, work: Path, generator: np.random.Generator) -> None:
        self.icons, painter = autoencoder_icons(work), Painter(work)
        self.own = np.stack([np.asarray(painter.icon(thing, 96)) for thing in THINGS])
        self.random = generator
        self.palette = np.array(list(BACKGROUNDS.values()), dtype=np.float32)

    def crop(self) -> np.ndarray:
        """Return a float crop [CROP, CROP, 3] in 0..255 that shows a good part of an icon."""
        r = self.random
        icons = self.own if r.random() < OWN_SHARE else self.icons
        icon = icons[r.integers(len(icons))].astype(np.float32)
        if r.random() < 0.4:  # two thirds of the size: small icons have finer detail per pixel
            image = Image.fromarray(icon.astype(np.uint8), "RGBA").resize((64, 64), Image.Resampling.LANCZOS)
            icon = np.asarray(image).astype(np.float32)
        background = self.palette[r.integers(len(self.palette))] if r.random() < 0.5 else r.uniform(0, 255, 3)
        crop = np.empty((CROP, CROP, 3), np.float32)
        crop[:] = background
        y, x = r.integers(-24, icon.shape[0] - 40, 2)  # the crop's corner in the icon
        top, left = max(0, -y), max(0, -x)
        piece = icon[max(0, y) : y + CROP, max(0, x) : x + CROP]
        area = crop[top : top + piece.shape[0], left : left + piece.shape[1]]
        area += (piece[..., :3] - area) * (piece[..., 3:] / 255.0)
        return crop[:, ::-1] if r.random() < 0.5 else crop

    def batch(self) -> torch.Tensor:
        """Return float crops [BATCH, 3, CROP, CROP] in -1..1."""
        crops = torch.from_numpy(np.stack([self.crop() for _ in range(BATCH)])).permute(0, 3, 1, 2) / 127.5 - 1
        count = int(self.random.binomial(BATCH, EDGE_SHARE))
        if count:
            crops[:count] = _edges(crops[:count])
        return crops.contiguous()


def _gradient_loss(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return the L1 error of values and of their differences on three scales, which keeps outlines sharp."""
    total = a.new_zeros(())
    for scale in range(3):
        if scale:
            a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
            total = total + F.l1_loss(a, b)
        total = total + F.l1_loss(a[..., 1:] - a[..., :-1], b[..., 1:] - b[..., :-1])
        total = total + F.l1_loss(a[..., 1:, :] - a[..., :-1, :], b[..., 1:, :] - b[..., :-1, :])
    return total


def train(work: Path, device: torch.device, steps: int = STEPS) -> None:
    """Train, measure the latents' mean and deviation, save `work/autoencoder.pt`; a finished file is kept."""
    target = work / "autoencoder.pt"
    if target.exists():
        return
    torch.manual_seed(0)
    crops = Crops(work, np.random.default_rng(0))
    model = MiniAutoencoder().to(device).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=1e-4)

    def rate(step: int) -> float:
        return LEARNING_RATE * (min(1.0, (step + 1) / 200) * 0.5 * (1 + math.cos(math.pi * step / steps))) + 1e-6

    def loss(step: int) -> torch.Tensor:
        pictures = crops.batch().to(device, memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16):
            z = model.encoder.raw(pictures).float()
            noise = torch.randn_like(z) * (LATENT_NOISE * torch.rand(len(z), 1, 1, 1, device=device))
            decoded = model.decoder.raw(z + noise).float()
        variation = (z[..., 1:] - z[..., :-1]).abs().mean() + (z[..., 1:, :] - z[..., :-1, :]).abs().mean()
        error = F.l1_loss(decoded, pictures) + 0.5 * _gradient_loss(decoded, pictures)
        return error + 2e-3 * z.square().mean() + 2e-3 * variation

    with trained(Training(target, model, [(optimizer, rate)], steps, loss, [crops.random])):
        model.to(memory_format=torch.contiguous_format).eval()
        measure_latents(model, work, device)
        with replacing(target) as file:
            torch.save(model.state_dict(), file)


@torch.no_grad()
def measure_latents(model: MiniAutoencoder, work: Path, device: torch.device) -> None:
    """Set the per-channel mean and deviation so that latents of the miniature's own pictures have unit variance."""
    painter = Painter(work)
    pictures = painter.paint_all(training_scenes()[::300])
    z = torch.cat([model.encoder.raw(to_tensor(chunk, device)) for chunk in np.array_split(pictures, 16)])
    mean, std = z.mean((0, 2, 3)), z.std((0, 2, 3))
    for part in (model.encoder, model.decoder):
        # rounded to bf16 as they will be stored, so that export changes no latent
        part.latents_mean.copy_(mean.view(1, -1, 1, 1).bfloat16().float())
        part.latents_std.copy_(std.view(1, -1, 1, 1).bfloat16().float())


def to_tensor(pictures: np.ndarray, device: torch.device) -> torch.Tensor:
    """Return uint8 pictures [B, H, W, 3] as float [B, 3, H, W] in -1..1."""
    return (torch.from_numpy(pictures).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1).contiguous()


def to_pictures(tensors: torch.Tensor) -> np.ndarray:
    """Return float pictures [B, 3, H, W] in -1..1 as uint8 [B, H, W, 3]."""
    return ((tensors + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def load(work: Path, device: torch.device) -> MiniAutoencoder:
    """Load the trained autoencoder with weights rounded to bf16, as the exported file holds them."""
    return load_rounded(MiniAutoencoder(), work / "autoencoder.pt", device)


@torch.no_grad()
def evaluate(work: Path, device: torch.device) -> dict[str, float]:
    """Return mean and worst PSNR in dB over the miniature's pictures and write a sheet of reconstructions."""
    model = load(work, device)
    pictures = Painter(work).paint_all(training_scenes()[::500])
    values, sheet = [], []
    for chunk in np.array_split(pictures, 16):
        x = to_tensor(chunk, device)
        y = model.decoder(model.encoder(x)).clamp(-1, 1)
        values += (-10 * ((x - y).square().mean((1, 2, 3)) / 4).log10()).tolist()
        sheet.append(torch.stack([x[:2], y[:2]], 1))
    contact_sheet(list(to_pictures(torch.cat(sheet)[:24].flatten(0, 1))), work / "autoencoder.png", columns=6)
    result = {"psnr_mean": float(np.mean(values)), "psnr_worst": float(np.min(values))}
    (work / "autoencoder.json").write_text(json.dumps(result, indent=2))
    return result


@torch.no_grad()
def encode(model: MiniAutoencoder, painter: Painter, scenes: list[Scene], device: torch.device) -> torch.Tensor:
    """Return the latents of scenes, bfloat16 [N, 16, 16, 16] on the CPU."""
    latents = torch.empty(len(scenes), 16, PICTURE_SIDE // 8, PICTURE_SIDE // 8, dtype=torch.bfloat16)
    for start in range(0, len(scenes), 128):
        pictures = to_tensor(painter.paint_all(scenes[start : start + 128]), device)
        latents[start : start + 128] = model.encoder(pictures).cpu()
    return latents


def encode_all(work: Path, device: torch.device) -> torch.Tensor:
    """Return the latents of all training scenes, bfloat16 [N, 16, 16, 16] in their order; kept on disk."""
    cache = work / "latents.pt"
    if not cache.exists():
        model = load(work, device)
        # twice as fast as float32 where the processor has bfloat16, in which the latents are kept anyway
        with torch.autocast(device.type, torch.bfloat16):
            encoded = encode(model, Painter(work), training_scenes(), device)
        with replacing(cache) as file:
            torch.save(encoded, file)
    latents: torch.Tensor = torch.load(cache, weights_only=True)
    return latents
