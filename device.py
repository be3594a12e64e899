"""Which device computes, in which dtype, and what stays in its memory: decisions, each returned with its reason.

The deciding functions are pure: plain facts in, a decision out. `choose_device`, `host_memory` and
`prepare_environment` are the only ones that touch the machine, and torch is imported in `choose_device` alone.

Knows nothing of weights on disk, requests, pipelines or fronts.
"""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from errors import RequestError

Kind = Literal["cuda", "mps", "cpu"]
Dtype = Literal["bfloat16", "float32"]

GIB = 1024**3
BFLOAT16_CAPABILITY = (8, 0)  # Ampere; older cards only emulate bf16

# Bytes in memory in bf16: numbers of the official shapes x 2.
SIZES: Mapping[str, int] = {
    "transformer": 12_309_817_472,
    "text_encoder": 8_044_936_192,
    "controlnet": 6_712_451_584,
    "vae": 167_639_366,
}
# An estimate, to be checked wherever a card is at hand: the denoiser's activations at 1024 x 1024, CUDA's own memory,
# and what fragmentation loses.
HEADROOM = 3_000_000_000
FLOOR = 8_000_000_000  # bytes of a card below which no plan is promised; an "8 GB" card has about 8.5e9
VRAM_MARGIN_GIB = 0.5  # kept free under `vram_limit`, as in DiffSynth's own low-VRAM examples
# Numbers alive per output pixel while the VAE decodes untiled: 3.8 kB a pixel in fp32, measured at 320 x 320 on a CPU.
VAE_NUMBERS_PER_PIXEL = 1_000
# Real-ESRGAN x4plus in fp32, for each pixel of a tile: measured on a CPU between tiles of 96 and 144 pixels.
UPSCALER_BYTES_PER_PIXEL = 16_000
UPSCALER_TILE_AT_LEAST = 96  # pixels of a side; below, most of a tile is overlap
# A larger tile is hardly faster: 1 GB on a CPU, 2 GB in fp16 on a card.
UPSCALER_TILE_AT_MOST: Mapping[Kind, int] = {"cpu": 256, "mps": 256, "cuda": 512}
TILED_AT_LEAST, TILED_AT_MOST = 512 * 512, 4096 * 4096  # pixels; Upscale's output ends at 4096 x 4096

# What must be set before torch, DiffSynth and Gradio are imported, and why.
ENVIRONMENT: Mapping[str, str] = {
    "PYTORCH_ENABLE_MPS_FALLBACK": "1",  # operations that MPS lacks run on the CPU instead of failing
    # DiffSynth takes whatever attention it finds installed, also for CPU and MPS; Sage's corrupts Z-Image.
    "DIFFSYNTH_ATTENTION_IMPLEMENTATION": "torch",
    "DIFFSYNTH_DOWNLOAD_SOURCE": "huggingface",
    "GRADIO_ANALYTICS_ENABLED": "False",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",  # prompts are short, and a fork after parallel use only warns
}


def prepare_environment(environ: MutableMapping[str, str] = os.environ) -> dict[str, str]:
    """Set what ENVIRONMENT lists and the user has not set; return what was set."""
    added = {name: value for name, value in ENVIRONMENT.items() if name not in environ}
    environ.update(added)
    return added


# --- which device ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Device:
    """The device to compute on. Memory is in bytes, None where unknown; `free_bytes` is as of the decision."""

    kind: Kind
    name: str
    total_bytes: int | None
    free_bytes: int | None
    dtype: Dtype
    reason: str


@dataclass(frozen=True)
class Accelerator:
    """What torch says about one device: `capability` is CUDA's compute capability, (major, minor)."""

    kind: Kind
    name: str
    total_bytes: int | None = None
    free_bytes: int | None = None
    capability: tuple[int, int] | None = None


def choose_device(asked: str = "auto") -> Device:
    """Return the device to compute on: CUDA, else MPS, else the CPU, unless one is asked for.

    Raises:
        RequestError: the device asked for is not there; the message names what is.
    """
    return decide(asked, list(_accelerators()))


