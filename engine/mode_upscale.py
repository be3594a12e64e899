"""Upscale: a picture at twice its width and height, and what that will cost.

Real-ESRGAN enlarges by exactly 2; then, where the request wants it, Turbo draws the result again a little. torch is
imported with the first picture.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Generator, Hashable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from cachetools import LRUCache
from PIL import Image

from core.events import Stage, Step, TileDone
from core.messages import Message
from core.request import (
    UPSCALE_MAX,
    UPSCALE_SCALE,
    UPSCALER_OVERLAP,
    UPSCALERS,
    ResolvedUpscale,
    Upscale,
    Upscaler,
)
from core.sizes import IMAGE_SIZES, WeightsKind
from core.upload import Upload
from diffusion import lazy_imports, vae_tiles
from diffusion.device import DeviceKind
from diffusion.memory import MemoryPlan
from diffusion.vae_tiles import FACTOR
from engine.drawing import checked
from engine.estimate import Work
from engine.mode import Drawing, Drawn, Job, Mode, Prepared, Studio
from images import reading
from images.cache import Controls
from images.tiles import Tile, spans
from upscaler.weights import Source, find

if TYPE_CHECKING:
    from diffusion.pipeline import Picture, Pipeline

NETWORK = "upscaler.network"
ENLARGED_BYTES = 128 << 20  # of the pictures enlarged last: two and a half of the largest, which has 50 MB
TILE_STEP = 64  # so that a quarter of a tile, which neighbours share, is a whole number of tokens


class UpscaleMode(Mode[ResolvedUpscale]):
    """A picture at twice its width and height."""

    request = Upscale

    def prepare(
        self, request: ResolvedUpscale, kind: WeightsKind, controls: Controls
    ) -> Generator[Stage, None, Prepared]:
        """Decode the picture."""
        yield from ()
        opened = open_input(request.uploads["image"])
        return Prepared(size_after(opened.image.size), opened.image, opened.notes, {"image": opened.digest})

    def work(self, request: ResolvedUpscale, kind: WeightsKind, size: tuple[int, int], plan: MemoryPlan) -> Work:
        """Return what a request computes: the tiles of Real-ESRGAN, and those of the refinement."""
        before = (size[0] // UPSCALE_SCALE, size[1] // UPSCALE_SCALE)
        enlarging = operations(before, request.upscaler, plan.upscaler_tile)
        usual = Work(kind, 0, *size, encodes=True, upscaler=request.upscaler, enlarging=enlarging, field="image")
        if not request.steps_run:
            return usual
        tiles = _refinement_tiles(size, kind, plan)
        width, height = (FACTOR * (end - begin) for begin, end in (tiles[0].x, tiles[0].y))
        return replace(usual, steps=request.steps, tile=(width, height), tiles=len(tiles))

    def draw(self, studio: Studio, job: Job[ResolvedUpscale]) -> Drawing:
        """Enlarge a picture, and refine it where the request wants that."""
        request, kind, prepared = job.request, job.chosen.kind, job.prepared
        assert prepared.image is not None  # `prepare` decoded it
        pipeline = (yield from studio.load(job)) if request.denoise else None
        if not lazy_imports.is_loaded(NETWORK):
            yield Stage("starting")
        on, plan = studio.machine(request.mode, kind)
        image, source = yield from enlarge(prepared.image, request.upscaler, on.kind, plan)
        notes = [*prepared.notes]
        if pipeline is not None:
            image, picture = yield from refine(pipeline, image, request, kind, plan)
            notes += picture.notes
        notes += _notes(request, kind, source, image.size, plan)
        return Drawn(image, tuple(notes), prepared.inputs, {"upscaler": source.fingerprint})


def open_input(upload: Upload) -> reading.Opened:
    """Decode the picture of a request.

    Raises:
        RequestError: it cannot be used, or the result would be larger than UPSCALE_MAX a side.
    """
    return reading.decode(upload, longest=UPSCALE_MAX // UPSCALE_SCALE)


def size_after(size: tuple[int, int]) -> tuple[int, int]:
    """Return the width and height of what comes out for those of what goes in."""
    return size[0] * UPSCALE_SCALE, size[1] * UPSCALE_SCALE


@dataclass(frozen=True)
class Foreseen:
    """What a request will give and take, before it is run.

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


def tiles_of(size: tuple[int, int], side: int) -> int:
    """Return how many tiles of a side Real-ESRGAN enlarges a picture of this size in."""
    return math.prod(len(spans(length, side, UPSCALER_OVERLAP)) for length in size)


