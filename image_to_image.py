"""Image-to-image with the pipeline's transformer: a picture is made noisy to a degree and drawn again, in tiles.

A picture larger than the model draws well is cut into overlapping tiles, all of one noise. Each step's predictions are
blended before the step is taken (MultiDiffusion, Bar-Tal et al. 2023), so that neighbours never part; the VAE works on
the same tiles, blended too. One tile is the plain image-to-image of DiffSynth's own `__call__`.

Knows nothing of requests, files or fronts.
"""

from __future__ import annotations

from collections.abc import Generator

import numpy as np
import torch
from diffsynth.pipelines.z_image import ZImagePipeline, ZImageUnit_InputImageEmbedder
from PIL import Image

import tiles
from request import Stage, Step, TileDone

FACTOR = 8  # pixels to a latent, in each direction
PATCH = 16  # pixels to a token: the VAE's factor times the transformer's patch of 2
OVERLAP = 4  # tiles share at least a side / OVERLAP


class InputImageUnit(ZImageUnit_InputImageEmbedder):
    """DiffSynth's unit for the picture to start from, which under VRAM management asks for a model `vae`.

    No pipeline of Z-Image has one, so the encoder would stay where it waits, and fail.
    """

    def process(
        self, pipe: ZImagePipeline, input_image: Image.Image | None, noise: torch.Tensor
    ) -> dict[str, torch.Tensor | None]:
        """Return the latents to start from, and those of the picture."""
        if input_image is None:
            return {"latents": noise, "input_latents": None}
        pipe.load_models_to_device(self.onload_model_names)
        encoded = pipe.vae_encoder(pipe.preprocess_image(input_image))
        first = pipe.scheduler.timesteps[0]
        return {"latents": pipe.scheduler.add_noise(encoded, noise, timestep=first), "input_latents": encoded}


def redraw(
    pipe: ZImagePipeline, image: Image.Image, prompt_embeds: list[torch.Tensor], seed: int, side: int
) -> Generator[Stage | Step | TileDone, None, tuple[Image.Image, torch.Tensor]]:
    """Draw `image` again, as far as the schedule says that is set in `pipe.scheduler`.

    Args:
        pipe: with its models loaded.
        image: RGB, width and height multiples of 16.
        prompt_embeds: the encoded prompt.
        seed: of the CPU's generator.
        side: the most that a tile is wide and high, in pixels, a multiple of 64.

    Returns:
        RGB of the same size and its latents, as the generator's return value.
    """
    width, height = image.size
    seen = tiles.grid(image.size, side, side // OVERLAP, step=PATCH)
    cut = tiles.grid((width // FACTOR, height // FACTOR), side // FACTOR, side // OVERLAP // FACTOR, step=2)
    assert [(tile.x[0] * FACTOR, tile.y[0] * FACTOR) for tile in cut] == [(tile.x[0], tile.y[0]) for tile in seen]
    weights = [torch.from_numpy(tile.weight).to(pipe.device) for tile in cut]

    yield Stage("encoding", "picture")
    latents = torch.zeros((1, 16, height // FACTOR, width // FACTOR), device=pipe.device)
    pipe.load_models_to_device(["vae_encoder"])
    for index, (tile, place, weight) in enumerate(zip(seen, cut, weights, strict=True)):
        with torch.no_grad():
            part = pipe.preprocess_image(image.crop((tile.x[0], tile.y[0], tile.x[1], tile.y[1])))
            latents[_at(place)] += pipe.vae_encoder(part) * weight
        if len(cut) > 1:
            yield TileDone("encoding", index + 1, len(cut))
    shape = tuple(latents.shape)
    noise = pipe.generate_noise(shape, seed=seed, rand_device="cpu", rand_torch_dtype=pipe.torch_dtype)
    latents = pipe.scheduler.add_noise(latents.to(pipe.torch_dtype), noise, timestep=pipe.scheduler.timesteps[0])

    yield Stage("denoising", "picture")
    pipe.load_models_to_device(["dit"])
    steps = len(pipe.scheduler.timesteps)
    for step, timestep in enumerate(pipe.scheduler.timesteps):
        predicted = torch.zeros(shape, device=pipe.device)
        now = timestep.unsqueeze(0).to(dtype=pipe.torch_dtype, device=pipe.device)
        for index, (place, weight) in enumerate(zip(cut, weights, strict=True)):
            with torch.no_grad():
                one = pipe.model_fn(
                    dit=pipe.dit, latents=latents[_at(place)], timestep=now, prompt_embeds=prompt_embeds
                )
                predicted[_at(place)] += one * weight
            if len(cut) > 1:
                yield TileDone("denoising", step * len(cut) + index + 1, steps * len(cut))
        with torch.no_grad():
            latents = pipe.step(pipe.scheduler, latents, step, predicted.to(pipe.torch_dtype))
        yield Step(step + 1, steps)

    yield Stage("decoding")
    canvas = tiles.Canvas(image.size)
    pipe.load_models_to_device(["vae_decoder"])
    for index, (tile, place) in enumerate(zip(seen, cut, strict=True)):
        with torch.no_grad():
            part = pipe.vae_decoder(latents[_at(place)])[0].permute(1, 2, 0)
        values = ((part.float().clamp(-1, 1) + 1) * 127.5).cpu().numpy()
        canvas.add(tile, values)
        if len(cut) > 1:
            yield TileDone("decoding", index + 1, len(cut))
    pipe.load_models_to_device([])
    return Image.fromarray(np.ascontiguousarray(canvas.finished())), latents


def _at(tile: tiles.Tile) -> tuple[slice, ...]:
    return (slice(None), slice(None), slice(*tile.y), slice(*tile.x))
