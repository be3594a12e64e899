"""LoRA files looked at: every dialect's names, the report, and what is refused, by header alone."""

import json
import re
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lora.file
from core.errors import RequestError
from hub.naming import spellings, weight_shapes
from lora import dialects
from tests.helpers import loras
from tests.helpers.loras import RANK, random_pairs, write

PAIRS = random_pairs()
EVERY_NAME = [*loras.NAMES, *loras.SUMS]


def tensors(dialect: str) -> loras.Tensors:
    return {**loras.NAMES, **loras.SUMS}[dialect](PAIRS)


def refusal(path: Path) -> str:
    with pytest.raises(RequestError) as refused:
        lora.file.read(path)
    assert refused.value.values["field"] == "lora"
    return str(refused.value)


# --- dialects ---


@pytest.mark.parametrize("dialect", EVERY_NAME)
def test_every_dialect_is_matched_in_full(dialect: str, tmp_path: Path) -> None:
    report = lora.file.read(write(tmp_path / "style.safetensors", tensors(dialect))).report
    assert set(report.matched) == set(PAIRS)
    assert len(report.matched) == len(PAIRS)
    assert report.size == "mini"
    assert (report.left_out, report.text_encoder, report.repeats) == ((), (), ())
    assert report.used == report.layers
    if dialect not in ("differences", "fused qkv", "fused qkv, kohya"):
        assert report.ranks == (RANK, RANK)


@pytest.mark.parametrize(
    ("dialect", "description"),
    [
        ("none", "LoRA, names lora_A/lora_B, prefix none"),
        ("base_model.model.transformer", "LoRA, names lora_A/lora_B, prefix base_model.model.transformer."),
        ("kohya", "LoRA, names lora_down/lora_up, prefix lora_unet_"),
        ("LoKr", "LoKr, prefix lycoris_"),
        ("LoHa", "LoHa, prefix lycoris_"),
        ("differences", "difference, prefix diffusion_model."),
    ],
)
def test_dialect_is_described(dialect: str, description: str, tmp_path: Path) -> None:
    assert lora.file.read(write(tmp_path / "style.safetensors", tensors(dialect))).report.dialect == description


def test_dialect_names_fused_layers_and_dora(tmp_path: Path) -> None:
    description = lora.file.read(write(tmp_path / "a.safetensors", tensors("fused qkv"))).report.dialect
    assert description.endswith("fused qkv")
    weights = {f"{name}.weight": torch.zeros(weight_shapes("mini")[name]) for name in PAIRS}
    description = lora.file.read(write(tmp_path / "b.safetensors", loras.dora(PAIRS, weights))).report.dialect
    assert description.startswith("LoRA with DoRA")


PREFIXES = [
    *("", "base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.", "dit.", "_orig_mod."),
    *("lora_unet__", "lora_unet_", "lora_transformer_", "lycoris_", "base_model.model.transformer.", "pipe.dit."),
    *("unet.", "module.", "model.", "module.model._orig_mod.", "my own_", "zimage.lora_unet_model_diffusion_model_"),
]
ENDS = [
    *(("down", f"{a}{b}.weight") for a in ("lora_A", "lora_down") for b in ("", ".default", ".my-style")),
    *(("up", f"{a}{b}.weight") for a in ("lora_B", "lora_up") for b in ("", ".default")),
    *(("down", "lora.down.weight"), ("up", "lora.up.weight"), ("up_bias", "lora_B.bias"), ("alpha", "alpha")),
    *(
        ("magnitude", "dora_scale"),
        ("magnitude", "lora_magnitude_vector"),
        ("magnitude", "lora_magnitude_vector.weight"),
    ),
    *((part, part) for part in ("lokr_w1", "lokr_w1_a", "lokr_w2_b", "hada_w1_a", "hada_w2_b", "diff", "diff_b")),
]


@given(st.sampled_from(sorted(spellings("full"))), st.sampled_from(PREFIXES), st.sampled_from(ENDS))
def test_any_spelling_under_any_prefix_with_any_end_is_understood(
    spelling: str, prefix: str, end: tuple[str, str]
) -> None:
    """`spelling` is flat; a dotted one is the same name with dots, of which `weight_shapes` has the usual ones."""
    part, written = end
    (source,) = dialects.parse([f"{prefix}{spelling}.{written}"]).sources
    assert source.targets == spellings("full")[spelling]
    assert source.prefix == prefix
    assert source.parts == {part: f"{prefix}{spelling}.{written}"}


