"""Folders as PEFT saves them: what PEFT itself computes with them is what is applied."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import cli
import lora.file
from core.errors import RequestError
from lora import adapter
from lora.adapter import Adapters
from tests.helpers.loras import RANK, peft, random_pairs, write

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of the imports alone
    import peft as theirs

Q, K, OUT, W2 = (
    "layers.0.attention.to_q",
    "layers.0.attention.to_k",
    "layers.1.attention.to_out.0",
    "layers.1.feed_forward.w2",
)
MODULES = {Q: (192, 192), K: (192, 192), OUT: (192, 192), W2: (512, 192)}
PEFT = "adapter_model.safetensors"


def base() -> torch.nn.Module:
    """A model with linear layers under the transformer's names."""
    root = torch.nn.Module()
    for name, (columns, rows) in MODULES.items():
        *above, last = name.split(".")
        place = root
        for word in above:
            if word not in dict(place.named_children()):
                place.add_module(word, torch.nn.Module())
            place = place.get_submodule(word)
        place.add_module(last, torch.nn.Linear(columns, rows, bias=False))
    return root


def saved(folder: Path, config: Any) -> dict[str, torch.Tensor]:
    """Save what PEFT makes of a configuration to a folder; return what it adds to each weight when it loads that."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of patterns that fit nothing
        model = theirs.get_peft_model(base(), config)
        for values in model.parameters():
            if values.requires_grad:
                torch.nn.init.normal_(values, std=0.3)
        model.save_pretrained(str(folder))
        loaded = theirs.PeftModel.from_pretrained(base(), str(folder))
    layers: dict[str, Any] = {name: loaded.get_submodule(f"base_model.model.{name}") for name in MODULES}
    changed = {name: layer for name, layer in layers.items() if hasattr(layer, "get_delta_weight")}
    return {name: layer.get_delta_weight("default").detach() for name, layer in changed.items()}


def added(path: Path) -> dict[str, torch.Tensor]:
    """What a file or folder adds to each weight here."""
    changes = Adapters().get(lora.file.read(path)).changes
    differences = {
        change.targets[0]: adapter.difference(change, {part: values.float() for part, values in change.tensors.items()})
        for change in changes
    }
    return {name: values for name, values in differences.items() if values is not None}


FOUR = {"r": 4, "lora_alpha": 4}
CONFIGS: dict[str, dict[str, Any]] = {
    "usual": {"r": 4, "lora_alpha": 8},
    "half": {"r": 8, "lora_alpha": 4},
    "rslora": {"r": 9, "lora_alpha": 6, "use_rslora": True},
    "by end": {**FOUR, "alpha_pattern": {"to_q": 16, "attention.to_k": 2}, "rank_pattern": {"to_q": 8}},
    "from the start": {**FOUR, "alpha_pattern": {"^layers.0.attention.to_q": 16, "^to_k": 64, "layers": 32}},
    "expressions": {**FOUR, "alpha_pattern": {r".*\.to_(q|k)": 16, r"layers\.\d+\.feed_forward\.w[13]": 2, "w.": 12}},
    "the first counts": {**FOUR, "alpha_pattern": {"to_.": 16, "layers.0.attention.to_q": 2}},
    "alternatives": {**FOUR, "alpha_pattern": {"layers.0.*|x": 16, "x|w2": 2}},
    "ranks": {**FOUR, "use_rslora": True, "rank_pattern": {r"^layers\.1.*": 16}, "alpha_pattern": {r"^layers\.1.*": 3}},
    "no end": {**FOUR, "alpha_pattern": {"layers.0": 16, "attention": 2, "o_q": 64}},
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_folder_adds_what_peft_adds(case: str, tmp_path: Path) -> None:
    expected = saved(tmp_path, theirs.LoraConfig(target_modules=["to_q", "to_k", "to_out.0", "w2"], **CONFIGS[case]))
    assert len(expected) == 4
    for given in (tmp_path, tmp_path / PEFT):
        found = added(given)
        assert found.keys() == expected.keys()
        for name, values in expected.items():
            torch.testing.assert_close(found[name], values, msg=name)


@pytest.mark.parametrize("whole", [False, True])
def test_lokr_and_loha_of_peft(whole: bool, tmp_path: Path) -> None:
    """A LoKr of whole factors is scaled too, by the rank that only the configuration tells."""
    rank = 64 if whole else 3
    patterns: dict[str, Any] = {"alpha_pattern": {"^layers.0.attention.to_q": 5}}
    for config in (theirs.LoKrConfig, theirs.LoHaConfig):
        shutil.rmtree(tmp_path / "x", ignore_errors=True)
        expected = saved(tmp_path / "x", config(r=rank, alpha=16, target_modules=["to_q", "w2"], **patterns))
        found = added(tmp_path / "x")
        assert found.keys() == expected.keys() == {Q, W2}
        for name, values in expected.items():
            torch.testing.assert_close(found[name], values, msg=name, rtol=1e-4, atol=1e-5)


PAIRS = random_pairs(modules=[Q, K])
ONES = {"base_model.model." + name: values for name, values in peft(PAIRS).items()}


def scales(path: Path) -> dict[str, float]:
    return {layer.source.targets[0]: layer.scale for layer in lora.file.read(path).layers}


def folder(path: Path, config: object, tensors: Any = ONES, name: str = PEFT) -> Path:
    """A folder with a file and a configuration, which is written as it is where it is a text."""
    path.mkdir(exist_ok=True)
    write(path / name, tensors)
    (path / "adapter_config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return path


@pytest.mark.parametrize(
    ("prefix", "pattern", "fits"),
    [
        ("base_model.model.", "^layers.0.attention.to_q", True),
        ("base_model.model.transformer.", "^layers.0.attention.to_q", False),
        ("base_model.model.transformer.", "^transformer.layers.0.attention.to_q", True),
        ("base_model.model.pipe.dit.", r"^pipe\.dit\..*to_q", True),
        ("base_model.model.pipe.dit.", "to_q", True),
        ("diffusion_model.", "^layers.0.attention.to_q", True),
    ],
)
def test_patterns_are_of_the_name_that_the_trained_model_had(
    prefix: str, pattern: str, fits: bool, tmp_path: Path
) -> None:
    config = {"r": RANK, "lora_alpha": 2, "alpha_pattern": {pattern: 12}}
    path = folder(tmp_path, config, peft(PAIRS, prefix))
    assert scales(path) == {Q: 3.0 if fits else 0.5, K: 0.5}


def test_what_the_tensors_say_themselves_counts(tmp_path: Path) -> None:
    """A file of another trainer's may lie beside a configuration."""
    path = folder(tmp_path, {"r": RANK, "lora_alpha": 16}, ONES | {f"base_model.model.{Q}.alpha": torch.tensor(2.0)})
    assert scales(path) == {Q: 0.5, K: 4.0}
    down_up = {name.replace("lora_A", "lora_down").replace("lora_B", "lora_up"): one for name, one in ONES.items()}
    write(tmp_path / "other.safetensors", ONES)
    assert scales(tmp_path / "other.safetensors") == {Q: 1.0, K: 1.0}  # the configuration is PEFT's own file's
    assert scales(folder(tmp_path / "x", {"r": RANK, "lora_alpha": 16}, down_up, "a.safetensors")) == {Q: 1.0, K: 1.0}
    assert scales(folder(tmp_path / "y", {"r": RANK, "lora_alpha": 16}, ONES, "a.safetensors")) == {Q: 4.0, K: 4.0}


