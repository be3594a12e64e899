"""The miniature written as other tools write models: ComfyUI's names, fp8, GGUF, shards."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from gguf import GGUFWriter
from gguf.constants import MODEL_ARCH, GGMLQuantizationType
from gguf.quants import quantize
from gguf.tensor_mapping import get_tensor_name_map
from safetensors import safe_open
from safetensors.torch import save_file

Tensors = dict[str, torch.Tensor]


def read(file: Path) -> dict[str, torch.Tensor]:
    with safe_open(file, framework="pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - it is no mapping


def in_comfyuis_names(own: Mapping[str, torch.Tensor], prefix: str = "") -> dict[str, torch.Tensor]:
    """Return a transformer as ComfyUI has it: query, key and value in one, and other names for the rest."""
    theirs = {}
    for name, tensor in own.items():
        if ".to_q." in name:
            three = [own[name.replace("to_q", f"to_{letter}")] for letter in "qkv"]
            theirs[prefix + name.replace("to_q", "qkv")] = torch.cat(three)
        elif not (".to_k." in name or ".to_v." in name):
            for ours, other in (
                ("all_x_embedder.2-1", "x_embedder"),
                ("all_final_layer.2-1", "final_layer"),
                ("to_out.0", "out"),
                ("norm_q", "q_norm"),
                ("norm_k", "k_norm"),
            ):
                name = name.replace(ours, other)
            theirs[prefix + name] = tensor
    return theirs


def in_fp8(plain: Mapping[str, torch.Tensor], way: str, dtype: torch.dtype = torch.float8_e4m3fn) -> Tensors:
    """Return a model with its matrices in fp8, as the tools write it.

    Args:
        plain: the model.
        way: "plain", "old" (ComfyUI up to 2025-10), "marked" (since then), or "rows", a scale for each row.
        dtype: which fp8.
    """
    packed: Tensors = {"scaled_fp8": torch.empty(0, dtype=dtype)} if way == "old" else {}
    for name, tensor in plain.items():
        if tensor.ndim != 2 or not name.endswith(".weight"):
            packed[name] = tensor
            continue
        module, largest = name.removesuffix(".weight"), tensor.float().abs()
        scale = (largest.amax(1, keepdim=True) if way == "rows" else largest.amax()) / torch.finfo(dtype).max
        scale = torch.ones(()) if way == "plain" else scale
        packed[name] = (tensor.float() / scale).to(dtype)
        if way == "old":
            packed |= {f"{module}.scale_weight": scale, f"{module}.scale_input": torch.ones(())}
        elif way != "plain":
            form = {torch.float8_e4m3fn: "float8_e4m3fn", torch.float8_e5m2: "float8_e5m2"}[dtype]
            mark = json.dumps({"format": form, "full_precision_matrix_mult": True}).encode()
            packed |= {f"{module}.weight_scale": scale, f"{module}.input_scale": torch.ones(())}
            packed[f"{module}.comfy_quant"] = torch.frombuffer(bytearray(mark), dtype=torch.uint8)
    return packed


def out_of_fp8(packed: Mapping[str, torch.Tensor]) -> Tensors:
    """Return the numbers that a model in fp8 stands for, in bf16 by their own names."""
    plain = {}
    for name, tensor in packed.items():
        module = name.removesuffix(".weight")
        scale = packed.get(f"{module}.weight_scale", packed.get(f"{module}.scale_weight", torch.ones(())))
        if not name.endswith(("scale", "scale_weight", "scale_input", "comfy_quant", "scaled_fp8")):
            plain[name] = (tensor.float() * scale).to(torch.bfloat16) if tensor.itemsize == 1 else tensor
    return plain


def write_gguf(path: Path, tensors: Mapping[str, torch.Tensor], kind: GGMLQuantizationType, architecture: str) -> Path:
    """Write a GGUF file as the tools do: matrices in one type, what has one dimension in fp32."""
    writer = GGUFWriter(path, architecture)
    writer.add_array("tokenizer.ggml.tokens", ["a", "bc"] * 50)
    for name, tensor in tensors.items():
        numbers = tensor.float().numpy()
        if 1 in numbers.shape:  # a token's side of length 1 is left out
            numbers = numbers.reshape(-1)
        of = kind if numbers.ndim > 1 else GGMLQuantizationType.F32
        writer.add_tensor(name, quantize(numbers, of), raw_dtype=of)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def in_llama_cpps_names(own: Mapping[str, torch.Tensor]) -> Tensors:
    names = get_tensor_name_map(MODEL_ARCH.QWEN3, 36)
    return {f"{names.get_name(name.removesuffix('.weight'))}.weight": tensor for name, tensor in own.items()}


def write_shards(folder: Path, tensors: Mapping[str, torch.Tensor], count: int = 3, index: bool = True) -> Path:
    """Write a model into several files, as diffusers does; return the index, or the second file where there is none."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = "diffusion_pytorch_model"
    places: dict[str, str] = {}
    for number in range(count):
        name = f"{stem}-{number + 1:05}-of-{count:05}.safetensors"
        part = dict(sorted(tensors.items())[number::count])
        save_file(part, folder / name)
        places |= dict.fromkeys(part, name)
    if not index:
        return folder / f"{stem}-00002-of-{count:05}.safetensors"
    path = folder / f"{stem}.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return path