def decide(asked: str, present: list[Accelerator]) -> Device:
    """Choose among the devices that are present, listed best first, the CPU last. Pure.

    Never fp16: its range is too small for these models, and the picture comes out black.

    Raises:
        RequestError: the device asked for is not among them.
    """
    kinds = [one.kind for one in present]
    if asked not in ("auto", *kinds):
        raise RequestError("device", asked, f"{', '.join(('auto', *kinds))} on this machine")
    one = present[0] if asked == "auto" else present[kinds.index(asked)]
    why = "as asked" if asked != "auto" else _WHY_AUTO[one.kind]
    dtype, why_dtype = _dtype(one)
    return Device(one.kind, one.name, one.total_bytes, one.free_bytes, dtype, f"{one.name}, {why}; {why_dtype}")


_WHY_AUTO: Mapping[Kind, str] = {
    "cuda": "the CUDA card of this machine",
    "mps": "Apple's GPU, since there is no CUDA card",
    "cpu": "since torch sees neither a CUDA card nor Apple's GPU",
}


def _dtype(one: Accelerator) -> tuple[Dtype, str]:
    if one.kind == "mps":
        return "bfloat16", "bf16, because fp16 overflows to black pictures on these models"
    if one.kind == "cpu":
        # Measured on two AVX2 cores: matrix products 22 GFLOP/s in bf16, 152 in fp32; convolutions 0.3 and 90.
        return "float32", "fp32, because bf16 is many times slower on a CPU"
    capability = one.capability or (0, 0)
    number = ".".join(map(str, capability))
    if capability >= BFLOAT16_CAPABILITY:
        return "bfloat16", f"bf16, which compute capability {number} has; fp16 overflows to black pictures"
    return "float32", (
        f"fp32, because compute capability {number} has no bf16 (8.0 and up do) and fp16 overflows to black pictures"
    )


def _accelerators() -> Iterator[Accelerator]:
    """Yield what torch can compute on, best first; the CPU is always last."""
    import torch

    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        yield Accelerator("cuda", torch.cuda.get_device_name(), total, free, torch.cuda.get_device_capability())
    if torch.backends.mps.is_available():
        # MPS has no mem_get_info; this is what Metal recommends, about three quarters of the machine's memory.
        total = torch.mps.recommended_max_memory()
        yield Accelerator("mps", "Apple GPU", total, total - torch.mps.driver_allocated_memory())
    total, free = host_memory()
    yield Accelerator("cpu", f"{platform.machine()} CPU, {os.cpu_count()} cores", total, free)


# --- how much memory ---------------------------------------------------------------------------------------------


