"""The ControlNet beside the transformer: its start values and a batched forward of both.

The forward follows DiffSynth's `model_fn_z_image_turbo` with a ControlNet (which takes one picture at a time) to within
rounding; a test holds the two together. Control images are the pipeline's: [B, 33, h, w], the control image's latents,
an empty mask and the latents of a mid-gray picture.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mini.models import MiniControlNet

from .transformer import block_forward, patches, velocity

if TYPE_CHECKING:
    from diffsynth.models.z_image_controlnet import ZImageControlTransformerBlock
    from diffsynth.models.z_image_dit import ZImageDiT, ZImageTransformerBlock

LATENT_CHANNELS = 16


def build(model: ZImageDiT) -> MiniControlNet:
    """Return a ControlNet that starts as copies of the transformer's blocks, and at first adds nothing."""
    torch.manual_seed(0)
    net = MiniControlNet()
    pairs: list[tuple[ZImageControlTransformerBlock, ZImageTransformerBlock]]
    pairs = [(net.control_layers[index], model.layers[place]) for place, index in net.control_layers_mapping.items()]
    pairs += list(zip(net.control_noise_refiner, model.noise_refiner, strict=True))
    with torch.no_grad():
        for block, origin in pairs:
            block.load_state_dict(origin.state_dict(), strict=False)
            block.after_proj.weight.zero_()
            block.after_proj.bias.zero_()
            if block.block_id == 0:
                block.before_proj.weight.normal_(0, 0.1 * block.dim**-0.5)
                block.before_proj.bias.zero_()
        # Patches are pixel by pixel, with the channels of a pixel side by side.
        embedder, origin = net.control_all_x_embedder["2-1"], model.all_x_embedder["2-1"]
        assert isinstance(embedder, torch.nn.Linear)
        spread = embedder.weight.view(len(embedder.weight), 4, -1)
        spread.normal_(0, 0.02)
        spread[..., :LATENT_CHANNELS] += origin.weight.view(len(origin.weight), 4, LATENT_CHANNELS)
        embedder.bias.copy_(origin.bias)
    return net


def forward(
    model: ZImageDiT,
    net: MiniControlNet,
    latents: torch.Tensor,
    sigma: torch.Tensor,
    words: torch.Tensor,
    lengths: torch.Tensor,
    rope: torch.Tensor,
    control: torch.Tensor,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Return the velocity noise - x0 under control, float32 like `latents` [B, 16, h, w].

    `control` is [B, 33, h, w]; everything else is as for `transformer.forward`.
    """
    tokens = latents.shape[2] * latents.shape[3] // 4
    frequencies = model.t_embedder.timestep_embedding(1000 - 1000 * sigma, model.t_embedder.frequency_embedding_size)
    t = model.t_embedder.mlp(frequencies)
    x = model.all_x_embedder["2-1"](patches(latents))
    side = net.control_all_x_embedder["2-1"](patches(control))
    block: ZImageTransformerBlock
    beside: ZImageControlTransformerBlock
    for block, beside in zip(model.noise_refiner, net.control_noise_refiner, strict=True):
        side = block_forward(beside, _enter(beside, side, x), rope[:tokens], t, dtype)
        x = block_forward(block, x, rope[:tokens], t, dtype) + scale * beside.after_proj(side)
    c = model.cap_embedder(words)
    padding = torch.arange(words.shape[1], device=words.device) >= lengths.unsqueeze(1)
    c = torch.where(padding.unsqueeze(-1), model.cap_pad_token, c)
    for block in model.context_refiner:
        c = block_forward(block, c, rope[tokens:], None, dtype)
    x, side = torch.cat([x, c], 1), torch.cat([side, c], 1)
    for place, block in enumerate(model.layers):
        hint = 0.0
        if place in net.control_layers_mapping:
            beside = net.control_layers[net.control_layers_mapping[place]]
            side = block_forward(beside, _enter(beside, side, x), rope, t, dtype)
            hint = scale * beside.after_proj(side)
        x = block_forward(block, x, rope, t, dtype) + hint
    return velocity(model, x[:, :tokens], t, latents.shape)


def _enter(beside: ZImageControlTransformerBlock, side: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return what enters a control block: the first one of a row also gets the input of the transformer's block."""
    if beside.block_id != 0:
        return side
    entered: torch.Tensor = beside.before_proj(side) + x
    return entered
