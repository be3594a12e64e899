"""What a request will take, before it runs: operations, seconds and memory, and whether that is hopeless.

Pure arithmetic over the models' shapes. The operations agree with those counted by torch; seconds are operations over a
device's throughput, assumed from its kind until a run of the same process has measured it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from core.errors import RequestError
from core.request import MODELS, UPSCALE_SCALE, UPSCALERS, Request, Upscale, Upscaler
from core.sizes import IMAGE_SIZES as POSSIBLE
from core.sizes import WeightsKind
from diffusion.device import Device, DeviceKind, Dtype
from diffusion.memory import PART_BYTES, VAE_NUMBERS_PER_PIXEL, MemoryPlan

USUAL_TEXT_TOKENS = 96  # of a usual prompt with its chat template; padded to a multiple of 32
TILE_OVERLAP = (4 / 3) ** 2  # how much more is drawn where neighbouring tiles share a quarter of their side
HOPELESS_SECONDS = 12 * 3600  # beyond a night nobody means it


@dataclass(frozen=True)
class Shape:
    """A transformer's shape: width, layers (those for picture or text alone apart), and the feed-forward's width.

    `text_numbers` counts the text encoder's weights that each token meets; `control_layers` are the ControlNet's.
    """

    width: int
    layers: int
    refiners: int
    hidden: int
    text_numbers: int
    control_layers: int
    control_refiners: int

    @property
    def numbers_per_layer(self) -> int:
        """Weights of a layer that each token meets."""
        return 4 * self.width * self.width + 3 * self.width * self.hidden


# Full: diffsynth.models.z_image_dit and z_image_controlnet; the text encoder is Qwen3-4B without its embedding, of
# which the last layer is not used. Miniature: the three configurations in mini.py.
SHAPES: Mapping[WeightsKind, Shape] = {
    "full": Shape(3840, 30, 2, 10240, 3_600_000_000, 15, 2),
    "mini": Shape(192, 6, 1, 512, 1_000_000, 3, 1),
}
# Operations a pixel of the VAE (1024 x 1024: 10.5 TFLOP to decode, 4.9 to encode); the miniature's has 1/100 of that.
VAE_PER_PIXEL: Mapping[WeightsKind, tuple[float, float]] = {"full": (4.7e6, 1.0e7), "mini": (5e4, 1e5)}


def step_flops(
    kind: WeightsKind, width: int, height: int, *, control: bool = False, text: int = USUAL_TEXT_TOKENS
) -> float:
    """Return the floating-point operations of one forward pass of the transformer, twice its multiplications."""
    shape = SHAPES[kind]
    image = width * height // 256  # patches of 2 x 2 latents, each of 8 x 8 pixels
    together = image + text

    def layers(count: int, tokens: int) -> float:
        return count * (2.0 * shape.numbers_per_layer * tokens + 4.0 * shape.width * tokens**2)

    total = layers(shape.layers, together) + layers(shape.refiners, image) + layers(shape.refiners, text)
    if control:
        total += layers(shape.control_layers, together) + layers(shape.control_refiners, image)
        # a projection after each, and one before each of the two stacks
        projection = 2.0 * shape.width**2
        total += projection * ((shape.control_layers + 1) * together + (shape.control_refiners + 1) * image)
    return total


@dataclass(frozen=True)
class Work:
    """What a request computes, whoever asks for it.

    Attributes:
        kind: which weights.
        mode: "generate", "controlnet" or "upscale".
        steps: denoising steps that are run; 0 where an enlargement is not refined.
        width: of the result, in pixels; for "upscale" too.
        height: likewise.
        cfg: guidance; other than 1 runs the transformer twice in each step.
        upscaler: the network that enlarges, for "upscale".
    """

    kind: WeightsKind
    mode: str
    steps: int
    width: int
    height: int
    cfg: float = 1.0
    upscaler: Upscaler = "best"

    @classmethod
    def of(cls, request: Request, kind: WeightsKind, size: tuple[int, int]) -> Work:
        """Return the work of a resolved request whose result has this width and height."""
        upscaler = request.upscaler if isinstance(request, Upscale) else cls.upscaler
        return cls(kind, request.mode, request.steps_run, *size, _cfg(request), upscaler)

    @property
    def controlled(self) -> bool:
        """Whether the ControlNet runs."""
        return self.mode == "controlnet"

    @property
    def drawn_at_once(self) -> tuple[int, int]:
        """Width and height of what the transformer sees: an enlargement is refined in tiles of the native side."""
        native = POSSIBLE[self.kind].native
        in_tiles = self.mode == "upscale" and self.width * self.height > native**2
        return (native, native) if in_tiles else (self.width, self.height)

    @property
    def tiles(self) -> float:
        """How many of those are drawn, by area: neighbours share a quarter of a side."""
        share = self.width * self.height / math.prod(self.drawn_at_once)
        return 1.0 if share == 1 else share * TILE_OVERLAP

    @property
    def passes(self) -> float:
        """How often the transformer runs."""
        return self.steps * (1 if self.cfg == 1 else 2) * self.tiles

    @property
    def flops(self) -> float:
        """The floating-point operations of the whole request."""
        total = 0.0
        if self.mode == "upscale":
            total += UPSCALERS[self.upscaler].operations * self.width * self.height / UPSCALE_SCALE**2
            if not self.steps:
                return total
        encode, decode = VAE_PER_PIXEL[self.kind]
        total += (1 if self.cfg == 1 else 2) * 2.0 * SHAPES[self.kind].text_numbers * USUAL_TEXT_TOKENS
        total += self.passes * step_flops(self.kind, *self.drawn_at_once, control=self.controlled)
        per_pixel = decode if self.mode == "generate" else decode + encode
        return total + self.tiles * math.prod(self.drawn_at_once) * per_pixel


@dataclass(frozen=True)
class Throughput:
    """What a device does in a second, while it draws: operations, and bytes of weights fetched from elsewhere."""

    flops: float
    fetched: float
    source: Literal["assumed", "measured"] = "assumed"


# Useful operations a second in bf16 by compute capability: about half of what the card of that generation that most
# people have can do. A guess until the process has drawn its first picture.
_CUDA: Mapping[tuple[int, int], float] = {
    (7, 0): 8e12,  # fp32: no bf16 before 8.0
    (8, 0): 150e12,
    (8, 6): 35e12,
    (8, 9): 80e12,
    (9, 0): 400e12,
    (10, 0): 400e12,
    (12, 0): 100e12,
}
CPU_FLOPS_PER_CORE = 50e9  # measured: 100 GFLOP/s in fp32 on two AVX2 cores
CPU_SHARE = 0.65  # of the speed of matrix products alone that a step reaches: 100 of 152 GFLOP/s on the same cores
APPLE_FLOPS = 5e12
FETCHED: Mapping[DeviceKind, float] = {"cuda": 8e9, "mps": 2e9, "cpu": 1.5e9}  # pageable copies to a card; a disk


def assumed(device_kind: DeviceKind, *, capability: tuple[int, int] | None = None, cores: int = 1) -> Throughput:
    """Return what a device is taken to do before anything was measured on it."""
    if device_kind == "cuda":
        known = [of for of in _CUDA if of <= (capability or (8, 6))]
        return Throughput(_CUDA[max(known, default=(7, 0))], FETCHED["cuda"])
    flops = APPLE_FLOPS if device_kind == "mps" else CPU_FLOPS_PER_CORE * cores
    return Throughput(flops, FETCHED[device_kind])


def work_seconds(flops: float, fetched: float, device: Throughput) -> float:
    """Return how long work takes: what is computed, and what is fetched meanwhile, one after the other."""
    return flops / device.flops + fetched / device.fetched


@dataclass(frozen=True)
class Estimate:
    """What a request will take: seconds without loading, and the device's memory at its fullest, in bytes."""

    seconds: float
    bytes: int
    flops: float
    source: Literal["assumed", "measured"]

    def __str__(self) -> str:
        return f"about {duration_text(self.seconds)} and {self.bytes / 1e9:.1f} GB"