def operations(size: tuple[int, int], choice: Upscaler, side: int) -> float:
    """Return the floating-point operations of an enlargement, with what overlapping tiles do twice."""
    area = math.prod(min(length, side) for length in size) * tiles_of(size, side)
    return float(area * UPSCALERS[choice].operations)


def enlarge(
    image: Image.Image, choice: Upscaler, kind: DeviceKind, plan: MemoryPlan
) -> Generator[Stage | TileDone, None, tuple[Image.Image, Source]]:
    """Enlarge a picture to exactly twice its width and height; also returns the network that did it.

    One of those enlarged last is not enlarged again: another seed or prompt only refines it.
    """
    source = find(choice)
    yield Stage("loading", source.title)
    pixels = hashlib.sha256(image.tobytes()).digest()
    key = (image.size, pixels, source, kind, plan.upscaler_tile)  # all that it depends on
    if (kept := _enlarged.get(key)) is not None:
        return kept.copy(), source
    lazy_imports.load(NETWORK)
    import upscaler.network

    model = upscaler.network.load(source, kind)
    yield Stage(upscaler.network.STAGE, source.title)
    enlarged = yield from upscaler.network.enlarge(image, model, plan.upscaler_tile)
    _enlarged[key] = enlarged.copy()
    return enlarged, source


def _bytes_of(image: Image.Image) -> int:
    return image.width * image.height * len(image.getbands())


_enlarged: LRUCache[Hashable, Image.Image] = LRUCache(ENLARGED_BYTES, getsizeof=_bytes_of)


def shown_large(path: Path) -> Image.Image:
    """Enlarge a small picture file for the eye, on the processor: by the fast network, as much as that does at once.

    Raises:
        RequestError: the picture cannot be used.
        WeightsMissing: the network is not on this machine.
    """
    image, source = open_input(Upload.open(path)).image, find("fast")
    lazy_imports.load(NETWORK)
    import upscaler.network

    return upscaler.network.shown_large(image, upscaler.network.load(source, "cpu"))


def plain(image: Image.Image) -> Image.Image:
    """Enlarge a picture by Lanczos's filter, which adds nothing."""
    return image.resize(size_after(image.size), Image.Resampling.LANCZOS)


def plain_file(path: Path) -> Image.Image:
    """Enlarge a picture file by `plain`: what a result is compared with.

    Raises:
        RequestError: the picture cannot be used.
    """
    return plain(open_input(Upload.open(path)).image)


def refine(
    pipeline: Pipeline, image: Image.Image, request: ResolvedUpscale, kind: WeightsKind, plan: MemoryPlan
) -> Generator[Stage | Step | TileDone, None, tuple[Image.Image, Picture]]:
    """Draw an enlarged picture again, by a request that wants it; the size stays exactly what it is."""
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


def _refinement_tiles(size: tuple[int, int], kind: WeightsKind, plan: MemoryPlan) -> list[Tile]:
    """Return the tiles, in latents, in which a picture of this size is refined."""
    sizes = IMAGE_SIZES[kind]
    width, height = (max(-(-length // sizes.step) * sizes.step, sizes.minimum) for length in size)
    side = refinement_side((width, height), kind, plan) // FACTOR
    return vae_tiles.cut((width // FACTOR, height // FACTOR), side, side // vae_tiles.REDRAWN_SHARE)


def _notes(
    request: ResolvedUpscale, kind: WeightsKind, source: Source, size: tuple[int, int], plan: MemoryPlan
) -> list[Message]:
    """Return what was done to the picture, as far as the request itself does not say it.

    Args:
        request: as it was carried out.
        kind: of the weights that refine.
        source: of Real-ESRGAN.
        size: of the result.
        plan: that it was made by.
    """
    messages = [Message("upscaler", "Enlarged by {model}.", model=source.title)]
    if request.denoise:
        cut = len(_refinement_tiles(size, kind, plan))
        text = "Refined in {tiles} tiles from {part:.0%} of the schedule; steps: {steps}."
        if cut == 1:
            text = "Refined from {part:.0%} of the schedule; steps: {steps}."
        messages.append(Message("refined", text, tiles=cut, part=request.denoise, steps=request.steps))
        if kind == "mini":
            text = "The miniature knows flat icons, not photographs: refining one makes it flatter."
            messages.append(Message("miniature_refines", text))
    elif kind == "mini":
        text = "Not refined: the miniature, which knows flat icons only, would harm a photograph (denoise 0)."
        messages.append(Message("not_refined", text))
    else:
        messages.append(Message("not_refined", "Not refined (denoise 0)."))
    return messages
