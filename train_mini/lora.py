"""Trains the example LoRA: `python -m train_mini.lora` teaches the embedded Turbo to draw its things in gold.

Needs only the weights in `weights/mini`: the miniature draws the training pictures itself, and everything in front of
the background is recoloured. PEFT trains on the transformer's own forward, one picture at a time as DiffSynth's
own trainer does. The file says which transformer it belongs to: train it again whenever that one changes.
"""

from __future__ import annotations

import argparse
import logging
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import mini.config
from diffusion.memory import GIB, memory_plan
from diffusion.pipeline import Picture, Pipeline, Progress
from hub import checkpoint, inventory
from mini.prompt import complete

from .export import write_weights
from .loop import WORK, Training, trained

logger = logging.getLogger("train_mini.lora")

TARGET = mini.config.FOLDER / "loras" / "gold.safetensors"
SHEET = Path(__file__).parent.parent / "docs" / "lora.png"
BASE = f"{mini.config.TURBO_FOLDER.name}/{mini.config.TRANSFORMER_FILE}"  # as the file names it
LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "w1", "w2", "w3"]
SIGMA_SHIFT, TURBO_STEPS = 3.0, 8
# Dark, middle and bright gold, by the brightness of what is recoloured.
GOLD = np.array([[84, 50, 4], [226, 166, 28], [255, 246, 196]], dtype=np.float32)
SHOWN = ("a large fox on a black background", "a red apple on a blue background", "a small butterfly, green background")


@dataclass(frozen=True)
class Schedule:
    """How long and how fast."""

    pictures: int = 240
    steps: int = 500
    batch: int = 8
    rank: int = 8
    rate: float = 3e-3
    seed: int = 11


def gilded(picture: Image.Image) -> Image.Image:
    """Return a picture in which everything in front of the plain background is gold."""
    pixels = np.asarray(picture.convert("RGB"), dtype=np.float32)
    background = np.median(np.concatenate([pixels[:4].reshape(-1, 3), pixels[-4:].reshape(-1, 3)]), axis=0)
    cover = np.clip((np.abs(pixels - background).max(axis=2) - 12) / 40, 0, 1)[..., None]
    brightness = pixels @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
    inside = brightness[cover[..., 0] > 0.9]
    low, middle, high = np.percentile(inside, [5, 50, 95]) if inside.size else (0.0, 127.0, 255.0)
    # a thing in a single flat colour becomes plain gold, neither dark nor bright
    level = np.clip(0.55 + (brightness - middle) / max(high - low, 90), 0, 1)
    gold = np.stack([np.interp(level, [0, 0.5, 1], GOLD[:, channel]) for channel in range(3)], axis=2)
    return Image.fromarray((background * (1 - cover) + gold * cover).round().astype(np.uint8))


def prompts(count: int, seed: int) -> list[str]:
    """Return captions of single things on plain backgrounds, from what the miniature knows."""
    known, rng = mini.config.vocabulary(), random.Random(seed)
    things, backgrounds = list(known["things"].values()), list(known["backgrounds"].values())
    made = []
    for _ in range(count):
        thing, background = rng.choice(rng.choice(things)), rng.choice(rng.choice(backgrounds))
        size = rng.choice(["", "", "large ", "small "])
        made.append(rng.choice(["a {s}{t} on a {b} background", "{s}{t}, {b} background"]).format(
            s=size, t=thing, b=background
        ))  # fmt: skip
    return made


def load() -> Pipeline:
    """Return the miniature's pipeline with Turbo."""
    built = Pipeline("cpu", torch.float32, memory_plan("cpu", GIB, None, GIB, "generate", "mini"))
    list(built.load(inventory.choose("mini", "generate", "turbo"), "turbo"))
    return built


def start(built: Pipeline, prompt: str, seed: int, steps: int = TURBO_STEPS, **more: Any) -> Progress:
    """Return a drawing by Turbo at the miniature's size, with what else the pipeline is to use."""
    return built.text_to_image(
        prompt=prompt, negative_prompt="", steps=steps, cfg=1.0, seed=seed,
        width=mini.config.NATIVE_SIZE, height=mini.config.NATIVE_SIZE, **more,
    )  # fmt: skip


def finished(drawing: Progress) -> Image.Image:
    """Return the picture of a drawing, after running it to its end."""
    while True:
        try:
            next(drawing)
        except StopIteration as done:
            picture: Picture = done.value
            return picture.image