@given(
    st.sampled_from(sorted(weight_shapes("full"))),
    st.sampled_from([prefix for prefix in PREFIXES if not prefix.endswith("_")]),
)
def test_any_module_by_its_own_name_is_understood(module: str, prefix: str) -> None:
    (source,) = dialects.parse([f"{prefix}{module}.lora_A.weight"]).sources
    assert source.targets == (module,)


@given(st.text(max_size=60))
def test_any_name_at_all_is_sorted_somewhere(name: str) -> None:
    parsed = dialects.parse([name])
    assert len(parsed.sources) + len(parsed.text_encoder) + len(parsed.rest) == 1


def test_fused_layer_stands_for_three_and_repeats_are_left_out(tmp_path: Path) -> None:
    both = tensors("fused qkv") | loras.peft(
        {name: pair for name, pair in PAIRS.items() if ".to_out" not in name and "feed" not in name}
    )
    report = lora.file.read(write(tmp_path / "style.safetensors", both)).report
    assert set(report.matched) == set(PAIRS)
    assert len(report.repeats) == 6
    assert all(name.endswith("attention.qkv") for name in report.repeats)


# --- the report ---


def test_report_says_what_the_metadata_tells(tmp_path: Path) -> None:
    metadata = {
        "ss_base_model_version": "zimage_turbo",
        "modelspec.trigger_phrase": "gold outline, \x1b[31mneon\n",
        "modelspec.title": "Gold",
    }
    report = lora.file.read(write(tmp_path / "gold style.safetensors", tensors("kohya"), metadata)).report
    assert (report.name, report.title, report.base) == ("gold style", "Gold", "turbo")
    assert report.trigger_words == ("gold outline", "[31mneon")
    assert report.alphas == (RANK, RANK)
    facts = report.facts()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["layers"] == "42 of 42 matched"
    assert facts["rank"] == "4"


@pytest.mark.parametrize(
    ("metadata", "base"),
    [
        ({}, None),
        ({"ss_base_model_version": "zimage"}, None),
        ({"modelspec.architecture": "Z-Image/lora"}, None),
        ({"ss_sd_model_name": "Tongyi-MAI/Z-Image-Turbo"}, "turbo"),
        ({"base_model": "Tongyi-MAI/Z-Image"}, "base"),
        ({"lora_adapter_metadata": '{"transformer.base_model_name_or_path": "Tongyi-MAI/Z-Image"}'}, "base"),
    ],
)
def test_likely_base(metadata: dict[str, str], base: str | None, tmp_path: Path) -> None:
    assert lora.file.read(write(tmp_path / "a.safetensors", tensors("none"), metadata)).report.base == base


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"ss_trigger_words": '["neon", "outline"]'}, ("neon", "outline")),
        ({"trigger_words": "neon, , neon"}, ("neon",)),
        ({"ss_tag_frequency": '{"5_x": {"neon": 20, "fox": 3}}', "ss_num_train_images": "20"}, ("neon",)),
        ({"ss_tag_frequency": '{"5_x": {"neon": 20}}'}, ()),
        ({"ss_tag_frequency": "[[[", "ss_num_train_images": "20"}, ()),
        ({"trigger_words": "x" * 500}, ()),
    ],
)
def test_trigger_words(metadata: dict[str, str], words: tuple[str, ...], tmp_path: Path) -> None:
    assert lora.file.read(write(tmp_path / "a.safetensors", tensors("none"), metadata)).report.trigger_words == words


def test_what_is_left_out_is_listed(tmp_path: Path) -> None:
    extra = {
        "layers.99.attention.to_q.lora_A.weight": torch.ones(RANK, 192),
        "layers.99.attention.to_q.lora_B.weight": torch.ones(192, RANK),
        "text_encoder.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(RANK, 128),
        "text_encoder.layers.0.self_attn.q_proj.lora_B.weight": torch.ones(128, RANK),
        "lora_te_layers_0_mlp_up_proj.lora_down.weight": torch.ones(RANK, 128),
        "something": torch.ones(1),
    }
    report = lora.file.read(write(tmp_path / "a.safetensors", tensors("none") | extra)).report
    assert report.left_out == ("layers.99.attention.to_q", "something")  # layers first
    assert set(report.text_encoder) == {"text_encoder.layers.0.self_attn.q_proj", "lora_te_layers_0_mlp_up_proj"}
    assert (report.used, report.layers) == (42, 44)
    first, second = map(str, report.warnings())
    assert "2 of 44 layers" in first
    assert "layers.99.attention.to_q" in first
    assert "2 layers for the text encoder" in second


