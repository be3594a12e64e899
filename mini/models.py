"""The miniature's torch classes: a tiny Qwen3 text encoder, a small 16-channel, 8x autoencoder, a tiny ControlNet.

DiffSynth loads them by their dotted path (see `mini.config.register`). Because of torch, nothing imports this
module before the first request.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from diffsynth.models.z_image_controlnet import ZImageControlNet, ZImageControlTransformerBlock
from torch import nn
from torch.nn import functional as F

from mini.config import CONTROLNET_CONFIG, TEXT_ENCODER_CONFIG, TRANSFORMER_CONFIG

if TYPE_CHECKING:
    from transformers.modeling_outputs import BaseModelOutputWithPast

LATENT_CHANNELS = 16
LATENT_BOUND = 4.0  # raw latents are squashed into -4..4


class MiniTextEncoder(nn.Module):
    """Qwen3 of four layers behind the interface of DiffSynth's ZImageTextEncoder."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import Qwen3Config, Qwen3Model

        self.model = Qwen3Model(Qwen3Config(**TEXT_ENCODER_CONFIG))

    def forward(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPast:  # whatever Qwen3Model takes
        """Pass through to Qwen3Model; the pipeline reads `hidden_states[-2]`."""
        output: BaseModelOutputWithPast = self.model(*args, **kwargs)
        return output


class MiniControlNet(ZImageControlNet):  # type: ignore[misc]  # DiffSynth brings no types
    """DiffSynth's ControlNet at the miniature's size; the original's blocks have a fixed width of 3840."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        places, refiners = CONTROLNET_CONFIG["control_layers_places"], CONTROLNET_CONFIG["n_refiner_layers"]
        dim = TRANSFORMER_CONFIG["dim"]
        self.control_layers = nn.ModuleList(_control_block(place) for place in places)
        embedder = nn.Linear(2 * 2 * CONTROLNET_CONFIG["control_in_dim"], dim)  # patches of 2 x 2
        self.control_all_x_embedder = nn.ModuleDict({"2-1": embedder})
        self.control_noise_refiner = nn.ModuleList(_control_block(place) for place in range(refiners))
        self.control_layers_mapping = {place: index for index, place in enumerate(places)}


def _control_block(place: int) -> ZImageControlTransformerBlock:
    return ZImageControlTransformerBlock(
        layer_id=place,
        dim=TRANSFORMER_CONFIG["dim"],
        n_heads=TRANSFORMER_CONFIG["n_heads"],
        n_kv_heads=TRANSFORMER_CONFIG["n_kv_heads"],
        block_id=place,
    )


class Residual(nn.Module):
    """GroupNorm, SiLU and two 3x3 convolutions around a skip connection."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(8, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(8, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] -> the same shape."""
        h = self.conv1(F.silu(self.norm1(x)))
        added: torch.Tensor = self.conv2(F.silu(self.norm2(h)))
        return x + added


class _Latents(nn.Module):
    """Holds the latents' per-channel mean and deviation, by which they get about unit variance."""

    latents_mean: torch.Tensor
    latents_std: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("latents_mean", torch.zeros(1, LATENT_CHANNELS, 1, 1))
        self.register_buffer("latents_std", torch.ones(1, LATENT_CHANNELS, 1, 1))


class MiniVAEEncoder(_Latents):
    """Images to latents. Wide convolutions run at quarter resolution or below: anything else is slow on a CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.PixelUnshuffle(4),
            nn.Conv2d(48, 48, 3, padding=1),
            Residual(48),
            nn.Conv2d(48, 96, 3, stride=2, padding=1),
            Residual(96),
            Residual(96),
            nn.Conv2d(96, LATENT_CHANNELS, 1),
        )

    def raw(self, images: torch.Tensor) -> torch.Tensor:
        """Images [B, 3, H, W] in -1..1 -> raw latents [B, 16, H/8, W/8] in -4..4; H and W multiples of 8."""
        return LATENT_BOUND * torch.tanh(self.layers(images) / LATENT_BOUND)

    def forward(self, images: torch.Tensor, **kwargs: object) -> torch.Tensor:
        """Images [B, 3, H, W] in -1..1 -> latents [B, 16, H/8, W/8] of about unit variance."""
        return (self.raw(images) - self.latents_mean) / self.latents_std


class MiniVAEDecoder(_Latents):
    """Latents to images."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(LATENT_CHANNELS, 96, 3, padding=1),
            Residual(96),
            Residual(96),
            nn.Conv2d(96, 48 * 4, 1),
            nn.PixelShuffle(2),
            Residual(48),
            Residual(48),
            nn.Conv2d(48, 32 * 4, 1),
            nn.PixelShuffle(2),
            Residual(32),
            nn.Conv2d(32, 12, 3, padding=1),
            nn.PixelShuffle(2),
        )

    def raw(self, latents: torch.Tensor) -> torch.Tensor:
        """Raw latents [B, 16, h, w] in -4..4 -> images [B, 3, 8h, 8w], about -1..1."""
        images: torch.Tensor = self.layers(latents)
        return images

    def forward(self, sample: torch.Tensor, **kwargs: object) -> torch.Tensor:
        """Latents [B, 16, h, w] of about unit variance -> images [B, 3, 8h, 8w], about -1..1."""
        return self.raw(sample * self.latents_std + self.latents_mean)


class MiniAutoencoder(nn.Module):
    """Encoder and decoder in one state dict, as `vae/diffusion_pytorch_model.safetensors` holds them."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = MiniVAEEncoder()
        self.decoder = MiniVAEDecoder()


def vae_encoder_state_dict(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Pick the encoder out of the autoencoder's file (DiffSynth's `state_dict_converter`)."""
    return {k.removeprefix("encoder."): state_dict[k] for k in state_dict if k.startswith("encoder.")}


def vae_decoder_state_dict(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Pick the decoder out of the autoencoder's file (DiffSynth's `state_dict_converter`)."""
    return {k.removeprefix("decoder."): state_dict[k] for k in state_dict if k.startswith("decoder.")}
