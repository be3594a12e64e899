"""How much memory the real weights take on this machine, without having them: sparse files of full size.

    .venv/bin/python bench/memory.py --model turbo --width 128 --height 128

Writes the official names and shapes with no data (they take no room on the disk), loads them as the memory plan of
this machine asks, encodes a prompt, makes denoising steps and decodes: everything but an image, since the numbers are
all zero. What is reported is anonymous memory, which is what a process can run out of; pages of files that are read can
be dropped by the kernel. `--memory GB` plans for a machine with so much.
Prints JSON last.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).parent.parent))

from core import environment
from diffusion import device, memory

environment.prepare_environment(os.environ)

from hub import inventory
from hub.parts import MINI_ROOT, PARTS
from tests.helpers import comfyui, sparse

if TYPE_CHECKING:
    from core.request import Model
    from diffusion.pipeline import Pipeline


class Peak:
    """The largest anonymous memory of this process, looked at often (Linux)."""

    def __init__(self) -> None:
        self.bytes = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Watch inside the block."""
        self._thread.start()
        try:
            yield
        finally:
            self._done.set()
            self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.02):
            self.bytes = max(self.bytes, anonymous())


def anonymous() -> int:
    """Return this process's resident anonymous memory in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def held(built: Pipeline) -> dict[str, int]:
    """Return the bytes in bf16 of every part that a pipeline has loaded, wherever its weights wait."""
    pipe = built.pipe
    parts = {"text_encoder": [pipe.text_encoder], "vae": [pipe.vae_encoder, pipe.vae_decoder]}
    parts |= {"controlnet": [pipe.controlnet]} if pipe.controlnet is not None else {}
    parts |= {model: [transformer] for model, transformer in built.transformers.items()}
    return {
        part: 2 * sum(weight.numel() for model in models for weight in model.parameters())
        for part, models in parts.items()
    }


def main() -> None:
    """Measure one load and one drawing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=["turbo", "base", "both"], default="turbo")
    parser.add_argument("--mode", choices=["generate", "controlnet"], default="generate")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--height", type=int, default=128)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--memory", help="GB to plan with, in place of what is free")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", help="auto, bf16 or fp32")
    parser.add_argument(
        "--stored", help="how Turbo's transformer lies in one file: fp8, Q8_0, Q4_K or another of GGUF's"
    )
    parser.add_argument("--load-only", action="store_true")
    args = parser.parse_args()

    on = device.choose_device(args.device, "full", args.dtype)
    plan = memory.plan_for(on, args.mode, "full", memory_gb=args.memory)
    print("\n".join(map(str, (on.reason, *plan.reasons))), file=sys.stderr)
    peak = Peak()
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder, peak.watched():
        chosen = write(Path(folder), args.mode)
        if args.stored:
            chosen["turbo"].files["turbo"] = (write_packed(Path(folder), args.stored),)
        begun = anonymous()
        start = time.perf_counter()
        built = draw(args, plan, on, chosen, seconds)
        seconds["total"] = round(time.perf_counter() - start, 1)
    facts = {
        "device": str(on.reason),
        "plan": {**asdict(plan), "resident_bytes": plan.resident_bytes},
        "request": {name: getattr(args, name) for name in ("model", "mode", "width", "height", "steps")},
        "seconds": seconds,
        "anonymous_before_loading": begun,
        "anonymous_peak": peak.bytes,
        "largest_resident_set": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "loaded": held(built),
    }
    print(json.dumps(facts, default=str))


def write(folder: Path, mode: str) -> dict[str, inventory.Chosen]:
    """Write both models' files, and find them as the program does; return the choice for each model."""
    parts = {"turbo": "Tongyi-MAI/Z-Image-Turbo", "base": "Tongyi-MAI/Z-Image"}
    for part, repo in (*parts.items(), ("text_encoder", parts["turbo"]), ("vae", parts["turbo"])):
        sparse.write_part(folder / repo, part)
    sparse.write_part(folder / parts["turbo"], "tokenizer")
    sparse.write_part(folder / PARTS["controlnet"].repo, "controlnet")
    found = {}
    for model in parts:
        chosen = inventory.choose("full", mode if model == "turbo" else "generate", model, root=folder, environ={})
        # A tokenizer cannot be left out: the miniature's ids are ids of the real one too.
        chosen.files["tokenizer"] = (MINI_ROOT / "Z-Image-Turbo" / "tokenizer",)
        found[model] = chosen
    return found


def write_packed(folder: Path, stored: str) -> Path:
    """Write Turbo's transformer as one file in ComfyUI's names, packed; return its path."""
    path = folder / ("turbo.safetensors" if stored == "fp8" else "turbo.gguf")
    if stored == "fp8":
        sparse.write_sparse(path, comfyui.TRANSFORMER, "F8_E4M3")
    else:
        comfyui.write_gguf(path, comfyui.TRANSFORMER, stored)
    return path


def draw(
    args: argparse.Namespace,
    plan: memory.MemoryPlan,
    on: device.Device,
    chosen: dict[str, inventory.Chosen],
    seconds: dict[str, float],
) -> Pipeline:
    """Load and draw, noting how long each stage takes."""
    import torch
    from PIL import Image

    from diffusion.pipeline import Pipeline

    built = Pipeline(on.kind, getattr(torch, on.dtype), plan)
    models: tuple[Model, ...] = ("base", "turbo") if args.model == "both" else (args.model,)
    for model in models:
        start = time.perf_counter()
        for stage in built.load(chosen[model], model):
            print(f"{stage.name} {stage.detail}", file=sys.stderr)
        seconds[f"loading {model}"] = round(time.perf_counter() - start, 1)
        if args.load_only:
            continue
        size = (args.width, args.height)
        control = (Image.new("RGB", size), 1.0) if args.mode == "controlnet" else None
        drawing = built.text_to_image(
            prompt="a fox",
            negative_prompt="",
            steps=args.steps,
            cfg=1.0,
            width=args.width,
            height=args.height,
            seed=1,
            control=control,
        )
        start = time.perf_counter()
        for event in drawing:
            print(f"{event} after {time.perf_counter() - start:.1f} s, {anonymous() / 1e9:.2f} GB", file=sys.stderr)
        seconds[f"drawing {model}"] = round(time.perf_counter() - start, 1)
    return built


if __name__ == "__main__":
    main()