def test_alpha_is_the_scale_and_may_stand_in_the_metadata(tmp_path: Path) -> None:
    def scales(name: str, found: loras.Tensors, metadata: dict[str, str] | None = None) -> set[float]:
        return {layer.scale for layer in lora.file.read(write(tmp_path / name, found, metadata)).layers}

    assert scales("a.safetensors", tensors("none")) == {1.0}
    assert scales("b.safetensors", loras.kohya(PAIRS, alpha=1.0)) == {1 / RANK}
    half = {
        name: tensor.bfloat16() if tensor.ndim == 0 else tensor
        for name, tensor in loras.kohya(PAIRS, alpha=1.0).items()
    }
    assert scales("c.safetensors", half) == {1 / RANK}
    config = {"transformer.lora_alpha": 8, "transformer.r": RANK, "transformer.alpha_pattern": {"to_q": 16}}
    written = {"lora_adapter_metadata": json.dumps(config)}
    assert scales("d.safetensors", loras.peft(PAIRS, "transformer."), written) == {2.0, 4.0}
    config["transformer.use_rslora"] = True
    written = {"lora_adapter_metadata": json.dumps(config)}
    assert scales("e.safetensors", loras.peft(PAIRS, "transformer."), written) == {4.0, 8.0}


def test_size_tells_the_real_models_from_the_miniature(tmp_path: Path) -> None:
    module = "layers.17.attention.to_q"
    big = lora.file.read(write(tmp_path / "big.safetensors", loras.peft(random_pairs(size="full", modules=[module]))))
    assert big.report.size == "full"
    big.report.check_fits("full")
    with pytest.raises(RequestError, match="a LoRA for the embedded miniature; this one was made for Z-Image"):
        big.report.check_fits("mini")


# --- what is refused ---


@pytest.mark.parametrize(
    ("names", "title"),
    [
        (["lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight"], "Stable Diffusion"),
        (["lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"], "Stable Diffusion XL"),
        (["lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.lora_up.weight"], "Stable Diffusion"),
        (["unet.down_blocks.2.attentions.0.transformer_blocks.9.attn1.to_q.lora_A.weight"], "Stable Diffusion XL"),
        (["lora_unet_double_blocks_0_img_attn_proj.lora_down.weight"], "HunyuanVideo"),
        (["diffusion_model.double_blocks.0.img_attn.proj.lora_A.weight"], "FLUX"),
        (["transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight"], "FLUX"),
        (["transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj.lora_A.weight"], "FLUX.2"),
        (["transformer_blocks.0.img_mlp.net.2.lora_A.weight"], "Qwen-Image"),
        (["transformer_blocks.0.attn.add_q_proj.lora_A.weight"], "Stable Diffusion 3"),
        (["diffusion_model.blocks.0.self_attn.q.lora_A.weight"], "Wan"),
        (["lora_unet_blocks_0_cross_attn_k.lora_down.weight"], "Wan"),
        (["transformer_blocks.0.attn1.to_q.lora_A.weight"], "LTX-Video or PixArt"),
        (["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"], "a language model"),
    ],
)
def test_other_architectures_are_refused_by_name(names: list[str], title: str, tmp_path: Path) -> None:
    sentence = refusal(write(tmp_path / "other.safetensors", {name: torch.ones(RANK, 64) for name in names}))
    assert sentence.endswith(f"allowed: a LoRA for Z-Image; this looks like one for {title}")


def test_sdxl_is_told_from_its_width_and_lumina_by_its_own(tmp_path: Path) -> None:
    name = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight"
    assert refusal(write(tmp_path / "xl.safetensors", {name: torch.ones(4, 2048)})).endswith("Stable Diffusion XL")
    lumina = {f"layers.0.attention.to_out.0.lora_{one}.weight": torch.ones(4, 2304) for one in "A"}
    lumina |= {"layers.0.attention.to_out.0.lora_B.weight": torch.ones(2304, 4)}
    assert refusal(write(tmp_path / "lumina.safetensors", lumina)).endswith("one for Lumina Image 2.0")


