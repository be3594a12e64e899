"""The Upscale mode around its two networks: what may go in, what it will cost, and the notes on what was done.

Real-ESRGAN enlarges by exactly 2; then, where the request wants it, Turbo draws the result again a little. torch is
imported with the first picture.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from core.events import Stage, Step, TileDone
from core.messages import Message
from core.request import UPSCALE_MAX, UPSCALE_SCALE, UPSCALER_OVERLAP, UPSCALERS, Upscale, Upscaler
from core.sizes import IMAGE_SIZES, WeightsKind
from diffusion import vae_tiles
from diffusion.device import DeviceKind
from diffusion.memory import PART_BYTES as PART_BYTES
from diffusion.memory import MemoryPlan
from diffusion.vae_tiles import FACTOR
from engine.drawing import checked
from engine.estimate import VAE_PER_PIXEL, Throughput, step_flops, work_seconds
from images import reading
from images.tiles import Tile, spans
from upscaler.weights import Source, find

if TYPE_CHECKING:
    from diffusion.pipeline import Picture, Pipeline

TILE_STEP = 64  # so that a quarter of a tile, which neighbours share, is a whole number of tokens
# Floating-point operations a second in convolutions, before anything was measured here. CPU: an AVX2 core or two, as
# measured for fp32; the others are guesses from data sheets at a third of the peak.
SPEED: dict[DeviceKind, float] = {"cpu": 80e9, "mps": 2e12, "cuda": 30e12}


def open_input(path: Path) -> reading.Opened:
    """Open the picture of a request.

    Raises:
        RequestError: it cannot be used, or the result would be larger than UPSCALE_MAX a side.
    """
    return reading.open_image(path, longest=UPSCALE_MAX // UPSCALE_SCALE)


def size_after(size: tuple[int, int]) -> tuple[int, int]:
    """Return the width and height of what comes out for those of what goes in."""
    return size[0] * UPSCALE_SCALE, size[1] * UPSCALE_SCALE


@dataclass(frozen=True)
class Estimate:
    """What a request will give and take.

    Attributes:
        before: width and height of what goes in, in pixels.
        after: of what comes out.
        tiles: of Real-ESRGAN.
        refined: tiles of the refinement; 0 where there is none.
        seconds: of both, without loading.
        measured: whether all that they rest on was measured on this machine.
    """

    before: tuple[int, int]
    after: tuple[int, int]
    tiles: int
    refined: int
    seconds: float
    measured: bool


def estimate(
    size: tuple[int, int],
    request: Upscale,
    kind: WeightsKind,
    plan: MemoryPlan,
    on: DeviceKind,
    seconds_per_operation: float | None,
    drawing: Throughput,
) -> Estimate:
    """Foresee an enlargement and its refinement.

    Args:
        size: of the picture that goes in.
        request: resolved.
        kind: of the weights that refine.
        plan: of this machine.
        on: its kind of device.
        seconds_per_operation: of Real-ESRGAN, as it was measured on this machine; None before that.
        drawing: what the device does in a second while it refines.
    """
    after, cut = size_after(size), _tiles(size, plan.upscaler_tile)
    seconds = operations(size, request.upscaler, plan.upscaler_tile) * (seconds_per_operation or 1 / SPEED[on])
    measured, refined = seconds_per_operation is not None, 0
    if request.denoise:
        assert request.steps is not None  # it is resolved
        refined, refining = _refinement(after, request.steps, kind, plan, drawing)
        seconds += refining
        measured = measured and drawing.source == "measured"
    return Estimate(size, after, cut, refined, seconds, measured)


def _refinement(
    size: tuple[int, int], steps: int, kind: WeightsKind, plan: MemoryPlan, drawing: Throughput
) -> tuple[int, float]:
    """Return how many tiles are refined, and how many seconds that takes."""
    cut = _refinement_cut(size, kind, plan)
    width, height = (FACTOR * (end - begin) for begin, end in (cut[0].x, cut[0].y))
    flops = steps * step_flops(kind, width, height)
    flops += width * height * sum(VAE_PER_PIXEL[kind])
    # Layers that do not stay on the device are fetched for each tile of each step.
    fetched = steps * PART_BYTES["transformer"] if kind == "full" and "transformer" not in plan.resident else 0
    return len(cut), len(cut) * work_seconds(flops, fetched, drawing)


def operations(size: tuple[int, int], choice: Upscaler, side: int) -> float:
    """Return the floating-point operations of an enlargement, with what overlapping tiles do twice."""
    area = math.prod(min(length, side) for length in size) * _tiles(size, side)
    return float(area * UPSCALERS[choice].operations)


def _tiles(size: tuple[int, int], side: int) -> int:
    return math.prod(len(spans(length, side, UPSCALER_OVERLAP)) for length in size)


def enlarge(
    image: Image.Image, choice: Upscaler, kind: DeviceKind, plan: MemoryPlan
) -> Generator[Stage | TileDone, None, tuple[Image.Image, Source]]:
    """Enlarge a picture to exactly twice its width and height; also returns the network that did it."""
    source = find(choice)
    yield Stage("loading", source.title)
    import upscaler.network

    model = upscaler.network.load(source, kind)
    yield Stage(upscaler.network.STAGE, source.title)
    enlarged = yield from upscaler.network.enlarge(image, model, plan.upscaler_tile)
    return enlarged, source


def plain(image: Image.Image) -> Image.Image:
    """Enlarge a picture by Lanczos's filter, which adds nothing."""
    return image.resize(size_after(image.size), Image.Resampling.LANCZOS)


