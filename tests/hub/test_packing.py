"""How checkpoints are packed: what is read, and what is refused by its name."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hub import packing
from hub.checkpoint import UnusableError

WEIGHT = torch.zeros(4, 4)
FP8 = WEIGHT.to(torch.float8_e4m3fn)
INT8 = WEIGHT.to(torch.int8)
BYTES = WEIGHT.to(torch.uint8)
ONE = torch.ones(())


def mark(**conf: object) -> torch.Tensor:
    """A layer's marker as ComfyUI writes it (comfy/ops.py): its configuration as JSON, in bytes."""
    return torch.frombuffer(bytearray(json.dumps(conf).encode()), dtype=torch.uint8)


def write(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path, dict(metadata or {}))
    return path


@pytest.mark.parametrize(
    ("tensors", "title", "scales"),
    [
        ({"a.weight": WEIGHT}, "fp32", {}),
        ({"a.weight": WEIGHT.bfloat16(), "b": WEIGHT[0]}, "bf16", {}),
        ({"a.weight": WEIGHT.half()}, "fp16", {}),
        ({"a.weight": FP8}, "fp8", {}),
        ({"a.weight": WEIGHT.to(torch.float8_e5m2)}, "fp8", {}),
        ({"a.weight": FP8, "a.scale_weight": ONE, "scaled_fp8": FP8[:0]},
         "fp8, scaled", {"a.weight": "a.scale_weight"}),
        ({"p.a.weight": FP8, "p.a.scale_weight": ONE, "p.scaled_fp8": FP8[0, :2], "p.a.scale_input": ONE},
         "fp8, scaled", {"p.a.weight": "p.a.scale_weight"}),
        ({"a.weight": FP8, "a.weight_scale": ONE, "a.input_scale": ONE, "a.comfy_quant": mark(format="float8_e4m3fn")},
         "fp8, scaled", {"a.weight": "a.weight_scale"}),
        ({"a.weight": FP8, "a.weight_scale": torch.ones(4, 1)}, "fp8, scaled", {"a.weight": "a.weight_scale"}),
        ({"a.weight": FP8, "b.weight": torch.zeros(9, 9)}, "fp32", {}),
    ],
)  # fmt: skip
def test_what_is_read(tensors: dict[str, torch.Tensor], title: str, scales: dict[str, str], tmp_path: Path) -> None:
    stored = packing.stored([write(tmp_path / "a.safetensors", tensors)])
    assert stored.title == title
    assert stored.scales == scales
    assert stored.packed == any(tensor.itemsize == 1 for tensor in tensors.values())
    assert stored.shapes.keys() == {name for name in tensors if name.endswith("weight") or name == "b"} - {
        *scales.values()
    }