def test_claimed_architecture_is_repeated_where_names_tell_nothing(tmp_path: Path) -> None:
    sentence = refusal(
        write(tmp_path / "a.safetensors", {"x.lora_A.weight": torch.ones(2)}, {"modelspec.architecture": "Foo-9"})
    )
    assert '"Foo-9", as its metadata says' in sentence


@pytest.mark.parametrize(
    ("found", "sentence"),
    [
        ({"x": torch.ones(1)}, "this file has no LoRA in it (for example x)"),
        ({"layers.0.attention.to_q.weight": torch.ones(2)}, "this is a whole transformer, not a LoRA"),
        ({"lora_te_x.lora_down.weight": torch.ones(2)}, "this one is for a text encoder alone (1 layers)"),
        ({"foo.bar.lora_A.weight": torch.ones(2)}, "none of its 1 layers matches (foo.bar)"),
    ],
)
def test_files_without_a_matching_layer_are_refused(found: loras.Tensors, sentence: str, tmp_path: Path) -> None:
    assert refusal(write(tmp_path / "a.safetensors", found)).endswith(sentence)


def broken(**changes: torch.Tensor | None) -> loras.Tensors:
    """One whole layer, of which some tensors are changed or taken away."""
    start = "layers.0.attention.to_q."
    whole = {"lora_A.weight": torch.ones(RANK, 192), "lora_B.weight": torch.ones(192, RANK)}
    renamed = {name.replace("__", "."): one for name, one in changes.items()}
    return {start + name: one for name, one in (whole | renamed).items() if one is not None}


@pytest.mark.parametrize(
    ("found", "tensor"),
    [
        (broken(lora_A__weight=None), "layers.0.attention.to_q.lora_B.weight"),
        (broken(lora_B__weight=None), "layers.0.attention.to_q.lora_A.weight"),
        (broken(lora_A__weight=None, lora_B__weight=None, alpha=torch.tensor(1.0)), "layers.0.attention.to_q.alpha"),
        (broken(lora_A__weight=torch.ones(RANK, 191)), "layers.0.attention.to_q.lora_A.weight"),
        (broken(lora_A__weight=torch.ones(RANK + 1, 192)), "layers.0.attention.to_q.lora_B.weight"),
        (broken(lora_B__weight=torch.ones(193, RANK)), "layers.0.attention.to_q.lora_B.weight"),
        (broken(lora_A__weight=torch.ones(0, 192)), "layers.0.attention.to_q.lora_A.weight"),
        (broken(lora_A__weight=torch.ones(RANK, 192, 3, 3)), "layers.0.attention.to_q.lora_A.weight"),
        (broken(lora_A__weight=torch.ones(())), "layers.0.attention.to_q.lora_A.weight"),
        (broken(alpha=torch.ones(3)), "layers.0.attention.to_q.alpha"),
        (broken(alpha=torch.tensor(float("nan"))), "layers.0.attention.to_q.alpha"),
        (broken(dora_scale=torch.ones(7)), "layers.0.attention.to_q.dora_scale"),
        (broken(lora_mid__weight=torch.ones(4, 4)), "layers.0.attention.to_q.lora_mid.weight"),
        (broken(scalar=torch.ones(3)), "layers.0.attention.to_q.scalar"),
        (broken(diff=torch.ones(192, 191)), "layers.0.attention.to_q.diff"),
        (broken(lora_A__scale_weight=torch.ones(3)), "layers.0.attention.to_q.lora_A.scale_weight"),
        (broken(lora_C__scale_weight=torch.ones(3)), "layers.0.attention.to_q.lora_C.scale_weight"),
        (broken(alpha=torch.ones(()), alpha_scale=torch.ones(())), "layers.0.attention.to_q.alpha_scale"),
        (broken(hada_w1_a_scale=torch.ones(1)), "layers.0.attention.to_q.hada_w1_a_scale"),
        (broken(lora_E=torch.ones(())), "layers.0.attention.to_q.lora_E"),
        (broken(lokr_w1=torch.ones(1, 1)), "layers.0.attention.to_q.lokr_w1"),
        (broken(lora_down__weight=torch.ones(RANK, 192)), "layers.0.attention.to_q.lora_down.weight"),
        (broken(lora_A__weight=torch.ones(RANK, 192).int()), "layers.0.attention.to_q.lora_A.weight"),
    ],
)  # fmt: skip
def test_broken_layers_are_refused_by_the_tensors_name(found: loras.Tensors, tensor: str, tmp_path: Path) -> None:
    assert repr(tensor) in refusal(write(tmp_path / "a.safetensors", found))


