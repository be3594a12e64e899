"""Kinds of adapters that are not applied are refused for what they are, never half applied."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import lora.file
from core.errors import RequestError
from tests.helpers import loras
from tests.helpers.loras import random_pairs, write

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of the imports alone
    import peft

Q = "layers.0.attention.to_q"
ONE = torch.ones(1)


PEFT, FLAT = f"base_model.model.{Q}", "lycoris_layers_0_attention_to_q"


def ones(module: str, *parts: str) -> loras.Tensors:
    return {f"{module}.{part}": ONE for part in parts}


def refusal(path: Path) -> str:
    with pytest.raises(RequestError) as refused:
        lora.file.read(path)
    return str(refused.value)


@pytest.mark.parametrize(
    ("kind", "tensors"),
    [
        ("OFT", ones(FLAT, "oft_blocks", "alpha")),
        ("OFT", ones(PEFT, "oft_R.weight")),
        ("OFT", {f"{FLAT}.oft_blocks": torch.ones(24, 8, 8)}),
        ("BOFT", {f"{FLAT}.oft_blocks": torch.ones(2, 24, 8, 8)}),
        ("BOFT", ones(PEFT, "boft_R", "boft_s")),
        ("GLoRA", ones(FLAT, "a1.weight", "a2.weight", "b1.weight", "b2.weight", "alpha")),
        ("GLoRA", ones(PEFT, "glora_A.Xd", "glora_B.Xd")),
        ("IA3", ones(PEFT, "ia3_l")),
        ("IA3", ones(FLAT, "weight", "on_input")),
        ("VeRA", ones(PEFT, "vera_lambda_b", "vera_lambda_d") | ones("base_model", "vera_A", "vera_B")),
        ("AdaLoRA", ones(PEFT, "lora_A", "lora_B", "lora_E", "ranknum")),
        ("HiRA", ones(PEFT, "hira_A", "hira_B")),
        ("control LoRA", {"lora_controlnet": ONE} | ones(Q, "up", "down")),
        ("control LoRA", ones(Q, "lora_up.weight", "lora_down.weight", "reshape_weight")),
        (
            "control LoRA",
            {"x_embedder.lora_A.weight": torch.ones(4, 128), "x_embedder.lora_B.weight": torch.ones(192, 4)},
        ),
    ],
)
@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside a LoRA"])
def test_a_kind_is_named(kind: str, tensors: loras.Tensors, beside: bool, tmp_path: Path) -> None:
    pairs = loras.peft(random_pairs(modules=["layers.1.attention.to_q"])) if beside else {}
    sentence = refusal(write(tmp_path / "a.safetensors", tensors | pairs))
    assert f"this one is of the kind {kind}, which is not applied here" in sentence


def test_the_model_that_it_is_for_comes_first(tmp_path: Path) -> None:
    tensors = {"lora_controlnet": ONE, "input_blocks.1.1.transformer_blocks.0.attn1.to_q.up": ONE}
    sentence = refusal(write(tmp_path / "a.safetensors", tensors))
    assert sentence.endswith("this looks like one for Stable Diffusion, of the kind control LoRA")


def test_a_controlnets_lora_is_named(tmp_path: Path) -> None:
    tensors = {f"control_layers.0.attention.to_q.lora_{side}.weight": ONE for side in "AB"}
    assert "this one is for a ControlNet, not for Z-Image itself" in refusal(write(tmp_path / "a.safetensors", tensors))


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (peft.OFTConfig(target_modules=["to_q"], r=0, oft_block_size=8), "OFT"),
        (peft.BOFTConfig(target_modules=["to_q"], boft_block_size=8), "BOFT"),
        (peft.GloraConfig(target_modules=["to_q"], r=2), "GLoRA"),
        (peft.IA3Config(target_modules=["to_q"], feedforward_modules=[]), "IA3"),
        (peft.VeraConfig(target_modules=["to_q"], r=2), "VeRA"),
        (peft.HRAConfig(target_modules=["to_q"], r=2), "HRA"),
        (peft.FourierFTConfig(target_modules=["to_q"], n_frequency=9), "FourierFT"),
        (peft.MissConfig(target_modules=["to_q"], r=8), "Bone or MiSS"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_peft_saves_is_named(config: Any, kind: str, tmp_path: Path) -> None:
    root = torch.nn.Module()
    root.add_module("attention", torch.nn.ModuleDict({"to_q": torch.nn.Linear(192, 192)}))
    layers = torch.nn.Module()
    layers.add_module("layers", torch.nn.ModuleList([root]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.get_peft_model(layers, config).save_pretrained(str(tmp_path))
    assert f"of the kind {kind}, which is not applied here" in refusal(tmp_path)
    assert f"of the kind {kind}, which is not applied here" in refusal(tmp_path / "adapter_model.safetensors")
