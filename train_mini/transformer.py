"""The transformer: start values, a batched forward, and the training of Base.

The batched forward follows DiffSynth's `model_fn_z_image_turbo` (which takes one picture at a time) to within rounding;
a test holds the two together. Latents are [B, 16, h, w]; captions are embeddings of equal padded length.
"""

from __future__ import annotations

import json
import logging
import math
import random
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.nn import functional as F

from mini import TRANSFORMER_CONFIG

from . import autoencoder, text_encoder
from .data import all_combinations, caption, random_caption, split
from .muon import Muon
from .text_encoder import matrix_dtype

logger = logging.getLogger(__name__)

CAPTION_MULTIPLE = 32  # the model pads captions to multiples of this (SEQ_MULTI_OF)
PATCH_NUMBERS = 64  # 2 x 2 latents of 16 channels


# ---- the model -------------------------------------------------------------------------------------------------------


def build() -> torch.nn.Module:
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


def rope_table(model: torch.nn.Module, caption_length: int, height: int, width: int, device) -> torch.Tensor:
    """Return rotations, complex64 [tokens, head_dim / 2], for [picture, caption]; the caption starts at position 1."""
    grid = torch.stack(
        torch.meshgrid(torch.tensor([caption_length + 1]), torch.arange(height), torch.arange(width), indexing="ij"), -1
    ).flatten(0, 2)
    words = torch.zeros(caption_length, 3, dtype=torch.long)
    words[:, 0] = torch.arange(1, caption_length + 1)
    return model.rope_embedder(torch.cat([grid, words]).to(device)).to(device)


def _linear(x: torch.Tensor, layer: torch.nn.Linear, dtype: torch.dtype) -> torch.Tensor:
    bias = None if layer.bias is None else layer.bias.to(dtype)
    return F.linear(x.to(dtype), layer.weight.to(dtype), bias)


class _RMSNorm(torch.autograd.Function):
    """RMS norm with its gradient written out: half the passes over memory of the chain that autograd would record."""

    @staticmethod
    def forward(ctx, x, weight, eps: float):
        """x [..., C] -> float32 of the same shape."""
        inverse = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        inverse = (inverse.square_() / x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).mul_(weight)

    @staticmethod
    def backward(ctx, gradient):
        """Gradients of x and weight."""
        x, weight, inverse = ctx.saved_tensors
        normed = x * inverse
        for_weight = (gradient * normed).flatten(0, -2).sum(0)
        gradient = gradient * weight
        mean = (gradient * normed).mean(-1, keepdim=True)
        return (gradient - normed.mul_(mean)).mul_(inverse).to(x.dtype), for_weight, None


def _norm(x: torch.Tensor, layer) -> torch.Tensor:
    return _RMSNorm.apply(x, layer.weight, layer.eps)