def refine(
    pipeline: Pipeline, image: Image.Image, request: Upscale, kind: WeightsKind, plan: MemoryPlan
) -> Generator[Stage | Step | TileDone, None, tuple[Image.Image, Picture]]:
    """Draw an enlarged picture again, by a resolved request that wants it; the size stays exactly what it is."""
    assert request.steps is not None  # it is resolved
    assert request.denoise is not None
    sizes = IMAGE_SIZES[kind]
    padded = reading.pad(image, sizes.step, sizes.minimum)
    side = refinement_side(padded.image.size, kind, plan)
    draw = partial(
        pipeline.image_to_image,
        image=padded.image,
        prompt=request.prompt,
        steps=request.steps,
        denoise=request.denoise,
        seed=request.seed,
        side=side,
    )
    picture = yield from checked(pipeline, draw)
    return padded.restore(picture.image), picture


def refinement_side(size: tuple[int, int], kind: WeightsKind, plan: MemoryPlan) -> int:
    """Return how much is drawn at once: all of it within the model's native area, else tiles of its native side.

    Less where the memory plan wants the VAE in smaller pieces.
    """
    sizes, area = IMAGE_SIZES[kind], math.prod(size)
    if area <= min(sizes.native**2, plan.tiled_vae_above) and max(size) <= sizes.maximum:
        return -(-max(size) // TILE_STEP) * TILE_STEP
    most = min(sizes.native, math.isqrt(plan.tiled_vae_above))
    return max(most // TILE_STEP * TILE_STEP, TILE_STEP)


def _refinement_cut(size: tuple[int, int], kind: WeightsKind, plan: MemoryPlan) -> list[Tile]:
    """Return the tiles, in latents, in which a picture of this size is refined."""
    sizes = IMAGE_SIZES[kind]
    width, height = (max(-(-length // sizes.step) * sizes.step, sizes.minimum) for length in size)
    side = refinement_side((width, height), kind, plan) // FACTOR
    return vae_tiles.cut((width // FACTOR, height // FACTOR), side, side // vae_tiles.REDRAWN_SHARE)


def notes(
    request: Upscale, kind: WeightsKind, source: Source, size: tuple[int, int], plan: MemoryPlan
) -> list[Message]:
    """Say what was done to the picture, as far as the request itself does not.

    Args:
        request: resolved.
        kind: of the weights that refine.
        source: of Real-ESRGAN.
        size: of the result.
        plan: that it was made by.
    """
    said = [Message("upscaler", "Enlarged by {model}.", model=source.title)]
    if request.denoise:
        cut = len(_refinement_cut(size, kind, plan))
        text = "Refined in {tiles} tiles from {part:.0%} of the schedule; steps: {steps}."
        if cut == 1:
            text = "Refined from {part:.0%} of the schedule; steps: {steps}."
        said.append(Message("refined", text, tiles=cut, part=request.denoise, steps=request.steps))
        if kind == "mini":
            text = "The miniature knows flat icons, not photographs: refining one makes it flatter."
            said.append(Message("miniature_refines", text))
    elif kind == "mini":
        text = "Not refined: the miniature, which knows flat icons only, would harm a photograph (denoise 0)."
        said.append(Message("not_refined", text))
    else:
        said.append(Message("not_refined", "Not refined (denoise 0)."))
    return said