@pytest.mark.parametrize(
    "factors",
    [
        {"lokr_w1": (4, 4), "lokr_w2": (48, 47)},
        {"lokr_w1": (7, 4), "lokr_w2": (27, 48)},
        {"lokr_w1": (4, 4), "lokr_w2_a": (48, 2), "lokr_w2_b": (3, 48)},
        {"lokr_w1": (0, 4), "lokr_w2": (48, 48)},
        {"lokr_w1": (4,), "lokr_w2": (48, 48)},
        {"lokr_w1": (4, 4)},
        {"lokr_w1": (4, 4), "lokr_w2": (48, 48), "lokr_w2_a": (48, 2), "lokr_w2_b": (2, 48)},
        {"lokr_w1": (4, 4), "lokr_w2": (48, 48), "lokr_t2": (2, 2)},
        {"hada_w1_a": (192, 2), "hada_w1_b": (2, 192)},
        {"hada_w1_a": (192, 2), "hada_w1_b": (2, 192), "hada_w2_a": (192, 2), "hada_w2_b": (2, 191)},
        {"diff": (192, 191)},
    ],
)
def test_factors_that_do_not_fit_are_refused(factors: dict[str, tuple[int, ...]], tmp_path: Path) -> None:
    found = {f"layers.0.attention.to_q.{part}": torch.ones(shape) for part, shape in factors.items()}
    assert "'layers.0.attention.to_q." in refusal(write(tmp_path / "a.safetensors", found))


# --- hostile files ---


def raw(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    assert refusal(raw(tmp_path / "a.safetensors", {})).endswith("this file is empty")


ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def shaped(sides: str) -> bytes:
    """A header with a shape as it is written here."""
    data_end = 0 if sides.endswith(" 0") else 8
    return b'{"a": {"dtype": "F32", "shape": [%s], "data_offsets": [0, %d]}}' % (sides.encode(), data_end)


@pytest.mark.parametrize(
    ("header", "data", "length"),
    [
        (b"", b"", None),
        (b"{}", b"", 2**63),
        (b"{}", b"", lora.file.MAX_HEADER + 1),
        (b"{}", b"", 500),
        (b"[]", b"", None),
        (b"{" * 100_000, b"", None),
        (b'{"a": ' * 50_000, b"", None),
        ({"a": ONE}, b"1234567", None),
        ({"a": ONE}, b"123456789", None),
        ({"a": ONE | {"shape": [3]}}, b"12345678", None),
        ({"a": ONE | {"shape": [-2]}}, b"12345678", None),
        ({"a": ONE | {"shape": [10**30, 10**30]}}, b"12345678", None),
        ({"a": ONE | {"shape": "2"}}, b"12345678", None),
        ({"a": ONE | {"dtype": "F33"}}, b"12345678", None),
        ({"a": ONE | {"data_offsets": [-8, 0]}}, b"12345678", None),
        ({"a": ONE | {"data_offsets": [0, 2**62]}}, b"12345678", None),
        ({"a": ONE | {"data_offsets": [8, 0]}}, b"12345678", None),
        ({"a": ONE | {"data_offsets": [0]}}, b"12345678", None),
        ({"a": ONE, "b": ONE}, b"12345678", None),
        ({"a": ONE, "b": ONE | {"data_offsets": [12, 20]}}, b"1" * 20, None),
        (b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "a": {}}', b"12345678", None),
        ({"__metadata__": [], "a": None}, b"", None),
        (b'{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 8]}}', b"12345678", None),
        (shaped("9" * 5_000), b"12345678", None),
        (shaped(",".join(["9" * 4_000] * 1_900)), b"12345678", None),  # to multiply them takes minutes
        (shaped(",".join(["9" * 70] * 100_000)), b"12345678", None),
        (shaped(f"{2**40}, 0"), b"", None),
        (shaped("1,1,1,1,1,1,1,1,2"), b"12345678", None),
        (b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, %s]}}' % (b"9" * 5_000), b"12345678", None),
        ({"a" * 501: ONE}, b"12345678", None),
        ({str(number): ONE | {"shape": [0], "data_offsets": [0, 0]} for number in range(20_001)}, b"", None),
        ({"x" + ".lora_magnitude_vector" * 300_000 + "!": ONE}, b"12345678", None),  # hours, to be told apart
        (b'{"__metadata__": {"a": %s1%s}}' % (b"[" * 900, b"]" * 900), b"", None),
        (b'{"__metadata__": {"a": %s}}' % (b"[" * 10_000), b"", None),
    ],
)
def test_hostile_headers_are_refused(header: object, data: bytes, length: int | None, tmp_path: Path) -> None:
    sentence = refusal(raw(tmp_path / "a.safetensors", header, data, length))
    assert "a .safetensors file" in sentence
    assert len(sentence) < 500


