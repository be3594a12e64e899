"""The names that checkpoints have for a Z-Image transformer's weights."""

from collections.abc import Mapping

import pytest
import torch
from gguf.constants import MODEL_ARCH
from gguf.tensor_mapping import get_tensor_name_map

import mini.config
from core.sizes import WeightsKind
from hub.checkpoint import read_header
from hub.naming import (
    ENCODER_SIZES,
    LAYER_SIZES,
    Shape,
    encoder_layout_of,
    encoder_shapes,
    layout_of,
    tensor_shapes,
    weight_shapes,
)
from tests.helpers.comfyui import TRANSFORMER
from tests.helpers.sparse import official_shapes


@pytest.mark.parametrize("size", LAYER_SIZES)
def test_names_and_shapes_are_the_models_own(size: WeightsKind) -> None:
    from diffsynth.models.z_image_dit import ZImageDiT

    with torch.device("meta"):
        model = ZImageDiT(**(mini.config.TRANSFORMER_CONFIG if size == "mini" else {}))
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert tensor_shapes(size) == own
    assert {f"{name}.weight" for name in weight_shapes(size)} == {name for name in own if name.endswith(".weight")}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "net.", "diffusion_model.", "any.thing.at.all."])
def test_comfyuis_names_are_recognised_behind_any_prefix(prefix: str) -> None:
    layout = layout_of({prefix + name: shape for name, shape in TRANSFORMER.items()})
    assert layout is not None
    assert layout.size == "full"
    assert len(layout.sources) == len(TRANSFORMER)
    fused = layout.sources[f"{prefix}layers.7.attention.qkv.weight"]
    assert fused == tuple(f"layers.7.attention.to_{letter}.weight" for letter in "qkv")
    assert layout.sources[f"{prefix}x_embedder.bias"] == ("all_x_embedder.2-1.bias",)
    assert layout.sources[f"{prefix}layers.0.attention.out.weight"] == ("layers.0.attention.to_out.0.weight",)


def test_what_else_a_file_holds_is_left_alone() -> None:
    shapes = {f"model.diffusion_model.{name}": shape for name, shape in TRANSFORMER.items()}
    others = {"vae.decoder.conv_in.weight": (512, 16, 3, 3), "text_encoders.qwen3_4b.norm.weight": (2560,)}
    layout = layout_of(shapes | others | {"model.diffusion_model.norm_final.weight": (3840,)})
    assert layout is not None
    assert layout.sources.keys() == shapes.keys()


@pytest.mark.parametrize(
    "changes",
    [
        {"layers.29.attention.qkv.weight": None},
        {"layers.29.attention.qkv.weight": (3840, 3840)},
        {"cap_embedder.1.weight": (3840, 4096)},
        {"cap_embedder.1.weight": None},
        {"x_pad_token": None},
        {"layers.3.attention.to_q.weight": (3840, 3840)},  # there twice
        {"second.cap_embedder.1.weight": (3840, 2560)},
    ],
)
def test_what_is_not_a_whole_transformer_is_not_taken_for_one(changes: dict[str, Shape | None]) -> None:
    shapes = {**TRANSFORMER, **changes}
    assert layout_of({name: shape for name, shape in shapes.items() if shape is not None}) is None


def test_text_encoders_names_and_shapes_are_the_models_own() -> None:
    assert encoder_shapes("full") == official_shapes("text_encoder")
    mini_file = mini.config.TURBO_FOLDER / mini.config.TEXT_ENCODER_FILE
    assert encoder_shapes("mini") == read_header(mini_file).shapes
    of = ENCODER_SIZES["mini"]
    assert {name: mini.config.TEXT_ENCODER_CONFIG[name] for name in vars(of)} == vars(of)


def in_llama_cpps_names(shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """A text encoder's shapes by the names that llama.cpp's own converter gives them."""
    names = get_tensor_name_map(MODEL_ARCH.QWEN3, 36)
    return {f"{names.get_name(name.removesuffix('.weight'))}.weight": shape for name, shape in shapes.items()}


@pytest.mark.parametrize("size", ENCODER_SIZES)
def test_text_encoders_are_recognised_in_every_spelling(size: WeightsKind) -> None:
    own = encoder_shapes(size)
    theirs = in_llama_cpps_names(own)
    assert "blk.0.attn_q_norm.weight" in theirs
    others = {"output.weight": own["model.embed_tokens.weight"], "rope_freqs.weight": (64,)}
    for spelled in (
        own,
        theirs,
        theirs | others,
        {f"text_encoders.qwen3_4b.transformer.{n}": s for n, s in own.items()},
    ):
        layout = encoder_layout_of(spelled)
        assert layout is not None
        assert (layout.size, layout.own) == (size, own)
        assert sorted(target for (target,) in layout.sources.values()) == sorted(own)
    assert layout_of(own) is None
    del theirs["blk.3.attn_k_norm.weight"]
    assert encoder_layout_of(theirs) is None
    assert encoder_layout_of({**own, "model.norm.weight": (3,)}) is None


def test_ggufs_leave_out_sides_of_length_1() -> None:
    shapes = {name: shape[1:] if shape[0] == 1 else shape for name, shape in TRANSFORMER.items()}
    assert shapes["x_pad_token"] == (3840,)
    assert layout_of(shapes) is not None
    assert layout_of(shapes | {"x_pad_token": (3840, 1)}) is None
