"""Full-size checkpoints without the disk: official names, shapes and shards, and no data.

A safetensors file may be sparse: its header is written and its length set, and the rest takes no room. Shapes come from
the real model classes on torch's meta device, in seconds. Whatever only reads names, shapes and sizes cannot tell such
a file from a downloaded one; what is loaded from it is zeros.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from core import environment

if TYPE_CHECKING:
    import torch

Shapes = Mapping[str, tuple[int, ...]]

BYTES = {"F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "F8_E8M0": 1}
COMMIT = "f332072aa78be7aecdf3ee76d5c247082da564a6"  # any 40 hex digits do

# As published: the file that shards are numbered from, the dtype, and the writer's largest shard. diffusers splits at
# 10 GB and transformers at 4 GB, both in the order of the state dict.
TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
LAYOUT: Mapping[str, tuple[str, str, float]] = {
    "turbo": (TRANSFORMER, "F32", 10e9),
    "base": (TRANSFORMER, "BF16", 10e9),
    "text_encoder": ("text_encoder/model.safetensors", "BF16", 4e9),
    "vae": ("vae/diffusion_pytorch_model.safetensors", "BF16", 10e9),
    "depth": ("model.safetensors", "F32", 10e9),
    "controlnet": ("Z-Image-Turbo-Fun-Controlnet-Union-2.1-2602-8steps.safetensors", "BF16", 10e9),
}
TOKENIZER = {
    "tokenizer.json": b'{"version": "1.0"}\n',
    "tokenizer_config.json": b'{"tokenizer_class": "Qwen2Tokenizer"}\n',
    "vocab.json": b"{}\n",
    "merges.txt": b"#version: 0.2\n",
}
UPSCALER_BYTES = 67_040_989


@cache
def official_shapes(part: str) -> Shapes:
    """Return the tensor names and shapes of a part ("turbo", "text_encoder", "vae", ...), in the model's own order."""
    environment.prepare_environment(os.environ)
    import torch

    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in _model_class(part)().state_dict().items()}


def _model_class(part: str) -> Callable[[], torch.nn.Module]:
    if part == "vae":
        from diffusers import AutoencoderKL

        # vae/config.json of Tongyi-MAI/Z-Image-Turbo
        return lambda: AutoencoderKL(  # type: ignore[no-untyped-call, return-value]  # diffusers hides that it is a Module
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=16,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
    if part == "text_encoder":
        from diffsynth.models.z_image_text_encoder import ZImageTextEncoder

        return ZImageTextEncoder  # type: ignore[no-any-return]  # DiffSynth brings no types
    if part in ("controlnet", "controlnet_lite"):
        from diffsynth.models.z_image_controlnet import ZImageControlNet

        # VideoX-Fun, config/z_image/z_image_control_2.1_lite.yaml; 2.02 GB on the hub
        return (
            (lambda: ZImageControlNet(control_layers_places=(0, 10, 20))) if part.endswith("lite") else ZImageControlNet
        )
    if part == "depth":
        from transformers import DepthAnythingForDepthEstimation

        from images import depth

        return lambda: DepthAnythingForDepthEstimation(depth.config())
    from diffsynth.models.z_image_dit import ZImageDiT

    return ZImageDiT  # type: ignore[no-any-return]  # DiffSynth brings no types


def write_sparse(
    path: Path,
    shapes: Shapes,
    dtype: str = "BF16",
    dtypes: Mapping[str, str] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file of full length, laid out as safetensors itself does, with a header and no data.

    Args:
        path: the file.
        shapes: of its tensors, by name.
        dtype: of all but those in `dtypes`.
        dtypes: of some, by name.
        metadata: what the file says about itself.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for name in sorted(shapes):
        of = (dtypes or {}).get(name, dtype)
        start, end = end, end + math.prod(shapes[name]) * BYTES[of]
        header[name] = {"dtype": of, "shape": list(shapes[name]), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def shards(shapes: Shapes, dtype: str, largest: float) -> list[Shapes]:
    """Split tensors into files of at most `largest` bytes, in their order."""
    parts: list[dict[str, tuple[int, ...]]] = [{}]
    total = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * BYTES[dtype]
        if parts[-1] and total + size > largest:
            parts.append({})
            total = 0
        parts[-1][name] = shape
        total += size
    return list(parts)


def write_part(folder: Path, part: str, dtype: str | None = None) -> None:
    """Write one part of the real weights into a repository's folder, in the published files."""
    if part == "tokenizer":
        for name, content in TOKENIZER.items():
            (folder / "tokenizer").mkdir(parents=True, exist_ok=True)
            (folder / "tokenizer" / name).write_bytes(content)
        return
    if part == "upscaler":
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "RealESRGAN_x4plus.pth").open("wb") as file:
            file.truncate(UPSCALER_BYTES)
        return
    name, published, largest = LAYOUT[part]
    split = shards(official_shapes(part), dtype or published, largest)
    if len(split) == 1:
        write_sparse(folder / name, split[0], dtype or published)
        return
    stem = name.removesuffix(".safetensors")
    index: dict[str, str] = {}
    for number, shapes in enumerate(split, 1):
        shard = folder / f"{stem}-{number:05}-of-{len(split):05}.safetensors"
        write_sparse(shard, shapes, dtype or published)
        index |= dict.fromkeys(shapes, shard.name)
    (folder / f"{name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}), encoding="utf-8")


def write_hub_snapshot(
    cache: Path, repo: str, parts: Iterable[str], commit: str = COMMIT, *, main: bool = True
) -> Path:
    """Write parts into a Hugging Face cache: blobs, a snapshot of links to them, and refs/main. Return the snapshot.

    Blobs have 64-digit names (a stand-in for the SHA-256 that the hub gives large files).
    """
    folder = cache / f"models--{repo.replace('/', '--')}"
    blobs, snapshot = folder / "blobs", folder / "snapshots" / commit
    blobs.mkdir(parents=True, exist_ok=True)
    for part in parts:
        write_part(snapshot, part)
    for file in sorted(path for path in snapshot.rglob("*") if path.is_file() and not path.is_symlink()):
        blob = blobs / hashlib.sha256(f"{repo}/{commit}/{file.name}".encode()).hexdigest()
        file.rename(blob)
        file.symlink_to(os.path.relpath(blob, file.parent))
    if main:
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / "main").write_text(commit, encoding="utf-8")
    return snapshot
