"""The names that checkpoints have for a Z-Image transformer's weights."""

import pytest
import torch

import mini.config
from core.sizes import WeightsKind
from hub.naming import LAYER_SIZES, Shape, layout_of, tensor_shapes, weight_shapes


@pytest.mark.parametrize("size", LAYER_SIZES)
def test_names_and_shapes_are_the_models_own(size: WeightsKind) -> None:
    from diffsynth.models.z_image_dit import ZImageDiT

    with torch.device("meta"):
        model = ZImageDiT(**(mini.config.TRANSFORMER_CONFIG if size == "mini" else {}))
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert tensor_shapes(size) == own
    assert {f"{name}.weight" for name in weight_shapes(size)} == {name for name in own if name.endswith(".weight")}


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
COMFYUI: dict[str, Shape] = {
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


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "net.", "diffusion_model.", "any.thing.at.all."])
def test_comfyuis_names_are_recognised_behind_any_prefix(prefix: str) -> None:
    layout = layout_of({prefix + name: shape for name, shape in COMFYUI.items()})
    assert layout is not None
    assert layout.size == "full"
    assert len(layout.sources) == len(COMFYUI)
    fused = layout.sources[f"{prefix}layers.7.attention.qkv.weight"]
    assert fused == tuple(f"layers.7.attention.to_{letter}.weight" for letter in "qkv")
    assert layout.sources[f"{prefix}x_embedder.bias"] == ("all_x_embedder.2-1.bias",)
    assert layout.sources[f"{prefix}layers.0.attention.out.weight"] == ("layers.0.attention.to_out.0.weight",)


def test_what_else_a_file_holds_is_left_alone() -> None:
    shapes = {f"model.diffusion_model.{name}": shape for name, shape in COMFYUI.items()}
    others = {"vae.decoder.conv_in.weight": (512, 16, 3, 3), "text_encoders.qwen3_4b.norm.weight": (2560,)}
    layout = layout_of(shapes | others | {"model.diffusion_model.norm_final.weight": (D,)})
    assert layout is not None
    assert layout.sources.keys() == shapes.keys()


@pytest.mark.parametrize(
    "changes",
    [
        {"layers.29.attention.qkv.weight": None},
        {"layers.29.attention.qkv.weight": (D, D)},
        {"cap_embedder.1.weight": (D, 4096)},
        {"cap_embedder.1.weight": None},
        {"x_pad_token": None},
        {"layers.3.attention.to_q.weight": (D, D)},  # there twice
        {"second.cap_embedder.1.weight": (D, 2560)},
    ],
)
def test_what_is_not_a_whole_transformer_is_not_taken_for_one(changes: dict[str, Shape | None]) -> None:
    shapes = {**COMFYUI, **changes}
    assert layout_of({name: shape for name, shape in shapes.items() if shape is not None}) is None
