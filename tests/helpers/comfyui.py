"""The files that ComfyUI's users have: names and shapes as published, and folders of sparse ones."""

import math
import struct
from collections.abc import Mapping
from pathlib import Path

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from hub.naming import Shape
from tests.helpers.sparse import official_shapes, write_sparse

# The names of z_image_turbo_bf16.safetensors, as ComfyUI's model reads them (comfy/ldm/lumina/model.py, NextDiT with
# z_image_modulation, and comfy/utils.py, z_image_to_diffusers).
D = 3840
BLOCK: dict[str, Shape] = {
    "attention.qkv.weight": (3 * D, D),
    "attention.out.weight": (D, D),
    "attention.q_norm.weight": (128,),
    "attention.k_norm.weight": (128,),
    "feed_forward.w1.weight": (10240, D),
    "feed_forward.w2.weight": (D, 10240),
    "feed_forward.w3.weight": (10240, D),
    "attention_norm1.weight": (D,),
    "attention_norm2.weight": (D,),
    "ffn_norm1.weight": (D,),
    "ffn_norm2.weight": (D,),
}
MODULATED: dict[str, Shape] = {"adaLN_modulation.0.weight": (4 * D, 256), "adaLN_modulation.0.bias": (4 * D,)}
TRANSFORMER: dict[str, Shape] = {
    "x_pad_token": (1, D),
    "cap_pad_token": (1, D),
    "x_embedder.weight": (D, 64),
    "x_embedder.bias": (D,),
    "t_embedder.mlp.0.weight": (1024, 256),
    "t_embedder.mlp.0.bias": (1024,),
    "t_embedder.mlp.2.weight": (256, 1024),
    "t_embedder.mlp.2.bias": (256,),
    "cap_embedder.0.weight": (2560,),
    "cap_embedder.1.weight": (D, 2560),
    "cap_embedder.1.bias": (D,),
    "final_layer.linear.weight": (64, D),
    "final_layer.linear.bias": (64,),
    "final_layer.adaLN_modulation.1.weight": (D, 256),
    "final_layer.adaLN_modulation.1.bias": (D,),
    **{f"{stack}.{n}.{name}": shape for stack in ("noise_refiner", "context_refiner") for n in (0, 1)
       for name, shape in BLOCK.items()},
    **{f"noise_refiner.{n}.{name}": shape for n in (0, 1) for name, shape in MODULATED.items()},
    **{f"layers.{n}.{name}": shape for n in range(30) for name, shape in (BLOCK | MODULATED).items()},
}  # fmt: skip


def _autoencoder() -> dict[str, Shape]:
    """The names of ae.safetensors (black-forest-labs/flux, src/flux/modules/autoencoder.py)."""
    shapes: dict[str, Shape] = {}

    def convolution(name: str, out: int, into: int, side: int = 3) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (out, into, side, side), (out,)

    def norm(name: str, width: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (width,), (width,)

    def block(name: str, into: int, out: int) -> None:
        norm(f"{name}.norm1", into)
        convolution(f"{name}.conv1", out, into)
        norm(f"{name}.norm2", out)
        convolution(f"{name}.conv2", out, out)
        if into != out:
            convolution(f"{name}.nin_shortcut", out, into, 1)

    def middle(half: str) -> None:
        for number in (1, 2):
            block(f"{half}.mid.block_{number}", 512, 512)
        norm(f"{half}.mid.attn_1.norm", 512)
        for name in ("q", "k", "v", "proj_out"):
            convolution(f"{half}.mid.attn_1.{name}", 512, 512, 1)

    widths = (128, 256, 512, 512)
    convolution("encoder.conv_in", 128, 3)
    for level, (into, out) in enumerate(zip((128, *widths), widths, strict=False)):
        for number in (0, 1):
            block(f"encoder.down.{level}.block.{number}", into if number == 0 else out, out)
        if level < 3:
            convolution(f"encoder.down.{level}.downsample.conv", out, out)
    middle("encoder")
    norm("encoder.norm_out", 512)
    convolution("encoder.conv_out", 32, 512)
    convolution("decoder.conv_in", 512, 16)
    middle("decoder")
    into = 512
    for level, out in reversed([*enumerate(widths)]):
        for number in (0, 1, 2):
            block(f"decoder.up.{level}.block.{number}", into if number == 0 else out, out)
        into = out
        if level > 0:
            convolution(f"decoder.up.{level}.upsample.conv", out, out)
    norm("decoder.norm_out", 128)
    convolution("decoder.conv_out", 3, 128)
    return shapes


AUTOENCODER = _autoencoder()


# The names of a Qwen3 as llama.cpp's converter writes them (gguf-py, constants.py, MODEL_ARCH.QWEN3), with the shapes
# of Qwen/Qwen3-4B (its config.json).
H = 2560
LLAMA_CPP_LAYER: dict[str, Shape] = {
    "attn_norm": (H,),
    "attn_q": (4096, H),
    "attn_k": (1024, H),
    "attn_v": (1024, H),
    "attn_output": (H, 4096),
    "attn_q_norm": (128,),
    "attn_k_norm": (128,),
    "ffn_norm": (H,),
    "ffn_gate": (9728, H),
    "ffn_up": (9728, H),
    "ffn_down": (H, 9728),
}
LLAMA_CPP_ENCODER: dict[str, Shape] = {
    "token_embd.weight": (151_936, H),
    "output_norm.weight": (H,),
    **{f"blk.{n}.{name}.weight": shape for n in range(36) for name, shape in LLAMA_CPP_LAYER.items()},
}


def write_gguf(path: Path, shapes: Mapping[str, Shape], kind: str) -> None:
    """Write a GGUF file of full length without data: rows in a type where they are whole blocks of it, else fp32."""
    header, end = b"GGUF" + struct.pack("<IQQ", 3, len(shapes), 0), 0
    for name, shape in shapes.items():
        of = GGMLQuantizationType[kind]
        if len(shape) < 2 or shape[-1] % GGML_QUANT_SIZES[of][0]:
            of = GGMLQuantizationType.F32
        header += struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", len(shape))
        header += b"".join(struct.pack("<Q", side) for side in reversed(shape)) + struct.pack("<IQ", of, end)
        numbers, size = GGML_QUANT_SIZES[of]
        end += -(-(math.prod(shape) // numbers * size) // 32) * 32
    header += bytes(-len(header) % 32)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + end)


def write_folder(models: Path, *, kind: str = "diffusion_models", encoders: str = "text_encoders") -> None:
    """Write all of ComfyUI's files for Z-Image into its folder of models, in full length and without data."""
    write_sparse(models / kind / "z_image_turbo_bf16.safetensors", TRANSFORMER)
    write_sparse(models / kind / "z_image_bf16.safetensors", TRANSFORMER)
    write_sparse(models / encoders / "qwen_3_4b.safetensors", official_shapes("text_encoder"))
    write_sparse(models / "vae" / "ae.safetensors", AUTOENCODER, "F32")
    name = "Z-Image-Turbo-Fun-Controlnet-Union-2.1.safetensors"
    write_sparse(models / "model_patches" / name, official_shapes("controlnet"))
