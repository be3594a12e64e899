"""What each thing that ours leaves out would take: operations of an image with it undone, beside ours.

    .venv/bin/python bench/removals.py [--weights miniature wide] [--layers 3] [--steps 4]

Counted as torch counts, which takes no quiet machine. What saves memory, waiting or fetching and no operations, is not
in the table: docs/adr/0045 lists it.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from core import environment

environment.prepare_environment(os.environ)

import torch
from diffsynth.pipelines.z_image import ZImageUnit_PromptEmbedder

from bench import pipelines
from bench.few_layers import FewLayers
from bench.pipelines import Asked, Contestant, Weights
from diffusion.pipeline import Pipeline
from diffusion.prompt_encoder import EncodedPrompt

Undo = Callable[[Pipeline], AbstractContextManager[None]]


@contextmanager
def padded_prompts(built: Pipeline) -> Iterator[None]:
    """Encode each prompt with its padding, as DiffSynth's unit does."""
    theirs = ZImageUnit_PromptEmbedder()

    def encode(prompt: str) -> EncodedPrompt:
        return EncodedPrompt(theirs.encode_prompt(built.pipe, prompt, built.pipe.device)[0])

    with patch.object(built.prompts, "_encode", encode):
        yield


@contextmanager
def last_layer(built: Pipeline) -> Iterator[None]:
    """Compute the text encoder's last layer."""
    layer: Any = built.pipe.text_encoder.model.layers[-1]
    ours = layer.__dict__.pop("forward")
    try:
        yield
    finally:
        layer.forward = ours


@contextmanager
def prompts_each_step(built: Pipeline) -> Iterator[None]:
    """Refine the prompts in each step; what is refined has the right shape alone, which is all that counts."""
    predict, width = built.denoiser.predict, built.pipe.dit.cap_embedder[1].in_features
    steps: list[int] = []

    def again(
        latents: torch.Tensor, timestep: torch.Tensor, captions: Sequence[torch.Tensor], control: Any = None
    ) -> Any:
        for caption in captions if steps else ():  # the first step's is counted where it is done
            built.denoiser.refined(torch.zeros(caption.shape[1], width, dtype=caption.dtype))
        steps.append(1)
        return predict(latents, timestep, captions, control)

    with patch.object(built.denoiser, "predict", again):
        yield


@contextmanager
def halves_apart(built: Pipeline) -> Iterator[None]:
    """Compute each half of a guided step on its own."""
    predict = built.denoiser.predict

    def apart(
        latents: torch.Tensor, timestep: torch.Tensor, captions: Sequence[torch.Tensor], control: Any = None
    ) -> Any:
        return [predict(latents, timestep, [caption], control)[0] for caption in captions]

    with patch.object(built.denoiser, "predict", apart):
        yield


@contextmanager
def control_each_step(built: Pipeline) -> Iterator[None]:
    """Embed the control image in each step."""
    predict, contexts = built.denoiser.predict, []
    control = built.denoiser.control
    steps: list[int] = []

    def seen(context: torch.Tensor, scale: float) -> Any:
        contexts.append(context)
        return control(context, scale)

    def again(
        latents: torch.Tensor, timestep: torch.Tensor, captions: Sequence[torch.Tensor], given: Any = None
    ) -> Any:
        if given is not None and steps:
            control(contexts[-1], 1.0)
        steps.append(1)
        return predict(latents, timestep, captions, given)

    with patch.object(built.denoiser, "control", seen), patch.object(built.denoiser, "predict", again):
        yield


@contextmanager
def prompts_forgotten(built: Pipeline) -> Iterator[None]:
    """Encode and refine a prompt for each seed."""
    built.prompts._kept.clear()
    built.denoiser._captions.clear()
    yield


@contextmanager
def images_forgotten(built: Pipeline) -> Iterator[None]:
    """Encode images, also the blank one, for each seed."""
    built.encoded_images._kept.clear()
    yield


FIRST: Mapping[str, Undo] = {  # what the first seed is spared
    "prompts padded to 512 tokens": padded_prompts,
    "text encoder's last layer": last_layer,
    "prompts refined in each step": prompts_each_step,
    "halves of a guided step apart": halves_apart,
    "control image embedded in each step": control_each_step,
}
SECOND: Mapping[str, Undo] = {  # what another seed of the same is spared
    "prompts encoded and refined again": prompts_forgotten,
    "images encoded again": images_forgotten,
}
Table = dict[str, dict[str, float]]  # operations by what is undone, "ours" first, and by image


def cases(side: int, steps: int) -> list[Asked]:
    """Return an image of every mode."""
    return [
        Asked(side, steps),
        Asked(side, steps, cfg=4.0),
        Asked(side, steps, mode="controlnet"),
        Asked(side, steps, mode="upscale"),
    ]


def counted(weights: Weights, asked: Sequence[Asked]) -> tuple[Table, Table]:
    """Return what images take with each thing undone: of the first seed, and of another."""
    built = pipelines.for_counting(weights)
    ours, prompts = pipelines.ours(built), pipelines.prompts()
    plain = {each.name: each for each in pipelines.others(built, weights, built.dtype_name)}

    def new(case: Asked, contestant: Contestant) -> float:
        return pipelines.operations(contestant, dataclasses.replace(case, prompt=next(prompts)))["total"]

    def again(case: Asked) -> float:
        known = dataclasses.replace(case, prompt=known_prompt)
        return pipelines.operations(ours.second_seed(), known)["total"]

    first: Table = {name: {} for name in ("ours", *FIRST, *plain)}
    second: Table = {name: {} for name in ("ours", *SECOND)}
    for case in asked:
        known_prompt = next(prompts)
        pipelines.operations(ours, dataclasses.replace(case, prompt=known_prompt))
        built.encoded_images._kept.clear()
        first["ours"][case.title] = new(case, ours)
        for name, undo in FIRST.items():
            built.encoded_images._kept.clear()
            with undo(built):
                first[name][case.title] = new(case, ours)
        first |= {name: {**first[name], case.title: new(case, each)} for name, each in plain.items()}
        second["ours"][case.title] = again(case)
        for name, undo in SECOND.items():
            with undo(built):
                second[name][case.title] = again(case)
    return first, second


def markdown(table: Table) -> str:
    """Return a table: TFLOP of ours, and what else each image takes with something undone, by ours."""
    titles = list(table["ours"])
    lines = [f"| | {' | '.join(titles)} |", "|---" * (len(titles) + 1) + "|"]
    for name, taken in table.items():
        cells = [
            f"{taken[title] / 1e12:.4g} TFLOP" if name == "ours" else f"{taken[title] / table['ours'][title] - 1:+.2%}"
            for title in titles
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    """Count, and print both tables of each kind of weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", nargs="+", choices=["miniature", "wide"], default=["miniature", "wide"])
    parser.add_argument("--layers", type=int, default=3, help="of the real width's models")
    parser.add_argument("--steps", type=int, default=4)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        for name in args.weights:
            if name == "miniature":
                weights, side = pipelines.miniature(), 128
            else:
                weights, side = pipelines.wide(Path(folder), FewLayers(args.layers, args.layers)), 256
            print(f"## {weights.title.capitalize()}\n")
            for title, table in zip(
                ("The first seed", "Another"), counted(weights, cases(side, args.steps)), strict=True
            ):
                print(f"{title}:\n\n{markdown(table)}")


if __name__ == "__main__":
    main()