def _rotate(x: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
    """Rotate pairs of neighbouring numbers; x float32 [B, tokens, heads, head_dim], `rope` from `rope_table`."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rope.unsqueeze(1)).flatten(-2)


def block_forward(block, x: torch.Tensor, rope: torch.Tensor, t: torch.Tensor | None, dtype: torch.dtype):
    """One ZImageTransformerBlock on x [B, tokens, dim] in float32; matrices multiply in `dtype`."""
    attention, feed_forward = block.attention, block.feed_forward
    if t is not None:
        modulation = F.linear(t, block.adaLN_modulation[0].weight, block.adaLN_modulation[0].bias).unsqueeze(1)
        scale1, gate1, scale2, gate2 = modulation.chunk(4, dim=2)
        scale1, scale2, gate1, gate2 = 1 + scale1, 1 + scale2, gate1.tanh(), gate2.tanh()
    else:
        scale1 = scale2 = gate1 = gate2 = 1.0
    h = (_norm(x, block.attention_norm1) * scale1).to(dtype)
    q, k, v = (_linear(h, m, dtype).unflatten(-1, (attention.num_heads, -1)) for m in
               (attention.to_q, attention.to_k, attention.to_v))  # fmt: skip
    q, k = _rotate(_norm(q, attention.norm_q), rope).to(dtype), _rotate(_norm(k, attention.norm_k), rope).to(dtype)
    h = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)
    x = x + gate1 * _norm(_linear(h.flatten(2), attention.to_out[0], dtype), block.attention_norm2)
    h = (_norm(x, block.ffn_norm1) * scale2).to(dtype)
    h = F.silu(_linear(h, feed_forward.w1, dtype)) * _linear(h, feed_forward.w3, dtype)
    return x + gate2 * _norm(_linear(h, feed_forward.w2, dtype), block.ffn_norm2)


def forward(
    model: torch.nn.Module,
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
    batch, channels, height, width = latents.shape
    h, w = height // 2, width // 2
    tokens = h * w  # a multiple of 32, so the picture needs no padding
    frequencies = model.t_embedder.timestep_embedding(1000 - 1000 * sigma, model.t_embedder.frequency_embedding_size)
    t = model.t_embedder.mlp(frequencies)
    x = latents.view(batch, channels, h, 2, w, 2).permute(0, 2, 4, 3, 5, 1).reshape(batch, tokens, -1)
    x = F.linear(x, model.all_x_embedder["2-1"].weight, model.all_x_embedder["2-1"].bias)
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
    final = model.all_final_layer["2-1"]
    x = x[:, :tokens]
    x = F.layer_norm(x, (x.shape[-1],), eps=final.norm_final.eps) * (1 + final.adaLN_modulation(t)).unsqueeze(1)
    x = F.linear(x, final.linear.weight, final.linear.bias)
    x = x.view(batch, h, w, 2, 2, channels).permute(0, 5, 1, 3, 2, 4).reshape(batch, channels, height, width)
    return -x


# ---- captions --------------------------------------------------------------------------------------------------------


def padded(count: int) -> int:
    """Round a caption's length in tokens up as the model does."""
    return -(-count // CAPTION_MULTIPLE) * CAPTION_MULTIPLE


def stack_words(embeddings: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad embeddings [L, 128] of one padded length to [B, L, 128] and return them with their lengths [B]."""
    length = padded(max(len(e) for e in embeddings))
    words = torch.zeros(len(embeddings), length, embeddings[0].shape[1])
    for i, e in enumerate(embeddings):
        words[i, : len(e)] = e
    return words, torch.tensor([len(e) for e in embeddings])


@dataclass
class Pool:
    """Embedded captions of one padded length with the combination (a row of the latents) that each describes."""

    words: torch.Tensor  # bfloat16 [N, L, 128]
    lengths: torch.Tensor  # int64 [N]
    rows: torch.Tensor  # int64 [N]

    def draw(self, count: int, generator: torch.Generator, device):
        """Return (words float32 [count, L, 128], lengths, rows) of random captions."""
        i = torch.randint(len(self.rows), (count,), generator=generator)
        return self.words[i].float().to(device), self.lengths[i].to(device), self.rows[i]


def caption_pools(work: Path, device, per_combination: int = 8) -> dict[int, Pool]:
    """Embed captions of the training combinations once: pools of 32 and of 64 tokens; kept on disk."""
    cache = work / "captions.pt"
    if cache.exists():
        return {k: Pool(*v) for k, v in torch.load(cache, weights_only=True).items()}
    rng = random.Random(4)
    row_of = {c: i for i, c in enumerate(all_combinations())}
    training, _ = split()
    tokenizer, model = text_encoder.load_tokenizer(work), text_encoder.load(work, device)
    idle = text_encoder.idle_words(work)
    pools = {}
    for length, repeats, long in ((32, per_combination, 0.0), (64, 2, 1.0)):
        texts, rows = [], []
        for c in training * repeats:
            made = random_caption(c, rng, empty=0.10 if length == 32 else 0.0, long=long)
            texts.append(text_encoder.decorate(made, rng, idle).text)
            rows.append(row_of[c])
        embeddings = text_encoder.embed(model, tokenizer, texts, device)
        keep = [i for i, e in enumerate(embeddings) if padded(len(e)) == length]
        words, lengths = stack_words([embeddings[i].cpu() for i in keep])
        pools[length] = Pool(words.bfloat16(), lengths, torch.tensor([rows[i] for i in keep]))
        logger.info("captions of up to %d tokens: %d", length, len(keep))
    torch.save({k: (p.words, p.lengths, p.rows) for k, p in pools.items()}, cache)
    return pools


# ---- training --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Schedule:
    """How long and how fast; the shares are of all steps."""

    steps: int = 3200
    batch: int = 24
    muon: float = 0.03
    adamw: float = 3e-3
    high_noise_share: float = 0.42  # first only sigma 0.88..1: plain text-to-picture regression
    falling_share: float = 0.30  # the rates fall to 5 % over the last part
    average_share: float = 0.12  # an exponential average over the very last part
    seed: int = 5


def rate(step: int, s: Schedule) -> float:
    """Return the factor on both learning rates: a short rise, a plateau, a fall to 5 %."""
    rest = (s.steps - step) / (s.falling_share * s.steps)
    return min(1.0, (step + 1) / 50) * min(1.0, 0.05 + 0.95 * rest)


def draw_sigma(count: int, high_noise: bool, generator: torch.Generator) -> torch.Tensor:
    """Return stratified noise levels [count]: uniform 0.88..1, or an eighth so and the rest sigmoid(1.1 N + 0.4)."""
    high_count = count if high_noise else count // 8
    u = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    high = 0.88 + 0.12 * u[:high_count] * count / high_count
    # sampling starts at sigma 1, where the sigmoid alone would hardly ever train
    u = u[torch.randperm(count, generator=generator)][high_count:].clamp(1e-4, 1 - 1e-4)
    return torch.cat([high, torch.sigmoid(1.1 * math.sqrt(2) * torch.erfinv(2 * u - 1) + 0.4)])


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


@dataclass
class Probe:
    """Fixed held-out captions with their latents, for the numbers watched during training."""

    words: torch.Tensor
    lengths: torch.Tensor
    wrong_words: torch.Tensor  # the same captions with another thing
    wrong_lengths: torch.Tensor
    latents: torch.Tensor
    noise: torch.Tensor

    @staticmethod
    def make(work: Path, latents: torch.Tensor, device, count: int = 48) -> Probe:
        """Take the first held-out combinations, each described in full."""
        row_of = {c: i for i, c in enumerate(all_combinations())}
        held_out = split()[1][:count]
        model, tokenizer = text_encoder.load(work, device), text_encoder.load_tokenizer(work)
        embedded = []
        for shift in (0, 1):
            shown = [replace(c, thing=held_out[i - shift].thing) for i, c in enumerate(held_out)]
            texts = [caption(c, "{a} on a {b} background") for c in shown]
            embedded += stack_words(text_encoder.embed(model, tokenizer, texts, device))
        noise = torch.randn((count, 16, 16, 16), generator=torch.Generator().manual_seed(6))
        rows = [row_of[c] for c in held_out]
        return Probe(*(x.to(device) for x in (*embedded, latents[rows], noise)))

    @torch.no_grad()
    def gap(self, predict) -> tuple[float, float]:
        """Return the x0 error at sigma 0.97 with the right caption and with one naming another thing."""
        sigma = torch.full((len(self.noise),), 0.97, device=self.noise.device)
        x = 0.03 * self.latents + 0.97 * self.noise
        errors = []
        for words, lengths in ((self.words, self.lengths), (self.wrong_words, self.wrong_lengths)):
            errors.append((x - 0.97 * predict(x, sigma, words, lengths) - self.latents).square().mean().item())
        return errors[0], errors[1]

    @torch.no_grad()
    def sample(self, predict, steps: int = 8, shift: float = 3.0) -> torch.Tensor:
        """Euler steps without guidance; returns latents."""
        u = torch.linspace(1, 0, steps + 1)
        sigmas = shift * u / (1 + (shift - 1) * u)
        x = self.noise
        for a, b in zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True):
            x = x + (b - a) * predict(x, torch.full((len(x),), a, device=x.device), self.words, self.lengths)
        return x


def write_sheet(work: Path, latents: torch.Tensor, target: Path, device, columns: int = 12) -> None:
    """Decode latents and write them as one PNG."""
    from PIL import Image

    with torch.no_grad():
        p = autoencoder.load(work, device).decoder(latents).clamp(-1, 1)
    rows = len(p) // columns
    p = p[: rows * columns].reshape(rows, columns, *p.shape[1:]).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    Image.fromarray(((p + 1) * 127.5).round().byte().cpu().numpy()).save(target)


def nearest_share(samples: torch.Tensor, truth: torch.Tensor, everything: torch.Tensor) -> float:
    """Share of samples whose nearest picture among all latents is the described one."""
    distances = torch.cdist(samples.flatten(1), everything.flatten(1))
    best = distances.argmin(1)
    return (everything[best] - truth).flatten(1).abs().amax(1).lt(1e-6).float().mean().item()


def train_base(work: Path, device: torch.device, s: Schedule | None = None) -> Path:
    """Train Base, resuming from `work/base_state.pt`; saves `work/base.pt`; a finished file is kept."""
    s = s or Schedule()
    target, resume = work / "base.pt", work / "base_state.pt"
    if target.exists():
        return target
    dtype = matrix_dtype(device)
    latents = autoencoder.encode_all(work, device).to(device)
    pools, probe = caption_pools(work, device), Probe.make(work, latents, device)
    model = build().to(device)
    average = {k: v.clone() for k, v in model.state_dict().items()}
    optimizers = optimisers(model, s, dtype)
    generator = torch.Generator().manual_seed(s.seed)
    tables = {length: rope_table(model, length, 8, 8, device) for length in pools}
    first = 0
    if resume.exists():
        saved = torch.load(resume, map_location=device, weights_only=True)
        model.load_state_dict(saved["model"])
        average, first = saved["average"], saved["step"]
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        generator.set_state(saved["generator"].cpu())
        logger.info("resumed at step %d", first)

    def predict(x, sigma, words, lengths):
        return forward(model, x, sigma, words, lengths, tables[words.shape[1]], dtype)

    start, smooth = time.time(), 1.0
    for step in range(first, s.steps):
        high_noise = step < s.high_noise_share * s.steps
        factor = rate(step, s)
        for optimizer, base_rate in zip(optimizers, (s.muon, s.adamw), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = base_rate * factor
        # every eighth batch has long captions, which shift the picture's positions
        words, lengths, rows = pools[64 if step % 8 == 7 else 32].draw(s.batch, generator, device)
        x0 = latents[rows]
        noise = torch.randn(x0.shape, generator=generator).to(device)
        sigma = draw_sigma(s.batch, high_noise, generator).to(device)
        level = sigma.view(-1, 1, 1, 1)
        loss = (predict((1 - level) * x0 + level * noise, sigma, words, lengths) - (noise - x0)).square().mean()
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        smooth += 0.02 * (loss.item() - smooth)
        averaging = step >= (1 - s.average_share) * s.steps
        for key, value in model.state_dict().items():
            if averaging:
                average[key].lerp_(value, 0.005)
            elif step % 50 == 0 or step + 1 >= (1 - s.average_share) * s.steps:
                average[key].copy_(value)
        if (step + 1) % 25 == 0 or step < 3:
            speed = (step + 1 - first) * s.batch / (time.time() - start)
            logger.info("base step %d/%d loss %.4f, %.1f samples/s", step + 1, s.steps, smooth, speed)
        if (step + 1) % 200 == 0 or step + 1 == s.steps:
            report(work, model, predict, probe, latents, device, step + 1, s.steps, high_noise)
            saved = {"model": model.state_dict(), "average": average, "step": step + 1}
            saved |= {"optimizers": [o.state_dict() for o in optimizers], "generator": generator.get_state()}
            torch.save(saved, resume.with_suffix(".new"))
            resume.with_suffix(".new").replace(resume)
    torch.save(average, target)
    return target


def report(work, model, predict, probe, latents, device, step, steps, high_noise) -> None:
    """Log the numbers that tell whether identity is being learned, and write a sheet of samples."""
    right, wrong = probe.gap(predict)
    line = {"step": step, "of": steps, "x0_right": round(right, 3), "x0_wrong": round(wrong, 3)}
    if not high_noise or step % 600 == 0:
        samples = probe.sample(predict)
        line["mse"] = round((samples - probe.latents).square().mean().item(), 4)
        line["retrieval"] = round(nearest_share(samples, probe.latents, latents), 3)
        write_sheet(work, samples, work / f"sheet_{step:05d}.png", device)
    logger.info("base probe %s", json.dumps(line))
    with open(work / "history.jsonl", "a") as log:
        log.write(json.dumps(line) + "\n")
