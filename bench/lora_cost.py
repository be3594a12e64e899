"""What a step costs with a LoRA, worn in either way, beside a step without one.

    .venv/bin/python bench/lora_cost.py [--device auto] [--tokens N] [--rank 16] [--runs 5]

Why: docs/adr/0010 chooses between changed copies of weights and hooks by this. Seconds depend on the machine; the
ratios are measured in turn in one process. `block` is one block of the real transformer's width with random numbers:
the transformer is 34 of them. `miniature` is the embedded model, whose operations are so small that their number is
what counts. Prints JSON on the last line.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from core import environment
from diffusion import device

environment.prepare_environment(os.environ)

import torch
from diffsynth.models.z_image_dit import RopeEmbedder, ZImageDiT, ZImageTransformerBlock

import mini.config
from lora.adapter import Adapter, Change, applied

WAYS = {"none": None, "copies": 1 << 40, "hooks": 0}  # bytes of room for copies
Figures = dict[str, dict[str, float]]  # by what is measured, and by way
LAYERS = [f"attention.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")]
LAYERS += [f"feed_forward.{name}" for name in ("w1", "w2", "w3")]


def random_lora(model: torch.nn.Module, blocks: list[str], rank: int) -> Adapter:
    """Return a LoRA of a rank in every attention and feed-forward layer of some blocks."""
    changes = []
    for name in (f"{block}.{layer}" for block in blocks for layer in LAYERS):
        rows, columns = model.get_parameter(f"{name}.weight").shape
        parts = {"down": torch.randn(rank, columns) / columns**0.5, "up": torch.randn(rows, rank) / 100}
        changes.append(Change((name,), "LoRA", 1.0, parts))
    return Adapter(None, None, tuple(changes))  # type: ignore[arg-type]  # it comes from no file


def measure(
    step: Callable[[], None], model: torch.nn.Module, adapter: Adapter, on: torch.device, dtype: torch.dtype, runs: int
) -> Figures:
    """Return seconds for each way, medians of runs in turn, and what applying it takes."""
    taken: dict[str, list[float]] = {way: [] for way in (*WAYS, "putting on copies", "putting on hooks")}
    # Seconds of this process's own on the CPU, so that other programs do not count.
    clock = time.process_time if on.type == "cpu" else time.perf_counter

    def now() -> float:
        if on.type == "cuda":
            torch.cuda.synchronize()
        return clock()

    for run in range(runs + 1):
        for way, room in WAYS.items():
            began = now()
            with applied(model, adapter, 0.8, room, dtype) if room is not None else nullcontext():
                applying, entered = now() - began, now()
                step()
                if run:  # the first one warms up
                    taken[way].append(now() - entered)
                    if room is not None:
                        taken[f"putting on {way}"].append(applying)
    medians = {way: statistics.median(seconds) for way, seconds in taken.items()}
    return {
        "seconds": {way: round(seconds, 4) for way, seconds in medians.items()},
        "times none": {way: round(medians[way] / medians["none"], 3) for way in ("copies", "hooks")},
    }


def block(on: torch.device, dtype: torch.dtype, tokens: int, rank: int, runs: int) -> Figures:
    """Measure one block of the real width."""
    with on:
        model = torch.nn.Module()
        layer = ZImageTransformerBlock(0, 3840, 30, 30, 1e-5, True).to(dtype).requires_grad_(False)
        model.layers = torch.nn.ModuleList([layer])
        x, t = torch.randn(1, tokens, 3840, dtype=dtype), torch.randn(1, 256, dtype=dtype)
    positions = torch.zeros(tokens, 3, dtype=torch.long)
    positions[:, 0] = torch.arange(tokens) % 1024
    rope = RopeEmbedder(axes_dims=[32, 48, 48], axes_lens=[1024, 512, 512])(positions).unsqueeze(0).to(on)

    def step() -> None:
        layer(x=x, attn_mask=None, freqs_cis=rope, adaln_input=t)

    return measure(step, model, random_lora(model, ["layers.0"], rank), on, dtype, runs)


def miniature(on: torch.device, dtype: torch.dtype, rank: int, runs: int) -> Figures:
    """Measure a step of the miniature's transformer at its only size."""
    from diffsynth.pipelines.z_image import model_fn_z_image_turbo

    from diffusion.pipeline import follow_weight_dtype

    model = ZImageDiT(**mini.config.TRANSFORMER_CONFIG).to(on, dtype).requires_grad_(False)
    follow_weight_dtype(model.t_embedder)
    latents, words = torch.randn(1, 16, 16, 16), torch.randn(20, 128)
    latents, words = latents.to(on, dtype), words.to(on, dtype)
    time_step = torch.tensor([500.0], device=on, dtype=dtype)

    def step() -> None:
        for _ in range(8):
            model_fn_z_image_turbo(model, latents=latents, timestep=time_step, prompt_embeds=words)

    blocks = [f"layers.{index}" for index in range(6)] + ["noise_refiner.0", "context_refiner.0"]
    return measure(step, model, random_lora(model, blocks, rank), on, dtype, runs)


def main() -> None:
    """Measure both and print JSON last."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--tokens", type=int, help="of the block (default: 256 on a CPU, 4160 elsewhere: 1024 x 1024)")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    chosen = device.choose_device(arguments.device, "full")
    on, dtype = torch.device(chosen.kind), getattr(torch, chosen.dtype)
    tokens = arguments.tokens or (256 if on.type == "cpu" else 4160)
    torch.manual_seed(0)
    with torch.no_grad():
        found = {
            "device": f"{chosen.name}, {chosen.dtype}",
            "rank": arguments.rank,
            "tokens": tokens,
            "block": block(on, dtype, tokens, arguments.rank, arguments.runs),
            "miniature, 8 steps": miniature(on, dtype, arguments.rank, arguments.runs),
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
