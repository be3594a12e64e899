"""What a request will take, before it runs: operations, seconds and memory, and whether that is hopeless.

Arithmetic over the models' shapes. The operations agree with those counted by torch; seconds are operations over a
device's speed, assumed from its kind until a run of the same process has measured it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from core.errors import RequestError
from core.messages import Message
from core.request import Upscaler
from core.sizes import IMAGE_SIZES as POSSIBLE
from core.sizes import WeightsKind
from diffusion.device import Device, DeviceKind
from diffusion.measure import Dtype
from diffusion.memory import PART_BYTES, VAE_NUMBERS_PER_PIXEL, MemoryPlan

USUAL_TEXT_TOKENS = 96  # of a usual prompt with its chat template; padded to a multiple of 32
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
    """Return the floating-point operations of one forward pass of the transformer, twice its multiplications.

    Without those of `refining_flops`, which no step needs.
    """
    shape = SHAPES[kind]
    image = width * height // 256  # patches of 2 x 2 latents, each of 8 x 8 pixels
    together = image + text

    total = _layers(shape, shape.layers, together) + _layers(shape, shape.refiners, image)
    if control:
        total += _layers(shape, shape.control_layers, together) + _layers(shape, shape.control_refiners, image)
        # a projection after each, and one before the layers
        projection = 2.0 * shape.width**2
        total += projection * ((shape.control_layers + 1) * together + shape.control_refiners * image)
    return total


def refining_flops(kind: WeightsKind, text: int = USUAL_TEXT_TOKENS) -> float:
    """Return the floating-point operations of the layers that refine a prompt alone, once an image."""
    return _layers(SHAPES[kind], SHAPES[kind].refiners, text)


def _layers(shape: Shape, count: int, tokens: int) -> float:
    return count * (2.0 * shape.numbers_per_layer * tokens + 4.0 * shape.width * tokens**2)


@dataclass(frozen=True)
class Work:
    """What a request computes, whichever mode asks for it.

    Attributes:
        kind: which weights.
        steps: denoising steps that are run; 0 where nothing is drawn.
        width: of the result, in pixels.
        height: likewise.
        cfg: guidance; other than 1 runs the transformer twice in each step.
        controlled: whether the ControlNet runs.
        encodes: whether the VAE encodes an image first.
        tile: width and height of what is drawn at once, in pixels; None where that is the whole result.
        tiles: how many of those are drawn in each step.
        upscaler: the network that enlarges, if one does.
        enlarging: its floating-point operations.
        field: the request's field that a smaller picture is asked for with.
    """

    kind: WeightsKind
    steps: int
    width: int
    height: int
    cfg: float = 1.0
    controlled: bool = False
    encodes: bool = False
    tile: tuple[int, int] | None = None
    tiles: int = 1
    upscaler: Upscaler | None = None
    enlarging: float = 0.0
    field: str = "size"

    @property
    def drawn_at_once(self) -> tuple[int, int]:
        """Width and height of what the transformer sees, in pixels."""
        return self.tile or (self.width, self.height)

    @property
    def passes(self) -> int:
        """How often the transformer runs."""
        return self.steps * (1 if self.cfg == 1 else 2) * self.tiles

    @property
    def step_flops(self) -> float:
        """The floating-point operations of the transformer."""
        passes = self.passes * step_flops(self.kind, *self.drawn_at_once, control=self.controlled)
        return passes + (refining_flops(self.kind) * (1 if self.cfg == 1 else 2) if self.steps else 0.0)

    @property
    def text_flops(self) -> float:
        """The floating-point operations of encoding the prompts."""
        if not self.steps:
            return 0.0
        return (1 if self.cfg == 1 else 2) * 2.0 * SHAPES[self.kind].text_numbers * USUAL_TEXT_TOKENS

    @property
    def vae_flops(self) -> float:
        """The floating-point operations of the VAE."""
        if not self.steps:
            return 0.0
        encode, decode = VAE_PER_PIXEL[self.kind]
        per_pixel = decode + encode if self.encodes else decode
        return self.tiles * math.prod(self.drawn_at_once) * per_pixel

    @property
    def flops(self) -> float:
        """The floating-point operations of a drawing: of everything but the enlargement."""
        return self.text_flops + self.step_flops + self.vae_flops

    def fetched(self, plan: MemoryPlan) -> float:
        """Return the bytes of weights that are fetched while they are used: what waits, in each step of a tile."""
        if self.kind == "mini" or not self.steps:
            return 0.0
        waiting = {part for part in plan.parts if part not in plan.resident}
        each_time = sum(PART_BYTES[part] for part in waiting & {"transformer", "controlnet"})
        return self.steps * self.tiles * each_time + (PART_BYTES["text_encoder"] if "text_encoder" in waiting else 0)


@dataclass(frozen=True)
class Speed:
    """What a device does in a second while it works.

    Attributes:
        products: floating-point operations of denoising steps, most of them matrix products.
        convolutions: floating-point operations of an enlargement.
        fetched: bytes of weights that come from elsewhere.
        text: floating-point operations of the text encoder.
        vae: floating-point operations of the VAE.
    """

    products: float
    convolutions: float
    fetched: float
    text: float
    vae: float

    def seconds(self, work: Work, plan: MemoryPlan) -> float:
        """Return how long work takes: what is computed and what is fetched, one after the other."""
        drawing = work.text_flops / self.text + work.step_flops / self.products + work.vae_flops / self.vae
        return drawing + work.fetched(plan) / self.fetched + work.enlarging / self.convolutions


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
# CPU: an AVX2 core or two, as measured for fp32; the others are guesses from data sheets at a third of the peak.
CONVOLUTIONS: Mapping[DeviceKind, float] = {"cpu": 80e9, "mps": 2e12, "cuda": 30e12}
FETCHED: Mapping[DeviceKind, float] = {"cuda": 8e9, "mps": 2e9, "cpu": 1.5e9}  # pageable copies to a card; a disk


def assumed(device_kind: DeviceKind, *, capability: tuple[int, int] | None = None, cores: int = 1) -> Speed:
    """Return what a device is taken to do before anything was measured on it."""
    if device_kind == "cuda":
        known = [generation for generation in _CUDA if generation <= (capability or (8, 6))]
        products = _CUDA[max(known, default=(7, 0))]
    else:
        products = APPLE_FLOPS if device_kind == "mps" else CPU_FLOPS_PER_CORE * cores
    return Speed(products, CONVOLUTIONS[device_kind], FETCHED[device_kind], text=products, vae=products)


@dataclass(frozen=True)
class Estimate:
    """What a request will take.

    Attributes:
        seconds: without loading.
        bytes: the device's memory at its fullest.
        source: whether all that the seconds rest on was measured in this process.
    """

    seconds: float
    bytes: int
    source: Literal["assumed", "measured"]

    @property
    def text(self) -> Message:
        """The estimate in words."""
        size = f"{self.bytes / 1e9:.1f}"
        return Message("estimate", "about {time} and {size} GB", time=duration_text(self.seconds), size=size)


PROGRAM_BYTES = 700_000_000  # torch, diffsynth and what they allocate before any weights; measured on a CPU
_LARGEST_FETCH = 151_936 * 2560  # numbers of the text encoder's embedding, the largest layer of all
_IMAGE_BYTES_PER_PIXEL = 16  # of what was decoded
_LIVE_PER_TOKEN = 14  # widths of a token alive inside a layer: the sum, its norm, three of the feed-forward, q, k, v


def peak_bytes(work: Work, plan: MemoryPlan, dtype: Dtype) -> int:
    """Return the device's memory at the fullest moment of a request, weights included, in bytes."""
    size = 4 if dtype == "float32" else 2
    shape, tokens = SHAPES[work.kind], math.prod(work.drawn_at_once) // 256 + USUAL_TEXT_TOKENS
    fetched = any(placement.at != "device" or placement.held != dtype for placement in plan.parts.values())
    # Read in one dtype and cast to another: both are there for a moment.
    encoding = _LARGEST_FETCH * (2 + size) if work.kind == "full" and fetched else 0
    denoising = tokens * shape.width * size * _LIVE_PER_TOKEN
    if work.controlled:  # what goes on beside the layers, and a layer's hint
        denoising += 2 * tokens * shape.width * size
    if work.cfg != 1:  # the other half, and the weights that both take, where they are fetched
        denoising += tokens * shape.width * size
        if fetched and work.kind == "full":
            denoising += size * shape.numbers_per_layer * (2 if work.controlled else 1)
    whole = math.prod(work.drawn_at_once)
    whole = whole if whole <= plan.tiled_vae_above else 768 * 768
    decoding = whole * _vae_bytes_per_pixel(plan) + _IMAGE_BYTES_PER_PIXEL * work.width * work.height
    if work.kind == "mini":
        return 100_000_000 + max(denoising, decoding // 20)
    return PROGRAM_BYTES + plan.resident_bytes + max(encoding, denoising, decoding)


def whole_vae_pixels(plan: MemoryPlan, taken: int) -> int:
    """Return the pixels that the VAE can decode at once beside what stays on the device and `taken` bytes more."""
    left = plan.room - plan.resident_bytes - PROGRAM_BYTES - taken
    return left // (_vae_bytes_per_pixel(plan) + _IMAGE_BYTES_PER_PIXEL)


def _vae_bytes_per_pixel(plan: MemoryPlan) -> int:
    return VAE_NUMBERS_PER_PIXEL * (4 if plan.vae_dtype == "float32" else 2)


def check(work: Work, plan: MemoryPlan, dtype: Dtype, speed: Speed) -> None:
    """Refuse what is hopeless.

    Raises:
        RequestError: it cannot fit the memory, or would take more than HOPELESS_SECONDS; with the nearest that fits.
    """
    size, needed = f"{work.width} x {work.height}", peak_bytes(work, plan, dtype)
    if needed > plan.room:
        text = "with {room} GB of memory ({size} needs about {needed} GB)"
        room = f"{plan.room / 1e9:.1f}"
        why = Message("little_memory", text, room=room, size=size, needed=f"{needed / 1e9:.1f}")
        nearest = _smaller(work, plan, dtype)
        if nearest is None:
            raise RequestError(work.field, size, Message("little_memory", "no size {why}", why=why))
        allowed = Message("little_memory", "up to about {nearest} {why}", nearest=nearest, why=why)
        raise RequestError(work.field, size, allowed, nearest=nearest)
    seconds = speed.seconds(work, plan)
    if seconds > HOPELESS_SECONDS:
        one, two = (speed.seconds(replace(work, steps=steps), plan) for steps in (1, 2))
        possible = int(1 + (HOPELESS_SECONDS - one) // (two - one))
        text = "{steps} would take about {time} on this device"
        why = Message("too_slow", text, steps=work.steps, time=duration_text(seconds))
        if possible >= 1:
            allowed = Message("too_slow", "{low} to {high} at {size}: {why}", low=1, high=possible, size=size, why=why)
            raise RequestError("steps", work.steps, allowed, nearest=possible)
        raise RequestError(work.field, size, Message("too_slow", "a smaller size: {why}", why=why))


class Forecast:
    """What requests will take on one device; a finished run replaces the assumed speed with the measured one.

    Args:
        cuda: what a CUDA card is taken to do until then; None takes what is usual for its generation.
    """

    def __init__(self, cuda: Speed | None = None) -> None:
        self._cuda = cuda
        self._products: dict[WeightsKind, float] = {}
        self._vae: dict[WeightsKind, float] = {}
        self._convolutions: dict[Upscaler, float] = {}

    def speed(self, work: Work, on: Device) -> Speed:
        """Return what a device does in a second of such work, as measured where it was."""
        if self._cuda is not None and on.kind == "cuda":
            speed = self._cuda
        else:
            speed = assumed(on.kind, capability=on.capability, cores=os.cpu_count() or 1)
        if on.rates is not None:
            rates = {part: CPU_SHARE * rate for part, rate in on.rates.items()}
            speed = replace(speed, products=rates["transformer"], text=rates["text_encoder"], vae=rates["vae"])
        if products := self._products.get(work.kind):
            # What was fetched meanwhile is in this figure too, and is not counted a second time.
            speed = replace(speed, products=products, fetched=math.inf)
        if vae := self._vae.get(work.kind):
            speed = replace(speed, vae=vae)
        if work.upscaler in self._convolutions:
            speed = replace(speed, convolutions=self._convolutions[work.upscaler])
        return speed

    def estimate(self, work: Work, on: Device, plan: MemoryPlan) -> Estimate:
        """Return what a request will take."""
        drawing = not work.steps or work.kind in self._products
        enlarging = work.upscaler is None or work.upscaler in self._convolutions
        seconds, size = self.speed(work, on).seconds(work, plan), peak_bytes(work, plan, on.dtype)
        return Estimate(seconds, size, "measured" if drawing and enlarging else "assumed")

    def learn(self, work: Work, taken: Mapping[str, float]) -> None:
        """Take the seconds of a finished run's stages for what this device does in a second.

        A refinement in tiles that overlap teaches nothing about drawing.
        """
        if work.upscaler and (seconds := taken.get("upscaling", 0.0)) > 0:
            self._convolutions[work.upscaler] = work.enlarging / seconds
        if not work.upscaler and (seconds := taken.get("denoising", 0.0)) > 0:
            self._products[work.kind] = work.step_flops / seconds
        if not (work.upscaler or work.encodes) and (seconds := taken.get("decoding", 0.0)) > 0:
            self._vae[work.kind] = work.vae_flops / seconds


def _smaller(work: Work, plan: MemoryPlan, dtype: Dtype) -> str | None:
    """Return the largest size of about the same shape that fits the memory."""
    possible = POSSIBLE[work.kind]
    longer = max(work.width, work.height)
    for side in range(longer - possible.step, possible.minimum - 1, -possible.step):
        width, height = (possible.nearest(round(length * side / longer)) for length in (work.width, work.height))
        if peak_bytes(replace(work, width=width, height=height), plan, dtype) <= plan.room:
            return f"{width} x {height}"
    return None


def duration_text(taken: float) -> Message:
    """Return seconds as people say them."""
    if taken < 90:
        return Message("seconds", "{seconds} s", seconds=f"{max(taken, 1):.0f}")
    if taken < 90 * 60:
        return Message("minutes", "{minutes} minutes", minutes=f"{taken / 60:.0f}")
    return Message("hours", "{hours} hours", hours=f"{taken / 3600:.1f}")