def training_set(built: Pipeline, s: Schedule) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return pairs of a gilded picture's latents [1, 16, 16, 16] and its prompt's embedding [tokens, width]."""
    found = []
    for index, prompt in enumerate(prompts(s.pictures, s.seed)):
        prompt = complete(prompt, index + 1).text  # as the app draws it
        golden = gilded(finished(start(built, prompt, seed=index + 1)))
        with torch.no_grad():
            latents = built.pipe.vae_encoder(built.pipe.preprocess_image(golden))
            found.append((latents, built.prompts.encode(prompt).embedding))
        if (index + 1) % 40 == 0:
            logger.info("%d of %d training pictures", index + 1, s.pictures)
    return found


def train(built: Pipeline, s: Schedule, work: Path, target: Path) -> None:
    """Train on the pipeline's transformer and write the LoRA; the transformer is left with it inside."""
    from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model

    examples = training_set(built, s)
    torch.manual_seed(s.seed)
    config = LoraConfig(r=s.rank, lora_alpha=s.rank, target_modules=LAYERS)
    transformer = inject_adapter_in_model(config, built.pipe.dit)
    parameters = [
        parameter
        for name, parameter in transformer.named_parameters()
        if parameter.requires_grad_("lora_" in name).requires_grad
    ]
    optimizer = torch.optim.AdamW(parameters, lr=s.rate, weight_decay=0.0)
    generator = torch.Generator().manual_seed(s.seed)

    def loss(step: int) -> torch.Tensor:
        latents, words = examples[int(torch.randint(len(examples), (1,), generator=generator))]
        u = torch.rand((), generator=generator)
        if torch.rand((), generator=generator) < 0.7:  # the noise levels that eight steps visit
            u = (1 + torch.randint(TURBO_STEPS, (), generator=generator)) / TURBO_STEPS
        sigma = SIGMA_SHIFT * u / (1 + (SIGMA_SHIFT - 1) * u)
        noise = torch.randn(latents.shape, generator=generator)
        predicted: torch.Tensor = built.pipe.model_fn(
            dit=transformer,
            latents=(1 - sigma) * latents + sigma * noise,
            timestep=1000 * sigma.reshape(1),
            prompt_embeds=[words],
        )
        return (predicted - (noise - latents)).square().mean() / s.batch

    def rate(step: int) -> float:
        return s.rate * min(1, (step + 1) / 20, 2 * (1 - step / s.steps))

    model = torch.nn.ParameterList(parameters)
    with trained(Training(work / "lora.pt", model, [(optimizer, rate)], s.steps, loss, [generator], parts=s.batch)):
        export(get_peft_model_state_dict(transformer), target)


def export(state: dict[str, torch.Tensor], target: Path) -> Path:
    """Write the LoRA as ComfyUI and DiffSynth name it, in bfloat16, with the digest of what it was trained on."""
    turbo = inventory.choose("mini", "generate", "turbo").files["turbo"]
    metadata = {
        "modelspec.title": "Gold",
        "modelspec.architecture": "z-image",
        "base_model": "the embedded miniature of Z-Image-Turbo",
        "trained_on": BASE,
        "trained_on_fingerprint": checkpoint.fingerprint(turbo),
    }
    write_weights(target, {f"diffusion_model.{name}": tensor for name, tensor in state.items()}, **metadata)
    return target


def sheet(target: Path, path: Path) -> None:
    """Write a picture of some things without the LoRA (above) and with it (below), through the app's own way."""
    import lora.file

    built = load()
    applied = built.loras.get(lora.file.read(target))
    rows = []
    for strength in (0.0, 1.0):
        row = []
        for seed, prompt in enumerate(SHOWN, 3):
            with built.lora(applied, strength):
                row.append(np.asarray(finished(start(built, complete(prompt, seed).text, seed))))
        rows.append(np.concatenate(row, axis=1))
    Image.fromarray(np.concatenate(rows)).resize((768, 512), Image.Resampling.LANCZOS).save(path, optimize=True)


def main() -> None:
    """Parse the command line, train, write the file and the picture."""
    parser = argparse.ArgumentParser(prog="python -m train_mini.lora", description=__doc__)
    parser.add_argument("--out", type=Path, default=TARGET, help="the LoRA's file (default: %(default)s)")
    parser.add_argument("--sheet", type=Path, default=SHEET, help="the picture that shows it (default: %(default)s)")
    parser.add_argument("--work", type=Path, default=WORK, help="the training's folder (default: %(default)s)")
    parser.add_argument("--pictures", type=int, default=Schedule.pictures, help="training pictures")
    parser.add_argument("--steps", type=int, default=Schedule.steps, help="training steps")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    arguments.work.mkdir(parents=True, exist_ok=True)
    schedule = Schedule(pictures=arguments.pictures, steps=arguments.steps)
    train(load(), schedule, arguments.work, arguments.out)
    sheet(arguments.out, arguments.sheet)
    logger.info("wrote %s, %d bytes, and %s", arguments.out, arguments.out.stat().st_size, arguments.sheet)


if __name__ == "__main__":
    main()