def host_memory() -> tuple[int, int]:
    """Return the host's total and available memory in bytes, within the limit of a container where there is one."""
    import psutil

    memory = psutil.virtual_memory()
    limit, used = cgroup_memory(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup"))
    if limit is None or limit >= memory.total:
        return memory.total, memory.available
    return limit, max(0, min(memory.available, limit - used))


# cgroup version -> (folder under the mount, limit, usage, the line of memory.stat that can be reclaimed)
_CGROUPS = {
    2: ("", "memory.max", "memory.current", "inactive_file"),
    1: ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def cgroup_memory(mount: Path, membership: Path) -> tuple[int | None, int]:
    """Return the memory limit of this process's control group (None without one) and what the group uses, in bytes.

    The tightest group on the way up counts. Cached file pages that the kernel can drop are not counted as used:
    weights that were read once would fill the limit otherwise.

    Args:
        mount: where control groups are mounted, usually /sys/fs/cgroup.
        membership: the list of this process's groups, usually /proc/self/cgroup.
    """
    limits = [
        (limit, _number(group / usage) - _reclaimable(group / "memory.stat", line))
        for group, limit_file, usage, line in _groups(mount, membership)
        if (limit := _number(group / limit_file)) > 0
    ]
    return min(limits, default=(None, 0))


def _groups(mount: Path, membership: Path) -> Iterator[tuple[Path, str, str, str]]:
    """Yield this process's groups and their parents, with the names of the files to read there."""
    for line in _text(membership).splitlines():
        _, controllers, path = line.split(":", 2)
        version = 2 if not controllers else 1
        if version == 1 and "memory" not in controllers.split(","):
            continue
        folder, *files = _CGROUPS[version]
        parts = path.strip("/").split("/")
        # Inside a container the path may be the host's, which is not visible there: the mount itself is the group then.
        for depth in range(len(parts), -1, -1):
            yield mount.joinpath(folder, *parts[:depth]), *files


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except OSError:  # not Linux, or no such group
        return ""


def _number(path: Path) -> int:
    """Read a count of bytes; 0 where there is none, as with the limit "max"."""
    text = _text(path).strip()
    return int(text) if text.isdigit() else 0


def _reclaimable(path: Path, name: str) -> int:
    return next((int(line.split()[1]) for line in _text(path).splitlines() if line.split()[0] == name), 0)


# --- what stays in memory ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MemoryPlan:
    """What stays in the device's memory while requests come and go.

    Attributes:
        resident: parts that stay on the device; "transformer" is the one in use.
        keep_both_transformers: whether Base and Turbo may be loaded together.
        vram_limit_gb: DiffSynth's `vram_limit`, in GiB as it counts; None where it manages nothing.
        offload: whether DiffSynth moves parts between host and device (its VRAM management).
        tiled_vae_above: pixels above which the VAE works in tiles.
        reasons: sentences for people.
        fits: whether the plan is expected to run at all; where it is not, the last reason says what is short.
        lora_copies: bytes that changed copies of weights may take while a LoRA is used; see docs/adr/0010.
        upscaler_tile: width and height of what Real-ESRGAN enlarges at once, in pixels of its input.
    """

    resident: tuple[str, ...]
    keep_both_transformers: bool
    vram_limit_gb: float | None
    offload: bool
    tiled_vae_above: int
    reasons: tuple[str, ...]
    fits: bool = True
    lora_copies: int = 0
    upscaler_tile: int = UPSCALER_TILE_AT_LEAST


@dataclass(frozen=True)
class _Row:
    """One way to use a device's memory: what stays on it, and how many transformers."""

    resident: tuple[str, ...]
    transformers: int
    sentence: str

    def bytes(self, scale: int) -> int:
        """Return what stays resident, in bytes; `scale` is 1 for bf16 and 2 for fp32."""
        extra = SIZES["transformer"] * (self.transformers - 1) if self.transformers else 0
        return scale * (sum(SIZES[part] for part in self.resident) + extra)


_ALL = ("transformer", "text_encoder", "vae")
_OWN_MEMORY = (  # without DiffSynth's management: everything a request needs is in the device's memory at once
    _Row(_ALL, 2, "Base and Turbo, text encoder and VAE stay in memory"),
    _Row(
        _ALL, 1, "one transformer, text encoder and VAE stay in memory; the other transformer is loaded when asked for"
    ),
)
_STAGED_CONTROL = _Row(_ALL, 1, "transformer, text encoder and VAE stay on the card")
_MANAGED = (  # with it: the rest waits in the host's memory
    _Row(("transformer", "vae"), 1, "the transformer stays on the card; the text encoder comes and goes"),
    _Row(("vae",), 0, "transformer and text encoder are streamed from the host's memory"),
)


def memory_plan(
    device_kind: Kind,
    total: int | None,
    free: int | None,
    host_total: int,
    mode: str,
    kind: Literal["full", "mini"] = "full",
    dtype: Dtype | None = None,
) -> MemoryPlan:
    """Decide what stays in memory. Pure; the figures are estimates from sizes, not yet measured on cards.

    The real weights take, in bf16: a transformer 12.3 GB, text encoder 8.0, ControlNet 6.7, VAE 0.2; twice that in
    fp32. So a CUDA card holds everything but ControlNet from 24 GB on, both transformers from 36 (with ControlNet from
    43), the transformer alone from 16, and streams below. The CPU and MPS are not managed: torch lacks there what
    DiffSynth's management calls (`cpu.empty_cache`, `mps.mem_get_info`).

    Args:
        device_kind: "cuda", "mps" or "cpu".
        total: the device's memory in bytes; None takes the host's.
        free: what is free of it before anything of ours is loaded; None takes all of it.
        host_total: the host's memory in bytes.
        mode: "generate", "controlnet" or "upscale".
        kind: "mini" needs no plan.
        dtype: what weights are held in; None takes fp32 on the CPU and bf16 elsewhere.
    """
    if kind == "mini":
        reasons = ("the miniature takes well under 1 GB: everything stays in memory",)
        spare = free if device_kind == "cuda" and free is not None else total or host_total
        tile = upscaler_tile(device_kind, spare - GIB)
        return MemoryPlan(
            (*_ALL, "controlnet"), True, None, False, TILED_AT_MOST, reasons, lora_copies=GIB, upscaler_tile=tile
        )

    dtype = dtype or ("float32" if device_kind == "cpu" else "bfloat16")
    scale = 2 if dtype == "float32" else 1
    # On the CPU and MPS what other programs hold can be swapped out; a CUDA card has no such way.
    room = total or host_total
    if device_kind == "cuda" and free is not None:
        room = min(room, free)
    control = ("controlnet",) if mode == "controlnet" else ()
    rows = [_with(row, control) for row in _OWN_MEMORY]
    managed = [] if device_kind != "cuda" else [*([_STAGED_CONTROL] if control else []), *_MANAGED]
    row = next((row for row in [*rows, *managed] if row.bytes(scale) + HEADROOM <= room), None)
    fits = row is not None
    row = row or (managed or rows)[-1]
    offload = row in managed

    reasons = [f"{_memory_text(device_kind, room)}: {row.sentence}"]
    if control:
        where = "stays in memory too" if "controlnet" in row.resident else "comes and goes"
        reasons.append(f"ControlNet ({scale * SIZES['controlnet'] / 1e9:.1f} GB) {where}")
    both = row.transformers == 2
    limit = None
    if offload:
        limit = round(room / GIB - VRAM_MARGIN_GIB, 1)
        one = scale * sum(SIZES[part] for part in (*_ALL, *control)) + HEADROOM
        both = one + scale * SIZES["transformer"] <= host_total
        wait = "both transformers wait" if both else "one transformer at a time waits"
        reasons.append(f"{wait} in the host's {host_total / 1e9:.0f} GB")
        if one > host_total:
            reasons.append(f"that needs about {one / 1e9:.0f} GB of host memory: expect swapping, or to run out of it")
            fits = False
        if total is not None and total < FLOOR:
            reasons.append(f"a card of {total / 1e9:.1f} GB is below the 8 GB that this is made for")
            fits = False
    elif not fits:
        need = (row.bytes(scale) + HEADROOM) / 1e9
        reasons.append(f"that needs about {need:.0f} GB in {dtype}: expect swapping, or to run out of memory")
    left = room - row.bytes(scale) - HEADROOM // 3
    per_pixel = VAE_NUMBERS_PER_PIXEL * 2 * scale
    tiled = min(max(left // per_pixel, TILED_AT_LEAST), TILED_AT_MOST)
    copies = 0 if offload else max(0, room - row.bytes(scale) - HEADROOM)
    tile = upscaler_tile(device_kind, left)
    return MemoryPlan(row.resident, both, limit, offload, tiled, tuple(reasons), fits, copies, tile)


def upscaler_tile(device_kind: Kind, spare: int) -> int:
    """Return the side of Real-ESRGAN's tiles, in pixels of its input: half of the memory that is spare, in steps of 16.

    Args:
        device_kind: "cuda", "mps" or "cpu"; on CUDA it computes in half precision.
        spare: bytes that nothing else of ours takes.
    """
    per_pixel = UPSCALER_BYTES_PER_PIXEL // (2 if device_kind == "cuda" else 1)
    side = math.isqrt(max(spare, 0) // 2 // per_pixel) // 16 * 16
    return min(max(side, UPSCALER_TILE_AT_LEAST), UPSCALER_TILE_AT_MOST[device_kind])


def _with(row: _Row, parts: tuple[str, ...]) -> _Row:
    return replace(row, resident=(*row.resident, *parts))


def _memory_text(device_kind: Kind, room: int) -> str:
    whose = {"cuda": "of video memory free", "mps": "that Metal recommends at most", "cpu": "of memory"}
    return f"{room / 1e9:.0f} GB {whose[device_kind]}"