# As the tools write them: ComfyUI (QUANTIZATION.md, comfy/quant_ops.py), nunchaku, SDNQ, bitsandbytes, llm-compressor.
@pytest.mark.parametrize(
    ("tensors", "packed_as"),
    [
        ({"a.weight": BYTES, "a.weight_scale": FP8, "a.weight_scale_2": ONE, "a.comfy_quant": mark(format="nvfp4")},
         "nvfp4"),
        ({"a.weight": BYTES, "a.weight_scale": FP8, "a.comfy_quant": mark(format="nvfp4")}, "nvfp4"),
        ({"a.weight": FP8, "a.weight_scale": BYTES, "a.comfy_quant": mark(format="mxfp8")}, "mxfp8"),
        ({"a.weight": FP8, "a.weight_scale": BYTES}, "4 or 8 bits in bytes"),
        ({"a.weight": INT8, "a.weight_scale": ONE, "a.comfy_quant": mark(format="int8_tensorwise")}, "int8_tensorwise"),
        ({"a.weight": INT8, "a.weight_scale": ONE, "a.comfy_quant": mark(format="int8_tensorwise", convrot=True)},
         "int8_tensorwise with convrot"),
        ({"a.weight": FP8, "a.comfy_quant": mark(format="float8_e4m3fn", params={"convrot": True})}, "with convrot"),
        ({"a.weight": INT8, "a.comfy_quant": mark(format="convrot_w4a4")}, "convrot_w4a4"),
        ({"a.weight": INT8}, "int8"),
        ({"a.weight": BYTES}, "4 or 8 bits in bytes"),
        ({"a.qweight": INT8, "a.wscales": ONE, "a.smooth_factor": WEIGHT[0], "a.proj_down": WEIGHT}, "SVDQuant"),
        ({"a.weight": BYTES, "a.scale": WEIGHT, "a.zero_point": WEIGHT}, "SDNQ"),
        ({"a.weight": INT8, "a.scale": WEIGHT, "a.svd_up": WEIGHT, "a.svd_down": WEIGHT}, "SDNQ"),
        ({"a.weight": BYTES, "a.weight.absmax": ONE, "a.weight.quant_state.bitsandbytes__nf4": BYTES}, "bitsandbytes"),
        ({"a.qweight": INT8, "a.qzeros": INT8, "a.scales": WEIGHT}, "GPTQ or AWQ"),
        ({"a.weight_packed": BYTES, "a.weight_scale": FP8}, "compressed-tensors"),
        ({"a.weight": FP8, "a.weight_scale": ONE, "a.pre_quant_scale": WEIGHT[0]}, "smoothed fp8"),
    ],
)  # fmt: skip
def test_what_is_not_read_is_named_with_what_would_do(
    tensors: dict[str, torch.Tensor], packed_as: str, tmp_path: Path
) -> None:
    with pytest.raises(UnusableError) as refused:
        packing.stored([write(tmp_path / "a.safetensors", tensors)])
    assert f"{packed_as}, which is not read here; the same model in bf16" in str(refused.value)
    assert "a.safetensors" in str(refused.value)


@pytest.mark.parametrize("conf", [{"format": "nvfp4"}, "nvfp4"])
def test_metadata_tells_of_layers_too(conf: object, tmp_path: Path) -> None:
    metadata = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": {"a": conf}})}
    with pytest.raises(UnusableError, match="is packed as nvfp4"):
        packing.stored([write(tmp_path / "a.safetensors", {"a.weight": FP8}, metadata)])


@pytest.mark.parametrize(
    ("tensors", "metadata"),
    [
        ({"a.weight": FP8, "a.comfy_quant": BYTES[0]}, {}),
        ({"a.weight": FP8, "a.comfy_quant": mark(format="x" * 5000)}, {}),
        ({"a.weight": FP8, "a.comfy_quant": torch.frombuffer(bytearray(b"[1, 2]"), dtype=torch.uint8)}, {}),
        ({"a.weight": FP8}, {"_quantization_metadata": "{"}),
        ({"a.weight": FP8}, {"_quantization_metadata": '{"layers": {"a": 3}}'}),
    ],
)
def test_marks_that_cannot_be_read_are_not_guessed(
    tensors: dict[str, torch.Tensor], metadata: dict[str, str], tmp_path: Path
) -> None:
    with pytest.raises(UnusableError, match="in a way that cannot be read how it is packed"):
        packing.stored([write(tmp_path / "a.safetensors", tensors, metadata)])


@pytest.mark.parametrize(
    ("weight", "scale", "said"),
    [
        (FP8, torch.ones(2, 2), "a scale of shape 2 x 2 (F32) for a.weight (F8_E4M3)"),
        (WEIGHT, ONE, "for a.weight (F32)"),
        (FP8, FP8, "(F8_E4M3) for a.weight"),
    ],
)
def test_scales_of_other_kinds_are_refused(
    weight: torch.Tensor, scale: torch.Tensor, said: str, tmp_path: Path
) -> None:
    with pytest.raises(UnusableError) as refused:
        packing.stored([write(tmp_path / "a.safetensors", {"a.weight": weight, "a.weight_scale": scale})])
    assert said in str(refused.value)


def test_another_models_own_scales_are_no_packing(tmp_path: Path) -> None:
    """As in Flux, whose norms have a `scale` in place of a `weight`."""
    tensors = {"blocks.0.norm.query_norm.scale": WEIGHT[0], "blocks.0.lin.weight": WEIGHT}
    assert packing.stored([write(tmp_path / "a.safetensors", tensors)]).title == "fp32"
