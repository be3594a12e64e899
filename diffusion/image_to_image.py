"""Image-to-image with the pipeline's transformer: an image is made noisy to a degree and drawn again, in tiles.

An image larger than the model draws well is cut into overlapping tiles, all of one noise. Each step's predictions are
blended before the step is taken (MultiDiffusion, Bar-Tal et al. 2023), so that neighbours agree; the VAE works on the
same tiles, blended too. One tile is the plain image-to-image of DiffSynth's own `__call__`.
"""

from __future__ import annotations

from collections.abc import Generator

import torch
from diffsynth.pipelines.z_image import ZImagePipeline, ZImageUnit_InputImageEmbedder
from PIL import Image

from core.events import Stage, Step, TileDone
from core.messages import Message
from diffusion import vae_tiles
from diffusion.denoiser import Denoiser
from diffusion.encoded_images import EncodedImages, key_of
from diffusion.vae_tiles import FACTOR, REDRAWN_SHARE


class InputImageUnit(ZImageUnit_InputImageEmbedder):  # type: ignore[misc]  # DiffSynth brings no types
    """DiffSynth's unit for the image to start from, which works under VRAM management.

    DiffSynth's own asks there for a model `vae`, which no pipeline of Z-Image has: the encoder would not be loaded.
    """

    def process(
        self, pipe: ZImagePipeline, input_image: Image.Image | None, noise: torch.Tensor
    ) -> dict[str, torch.Tensor | None]:
        """Return the latents to start from, and those of the image."""
        if input_image is None:
            return {"latents": noise, "input_latents": None}
        pipe.load_models_to_device(self.onload_model_names)
        encoded = pipe.vae_encoder(pipe.preprocess_image(input_image))
        first = pipe.scheduler.timesteps[0]
        return {"latents": pipe.scheduler.add_noise(encoded, noise, timestep=first), "input_latents": encoded}


def redraw(
    pipe: ZImagePipeline,
    denoiser: Denoiser,
    kept: EncodedImages,
    image: Image.Image,
    embedding: torch.Tensor,
    seed: int,
    side: int,
) -> Generator[Stage | Step | TileDone, None, tuple[torch.Tensor, torch.Tensor]]:
    """Draw `image` again, over the part of the schedule that is set in `pipe.scheduler`.

    Args:
        pipe: with its models loaded.
        denoiser: of the same pipe.
        kept: where the image's latents are looked for, and kept.
        image: RGB, width and height multiples of 16.
        embedding: of the prompt, [tokens, width].
        seed: of the CPU's generator.
        side: the most that a tile is wide and high, in pixels, a multiple of 64.

    Returns:
        The decoded image, [1, 3, height, width] in about -1..1, and its latents, as the generator's return value.
    """
    width, height = (length // FACTOR for length in image.size)
    side, overlap = side // FACTOR, side // FACTOR // REDRAWN_SHARE
    cut = vae_tiles.cut((width, height), side, overlap)
    weights = [torch.from_numpy(tile.weight).to(pipe.device) for tile in cut]

    yield Stage("encoding", Message("stage", "picture"))
    key = key_of(pipe.vae_encoder, image, side, overlap)
    if (encoded := kept.get(key)) is None:
        pipe.load_models_to_device(["vae_encoder"])
        work = vae_tiles.encode(pipe.vae_encoder, pipe.preprocess_image(image), side, overlap)
        encoded = kept.put(key, (yield from _counted("encoding", work)))
    shape = tuple(encoded.shape)
    noise = pipe.generate_noise(shape, seed=seed, rand_device="cpu", rand_torch_dtype=pipe.torch_dtype)
    latents = pipe.scheduler.add_noise(encoded, noise, timestep=pipe.scheduler.timesteps[0])

    yield Stage("denoising", Message("stage", "picture"))
    pipe.load_models_to_device(["dit"])
    with torch.no_grad():
        caption = denoiser.caption(embedding)
    steps = len(pipe.scheduler.timesteps)
    for step, timestep in enumerate(pipe.scheduler.timesteps):
        predicted = torch.zeros(shape, device=pipe.device)
        now = timestep.unsqueeze(0).to(dtype=pipe.torch_dtype, device=pipe.device)
        for index, (tile, weight) in enumerate(zip(cut, weights, strict=True)):
            place = vae_tiles.at(tile)
            with torch.no_grad():
                (noise,) = denoiser.predict(latents[place], now, [caption])
                predicted[place] += noise * weight
            if len(cut) > 1:
                yield TileDone("denoising", step * len(cut) + index + 1, steps * len(cut))
        with torch.no_grad():
            latents = pipe.step(pipe.scheduler, latents, step, predicted.to(pipe.torch_dtype))
        yield Step(step + 1, steps)

    yield Stage("decoding")
    pipe.load_models_to_device(["vae_decoder"])
    decoded = yield from _counted("decoding", vae_tiles.decode(pipe.vae_decoder, latents, side, overlap))
    pipe.load_models_to_device([])
    return decoded, latents


def _counted(stage: str, work: vae_tiles.Work[torch.Tensor]) -> Generator[TileDone, None, torch.Tensor]:
    """Carry out the VAE's work, with an event after each of several tiles."""
    while True:
        try:
            # Grad mode belongs to a thread, and a generator may be driven by several.
            with torch.no_grad():
                done, total = next(work)
        except StopIteration as finished:
            whole: torch.Tensor = finished.value
            return whole
        if total > 1:
            yield TileDone(stage, done, total)
