"""Names as people's files have them: any prefix, wrappers inside, several kinds on one layer, one layer twice."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lora.file
from hub.naming import spellings
from lora import dialects
from tests.helpers import loras
from tests.helpers.loras import RANK, random_pairs, write

PAIRS = random_pairs()
Q = "layers.0.attention.to_q"


@pytest.mark.parametrize(
    ("written", "module"),
    [
        ("pipe.dit.layers.0.attention.to_q", Q),
        ("unet.layers.0.attention.to_q", Q),
        ("module.layers.0.attention.to_q", Q),
        ("model.layers.0.attention.to_q", Q),
        ("base_model.model.pipe.dit.layers.0.attention.to_q", Q),
        ("some-name.of_mine.layers.0.attention.to_q", Q),
        ("_orig_mod.layers.0.attention.to_q", Q),
        ("layers._orig_mod.0.attention.to_q", Q),
        ("layers.0._orig_mod.attention.to_q", Q),
        ("layers.0.attention.to_q._orig_mod", Q),
        ("dit.module.layers.0.module.attention._fsdp_wrapped_module.to_q", Q),
        ("transformer.layers.0._checkpoint_wrapped_module.attention.to_q.base_layer", Q),
        ("layers.0.attention.processor.to_q", Q),
        ("layers.0._anything_private.attention.to_q", Q),
        ("lycoris__orig_mod_layers_0_attention_to_q", Q),
        ("lora_unet_layers_0__orig_mod_attention_to_q", Q),
        ("lora_unet_layers_0__orig_mod_attention_to_q__orig_mod", Q),
        ("lora_pipe_dit_layers_0_attention_to_q", Q),
        ("layers.0.attention.wq", Q),
        ("diffusion_model.layers.0.attention.wo", "layers.0.attention.to_out.0"),
        ("lora_unet_layers_0_attention_wo", "layers.0.attention.to_out.0"),
        ("x.noise_refiner.0.attention.wk", "noise_refiner.0.attention.to_k"),
        ("my_x_embedder", "all_x_embedder.2-1"),
    ],
)
def test_a_module_is_found_whatever_stands_around_its_name(written: str, module: str) -> None:
    (source,) = dialects.parse([f"{written}.lora_A.weight"]).sources
    assert source.targets == (module,)


@given(
    st.sampled_from(sorted(spellings("full"))),
    st.lists(
        st.from_regex(r"[a-z][a-z0-9-]{0,9}", fullmatch=True).filter(lambda word: not word.startswith("te")), max_size=4
    ),
    st.sampled_from("._"),
)
def test_any_words_are_a_prefix(spelling: str, words: list[str], mark: str) -> None:
    prefix = "".join(word + mark for word in words)
    (source,) = dialects.parse([f"{prefix}{spelling}.alpha"]).sources
    if not dialects._ELSEWHERE.search(prefix):
        assert source.targets == spellings("full")[spelling]
        assert source.prefix == prefix


@pytest.mark.parametrize(
    "written",
    [
        "control_layers.0.attention.to_q",
        "lora_unet_control_layers_0_attention_to_q",
        "dit.control_noise_refiner.0.attention.to_q",
        "controlnet.layers.0.attention.to_q",
        "blocks.3.layers.0.attention.to_q",
        "noise_refiner.layers.0.attention.to_q",
        "layers.0.cross.attention.to_q",
        "layers.0.attention.to_q.more",
        "players.0.attention.to_q",
        "transformer.context_embedder.layers.0.feed_forward.w1",
    ],
)
def test_another_networks_module_is_left_out(written: str) -> None:
    (source,) = dialects.parse([f"{written}.lora_A.weight"]).sources
    assert source.targets == ()


@pytest.mark.parametrize(
    "written",
    [
        "pipe.text_encoder.layers.0.attention.to_q",
        "lora_te1_layers_0_attention_to_q",
        "te.layers.0.mlp.up_proj",
        "model.layers.3.self_attn.q_proj",
    ],
)
def test_a_text_encoders_module_is_none_of_the_transformer(written: str) -> None:
    parsed = dialects.parse([f"{written}.lora_A.weight"])
    assert (parsed.sources, parsed.text_encoder) == ((), (written,))


@pytest.mark.parametrize(
    ("end", "part"),
    [
        *((f"lokr_w1{end}", "lokr_w1") for end in ("", ".default", ".my-style", ".default.weight")),
        *((f"hada_w2_b{end}", "hada_w2_b") for end in ("", ".default")),
        *((f"lora_A{end}", "down") for end in ("", ".weight", ".default", ".default.weight")),
        *(("lora_a.weight", "down"), ("lora_b.weight", "up"), ("alpha.default", "alpha"), ("scalar", "scalar")),
        ("lora_magnitude_vector.default.weight", "magnitude"),
        *((f"lora_down{end}", "down_scale") for end in (".scale_weight", ".weight_scale", ".weight.scale", "_scale")),
        *((f"lora_B.default{end}", "up_scale") for end in (".weight_scale_inv", ".weight__fp8_scale")),
        *(("lokr_w1.scale_weight", "lokr_w1_scale"), ("lokr_w2_a_scale", "lokr_w2_a_scale")),
    ],
)
def test_ends_of_names(end: str, part: str) -> None:
    (source,) = dialects.parse([f"{Q}.{end}"]).sources
    assert source.parts == {part: f"{Q}.{end}"}


def test_old_names_of_diffusers_processors() -> None:
    names = [f"unet.layers.0.attention.processor.to_q_lora.{side}.weight" for side in ("down", "up")]
    (source,) = dialects.parse(names).sources
    assert (source.targets, set(source.parts)) == ((Q,), {"down", "up"})


def test_what_only_computing_in_fp8_needs_is_no_layer(tmp_path: Path) -> None:
    markers = {
        "scaled_fp8": torch.zeros(2),
        f"diffusion_model.{Q}.lora_A.comfy_quant": torch.zeros(3, dtype=torch.uint8),
        f"diffusion_model.{Q}.lora_A.input_scale": torch.ones(()),
    }
    report = lora.file.read(write(tmp_path / "a.safetensors", loras.peft(PAIRS, "diffusion_model.") | markers)).report
    assert (report.used, report.layers, report.left_out) == (42, 42, ())


def repeated(*files: loras.Tensors) -> loras.Tensors:
    found: loras.Tensors = {}
    for file in files:
        found |= file
    return found


def down_and_up(tensors: loras.Tensors) -> loras.Tensors:
    names = {name: name.replace("lora_A", "lora_down").replace("lora_B", "lora_up") for name in tensors}
    return {names[name]: values for name, values in tensors.items()}


@pytest.mark.parametrize(
    ("tensors", "repeats"),
    [
        (repeated(loras.peft(PAIRS), loras.peft(PAIRS, "transformer.")), 42),
        (repeated(loras.peft(PAIRS), loras.kohya(PAIRS, "lora_unet_")), 42),
        (repeated(loras.fused(PAIRS), loras.peft(PAIRS, "diffusion_model.")), 30),  # 6 blocks' qkv, out, w1, w2, w3
        (repeated(loras.peft(PAIRS), loras.peft(PAIRS, "", ".default")), 42),
        (repeated(loras.peft(PAIRS), down_and_up(loras.peft(PAIRS))), 42),
    ],
    ids=["two prefixes", "two dialects", "fused beside its parts", "two adapters", "two ways of writing pairs"],
)
def test_a_layer_under_two_names_is_used_once_and_told(tensors: loras.Tensors, repeats: int, tmp_path: Path) -> None:
    found = lora.file.read(write(tmp_path / "a.safetensors", tensors))
    assert sorted(target for layer in found.layers for target in layer.source.targets) == sorted(PAIRS)
    assert found.report.left_out == ()
    (warning,) = found.report.warnings()
    assert str(warning).startswith(f"{len(found.report.repeats)} layers of the LoRA are there again under other names")
    assert len(found.report.repeats) == repeats


def test_what_is_written_as_most_of_the_file_comes_first(tmp_path: Path) -> None:
    few = {name: pair for name, pair in PAIRS.items() if name == Q}
    tensors = loras.peft(few, "a.odd.") | loras.peft(PAIRS, "transformer.")
    found = lora.file.read(write(tmp_path / "a.safetensors", tensors))
    assert found.report.repeats == (f"a.odd.{Q}",)


def test_a_fused_layer_beside_one_of_its_parts_is_used(tmp_path: Path) -> None:
    tensors = {
        f"layers.0.attention.{module}.lora_{side}.weight": torch.ones(shape)
        for module, rows in (("to_q", 192), ("qkv", 576))
        for side, shape in (("A", (RANK, 192)), ("B", (rows, RANK)))
    }
    report = lora.file.read(write(tmp_path / "a.safetensors", tensors)).report
    assert report.matched == tuple(f"layers.0.attention.to_{letter}" for letter in "qkv")
    assert report.repeats == (Q,)
