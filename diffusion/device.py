"""Which device computes, and in which dtype: a decision, returned with its reason.

`decide` is pure: plain facts in, a decision out. `choose_device` looks at the machine, and is where torch is imported.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from core.errors import RequestError
from core.messages import Message
from core.sizes import WeightsKind
from diffusion import host_memory, measure
from diffusion.measure import Dtype, Part

DeviceKind = Literal["cuda", "mps", "cpu"]
DTYPES: Mapping[str, Dtype | None] = {"auto": None, "bf16": "bfloat16", "fp32": "float32"}
BFLOAT16_CAPABILITY = (8, 0)  # Ampere; older cards only emulate bf16


@dataclass(frozen=True)
class Device:
    """The device to compute on.

    Memory is in bytes, None where unknown; `free_bytes` is as of the decision. `dtype` is what transformer and
    ControlNet compute in, `text_dtype` and `vae_dtype` what text encoder and VAE do, where that is another. `rates` are
    operations a second of each part in its dtype, where they were measured.
    """

    kind: DeviceKind
    name: str
    total_bytes: int | None
    free_bytes: int | None
    dtype: Dtype
    reason: Message
    capability: tuple[int, int] | None = None
    text_dtype: Dtype | None = None
    vae_dtype: Dtype | None = None
    rates: Mapping[Part, float] | None = None


@dataclass(frozen=True)
class Accelerator:
    """A device as torch reports it: `capability` is CUDA's compute capability, (major, minor)."""

    kind: DeviceKind
    name: str
    total_bytes: int | None = None
    free_bytes: int | None = None
    capability: tuple[int, int] | None = None


def choose_device(asked: str, kind: WeightsKind, dtype: str | None = None) -> Device:
    """Return the device to compute on: CUDA, else MPS, else the CPU, unless one is asked for.

    For the real weights on a CPU, its speeds are measured where they are not stored: about a second, once.

    Args:
        asked: "auto", or a device by its name.
        kind: which weights are going to be used; the miniature computes in fp32 on every CPU.
        dtype: what the real weights are to compute in, "auto", "bf16" or "fp32"; None takes Z_IMAGE_DTYPE, else "auto".

    Raises:
        RequestError: the device asked for is not there, or there is no such dtype; the message names what is.
    """
    given = dtype or os.environ.get("Z_IMAGE_DTYPE") or "auto"
    if given not in DTYPES:
        raise RequestError("dtype", given, Message("dtypes", "{names}", names=list(DTYPES)))
    present = list(_accelerators())
    chosen = _asked_for(asked, present)
    speeds = measure.speeds() if chosen.kind == "cpu" and kind == "full" else None
    return decide(asked, present, speeds, DTYPES[given] if kind == "full" else None)


def decide(
    asked: str, present: list[Accelerator], speeds: measure.Speeds | None = None, dtype: Dtype | None = None
) -> Device:
    """Choose among the devices that are present, listed best first, the CPU last. Pure.

    Never fp16: its range is too small for these models, and the image comes out black.

    Args:
        asked: "auto", or a device by its name.
        present: the devices of this machine.
        speeds: how fast the CPU computes in either dtype; None where it is to compute in fp32.
        dtype: what is to be computed in, for all parts; None takes what suits the device.

    Raises:
        RequestError: the device asked for is not among them.
    """
    accelerator = _asked_for(asked, present)
    why = _AS_ASKED if asked != "auto" else _WHY_AUTO[accelerator.kind]
    known = speeds if accelerator.kind == "cpu" else None
    dtypes, why_dtype = _dtypes(accelerator, known, dtype)
    return Device(
        accelerator.kind,
        accelerator.name,
        accelerator.total_bytes,
        accelerator.free_bytes,
        dtypes["transformer"],
        Message("device", "{name}, {why}; {dtype}", name=accelerator.name, why=why, dtype=why_dtype),
        accelerator.capability,
        text_dtype=dtypes.get("text_encoder"),
        vae_dtype=dtypes.get("vae"),
        rates={part: getattr(known.of(part), used) * 1e9 for part, used in dtypes.items()} if known else None,
    )


def _asked_for(asked: str, present: list[Accelerator]) -> Accelerator:
    kinds = [accelerator.kind for accelerator in present]
    if asked == "auto":
        return present[0]
    if asked not in kinds:
        raise RequestError("device", asked, Message("devices", "{names} on this machine", names=["auto", *kinds]))
    return present[kinds.index(asked)]


_AS_ASKED = Message("as_asked", "as asked")
_WHY_AUTO: Mapping[DeviceKind, Message] = {
    "cuda": Message("best_device", "the CUDA card of this machine"),
    "mps": Message("best_device", "Apple's GPU, since there is no CUDA card"),
    "cpu": Message("best_device", "since torch sees neither a CUDA card nor Apple's GPU"),
}


def _dtypes(
    accelerator: Accelerator, speeds: measure.Speeds | None, asked: Dtype | None
) -> tuple[dict[Part, Dtype], Message]:
    """Return what parts compute in, and why; those that are left out go by the transformer's."""
    if asked is not None:
        parts = PARTS if accelerator.kind == "cpu" else PARTS[:1]
        return dict.fromkeys(parts, asked), Message("dtype", "{dtype}, as asked", dtype=_SHORT[asked])
    if speeds is not None:
        dtypes = {part: speeds.faster(part) for part in PARTS}
        return dtypes, _why_measured(speeds, dtypes)
    dtype, why = _dtype(accelerator)
    return {"transformer": dtype}, why


PARTS: tuple[Part, ...] = get_args(Part)
_SHORT: Mapping[Dtype, str] = {"float32": "fp32", "bfloat16": "bf16"}


def _dtype(accelerator: Accelerator) -> tuple[Dtype, Message]:
    if accelerator.kind == "mps":
        return "bfloat16", Message("dtype", "bf16, because fp16 overflows to black pictures on these models")
    if accelerator.kind == "cpu":
        return "float32", Message("dtype", "fp32, so that a seed means one picture on all processors")
    capability = accelerator.capability or (0, 0)
    number = ".".join(map(str, capability))
    if capability >= BFLOAT16_CAPABILITY:
        text = "bf16, which compute capability {number} has; fp16 overflows to black pictures"
        return "bfloat16", Message("dtype", text, number=number)
    text = "fp32, because compute capability {number} has no bf16 (8.0 and up do) and fp16 overflows to black pictures"
    return "float32", Message("dtype", text, number=number)


def _why_measured(speeds: measure.Speeds, dtypes: Mapping[Part, Dtype]) -> Message:
    figures = [
        Message("speed", "{work} {speeds}", work=work, speeds=getattr(speeds, work).message)
        for work in ("products", "attention", "convolution", "text")
    ]
    dtype = dtypes["transformer"]
    if dtype == "float32":
        text = "fp32, because a step in bf16 is only {times:.2g} times as fast as in fp32, as measured here ({figures})"
    else:
        text = "bf16, because a step in it is {times:.2g} times as fast as in fp32, as measured here ({figures})"
    reason = Message("dtype", text, times=speeds.step.ratio, figures=figures)
    for part, other in dtypes.items():
        if other != dtype:
            text = _OTHERWISE[part]
            reason = Message("dtype", text, reason=reason, dtype=_SHORT[other])
    return reason


_OTHERWISE: Mapping[Part, str] = {
    "text_encoder": "{reason}; the text encoder in {dtype}",
    "vae": "{reason}; the VAE in {dtype}",
}


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
    total, free = host_memory.total_and_free()
    yield Accelerator("cpu", f"{platform.machine()} CPU, {os.cpu_count()} cores", total, free)
