"""What stays in a device's memory: one pure function from plain facts to a plan, returned with its reasons.

Only `plan_for` looks at the machine.
"""

from __future__ import annotations

import errno
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from core.errors import RequestError
from core.messages import Message
from core.sizes import WeightsKind
from diffusion import host_memory
from diffusion.device import Device, DeviceKind
from diffusion.measure import Dtype

GIB = 1024**3

# Bytes in memory in bf16: numbers of the official shapes x 2.
PART_BYTES: Mapping[str, int] = {
    "transformer": 12_309_817_472,
    "text_encoder": 8_044_936_192,
    "controlnet": 6_712_451_584,
    "vae": 167_639_366,
}
# An estimate, to be checked wherever a card is at hand: the denoiser's activations at 1024 x 1024, CUDA's own memory,
# and what fragmentation loses.
HEADROOM: Mapping[str, int] = {"bfloat16": 3_000_000_000, "float32": 3_500_000_000}
FLOOR = 8_000_000_000  # bytes of a card below which nothing is promised; an "8 GB" card has about 8.5e9
HOST_RESERVE = 6_000_000_000  # bytes of the host's memory left to the system, the program and files being read
VRAM_MARGIN_GIB = 0.5  # kept free under `vram_limit`, as in DiffSynth's own low-VRAM examples
_LAYER_NUMBERS = 4 * 3840**2 + 3 * 3840 * 10240  # weights of one of the transformer's layers
# Numbers alive per output pixel while the VAE decodes untiled: 3.8 kB a pixel in fp32, measured at 320 x 320 on a CPU.
VAE_NUMBERS_PER_PIXEL = 1_000
# Real-ESRGAN x4plus in fp32, for each pixel of a tile: measured on a CPU between tiles of 96 and 144 pixels.
UPSCALER_BYTES_PER_PIXEL = 16_000
UPSCALER_TILE_AT_LEAST = 128  # pixels of a side; below, most of a tile is overlap
# A larger tile is hardly faster: 1 GB on a CPU, 2 GB in fp16 on a card.
UPSCALER_TILE_AT_MOST: Mapping[DeviceKind, int] = {"cpu": 256, "mps": 256, "cuda": 512}
TILED_AT_LEAST, TILED_AT_MOST = 512 * 512, 4096 * 4096  # pixels; Upscale's output ends at 4096 x 4096


Where = Literal["device", "host", "disk"]
# A transformer that is not in use stays where it is, is moved to the host's memory, or is given up and read again.
Other = Literal["stays", "moves", "goes"]


@dataclass(frozen=True)
class Placement:
    """Where a part waits between uses, and the dtype that its weights are held in (computed in is the device's)."""

    at: Where
    held: Dtype


@dataclass(frozen=True)
class MemoryPlan:
    """What stays in the device's memory while requests come and go.

    Attributes:
        parts: where each part waits. What does not wait on the device is fetched layer by layer while it is used.
        other_transformer: what becomes of Base while Turbo draws, and the other way round, once both were asked for.
        vram_limit_gb: DiffSynth's `vram_limit`, in GiB as it counts: how full the card may be before layers stop
            staying on it. None where nothing is fetched, and on the CPU and MPS, where DiffSynth cannot ask.
        tiled_vae_above: pixels above which the VAE works in tiles.
        text_dtype: what the text encoder computes in.
        vae_dtype: what the VAE is held and computed in.
        room: bytes of the device's memory that the plan counts with.
        reasons: why it is so, for people.
        fits: whether the plan is expected to run at all; where it is not, the last reason states what is short.
        lora_copies: bytes that changed copies of weights may take while a LoRA is used; see docs/adr/0010.
        tightest: whether there is nothing left to give up.
        upscaler_tile: width and height of what Real-ESRGAN enlarges at once, in pixels of its input.
    """

    parts: Mapping[str, Placement]
    other_transformer: Other
    vram_limit_gb: float | None
    tiled_vae_above: int
    text_dtype: Dtype
    vae_dtype: Dtype
    room: int
    reasons: tuple[Message, ...]
    fits: bool = True
    lora_copies: int = 0
    tightest: bool = False
    upscaler_tile: int = UPSCALER_TILE_AT_LEAST

    @property
    def resident(self) -> tuple[str, ...]:
        """Parts that stay on the device; "transformer" is the one in use."""
        return tuple(part for part, placement in self.parts.items() if placement.at == "device")

    @property
    def offload(self) -> bool:
        """Whether parts come from the host's memory or the disk while they are used."""
        return len(self.resident) < len(self.parts)

    @property
    def resident_bytes(self) -> int:
        """Bytes that stay on the device."""
        held = sum(part_bytes(part, self.parts[part].held) for part in self.resident)
        second = self.other_transformer == "stays" and "transformer" in self.resident
        return held + (part_bytes("transformer", self.parts["transformer"].held) if second else 0)


