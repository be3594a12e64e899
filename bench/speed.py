"""How long a visitor waits: the page, the first picture, a warm one, and that against two other pipelines.

    .venv/bin/python bench/speed.py [--runs 5]

Why: these are the waits that somebody on a laptop feels. Seconds depend on the machine, so what counts are the ratios:
ours against DiffSynth's own `pipe(...)` and against diffusers, in turn in one process, on the same miniature.
Prints a table, and all figures as JSON on the last line.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

PROMPT = "a red apple on a blue background"


def seconds(work: Callable[[], object]) -> float:
    """Return the wall seconds that `work` takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def start_to_page() -> float:
    """Return the seconds from starting the command to the page's first answer."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = time.perf_counter()
    server = subprocess.Popen(
        [sys.executable, ROOT / "cli.py", "serve", "--port", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/") as answer:
                    answer.read()
                return time.perf_counter() - started
            except urllib.error.URLError:
                if server.poll() is not None:
                    raise RuntimeError("the server stopped before it answered") from None
                time.sleep(0.05)
    finally:
        server.terminate()
        server.wait()


def first_image(folder: Path) -> float:
    """Return the seconds of a command that draws one image, set-up excluded."""
    command: list[str | Path] = [sys.executable, ROOT / "cli.py", "generate", PROMPT, "--seed", "7"]
    command += ["--weights", "mini", "--out", folder / "first.png"]
    return seconds(lambda: subprocess.run(command, check=True, capture_output=True))


def warm_images(runs: int) -> dict[str, list[float]]:
    """Return the seconds of warm images with ours, DiffSynth's own call and diffusers, run in turn."""
    from core import environment

    environment.prepare_environment(os.environ)
    import torch
    from diffsynth.pipelines.z_image import ZImageUnit_PromptEmbedder
    from transformers import AutoTokenizer, Qwen3Model

    from core.request import TextToImage
    from engine import Engine, Settings
    from engine.worker import LocalWorker
    from hub import parts

    diffusers: Any = importlib.import_module("diffusers")  # loads its names lazily, which hides their types
    worker = LocalWorker(Settings(weights="mini", device="cpu"))
    engine = Engine(worker=worker)
    requests = {model: TextToImage.parse(prompt=PROMPT, seed=7, model=model) for model in ("turbo", "base")}
    for request in requests.values():
        engine.draw(request)
    pipeline, plain_unit = worker.pipeline, ZImageUnit_PromptEmbedder()
    assert pipeline is not None  # it has drawn
    pipe = pipeline.pipe
    turbo = parts.MINI_ROOT / "Z-Image-Turbo"
    diffusers_pipe = diffusers.ZImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(turbo / "scheduler"),
        vae=None,
        text_encoder=Qwen3Model.from_pretrained(turbo / "text_encoder", dtype=torch.float32),
        tokenizer=AutoTokenizer.from_pretrained(turbo / "tokenizer"),
        transformer=diffusers.ZImageTransformer2DModel.from_pretrained(
            turbo / "transformer", torch_dtype=torch.float32
        ),
    )
    diffusers_pipe.set_progress_bar_config(disable=True)

    def diffsynth_call() -> None:
        """Draw with DiffSynth's pipeline as it comes, padding included; only its fp32 crash is fixed."""
        ours = pipe.units[1]
        pipe.units[1] = plain_unit
        pipe.dit = pipeline.transformers["turbo"]
        pipe(prompt=PROMPT, seed=7, height=128, width=128, num_inference_steps=8, progress_bar_cmd=iter)
        pipe.units[1] = ours

    def diffusers_call() -> None:
        """Draw latents with diffusers; decoding is left out, since the autoencoder is our own."""
        diffusers_pipe(
            prompt=PROMPT, height=128, width=128, num_inference_steps=8, guidance_scale=0, output_type="latent"
        )

    contestants: dict[str, Callable[[], object]] = {
        "warm picture, Turbo, 8 steps": lambda: engine.draw(requests["turbo"]),
        "DiffSynth's own call, Turbo, 8 steps": diffsynth_call,
        "diffusers, Turbo, 8 steps, latents only": diffusers_call,
        "warm picture, Base, 25 steps": lambda: engine.draw(requests["base"]),
    }
    taken: dict[str, list[float]] = {name: [] for name in contestants}
    for run in range(runs + 1):
        for name, work in contestants.items():
            once = seconds(work)
            if run:  # the first of each warms up
                taken[name].append(once)
    return taken


def main() -> None:
    """Measure everything and print it."""
    import tempfile

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="counted runs of each; the median is reported")
    runs = parser.parse_args().runs
    with tempfile.TemporaryDirectory() as folder:
        taken = {
            "start to reachable page": [start_to_page() for _ in range(runs)],
            "first picture of a process": [first_image(Path(folder)) for _ in range(runs)],
            **warm_images(runs),
        }
    medians = {name: statistics.median(times) for name, times in taken.items()}
    ours = medians["warm picture, Turbo, 8 steps"]
    for name, times in taken.items():
        print(f"{name:42} {medians[name]:7.3f} s  (from {min(times):.3f} to {max(times):.3f})")
    ratios = {name: medians[name] / ours for name in medians if name.startswith(("DiffSynth", "diffusers"))}
    for name, ratio in ratios.items():
        print(f"{name} takes {ratio:.2f} times ours")
    print(json.dumps({"runs": runs, "median_seconds": medians, "times_ours": ratios}))


if __name__ == "__main__":
    main()
