"""Memory plans that no machine would be given, for tests of how plans are carried out."""

import dataclasses
from typing import Any

from diffusion.measure import Dtype
from diffusion.memory import MemoryPlan, Placement, Where, memory_plan


def everything_stays(dtype: Dtype = "float32", **changes: Any) -> MemoryPlan:
    """A plan for the miniature that keeps every part and both transformers in memory, computed in one dtype."""
    plan = memory_plan("cpu", 10**9, None, 10**9, "controlnet", "mini", dtype)
    return dataclasses.replace(plan, **changes)


def plan_with(at: Where, held: Dtype = "float32", **changes: Any) -> MemoryPlan:
    """A plan for the miniature whose parts, but for the VAE, all wait in one place."""
    plan = everything_stays()
    parts = {name: Placement("device" if name == "vae" else at, held) for name in plan.parts}
    return dataclasses.replace(plan, parts=parts, **changes)