def part_bytes(part: str, dtype: Dtype) -> int:
    """Return what the real weights of a part take in memory."""
    return PART_BYTES[part] * (2 if dtype == "float32" else 1)


def memory_plan(
    device_kind: DeviceKind,
    total: int | None,
    free: int | None,
    host_total: int,
    mode: str,
    kind: WeightsKind = "full",
    dtype: Dtype | None = None,
    *,
    allowed: int | None = None,
    tighter: int = 0,
    text_dtype: Dtype | None = None,
    vae_dtype: Dtype | None = None,
) -> MemoryPlan:
    """Decide what stays in memory. Pure; figures for cards are estimates from sizes, those for a CPU were measured.

    The real weights take, in bf16: a transformer 12.3 GB, text encoder 8.0, ControlNet 6.7, VAE 0.2; twice that in
    fp32. So in bf16 everything but ControlNet fits from 24 GB on, both transformers from 36 (with ControlNet from 43),
    the transformer alone from 16; below that its layers are fetched in each step. A device that computes in fp32 holds
    the weights in bf16 where fp32 would not fit: the numbers are those that other devices compute with.

    Parts that do not stay on a CUDA card wait in the host's memory where that suffices, else on the disk. On the CPU
    and on Apple's GPU, whose memory is the host's, they are read from the disk. On the CPU that means mapped: the
    system keeps of their files what nothing else needs the memory for. So the text encoder never adds to a transformer
    there; each has the memory while it works.

    Args:
        device_kind: "cuda", "mps" or "cpu".
        total: the device's memory in bytes; None takes the host's.
        free: what is free of it before anything of ours is loaded; None takes all of it.
        host_total: the host's memory in bytes.
        mode: "generate", "controlnet" or "upscale".
        kind: "mini" needs no plan.
        dtype: what is computed in; None takes fp32 on the CPU and bf16 elsewhere.
        allowed: bytes of the device's memory to count with, in place of what is free: the user's word.
        tighter: how many plans to skip that would fit: after the memory did not suffice.
        text_dtype: what the text encoder computes in; None takes `dtype`.
        vae_dtype: what the VAE is held and computed in; None takes fp32 on Apple's GPU and `dtype` elsewhere.
    """
    dtype = dtype or ("float32" if device_kind == "cpu" else "bfloat16")
    total = total or host_total
    on = _Situation(
        kind=device_kind,
        total=total,
        taken=total - free if free is not None else 0,
        room=allowed if allowed is not None else total if free is None else min(total, free),
        host_total=host_total,
        dtype=dtype,
        # Black images on Apple's GPU have come from VAEs in half precision; fp32 costs 0.2 GB there.
        vae_dtype=vae_dtype or ("float32" if device_kind == "mps" else dtype),
        limited=allowed is not None,
        tighter=tighter,
    )
    if kind == "mini":
        return _mini_plan(on)
    parts = (*_PARTS, "controlnet") if mode == "controlnet" else _PARTS
    ways = _ways(on, parts)
    fitting = [way for way in ways if way.needs(on) <= on.room]
    way = (fitting or ways[-1:])[min(tighter, max(len(fitting) - 1, 0))]
    waiting = [part for part in parts if part not in way.resident]
    at = _where_parts_wait(on, waiting)
    other = _other_transformer(on, way, waiting, at)
    return MemoryPlan(
        parts={part: way.placement(part, on, at) for part in parts},
        other_transformer=other,
        vram_limit_gb=_vram_limit(on) if waiting else None,
        tiled_vae_above=_tiled_above(on, way),
        text_dtype=text_dtype or dtype,
        vae_dtype=on.vae_dtype,
        room=on.room,
        reasons=_reasons(on, way, waiting, at, other, fits=bool(fitting), control="controlnet" in parts),
        fits=bool(fitting),
        lora_copies=0 if waiting else _lora_copies(on, way),
        tightest=bool(tighter) and tighter >= len(fitting) - 1,
        upscaler_tile=upscaler_tile(on.kind, way.spare(on) - on.headroom // 3),
    )


def upscaler_tile(device_kind: DeviceKind, spare: int) -> int:
    """Return the side of Real-ESRGAN's tiles, in pixels of its input: half of the memory that is spare, in steps of 16.

    Args:
        device_kind: "cuda", "mps" or "cpu"; on CUDA it computes in half precision.
        spare: bytes that nothing else of ours takes.
    """
    per_pixel = UPSCALER_BYTES_PER_PIXEL // (2 if device_kind == "cuda" else 1)
    side = math.isqrt(max(spare, 0) // 2 // per_pixel) // 16 * 16
    return min(max(side, UPSCALER_TILE_AT_LEAST), UPSCALER_TILE_AT_MOST[device_kind])


def plan_for(
    on: Device,
    mode: str,
    kind: WeightsKind,
    *,
    memory_gb: float | str | None = None,
    tighter: int = 0,
) -> MemoryPlan:
    """Return the memory plan for a device of this machine; see `memory_plan`.

    Args:
        on: the device, as chosen before anything of ours was loaded.
        mode: "generate", "controlnet" or "upscale".
        kind: which weights.
        memory_gb: GB (10^9 bytes) of the device's memory to count with; None takes Z_IMAGE_MEMORY, else what is free.
        tighter: how many plans to skip that would fit.

    Raises:
        RequestError: `memory_gb` is not a positive number.
    """
    given = memory_gb if memory_gb is not None else os.environ.get("Z_IMAGE_MEMORY") or None
    try:
        allowed = None if given is None else int(float(given) * 1e9)
    except (ValueError, OverflowError):
        allowed = 0
    if allowed is not None and allowed <= 0:
        raise RequestError("memory", given, Message("gigabytes", "a number of GB above 0, such as 12"))
    total, _ = host_memory.total_and_free()
    return memory_plan(
        on.kind,
        on.total_bytes,
        on.free_bytes,
        total,
        mode,
        kind,
        on.dtype,
        allowed=allowed,
        tighter=tighter,
        text_dtype=on.text_dtype,
        vae_dtype=on.vae_dtype,
    )


# --- the ways to use a device's memory ---------------------------------------------------------------------------


@dataclass(frozen=True)
class _Use:
    """A row of the table: what stays on the device, as far as a mode needs it, and what people read of it.

    Attributes:
        resident: the parts that stay.
        transformers: how many of Base and Turbo stay, where one does.
        stays, rest: templates: what stays, and what becomes of the others where that needs a word.
        as_computed: whether weights may stay in the dtype that is computed in; in bf16 they always may.
        without_controlnet: whether the row is for a mode with a ControlNet that does not stay.
    """

    resident: tuple[str, ...]
    transformers: int
    stays: str
    rest: str = ""
    as_computed: bool = False
    without_controlnet: bool = False


_PARTS = ("transformer", "text_encoder", "vae")  # of every mode

_USES = (  # the roomiest first
    _Use((*_PARTS, "controlnet"), 2, "Base and Turbo, text encoder and VAE stay in memory", as_computed=True),
    _Use(
        (*_PARTS, "controlnet"),
        1,
        "one transformer, text encoder and VAE stay in memory",
        as_computed=True,
    ),
    # A text encoder is fetched once a prompt, a ControlNet in each step.
    _Use(
        ("transformer", "vae", "controlnet"),
        1,
        "the transformer stays in memory",
        "the text encoder is fetched for each new prompt",
    ),
    _Use(
        ("transformer", "vae"),
        1,
        "the transformer stays in memory",
        "the text encoder is fetched for each new prompt",
        without_controlnet=True,
    ),
    _Use(("vae",), 1, "transformer and text encoder are fetched layer by layer, in each step"),
)
# On the CPU, where the text encoder is mapped from its file and gives way to the transformer.
_USES_OF_A_CPU = (
    _Use(
        ("transformer", "vae", "controlnet"),
        2,
        "Base and Turbo stay in memory",
        "the text encoder is used from its file",
        as_computed=True,
    ),
    _Use(
        ("transformer", "vae", "controlnet"),
        1,
        "one transformer stays in memory",
        "the text encoder is used from its file",
    ),
    _Use(
        ("transformer", "vae"),
        1,
        "one transformer stays in memory",
        "the text encoder is used from its file",
        without_controlnet=True,
    ),
    _Use(("vae",), 1, "transformer and text encoder are used from their files, in each step"),
)


@dataclass(frozen=True)
class _Situation:
    """What `memory_plan` is asked about, with every default filled in; sizes in bytes.

    Attributes:
        kind: of the device.
        total: the device's memory.
        taken: what others hold of it.
        room: what the plan may count with.
        host_total: the host's memory.
        dtype: what is computed in.
        vae_dtype: what the VAE is held and computed in.
        limited: whether `room` is the user's word.
        tighter: how many plans to skip that would fit.
    """

    kind: DeviceKind
    total: int
    taken: int
    room: int
    host_total: int
    dtype: Dtype
    vae_dtype: Dtype
    limited: bool
    tighter: int

    @property
    def headroom(self) -> int:
        """What computing takes beside the weights."""
        return HEADROOM[self.dtype]


@dataclass(frozen=True)
class _Way:
    """A row of the table for one mode, with weights held in one dtype."""

    use: _Use
    resident: tuple[str, ...]
    held: Dtype

    @property
    def key(self) -> tuple[object, ...]:
        """What tells it from another way of the same mode."""
        return self.resident, self.use.transformers, self.held

    def bytes(self, on: _Situation) -> int:
        """Return what stays on the device."""
        others = [part for part in self.resident if part != "vae"] + ["transformer"] * (self.use.transformers - 1)
        return sum(part_bytes(part, self.held) for part in others) + part_bytes("vae", on.vae_dtype)

    def needs(self, on: _Situation) -> int:
        """Return what the device must have."""
        return self.bytes(on) + on.headroom

    def spare(self, on: _Situation) -> int:
        """Return what is left beside the parts that stay."""
        return on.room - self.bytes(on)

    def placement(self, part: str, on: _Situation, at: Where) -> Placement:
        """Return a part's place; `at` is where those wait that do not stay."""
        if part not in self.resident:
            return Placement(at, "bfloat16")
        return Placement("device", on.vae_dtype if part == "vae" else self.held)

    def messages(self, dtype: Dtype) -> list[Message]:
        """Return what becomes of the parts, on a device that computes in `dtype`."""
        stays = Message("memory", self.use.stays)
        if self.held != dtype and "transformer" in self.resident:
            stays = Message("memory", "{plan}, held in bf16 and computed in fp32", plan=stays)
        return [stays, Message("memory", self.use.rest)] if self.use.rest else [stays]


def _ways(on: _Situation, parts: tuple[str, ...]) -> list[_Way]:
    """Return the ways to use a device's memory for a mode of these parts, the roomiest first."""
    uses = _USES_OF_A_CPU if on.kind == "cpu" else _USES
    # Weights are held in bf16 before any are fetched from elsewhere.
    pairs: list[tuple[_Use, Dtype]] = [(use, on.dtype) for use in uses if use.as_computed and on.dtype != "bfloat16"]
    pairs += [(use, "bfloat16") for use in uses if not use.without_controlnet or "controlnet" in parts]
    ways = [_Way(use, tuple(part for part in use.resident if part in parts), held) for use, held in pairs]
    # Without a ControlNet, two rows are one.
    return [way for index, way in enumerate(ways) if index == 0 or way.key != ways[index - 1].key]


# --- what follows from one of them -------------------------------------------------------------------------------


def _where_parts_wait(on: _Situation, waiting: Sequence[str]) -> Where:
    if on.kind != "cuda":  # its memory is the host's
        return "disk"
    return "host" if _fits_host(on, waiting) else "disk"


def _bytes_waiting(waiting: Sequence[str]) -> int:
    return sum(part_bytes(part, "bfloat16") for part in waiting)


def _other_transformer(on: _Situation, way: _Way, waiting: Sequence[str], at: Where) -> Other:
    """Return what becomes of the transformer that is not in use."""
    if "transformer" not in waiting:
        if way.use.transformers == 2:
            return "stays"
        # One in another dtype than is computed in is DiffSynth's to move, which sends it where it waits: to the device.
        movable = on.kind == "cuda" and way.held == on.dtype and not on.tighter
        return "moves" if movable and _fits_host(on, [*waiting, "transformer"]) else "goes"
    if at == "disk":  # one that waits there takes no memory
        return "stays"
    return "stays" if _fits_host(on, [*waiting, "transformer"]) else "goes"


def _fits_host(on: _Situation, waiting: Sequence[str]) -> bool:
    return _bytes_waiting(waiting) + HOST_RESERVE <= on.host_total


def _vram_limit(on: _Situation) -> float | None:
    """Return DiffSynth's `vram_limit` in GiB; None for a device that it cannot ask."""
    if on.kind != "cuda":
        return None
    # The check behind it counts what everybody holds on the card, not only this process. Beside the margin there has to
    # be room for the one layer that both halves of a guided step take (diffusion.denoiser.fetched_once).
    layer = _LAYER_NUMBERS * (4 if on.dtype == "float32" else 2) / GIB
    return round(min(on.total, on.taken + on.room) / GIB - VRAM_MARGIN_GIB - layer, 1)


def _tiled_above(on: _Situation, way: _Way) -> int:
    """Return the pixels above which the VAE works in tiles."""
    if on.tighter:
        return TILED_AT_LEAST
    per_pixel = VAE_NUMBERS_PER_PIXEL * (4 if on.vae_dtype == "float32" else 2)
    return min(max((way.spare(on) - on.headroom // 3) // per_pixel, TILED_AT_LEAST), TILED_AT_MOST)


def _lora_copies(on: _Situation, way: _Way) -> int:
    """Return the bytes that changed copies of weights may take, which only weights in the dtype computed in have."""
    if on.tighter or way.held != on.dtype:
        return 0
    return max(0, way.spare(on) - on.headroom)


def _reasons(
    on: _Situation, way: _Way, waiting: Sequence[str], at: Where, other: Other, *, fits: bool, control: bool
) -> tuple[Message, ...]:
    """Return what people read of a plan, in order."""
    room = _ALLOWED if on.limited else _FREE[on.kind]
    reasons = [Message("memory", room, room=round(on.room / 1e9), plan=way.messages(on.dtype))]
    if on.tighter:
        reasons.append(Message("memory", "tighter than estimated, because the memory did not suffice before"))
    if control:
        resident = "controlnet" in way.resident
        text = "ControlNet ({size} GB) stays in memory too" if resident else "ControlNet ({size} GB) is fetched too"
        reasons.append(Message("memory", text, size=_gigabytes(part_bytes("controlnet", way.held))))
    if other != "stays" and "transformer" in way.resident:
        reasons.append(Message("memory", _OTHER[other]))
    if waiting and at == "host":
        text = "what does not stay waits in the host's {size} GB of memory"
        reasons.append(Message("memory", text, size=round(on.host_total / 1e9)))
    elif waiting and on.kind != "cpu":  # there, the row says so
        reasons.append(Message("memory", "what does not stay waits on the disk"))
    if on.kind == "cuda" and on.total < FLOOR:
        text = "a card of {size} GB is below the 8 GB that this is made for: slow, and tight"
        reasons.append(Message("memory", text, size=_gigabytes(on.total)))
    if not fits:
        text = "even that needs about {size} GB: expect to run out of memory"
        reasons.append(Message("memory", text, size=round(way.needs(on) / 1e9)))
    return tuple(reasons)


def _gigabytes(size: int) -> float:
    return round(size / 1e9, 1)


_OTHER: Mapping[Other, str] = {
    "moves": "the other of Base and Turbo waits in the host's memory once it was asked for",
    "goes": "the other of Base and Turbo is loaded when asked for",
}
_ALLOWED = "{room} GB allowed: {plan}"
_FREE: Mapping[DeviceKind, str] = {
    "cuda": "{room} GB of video memory free: {plan}",
    "mps": "{room} GB that Metal recommends at most: {plan}",
    "cpu": "{room} GB of memory free: {plan}",
}


def _mini_plan(on: _Situation) -> MemoryPlan:
    """Return a plan that keeps the miniature in memory, or reads it from the disk after that did not suffice."""
    at: Where = "disk" if on.tighter else "device"
    text = "the miniature takes well under 1 GB: everything stays in memory"
    if on.tighter:
        text = "the miniature is read from the disk in each step, because the memory did not suffice before"
    return MemoryPlan(
        parts={part: Placement("device" if part == "vae" else at, on.dtype) for part in (*_PARTS, "controlnet")},
        other_transformer="stays",
        vram_limit_gb=None,
        tiled_vae_above=TILED_AT_MOST,
        text_dtype=on.dtype,
        vae_dtype=on.dtype,
        room=on.room,
        reasons=(Message("memory", text),),
        lora_copies=0 if on.tighter else GIB,
        tightest=bool(on.tighter),
        upscaler_tile=upscaler_tile(on.kind, on.room - GIB),
    )


# --- running out of it --------------------------------------------------------------------------------------------


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that the device or the host had too little memory.

    CUDA has a class for it; torch's CPU allocator, MPS and a failed mapping of a file are told by their message or
    number alone.
    """
    torch = sys.modules.get("torch")  # importing it may be what failed
    if isinstance(error, MemoryError) or (torch and isinstance(error, torch.OutOfMemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY_TEXTS)


_OUT_OF_MEMORY_TEXTS = (
    "can't allocate memory",  # c10/core/impl/alloc_cpu.cpp
    "unable to mmap",  # aten/src/ATen/MapAllocator.cpp
    "MPS backend out of memory",  # aten/src/ATen/mps/MPSAllocator.mm
    "CUDA out of memory",
    "CUDA error: out of memory",  # an allocation that does not go through torch's allocator
    "CUBLAS_STATUS_ALLOC_FAILED",
    "Cannot allocate memory",
)