def test_a_folder_has_a_name_and_a_digest_of_both_files(tmp_path: Path) -> None:
    path = folder(tmp_path / "my style", {"r": RANK, "lora_alpha": 16})
    found = lora.file.read(path)
    assert (found.report.name, found.report.alphas) == ("my style", (16, 16))
    kept = Adapters()
    first = kept.get(found)
    folder(path, {"r": RANK, "lora_alpha": 4})
    second = kept.get(lora.file.read(path))
    assert first.identity.hash == second.identity.hash  # of the tensors, as galleries know them
    assert first.identity.digest != second.identity.digest
    assert {change.scale for change in first.changes} == {4.0}
    assert {change.scale for change in second.changes} == {1.0}


def test_peft_without_its_configuration_is_told(tmp_path: Path) -> None:
    (warning,) = lora.file.read(write(tmp_path / PEFT, ONES)).report.warnings()
    assert warning.code == "lora_alpha"
    assert "adapter_config.json, which is not beside it" in str(warning)
    assert not lora.file.read(folder(tmp_path / "x", {"r": RANK})).report.warnings()
    assert not lora.file.read(write(tmp_path / "a.safetensors", peft(PAIRS))).report.warnings()


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"r": 8}, "the rank 8, where its tensors have 4"),
        ({"r": RANK, "rank_pattern": {"to_k": 2}}, "to_k' the rank 2"),
        ({"r": RANK, "lora_alpha": "much"}, "its lora_alpha is 'much', not a number"),
        ({"r": RANK, "lora_alpha": True}, "its lora_alpha is 'True'"),
        ({"r": RANK, "alpha_pattern": {"to_q": None, "(": 3}}, "has '(', which is no regular expression"),
        ('{"r": 4, "lora_alpha": NaN}', "its alpha nan is out of proportion"),
        ('{"r": 4, "lora_alpha": 1e999}', "its alpha inf is out of proportion"),
        ("[4]", "adapter_config.json beside it is no JSON object"),
        ("\0", "adapter_config.json beside it is no JSON object"),
        ({"peft_type": "IA3"}, "of the kind 'IA3', which is not applied here"),
        ({"r": RANK, "init_lora_weights": "pissa_niter_4"}, "its training began with 'pissa_niter_4'"),
        (" " * (lora.file.MAX_CONFIG + 1), "adapter_config.json has at most 500,000 bytes"),
    ],
)
def test_a_configuration_that_cannot_be_meant_is_refused(config: object, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError) as refused:
        lora.file.read(folder(tmp_path, config))
    assert sentence in str(refused.value)


def test_a_folder_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora.file, "FOLDERS", (tmp_path / "loras",))
    (tmp_path / "loras").mkdir()
    path = folder(tmp_path / "loras" / "gold", {"r": RANK})
    monkeypatch.chdir(tmp_path)
    assert lora.file.find("gold") == path
    (tmp_path / "gold").mkdir()  # a folder without a LoRA hides none
    assert lora.file.find("gold") == path
    write(tmp_path / "gold" / "a.safetensors", ONES)
    assert lora.file.find("gold") == Path("gold")
    write(tmp_path / "gold" / "b.safetensors", ONES)
    with pytest.raises(RequestError, match=r"a folder with one \.safetensors file in it; this one has 2"):
        lora.file.read(lora.file.find("gold"))


def test_inspect_reads_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(folder(tmp_path / "style", {"r": RANK, "lora_alpha": 2})), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["notes"] == []
    assert (facts["name"], facts["rank"], facts["alpha"]) == ("style", "4", "2")
    assert cli.main(["inspect", str(write(tmp_path / PEFT, ONES))]) == 0
    assert "notes:\n  PEFT keeps the LoRA's alpha in adapter_config.json" in capsys.readouterr().out
