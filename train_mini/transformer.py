"""The transformer: its start values and a batched forward.

The forward follows DiffSynth's `model_fn_z_image_turbo` (which takes one picture at a time) to within rounding;
a test holds the two together. Latents are [B, 16, h, w]; captions are embeddings of equal padded length.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from mini.config import TRANSFORMER_CONFIG

if TYPE_CHECKING:
    from diffsynth.models.z_image_dit import ZImageDiT, ZImageTransformerBlock

CAPTION_MULTIPLE = 32  # the model pads captions to multiples of this (SEQ_MULTI_OF)
CAPTION_LENGTHS = (32, 64)  # of the padded captions that training draws
PATCH_NUMBERS = 64  # 2 x 2 latents of 16 channels

# Latents, noise levels, words and their lengths -> velocities.
Predict = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


# ---- the model -------------------------------------------------------------------------------------------------------


def build() -> ZImageDiT:
    """Return an untrained ZImageDiT with the start values that let it learn on a small budget."""
    from diffsynth.models.z_image_dit import ZImageDiT

    torch.manual_seed(0)
    model = ZImageDiT(**TRANSFORMER_CONFIG)
    dim, k = model.dim, PATCH_NUMBERS
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 2 and "pad_token" not in name:
                p.normal_(0, p.shape[1] ** -0.5)
            elif name.endswith("bias"):
                p.zero_()
        for name in ("x_pad_token", "cap_pad_token"):  # uninitialised memory in DiffSynth
            getattr(model, name).normal_(0, 0.5)
        for name, p in model.named_parameters():
            if "adaLN_modulation" in name:
                p.zero_()
                if name.startswith(("layers", "noise_refiner")) and name.endswith("bias"):
                    p[dim : 2 * dim] = 0.3  # both gates a little open
                    p[3 * dim :] = 0.3
        # The noise passes through on its own: the first channels carry the patch from the embedder to the final layer.
        embedder, final = model.all_x_embedder["2-1"], model.all_final_layer["2-1"].linear
        embedder.weight[:k] = torch.eye(k)
        embedder.weight[k:] = 0
        embedder.bias[:k] = 0
        embedder.bias[k:].normal_(0, 1)
        final.weight[:, :k] = -torch.eye(k) * math.sqrt(k / dim)
        final.weight[:, k:] *= 0.1
        for block in (*model.layers, *model.noise_refiner):
            attention, feed_forward = block.attention, block.feed_forward
            for reader in (attention.to_q, attention.to_k, attention.to_v, feed_forward.w1, feed_forward.w3):
                reader.weight[:, :k] *= 0.1
            for writer in (attention.to_out[0], feed_forward.w2):
                writer.weight[:k] *= 0.1
    return model


def rope_table(
    model: ZImageDiT, caption_length: int, height: int, width: int, device: torch.device | str
) -> torch.Tensor:
    """Return rotations, complex64 [tokens, head_dim / 2], for [picture, caption]; the caption starts at position 1."""
    grid = torch.stack(
        torch.meshgrid(torch.tensor([caption_length + 1]), torch.arange(height), torch.arange(width), indexing="ij"), -1
    ).flatten(0, 2)
    words = torch.zeros(caption_length, 3, dtype=torch.long)
    words[:, 0] = torch.arange(1, caption_length + 1)
    rotations: torch.Tensor = model.rope_embedder(torch.cat([grid, words]).to(device)).to(device)
    return rotations


def _linear(x: torch.Tensor, layer: torch.nn.Linear, dtype: torch.dtype) -> torch.Tensor:
    bias = None if layer.bias is None else layer.bias.to(dtype)
    return F.linear(x.to(dtype), layer.weight.to(dtype), bias)


class _RMSNorm(torch.autograd.Function):
    """RMS norm with its gradient written out: half the passes over memory of the chain that autograd would record."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Return x [..., C] normed and weighted, float32 of the same shape."""
        inverse = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        inverse = (inverse.square_() / x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        normed: torch.Tensor = (x * inverse).mul_(weight)
        return normed

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        """Return the gradients of x and weight."""
        x, weight, inverse = ctx.saved_tensors
        normed = x * inverse
        for_weight = (gradient * normed).flatten(0, -2).sum(0)
        gradient = gradient * weight
        mean = (gradient * normed).mean(-1, keepdim=True)
        return (gradient - normed.mul_(mean)).mul_(inverse).to(x.dtype), for_weight, None


def _norm(x: torch.Tensor, layer: torch.nn.RMSNorm) -> torch.Tensor:
    normed: torch.Tensor = _RMSNorm.apply(x, layer.weight, layer.eps)
    return normed


def _rotate(x: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
    """Return x, float32 [B, tokens, heads, head_dim], with neighbouring pairs of numbers rotated by a `rope_table`."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return torch.view_as_real(pairs * rope.unsqueeze(1)).flatten(-2)


def block_forward(
    block: ZImageTransformerBlock, x: torch.Tensor, rope: torch.Tensor, t: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """Return the output of a ZImageTransformerBlock for x [B, tokens, dim] in float32; matrices multiply in `dtype`."""
    attention, feed_forward = block.attention, block.feed_forward
    modulated: list[torch.Tensor | float] = [1.0] * 4
    if t is not None:
        modulation = F.linear(t, block.adaLN_modulation[0].weight, block.adaLN_modulation[0].bias).unsqueeze(1)
        first, second, third, fourth = modulation.chunk(4, dim=2)
        modulated = [1 + first, second.tanh(), 1 + third, fourth.tanh()]
    scale1, gate1, scale2, gate2 = modulated
    h = (_norm(x, block.attention_norm1) * scale1).to(dtype)
    q, k, v = (
        _linear(h, m, dtype).unflatten(-1, (attention.num_heads, -1))  # type: ignore[no-untyped-call]  # torch leaves it untyped
        for m in (attention.to_q, attention.to_k, attention.to_v)
    )
    q, k = _rotate(_norm(q, attention.norm_q), rope).to(dtype), _rotate(_norm(k, attention.norm_k), rope).to(dtype)
    h = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)
    x = x + gate1 * _norm(_linear(h.flatten(2), attention.to_out[0], dtype), block.attention_norm2)
    h = (_norm(x, block.ffn_norm1) * scale2).to(dtype)
    h = F.silu(_linear(h, feed_forward.w1, dtype)) * _linear(h, feed_forward.w3, dtype)
    return x + gate2 * _norm(_linear(h, feed_forward.w2, dtype), block.ffn_norm2)


def patches(x: torch.Tensor) -> torch.Tensor:
    """Return [B, C, h, w] as patches [B, h/2 * w/2, 4 C], in the order of the model's `patchify`."""
    batch, channels, height, width = x.shape
    x = x.view(batch, channels, height // 2, 2, width // 2, 2)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(batch, height * width // 4, 4 * channels)


def velocity(model: ZImageDiT, x: torch.Tensor, t: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Return what the last layer makes of the picture's tokens x: the velocity of latents of a shape."""
    batch, channels, height, width = shape
    final = model.all_final_layer["2-1"]
    x = F.layer_norm(x, (x.shape[-1],), eps=final.norm_final.eps) * (1 + final.adaLN_modulation(t)).unsqueeze(1)
    x = final.linear(x).view(batch, height // 2, width // 2, 2, 2, channels)
    return -x.permute(0, 5, 1, 3, 2, 4).reshape(batch, channels, height, width)


def forward(
    model: ZImageDiT,
    latents: torch.Tensor,
    sigma: torch.Tensor,
    words: torch.Tensor,
    lengths: torch.Tensor,
    rope: torch.Tensor,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Return the velocity noise - x0 (the sign of the pipeline), float32 like `latents` [B, 16, h, w].

    `sigma` [B] in 0..1; `words` [B, L, 128] with L a multiple of 32, of which `lengths` [B] tokens count and the rest
    become the model's pad token (and are attended, as in the original); `rope` from `rope_table`.
    """
    tokens = latents.shape[2] * latents.shape[3] // 4  # a multiple of 32, so the picture needs no padding
    frequencies = model.t_embedder.timestep_embedding(1000 - 1000 * sigma, model.t_embedder.frequency_embedding_size)
    t = model.t_embedder.mlp(frequencies)
    x = model.all_x_embedder["2-1"](patches(latents))
    for block in model.noise_refiner:
        x = block_forward(block, x, rope[:tokens], t, dtype)
    c = _linear(_norm(words, model.cap_embedder[0]), model.cap_embedder[1], torch.float32)
    padding = torch.arange(words.shape[1], device=words.device) >= lengths.unsqueeze(1)
    c = torch.where(padding.unsqueeze(-1), model.cap_pad_token, c)
    for block in model.context_refiner:
        c = block_forward(block, c, rope[tokens:], None, dtype)
    x = torch.cat([x, c], 1)
    for block in model.layers:
        x = block_forward(block, x, rope, t, dtype)
    return velocity(model, x[:, :tokens], t, latents.shape)


def rope_tables(model: ZImageDiT, device: torch.device) -> dict[int, torch.Tensor]:
    """Return the rotations for pictures of 8 x 8 patches, by the padded length of their captions."""
    return {length: rope_table(model, length, 8, 8, device) for length in CAPTION_LENGTHS}


def predictor(model: ZImageDiT, device: torch.device, dtype: torch.dtype) -> Predict:
    """Return `forward` of a model on pictures of 8 x 8 patches."""
    tables = rope_tables(model, device)
    return lambda x, sigma, words, lengths: forward(model, x, sigma, words, lengths, tables[words.shape[1]], dtype)


# ---- captions --------------------------------------------------------------------------------------------------------


def padded(count: int) -> int:
    """Return a caption's length in tokens, rounded up as the model does."""
    return -(-count // CAPTION_MULTIPLE) * CAPTION_MULTIPLE


def stack_words(embeddings: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad embeddings [L, 128] of one padded length to [B, L, 128] and return them with their lengths [B]."""
    length = padded(max(len(e) for e in embeddings))
    words = torch.zeros(len(embeddings), length, embeddings[0].shape[1], dtype=embeddings[0].dtype)
    for i, e in enumerate(embeddings):
        words[i, : len(e)] = e
    return words, torch.tensor([len(e) for e in embeddings])
