"""LoRA files for tests, in the true format: one random LoRA, written in every dialect that is in the wild."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from hub.naming import weight_shapes

RANK = 4
Pairs = dict[str, tuple[torch.Tensor, torch.Tensor]]  # module -> (down [rank, in], up [out, rank])
Tensors = dict[str, torch.Tensor]


def linear_modules(size: str = "mini") -> list[str]:
    """Return the names of the transformer's linear layers."""
    return [name for name, shape in weight_shapes(size).items() if len(shape) == 2]


def random_pairs(seed: int = 0, size: str = "mini", gain: float = 0.3, modules: list[str] | None = None) -> Pairs:
    """Return a LoRA for some modules, by default every attention and feed-forward layer of the main stack.

    `gain` is about how large the change is beside a weight of usual size.
    """
    generator = torch.Generator().manual_seed(seed)
    shapes = weight_shapes(size)
    pairs = {}
    for name in modules or [
        module for module in linear_modules(size) if module.startswith("layers.") and "adaLN" not in module
    ]:
        rows, columns = shapes[name]
        down = torch.randn(RANK, columns, generator=generator) / columns**0.5
        pairs[name] = down, gain * torch.randn(rows, RANK, generator=generator) / RANK**0.5
    return pairs


def write(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    """Write a safetensors file."""
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, path, dict(metadata or {}))
    return path


def peft(pairs: Pairs, prefix: str = "", adapter: str = "") -> Tensors:
    """Write lora_A and lora_B under a prefix."""
    found: Tensors = {}
    for name, (down, up) in pairs.items():
        found[f"{prefix}{name}.lora_A{adapter}.weight"] = down
        found[f"{prefix}{name}.lora_B{adapter}.weight"] = up
    return found


def kohya(pairs: Pairs, prefix: str = "lora_unet_", alpha: float = RANK, down: str = "lora_down") -> Tensors:
    """Write lora_down, lora_up and alpha under a prefix, dots as underscores."""
    up_name, scale = down.replace("down", "up"), alpha / RANK
    found: Tensors = {}
    for name, (first, second) in pairs.items():
        flat = prefix + name.replace(".", "_")
        found[f"{flat}.{down}.weight"], found[f"{flat}.{up_name}.weight"] = first, second / scale
        found[f"{flat}.alpha"] = torch.tensor(alpha)
    return found


def fused(pairs: Pairs, flat: bool = False) -> Tensors:
    """Write q, k and v of a block as one LoRA of three times the rank, and `to_out.0` as `out`."""
    found: Tensors = {}
    for name, (down, up) in pairs.items():
        name = name.replace(".to_out.0", ".out")
        if name.endswith(("to_k", "to_v")):
            continue
        if name.endswith("to_q"):
            block = name.removesuffix("to_q")
            three = [pairs[block + part] for part in ("to_q", "to_k", "to_v")]
            name = block + "qkv"
            down = torch.cat([first for first, _ in three])
            up = torch.block_diag(*(second for _, second in three))  # type: ignore[no-untyped-call]  # torch leaves it untyped
        start = "lora_unet_" + name.replace(".", "_") if flat else "diffusion_model." + name
        found[f"{start}.lora_down.weight"], found[f"{start}.lora_up.weight"] = down, up
        found[f"{start}.alpha"] = torch.tensor(float(len(down)))
    return found


def lokr(pairs: Pairs, prefix: str = "lycoris_") -> Tensors:
    """Write each product as a Kronecker product whose first factor is the number one."""
    found: Tensors = {}
    for name, (down, up) in pairs.items():
        flat = prefix + name.replace(".", "_")
        found |= {f"{flat}.lokr_w1": torch.ones(1, 1), f"{flat}.lokr_w2_a": up, f"{flat}.lokr_w2_b": down}
        found[f"{flat}.alpha"] = torch.tensor(float(RANK))
    return found


def loha(pairs: Pairs, prefix: str = "lycoris_") -> Tensors:
    """Write each product as an element-wise product with a matrix of ones, which is of rank one."""
    found: Tensors = {}
    for name, (down, up) in pairs.items():
        flat = prefix + name.replace(".", "_")
        found |= {f"{flat}.hada_w2_a": up, f"{flat}.hada_w2_b": down, f"{flat}.alpha": torch.tensor(float(RANK))}
        ones = torch.zeros(up.shape), torch.zeros(down.shape)
        ones[0][:, 0], ones[1][0] = 1, 1
        found |= {f"{flat}.hada_w1_a": ones[0], f"{flat}.hada_w1_b": ones[1]}
    return found


def differences(pairs: Pairs, prefix: str = "diffusion_model.") -> Tensors:
    """Write each product multiplied out."""
    return {f"{prefix}{name}.diff": up @ down for name, (down, up) in pairs.items()}


def dora(
    pairs: Pairs, weights: Mapping[str, torch.Tensor], by_column: bool = False, peft_names: bool = False
) -> Tensors:
    """Write each pair with the magnitudes that the sum with the weight has anyway: the plain LoRA in DoRA's terms."""
    found = peft(pairs, "diffusion_model.") if peft_names else kohya(pairs, "lora_unet_")
    for name, (down, up) in pairs.items():
        norm = (weights[name + ".weight"].float() + up @ down).norm(dim=0 if by_column else 1, keepdim=True)
        key = (
            f"diffusion_model.{name}.lora_magnitude_vector"
            if peft_names
            else f"lora_unet_{name.replace('.', '_')}.dora_scale"
        )
        found[key] = norm.flatten() if peft_names else norm
    return found


# Rewritings that change names alone: the arithmetic is the same, bit for bit.
NAMES: Mapping[str, Callable[[Pairs], Tensors]] = {
    "none": peft,
    "diffusion_model": lambda pairs: peft(pairs, "diffusion_model."),
    "transformer": lambda pairs: peft(pairs, "transformer."),
    "transformer.diffusion_model": lambda pairs: peft(pairs, "transformer.diffusion_model."),
    "model.diffusion_model": lambda pairs: peft(pairs, "model.diffusion_model."),
    "base_model.model": lambda pairs: peft(pairs, "base_model.model."),
    "base_model.model.transformer": lambda pairs: peft(pairs, "base_model.model.transformer."),
    "dit": lambda pairs: peft(pairs, "dit."),
    "default adapter": lambda pairs: peft(pairs, "", ".default"),
    "kohya": kohya,
    "kohya, two underscores": lambda pairs: kohya(pairs, "lora_unet__"),
    "kohya, alpha": lambda pairs: kohya(pairs, alpha=2.0 * RANK),
    "kohya, lora.down": lambda pairs: kohya(pairs, down="lora.down"),
    "lycoris": lambda pairs: kohya(pairs, "lycoris_"),
    "1 x 1 convolutions": lambda pairs: {
        name: tensor if tensor.ndim == 0 else tensor[..., None, None] for name, tensor in kohya(pairs).items()
    },
    "old names": lambda pairs: {
        name.replace("to_out.0", "out").replace("all_x_embedder.2-1", "x_embedder"): tensor
        for name, tensor in peft(pairs, "diffusion_model.").items()
    },
}
# Rewritings that reach the same weights by other sums: equal to within rounding.
SUMS: Mapping[str, Callable[[Pairs], Tensors]] = {
    "fused qkv": fused,
    "fused qkv, kohya": lambda pairs: fused(pairs, flat=True),
    "LoKr": lokr,
    "LoHa": loha,
    "differences": differences,
}
