"""Which device computes, and in which dtype: a decision, returned with its reason.

`decide` is pure: plain facts in, a decision out. `choose_device` looks at the machine, and is where torch is imported.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from core.errors import RequestError
from core.messages import Message
from core.sizes import WeightsKind
from diffusion import host_memory, measure

DeviceKind = Literal["cuda", "mps", "cpu"]
Dtype = Literal["bfloat16", "float32"]
BFLOAT16_CAPABILITY = (8, 0)  # Ampere; older cards only emulate bf16


@dataclass(frozen=True)
class Device:
    """The device to compute on.

    Memory is in bytes, None where unknown; `free_bytes` is as of the decision. `vae_dtype` is the VAE's, where it is
    another; `flops` are operations a second in `dtype`, where they were measured.
    """

    kind: DeviceKind
    name: str
    total_bytes: int | None
    free_bytes: int | None
    dtype: Dtype
    reason: Message
    capability: tuple[int, int] | None = None
    vae_dtype: Dtype | None = None
    flops: float | None = None


@dataclass(frozen=True)
class Accelerator:
    """A device as torch reports it: `capability` is CUDA's compute capability, (major, minor)."""

    kind: DeviceKind
    name: str
    total_bytes: int | None = None
    free_bytes: int | None = None
    capability: tuple[int, int] | None = None


def choose_device(asked: str, kind: WeightsKind) -> Device:
    """Return the device to compute on: CUDA, else MPS, else the CPU, unless one is asked for.

    For the real weights on a CPU, its speeds are measured where they are not stored: half a second, once.

    Args:
        asked: "auto", or a device by its name.
        kind: which weights are going to be used; the miniature computes in fp32 on every CPU.

    Raises:
        RequestError: the device asked for is not there; the message names what is.
    """
    present = list(_accelerators())
    chosen = _asked_for(asked, present)
    return decide(asked, present, measure.speeds() if chosen.kind == "cpu" and kind == "full" else None)


def decide(asked: str, present: list[Accelerator], speeds: measure.Speeds | None = None) -> Device:
    """Choose among the devices that are present, listed best first, the CPU last. Pure.

    Never fp16: its range is too small for these models, and the image comes out black.

    Args:
        asked: "auto", or a device by its name.
        present: the devices of this machine.
        speeds: how fast the CPU computes in either dtype; None where it is to compute in fp32.

    Raises:
        RequestError: the device asked for is not among them.
    """
    accelerator = _asked_for(asked, present)
    why = _AS_ASKED if asked != "auto" else _WHY_AUTO[accelerator.kind]
    dtype, why_dtype = _dtype(accelerator, speeds)
    known = speeds if accelerator.kind == "cpu" else None
    return Device(
        accelerator.kind,
        accelerator.name,
        accelerator.total_bytes,
        accelerator.free_bytes,
        dtype,
        Message("device", "{name}, {why}; {dtype}", name=accelerator.name, why=why, dtype=why_dtype),
        accelerator.capability,
        vae_dtype=_vae_dtype(dtype, known) if known else None,
        flops=getattr(known.products, dtype) * 1e9 if known else None,
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


def _dtype(accelerator: Accelerator, speeds: measure.Speeds | None) -> tuple[Dtype, Message]:
    if accelerator.kind == "mps":
        return "bfloat16", Message("dtype", "bf16, because fp16 overflows to black pictures on these models")
    if accelerator.kind == "cpu":
        return ("float32", _WHY_FP32) if speeds is None else _measured_dtype(speeds)
    capability = accelerator.capability or (0, 0)
    number = ".".join(map(str, capability))
    if capability >= BFLOAT16_CAPABILITY:
        text = "bf16, which compute capability {number} has; fp16 overflows to black pictures"
        return "bfloat16", Message("dtype", text, number=number)
    text = "fp32, because compute capability {number} has no bf16 (8.0 and up do) and fp16 overflows to black pictures"
    return "float32", Message("dtype", text, number=number)


def _vae_dtype(dtype: Dtype, speeds: measure.Speeds) -> Dtype:
    return dtype if speeds.bfloat16_vae else "float32"


_WHY_FP32 = Message("dtype", "fp32, so that a seed means one picture on all processors")


def _measured_dtype(speeds: measure.Speeds) -> tuple[Dtype, Message]:
    figures = [
        Message("speed", "{work} {speeds}", work=work, speeds=getattr(speeds, work).message)
        for work in ("products", "attention", "convolution")
    ]
    dtype: Dtype = "bfloat16" if speeds.bfloat16_steps else "float32"
    if dtype == "float32":
        text = "fp32, because a step in bf16 is only {times:.2g} times as fast as in fp32, as measured here ({figures})"
    else:
        text = "bf16, because a step in it is {times:.2g} times as fast as in fp32, as measured here ({figures})"
        if not speeds.bfloat16_vae:
            text += "; the VAE in fp32"
    return dtype, Message("dtype", text, times=speeds.step_ratio, figures=figures)


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
