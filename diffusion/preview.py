"""Previews of an image in progress: latents projected to colours, a small multiplication instead of a decoding.

Each of the 16 channels adds its share of red, green and blue to a pixel that stands for 8 x 8 of the image.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from core.events import Preview
from core.sizes import WeightsKind


@dataclass(frozen=True)
class Factors:
    """Shares of red, green and blue by channel, and what is added: colours from -1 to 1."""

    channels: tuple[tuple[float, float, float], ...]
    bias: tuple[float, float, float]


# fmt: off
FACTORS: Mapping[WeightsKind, Factors] = {
    # Z-Image's autoencoder is Flux's; these are the factors that ComfyUI publishes for it (comfy/latent_formats.py).
    "full": Factors(
        (
            (-0.0346, 0.0244, 0.0681), (0.0034, 0.0210, 0.0687), (0.0275, -0.0668, -0.0433), (-0.0174, 0.0160, 0.0617),
            (0.0859, 0.0721, 0.0329), (0.0004, 0.0383, 0.0115), (0.0405, 0.0861, 0.0915), (-0.0236, -0.0185, -0.0259),
            (-0.0245, 0.0250, 0.1180), (0.1008, 0.0755, -0.0421), (-0.0515, 0.0201, 0.0011), (0.0428, -0.0012, -0.0036),
            (0.0817, 0.0765, 0.0749), (-0.1264, -0.0522, -0.1103), (-0.0280, -0.0881, -0.0499),
            (-0.1262, -0.0982, -0.0778),
        ),
        (-0.0329, -0.0718, -0.0851),
    ),
    # Found by `bench/preview_cost.py --fit`: they explain 98 % of the variance of the colours.
    "mini": Factors(
        (
            (-0.0419, -0.0052, -0.0151), (0.0499, 0.1824, 0.4574), (0.0065, 0.0995, -0.0101),
            (0.0097, 0.0068, 0.0351), (-0.0437, 0.0329, -0.0083), (0.1765, -0.0014, 0.0756),
            (0.0031, -0.0494, 0.0170), (-0.0249, -0.1419, -0.0100), (-0.0301, 0.0180, -0.1431),
            (0.0546, 0.1242, 0.0250), (-0.0180, -0.0976, -0.0928), (0.0015, -0.0452, -0.0079),
            (-0.4060, -0.1691, -0.1076), (-0.0119, -0.0122, 0.0156), (-0.1698, -0.0854, 0.0615),
            (-0.0835, 0.0540, -0.0194),
        ),
        (0.2215, 0.0998, 0.0581),
    ),
}
# fmt: on


def project(latents: torch.Tensor, kind: WeightsKind) -> Preview:
    """Return the colours of latents, (1, 16, height / 8, width / 8), as an image of their own size."""
    factors = FACTORS[kind]
    grid = latents[0].float()
    shares = torch.tensor(factors.channels, device=grid.device)
    bias = torch.tensor(factors.bias, device=grid.device)
    colours = torch.einsum("chw,cr->hwr", grid, shares) + bias
    pixels = ((colours + 1) * 127.5).round().clamp(0, 255).to("cpu", torch.uint8)
    return Preview(width=pixels.shape[1], height=pixels.shape[0], rgb=pixels.numpy().tobytes())