def foresee(work: Work, plan: MemoryPlan, dtype: Dtype, device: Throughput) -> Estimate:
    """Estimate a request under a memory plan."""
    fetched = 0.0
    if work.kind == "full" and work.steps:
        waiting = {part for part in plan.parts if part not in plan.resident}
        fetched = work.passes * sum(PART_BYTES[part] for part in waiting & {"transformer", "controlnet"})
        fetched += PART_BYTES["text_encoder"] if "text_encoder" in waiting else 0
    return Estimate(work_seconds(work.flops, fetched, device), peak_bytes(work, plan, dtype), work.flops, device.source)


PROGRAM_BYTES = 700_000_000  # torch, diffsynth and what they allocate before any weights; measured on a CPU
_LARGEST_FETCH = 151_936 * 2560  # numbers of the text encoder's embedding, the largest layer of all
_LIVE_PER_TOKEN = 14  # widths of a token alive inside a layer: the sum, its norm, three of the feed-forward, q, k, v


def peak_bytes(work: Work, plan: MemoryPlan, dtype: Dtype) -> int:
    """Return the device's memory at the fullest moment of a request, weights included, in bytes."""
    size = 4 if dtype == "float32" else 2
    shape, tokens = SHAPES[work.kind], math.prod(work.drawn_at_once) // 256 + USUAL_TEXT_TOKENS
    fetched = any(placement.at != "device" or placement.held != dtype for placement in plan.parts.values())
    # Read in one dtype and cast to another: both are there for a moment.
    encoding = _LARGEST_FETCH * (2 + size) if work.kind == "full" and fetched else 0
    denoising = tokens * shape.width * size * _LIVE_PER_TOKEN
    if work.controlled:  # every layer's hint is kept
        denoising += 2 * shape.control_layers * tokens * shape.width * size
    whole = math.prod(work.drawn_at_once)
    whole = whole if whole <= plan.tiled_vae_above else 768 * 768
    per_number = 4 if plan.vae_dtype == "float32" else 2
    decoding = whole * VAE_NUMBERS_PER_PIXEL * per_number + 16 * work.width * work.height
    if work.kind == "mini":
        return 100_000_000 + max(denoising, decoding // 20)
    return PROGRAM_BYTES + plan.resident_bytes + max(encoding, denoising, decoding)


def check(work: Work, plan: MemoryPlan, dtype: Dtype, device: Throughput) -> Estimate:
    """Return what a request will take, unless it is hopeless.

    Raises:
        RequestError: it cannot fit the memory, or would take more than HOPELESS_SECONDS; with the nearest that fits.
    """
    found = foresee(work, plan, dtype, device)
    size, field = f"{work.width} x {work.height}", "size" if work.mode == "generate" else "image"
    if found.bytes > plan.room:
        why = f"with {plan.room / 1e9:.1f} GB of memory ({size} needs about {found.bytes / 1e9:.1f} GB)"
        nearest = _smaller(work, plan, dtype)
        if nearest is None:
            raise RequestError(field, size, f"no size {why}")
        raise RequestError(field, size, f"up to about {nearest} {why}", nearest=nearest)
    if found.seconds > HOPELESS_SECONDS:
        one, two = (foresee(replace(work, steps=steps), plan, dtype, device).seconds for steps in (1, 2))
        possible = int(1 + (HOPELESS_SECONDS - one) // (two - one))
        took = f"{work.steps} would take about {duration_text(found.seconds)} on this device"
        if possible >= 1:
            raise RequestError("steps", work.steps, f"1 to {possible} at {size}: {took}", nearest=possible)
        raise RequestError(field, size, f"a smaller size: {took}")
    return found


class Forecast:
    """What requests will take on one device; a finished run replaces the assumed throughput with the measured one."""

    def __init__(self) -> None:
        self._measured: dict[WeightsKind, Throughput] = {}

    def throughput(self, kind: WeightsKind, on: Device) -> Throughput:
        """Return what a device does in a second, as measured where it was."""
        usual = assumed(on.kind, capability=on.capability, cores=os.cpu_count() or 1)
        if on.flops is not None:
            usual = replace(usual, flops=CPU_SHARE * on.flops)
        return self._measured.get(kind, usual)

    def check(
        self, request: Request, kind: WeightsKind, size: tuple[int, int], on: Device, plan: MemoryPlan
    ) -> Estimate:
        """Return what a resolved request will take, unless it is hopeless.

        Raises:
            RequestError: as `check`.
        """
        return check(Work.of(request, kind, size), plan, on.dtype, self.throughput(kind, on))

    def learn(self, request: Request, kind: WeightsKind, size: tuple[int, int], taken: Mapping[str, float]) -> None:
        """Take the seconds of a finished run's denoising for what this device does in a second.

        Upscale draws in tiles that overlap, and teaches nothing.
        """
        drawing = taken.get("denoising", 0.0)
        if drawing <= 0 or request.mode == "upscale":
            return
        work = Work.of(request, kind, size)
        flops = work.passes * step_flops(kind, *size, control=work.controlled)
        # What was fetched meanwhile is in this figure too, and is not counted a second time.
        self._measured[kind] = Throughput(flops / drawing, float("inf"), "measured")


def _cfg(request: Request) -> float:
    return getattr(request, "cfg", MODELS[request.model].cfg)


def _smaller(work: Work, plan: MemoryPlan, dtype: Dtype) -> str | None:
    """Return the largest size of about the same shape that fits the memory."""
    possible = POSSIBLE[work.kind]
    longer = max(work.width, work.height)
    for side in range(longer - possible.step, possible.minimum - 1, -possible.step):
        width, height = (possible.nearest(round(one * side / longer)) for one in (work.width, work.height))
        if peak_bytes(replace(work, width=width, height=height), plan, dtype) <= plan.room:
            return f"{width} x {height}"
    return None


def duration_text(taken: float) -> str:
    """Return seconds as people say them."""
    if taken < 90:
        return f"{max(taken, 1):.0f} s"
    if taken < 90 * 60:
        return f"{taken / 60:.0f} minutes"
    return f"{taken / 3600:.1f} hours"
