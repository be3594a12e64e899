"""Checkpoints of users' in place of the published transformer: the miniature's, written as others write them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf.constants import GGMLQuantizationType
from PIL import Image
from safetensors.torch import save_file

import cli
from core import metadata
from core.errors import RequestError
from core.events import Failure, Result
from core.request import ControlNet, TextToImage, Upscale
from engine import Engine
from engine.worker import Settings
from engine.worker_zerogpu import PackedWorker
from hub import checkpoint, inventory
from tests.engine.test_engine import pixels
from tests.helpers.layouts import in_comfyuis_names, in_fp8, out_of_fp8, read, write_gguf, write_shards

ASKED: dict[str, Any] = {"prompt": "a fox on a black background", "seed": 7, "steps": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The miniature's transformers in every layout."""
    made = tmp_path_factory.mktemp("own")
    turbo, base = (read(inventory.choose("mini", "generate", model).files[model][0]) for model in ("turbo", "base"))
    save_file(in_comfyuis_names(turbo), made / "icons_turbo.safetensors")
    save_file(in_comfyuis_names(turbo, "model.diffusion_model."), made / "prefixed_turbo.safetensors")
    save_file({name: tensor.float() for name, tensor in turbo.items()}, made / "wide_turbo.safetensors")
    write_gguf(made / "packed_turbo.gguf", in_comfyuis_names(turbo), GGMLQuantizationType.BF16, "lumina2")
    write_shards(made / "sharded_turbo" / "transformer", turbo)
    write_shards(made / "numbered_turbo", turbo, index=False)
    packed = in_fp8(in_comfyuis_names(turbo), "plain")
    save_file(packed, made / "fp8_turbo.safetensors")
    save_file(out_of_fp8(packed), made / "out_of_fp8_turbo.safetensors")
    save_file(base, made / "icons_base.safetensors")
    save_file(turbo, made / "icons.safetensors")
    return made


@pytest.mark.parametrize(
    "name",
    [
        "icons_turbo.safetensors",
        "prefixed_turbo.safetensors",
        "wide_turbo.safetensors",
        "packed_turbo.gguf",
        "sharded_turbo",
        "sharded_turbo/transformer/diffusion_pytorch_model.safetensors.index.json",
        "numbered_turbo/diffusion_pytorch_model-00002-of-00003.safetensors",
    ],
)
def test_every_layout_draws_the_same_picture(name: str, folder: Path, draw: Callable[..., Result]) -> None:
    found = draw(**ASKED, checkpoint=str(folder / name))
    assert pixels(found.png) == pixels(draw(**ASKED).png)
    assert "used as Z-Image Turbo, with the other parts from the embedded miniature" in str(found.weights_note)


def test_fp8_draws_what_its_numbers_say(folder: Path, draw: Callable[..., Result]) -> None:
    one, other = (draw(**ASKED, checkpoint=str(folder / f"{name}fp8_turbo.safetensors")) for name in ("", "out_of_"))
    assert pixels(one.png) == pixels(other.png) != pixels(draw(**ASKED).png)