def test_the_largest_shape_is_still_read(tmp_path: Path) -> None:
    header = {
        "a": ONE | {"shape": [1, 1, 1, 1, 1, 1, 1, 2]},
        "b": ONE | {"shape": [0, 2**40 - 1], "data_offsets": [8, 8]},
    }
    assert refusal(raw(tmp_path / "a.safetensors", header, b"12345678")).endswith("no LoRA in it (for example a, b)")


def with_metadata(path: Path, metadata: dict[str, str]) -> Path:
    return write(path, tensors("none"), metadata)


HUGE = ["1e999", "-1e999", "NaN", "Infinity", "1e308", "1" + "0" * 400, "9" * 5_000]


@pytest.mark.parametrize("value", HUGE)
@pytest.mark.parametrize(
    "config", ['{"lora_alpha": %s}', '{"transformer.alpha_pattern": {"layers.0.attention.to_q": %s}}']
)
def test_alphas_that_no_number_is_are_refused(value: str, config: str, tmp_path: Path) -> None:
    sentence = refusal(with_metadata(tmp_path / "a.safetensors", {"lora_adapter_metadata": config % value}))
    assert "its alpha" in sentence
    assert re.search(r"'layers\.0\.attention\.to_\w'$", sentence)
    assert len(sentence) < 300


def test_an_alpha_out_of_proportion_is_refused_wherever_it_stands(tmp_path: Path) -> None:
    for dtype, alpha in ((torch.float64, 1e308), (torch.float32, 3e38), (torch.bfloat16, -3e38), (torch.int64, 2**62)):
        found = broken(alpha=torch.tensor(alpha, dtype=dtype))
        assert "out of proportion" in refusal(write(tmp_path / "a.safetensors", found))


def test_alphas_of_a_config_without_end_are_refused(tmp_path: Path) -> None:
    config = json.dumps({"lora_alpha": 8, "x": "x" * lora.file.MAX_CONFIG})
    for key in ("lora_adapter_metadata", "ss_network_args"):
        assert key in refusal(with_metadata(tmp_path / "a.safetensors", {key: config}))


def test_patterns_without_end_are_refused(tmp_path: Path) -> None:
    many = {f"layers.{number}.x": number for number in range(lora.file.MOST_PATTERNS + 1)}
    for patterns in (many, {"x" * (lora.file.LONGEST_PATTERN + 1): 1}):
        config = json.dumps({"alpha_pattern": patterns})
        assert "patterns" in refusal(with_metadata(tmp_path / "a.safetensors", {"lora_adapter_metadata": config}))
    config = json.dumps({"alpha_pattern": {"(to_q": 1}})
    assert "no regular expression" in refusal(
        with_metadata(tmp_path / "a.safetensors", {"lora_adapter_metadata": config})
    )


def test_a_pattern_that_would_take_for_ever_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora.file, "PATTERN_SECONDS", 0.0)
    config = json.dumps({"alpha_pattern": {"(.+)" * 15 + r"\3\4\5\6\7_q": 1}})
    assert "too long" in refusal(with_metadata(tmp_path / "a.safetensors", {"lora_adapter_metadata": config}))


@pytest.mark.parametrize("images", ["²", "9" * 5_000, "1e3", "-1", "½"])
def test_a_number_of_pictures_that_is_none_gives_no_words(images: str, tmp_path: Path) -> None:
    metadata = {"ss_tag_frequency": '{"x": {"neon": 20}}', "ss_num_train_images": images}
    assert lora.file.read(with_metadata(tmp_path / "a.safetensors", metadata)).report.trigger_words == ()


@pytest.mark.parametrize(
    "text", ["[" * 10_000, "[" * 900 + "1" + "]" * 900, "[" + "9" * 5_000 + "]", "," * 7_000_000, "[" + "1" * 400 + "]"]
)
def test_trigger_words_that_are_none_are_left_out(text: str, tmp_path: Path) -> None:
    report = lora.file.read(with_metadata(tmp_path / "a.safetensors", {"trigger_words": text})).report
    assert all(len(word) <= lora.file.LONGEST_TRIGGER for word in report.trigger_words)
    assert not any("11111" in word for word in report.trigger_words)


@pytest.mark.parametrize("key", ["lora_adapter_metadata", "ss_network_args", "ss_tag_frequency", "ss_num_train_images"])
def test_metadata_nested_without_end_is_left_out(key: str, tmp_path: Path) -> None:
    for depth in (900, 10_000):
        deep = "[" * depth + "]" * depth
        value = f'{{"rs_lora": {deep}, "base_model_name_or_path": {deep}}}'
        assert lora.file.read(with_metadata(tmp_path / "a.safetensors", {key: value})).layers[0].scale == 1


def test_a_file_that_goes_away_meanwhile_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.safetensors", loras.kohya(PAIRS))
    fitting = lora.file._fitting

    def gone(*arguments: Any) -> object:
        path.unlink()
        return fitting(*arguments)

    monkeypatch.setattr(lora.file, "_fitting", gone)
    assert "a file that can be read" in refusal(path)


def test_names_without_end_are_told_apart() -> None:
    known = ["layers.0.attention.to_q.lora_A.weight", "layers.0.attention.to_q.lora_B.weight"]
    parsed = dialects.parse([*known, "." * 1_000_000, "lora_unet_" + "_" * 4_000_000 + "x.alpha"])
    assert (len(parsed.sources), len(parsed.rest)) == (2, 1)


def test_other_kinds_of_file_are_refused(tmp_path: Path) -> None:
    assert "that exists" in refusal(tmp_path / "absent.safetensors")
    assert "a folder with one .safetensors file in it; this one has 0" in refusal(tmp_path)
    pickle = tmp_path / "a.pt"
    torch.save({"a": torch.ones(1)}, pickle)
    assert "not a safetensors file" in refusal(pickle)
    pointer = tmp_path / "b.safetensors"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\n")
    assert "Git LFS pointer" in refusal(pointer)
    sparse = tmp_path / "c.safetensors"
    with open(sparse, "wb") as file:
        file.truncate(lora.file.MAX_FILE + 1)
    assert "up to 4 GiB; this one has 4.0 GiB" in refusal(sparse)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write(
        tmp_path_factory.mktemp("lora") / "a.safetensors",
        loras.kohya(random_pairs(modules=["layers.0.attention.to_q"])),
    ).read_bytes()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.data())
def test_a_file_cut_anywhere_is_refused(whole: bytes, tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "cut.safetensors"
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    refusal(path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.data())
def test_a_damaged_file_is_read_or_refused_and_never_crashes(whole: bytes, tmp_path: Path, data: st.DataObject) -> None:
    damaged = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        end = 8 + int.from_bytes(whole[:8], "little")
        damaged[data.draw(st.integers(0, end - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(damaged)
    try:
        assert lora.file.read(path).report.matched
    except RequestError as refused:
        assert refused.values["field"] == "lora"


# --- identity ---


def test_hash_is_the_trainers_or_of_the_data(tmp_path: Path) -> None:
    import hashlib

    plain = lora.file.read(write(tmp_path / "a.safetensors", tensors("none")))
    content = plain.path.read_bytes()
    found = lora.file.identify(plain)
    assert found.hash == hashlib.sha256(content[plain.header.data_start :]).hexdigest()[:12]
    assert found.digest == hashlib.sha256(content).hexdigest()
    named = lora.file.read(write(tmp_path / "b.safetensors", tensors("none"), {"sshs_model_hash": "ab" * 32}))
    assert lora.file.identify(named).hash == "abababababab"
    odd = lora.file.read(write(tmp_path / "c.safetensors", tensors("none"), {"sshs_model_hash": "not, a: hash"}))
    assert lora.file.identify(odd).hash == found.hash
    plain.path.write_bytes(content + b"1")
    with pytest.raises(RequestError, match="nobody changes meanwhile"):
        lora.file.identify(plain)


def test_reading_loads_no_torch() -> None:
    import subprocess
    import sys

    code = (
        "import sys, lora.file; print([name for name in ('torch', 'safetensors', 'diffsynth') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=loras.__file__.rsplit("/tests", 1)[0],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"