def test_a_picture_names_its_checkpoint_and_is_drawn_again_by_it(
    folder: Path, draw: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = folder / "icons_turbo.safetensors"
    result = draw(**ASKED, checkpoint=str(file))
    path = tmp_path / "picture.png"
    metadata.save(result, path)
    digest = checkpoint.fingerprint([file])
    assert digest.startswith("sha256:")
    assert result.sidecar["checkpoint"] == {"name": "icons_turbo", "fingerprint": digest}
    assert result.sidecar["weights"]["fingerprints"]["turbo"] == digest
    with Image.open(path) as image:
        text = str(image.info["parameters"])
    assert f"Model hash: {digest[7:17]}, Model: icons_turbo, Base model: Z-Image Turbo" in text
    found = metadata.read_picture(path)
    assert found.values["checkpoint"] == file.name  # where it lay is nobody's business
    assert found.inputs["checkpoint"] == digest
    monkeypatch.setenv("Z_IMAGE_MODELS", str(folder))
    assert draw(**found.values).png == result.png
    again = draw(**{**found.values, "checkpoint": "prefixed_turbo"})
    assert metadata.describe(again.request, metadata.Provenance("mini", {}))["request"]["checkpoint"].endswith(
        ".safetensors"
    )


def test_one_of_base_is_guided_as_base_is(folder: Path, draw: Callable[..., Result]) -> None:
    own = str(folder / "icons_base.safetensors")
    found = draw(**ASKED, checkpoint=own, negative_prompt="blue")
    assert isinstance(found.request, TextToImage)
    assert (found.request.model, found.request.cfg) == ("base", 4.0)
    assert pixels(found.png) == pixels(draw(**ASKED, model="base", negative_prompt="blue").png)


def test_what_says_nothing_is_asked_for(folder: Path, draw: Callable[..., Result]) -> None:
    own = str(folder / "icons.safetensors")
    with pytest.raises(RequestError, match=r"turbo or base, whichever icons\.safetensors was made of") as asked:
        draw(**ASKED, checkpoint=own)
    assert asked.value.values["field"] == "model"
    assert pixels(draw(**ASKED, checkpoint=own, model="turbo").png) == pixels(draw(**ASKED).png)


def test_controlnet_takes_what_was_made_of_turbo(folder: Path, engine: Engine, tmp_path: Path) -> None:
    image = tmp_path / "lines.png"
    Image.linear_gradient("L").resize((128, 128)).save(image)

    def drawn(**values: Any) -> Result:
        return engine.draw(ControlNet.parse(**ASKED, image=str(image), preprocessor="none", **values))

    usual = drawn()
    for name in ("icons_turbo", "icons"):
        assert pixels(drawn(checkpoint=str(folder / f"{name}.safetensors")).png) == pixels(usual.png)
    with pytest.raises(RequestError, match="made of Z-Image Turbo in this mode; this one is of Z-Image"):
        drawn(checkpoint=str(folder / "icons_base.safetensors"))


def test_upscale_stays_with_plain_turbo() -> None:
    with pytest.raises(RequestError, match="checkpoint: "):
        Upscale.parse(image="a.png", checkpoint="icons_turbo")


def test_at_most_two_transformers_stay_in_memory(folder: Path) -> None:
    own = Engine(Settings(weights="mini", device="cpu"))
    for name in ("icons_turbo", "prefixed_turbo", "icons_base"):
        last = own.draw(TextToImage.parse(**ASKED, checkpoint=str(folder / f"{name}.safetensors")))
        transformers = own.worker.pipeline.transformers  # type: ignore[attr-defined]  # a worker of this process
        assert len(transformers) <= 2
    assert pixels(own.draw(TextToImage.parse(**ASKED)).png) != pixels(last.png)
    assert list(transformers)[-1] == "turbo"


def test_a_space_on_zerogpu_draws_with_what_it_has_loaded(folder: Path) -> None:
    with pytest.raises(RequestError, match="none on this Space"):
        PackedWorker(Settings()).weights("generate", "turbo", "auto", str(folder / "icons_turbo.safetensors"))


def test_visitors_choose_among_those_that_are_found(
    folder: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    from web.run import carry_out

    def last(**values: Any) -> Any:
        *_, event = carry_out(engine, TextToImage, ("", ""), {**ASKED, "weights": "auto", **values})
        return event

    named = str(folder / "icons_turbo.safetensors")
    refused = last(checkpoint=named)
    assert isinstance(refused, Failure)
    assert "none: no checkpoint is found on this machine" in refused.text
    monkeypatch.setenv("Z_IMAGE_MODELS", str(folder))
    refused = last(checkpoint=named)
    assert isinstance(refused, Failure)
    assert "one of " in refused.text
    assert isinstance(last(checkpoint="icons_turbo.safetensors"), Result)


@pytest.mark.slow
def test_the_command_line_replays_with_the_same_checkpoint_only(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    common = ["--weights", "mini", "--device", "cpu", "--models", str(folder)]
    monkeypatch.setenv("Z_IMAGE_MODELS", "")
    asked = ["generate", "a fox", "--seed", "7", "--steps", "2", *common, "--checkpoint", "icons_turbo"]
    assert cli.main([*asked, "--out", "one.png", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["request"]["checkpoint"] == "icons_turbo.safetensors"
    assert cli.main(["generate", "--from", "one.png", *common, "--out", "two.png"]) == 0
    assert (tmp_path / "two.png").read_bytes() == (tmp_path / "one.png").read_bytes()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    save_file({"a.weight": torch.zeros(2, 2)}, elsewhere / "icons_turbo.safetensors")
    other = ["--weights", "mini", "--device", "cpu", "--models", str(elsewhere)]
    assert cli.main(["generate", "--from", "one.png", *other, "--out", "three.png"]) == RequestError.exit_code
    assert "give it with --checkpoint FILE" in capsys.readouterr().err
