"""Checkpoints of users': recognised in every layout, told of which model they are, or refused with a reason."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from core.errors import RequestError, WeightsMissing
from core.request import Model
from hub import fine_tunes
from hub.naming import Shape, tensor_shapes
from tests.helpers import comfyui
from tests.helpers.sparse import Shapes, official_shapes, shards, write_part, write_sparse

Environ = dict[str, str]
PREFIXED: dict[str, Shape] = {f"model.diffusion_model.{name}": shape for name, shape in comfyui.TRANSFORMER.items()}


@pytest.fixture
def environ(tmp_path: Path) -> Environ:
    """An environment in which every place to look in lies in this test's folder, and is empty."""
    home = str(tmp_path / "home")
    return {"HOME": home, "USERPROFILE": home, "DIFFSYNTH_MODEL_BASE_PATH": str(tmp_path / "models")}


def write_shards(folder: Path, shapes: Shapes, stem: str = "diffusion_pytorch_model", largest: float = 10e9) -> None:
    split = shards(shapes, "F32", largest)
    for number, part in enumerate(split, 1):
        write_sparse(folder / f"{stem}-{number:05}-of-{len(split):05}.safetensors", part, "F32")


def test_full_size_files_of_every_layout_are_recognised(tmp_path: Path) -> None:
    own = tensor_shapes("full")
    write_sparse(tmp_path / "own.safetensors", own)
    write_sparse(tmp_path / "fused.safetensors", comfyui.TRANSFORMER, "F16")
    bundle = {**PREFIXED, **{f"first_stage_model.{name}": shape for name, shape in comfyui.AUTOENCODER.items()}}
    write_sparse(tmp_path / "prefixed.safetensors", bundle)
    write_sparse(tmp_path / "net.safetensors", {f"net.{name}": shape for name, shape in comfyui.TRANSFORMER.items()})
    write_sparse(tmp_path / "plain8.safetensors", comfyui.TRANSFORMER, "F8_E4M3")
    marks = {f"{name.removesuffix('.weight')}.weight_scale": () for name in PREFIXED if name.endswith("qkv.weight")}
    write_sparse(tmp_path / "scaled8.safetensors", PREFIXED | marks, "F8_E5M2", dict.fromkeys(marks, "F32"))
    comfyui.write_gguf(tmp_path / "packed.gguf", comfyui.TRANSFORMER, "Q5_K")
    write_shards(tmp_path / "repo" / "transformer", own)
    write_shards(tmp_path / "loose", comfyui.TRANSFORMER, "mix")
    for number, part in enumerate(shards(comfyui.TRANSFORMER, "F32", 16 << 30), 1):  # as llama.cpp splits files
        comfyui.write_gguf(tmp_path / "split" / f"mix-{number:05}-of-00002.gguf", part, "Q8_0")
    for named, stored in {
        "own.safetensors": "bf16",
        "fused.safetensors": "fp16",
        "prefixed.safetensors": "bf16",
        "net.safetensors": "bf16",
        "plain8.safetensors": "fp8",
        "scaled8.safetensors": "fp8, scaled",
        "packed.gguf": "GGUF Q5_K",
        "repo": "fp32",
        "repo/transformer": "fp32",
        "repo/transformer/diffusion_pytorch_model-00002-of-00003.safetensors": "fp32",
        "loose": "fp32",
        "loose/mix-00001-of-00003.safetensors": "fp32",
        "split/mix-00002-of-00002.gguf": "GGUF Q8_0",
    }.items():
        tune = fine_tunes.find(str(tmp_path / named))
        assert (tune.kind, tune.stored) == ("full", stored), named
        folder = named.partition("/")[0]
        assert len(tune.files) == {"repo": 3, "loose": 3, "split": 2}.get(folder, 1)
        assert tune.size == sum(file.stat().st_size for file in tune.files)
    assert tune.title == "mix"
    for below in ("", "/transformer", "/transformer/diffusion_pytorch_model-00001-of-00003.safetensors"):
        assert fine_tunes.find(f"{tmp_path}/repo{below}").name == "repo"
    cached = tmp_path / "models--Tongyi-MAI--Z-Image-Turbo" / "snapshots" / ("a" * 40)
    write_shards(cached / "transformer", own)
    assert (tune := fine_tunes.find(str(cached))).name == "Tongyi-MAI/Z-Image-Turbo"
    assert tune.model == "turbo"


@pytest.mark.parametrize(
    ("name", "metadata", "model"),
    [
        ("z_image_turbo_bf16", {}, "turbo"),
        ("z_image_bf16", {}, "base"),
        ("z-image-base-anime", {}, "base"),
        ("ZIT_real_v3", {}, "turbo"),
        ("myzib_v1", {}, None),
        ("my-ZIB", {}, "base"),
        ("z_image_de_turbo_v1_bf16", {}, "base"),
        ("Z-Image-De-Distilled", {}, "base"),
        ("moody_z_image_v3", {}, None),
        ("moody", {"modelspec.architecture": "z-image-turbo"}, "turbo"),
        ("moody", {"ss_base_model_version": "zimage_base"}, "base"),
        ("moody", {"modelspec.architecture": "z-image"}, None),
        ("moody_turbo", {"modelspec.title": "Z-Image De-Turbo"}, "base"),
        ("database", {}, None),
        ("wide_turbo", {}, "turbo"),
    ],
)
def test_what_it_was_made_of_is_told_by_metadata_or_name(
    name: str, metadata: Mapping[str, str], model: Model | None, tmp_path: Path
) -> None:
    write_sparse(tmp_path / f"{name}.safetensors", tensor_shapes("mini"), metadata=metadata)
    tune = fine_tunes.read(tmp_path / f"{name}.safetensors")
    assert (tune.model, tune.kind) == (model, "mini")
    assert tune.used_as("base") == "base"
    if model:
        assert tune.used_as(None) == model
    else:
        with pytest.raises(RequestError, match=rf"model: .*whichever {name}.safetensors was made of.*--model"):
            tune.used_as(None)
    if model == "base":
        with pytest.raises(RequestError, match="made of Z-Image Turbo in this mode; this one is of Z-Image"):
            tune.check_goes_with("turbo")
    else:
        tune.check_goes_with("turbo")


def write_bad(folder: Path, what: str) -> Path:
    path = folder / "a.safetensors"
    match what:
        case "absent":
            return folder / "absent.safetensors"
        case "autoencoder":
            write_sparse(path, comfyui.AUTOENCODER)
        case "lacks one":
            write_sparse(path, {n: s for n, s in comfyui.TRANSFORMER.items() if n != "layers.7.attention.out.weight"})
        case "int8":
            write_sparse(path, comfyui.TRANSFORMER, "I8")
        case "cut short":
            write_sparse(path, comfyui.TRANSFORMER)
            with path.open("r+b") as file:
                file.truncate(1_000_000)
        case "text":
            path.write_text("hello")
        case "other ending":
            path = folder / "a.zip"
            path.touch()
        case "empty folder":
            return folder
        case "missing shard":
            write_shards(folder, tensor_shapes("full"))
            (folder / "diffusion_pytorch_model-00002-of-00003.safetensors").unlink()
            return folder / "diffusion_pytorch_model-00001-of-00003.safetensors"
        case "downloading":
            write_sparse(path, comfyui.TRANSFORMER)
            path.with_name("a.safetensors.aria2").touch()
    return path


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("absent", "none is found on this machine"),
        ("autoencoder", "holds no whole transformer of Z-Image"),
        ("lacks one", "holds no whole transformer of Z-Image"),
        ("int8", "is packed as int8, which is not read here"),
        ("cut short", "is cut short"),
        ("text", "is not a safetensors file"),
        ("other ending", "neither a .safetensors nor a .gguf file"),
        ("empty folder", "holds no .safetensors files"),
        ("missing shard", "lacks 1 of 3 files"),
        ("downloading", "is still being downloaded"),
    ],
)
def test_what_cannot_be_used_says_why(what: str, said: str, environ: Environ, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    with pytest.raises(RequestError) as refused:
        fine_tunes.find(str(write_bad(folder, what)), environ)
    assert str(refused.value).startswith("checkpoint: ")
    assert said in str(refused.value)


@pytest.mark.parametrize("odd", ["x" * 5000, "~nobody-of-that-name/x", "a\0b", ""])
def test_odd_names_are_no_files(odd: str, environ: Environ) -> None:
    with pytest.raises(RequestError):
        fine_tunes.find(odd or "nothing", environ)


def test_those_in_comfyuis_folders_are_found_by_name(environ: Environ, tmp_path: Path) -> None:
    models = Path(environ["HOME"]) / "ComfyUI" / "models"
    comfyui.write_folder(models)
    write_sparse(models / "checkpoints" / "z" / "anime_turbo.safetensors", PREFIXED)
    comfyui.write_gguf(models / "unet" / "real-base-Q8_0.gguf", comfyui.TRANSFORMER, "Q8_0")
    write_sparse(models / "diffusion_models" / "zit_nvfp4_mix.safetensors", comfyui.TRANSFORMER, "U8")
    write_sparse(models / "diffusion_models" / "flux_dev.safetensors", {"double_blocks.0.img_attn.qkv.weight": (3, 3)})
    named = tmp_path / "named"
    write_sparse(named / "mine_turbo.safetensors", comfyui.TRANSFORMER)
    write_shards(models / "unet", comfyui.TRANSFORMER, "split_turbo")
    found = fine_tunes.found(environ)
    first = "split_turbo-00001-of-00003.safetensors"  # which stands for all three
    write_shards(models / "unet" / "half", comfyui.TRANSFORMER, "z_image_half")
    (models / "unet" / "half" / "z_image_half-00001-of-00003.safetensors").unlink()
    assert found.keys() == {"anime_turbo.safetensors", "real-base-Q8_0.gguf", first}
    assert fine_tunes.found({**environ, "Z_IMAGE_MODELS": str(named)}).keys() == {*found, "mine_turbo.safetensors"}
    for name in ("anime_turbo", "anime_turbo.safetensors"):
        assert fine_tunes.find(name, environ).files[0].parent.name == "z"
    problems = " ".join(map(str, fine_tunes.unusable(environ)))
    assert "zit_nvfp4_mix.safetensors is packed as 4 or 8 bits in bytes" in problems
    assert problems.count("lacks 1 of 3 files: z_image_half-00001-of-00003.safetensors") == 1
    with pytest.raises(RequestError, match="or of a diffusers folder, or one of "):
        fine_tunes.find("other", environ)


def test_it_needs_the_other_parts(environ: Environ, tmp_path: Path) -> None:
    write_sparse(tmp_path / "mix_turbo.safetensors", comfyui.TRANSFORMER)
    tune = fine_tunes.read(tmp_path / "mix_turbo.safetensors")
    with pytest.raises(WeightsMissing) as missing:
        fine_tunes.choose(tune, "auto", "generate", "turbo", environ)
    assert "the checkpoint mix_turbo.safetensors is not all" in str(missing.value)
    assert missing.value.values["command"].endswith("models download text_encoder vae tokenizer")
    comfyui.write_folder(Path(environ["HOME"]) / "ComfyUI" / "models")
    write_part(tmp_path / "models/Tongyi-MAI/Z-Image-Turbo", "tokenizer")
    chosen = fine_tunes.choose(tune, "auto", "generate", "turbo", environ)
    assert (chosen.kind, chosen.checkpoint, chosen.files["turbo"]) == ("full", "mix_turbo", tune.files)
    assert chosen.files.keys() == {"turbo", "text_encoder", "vae", "tokenizer"}
    places = "the ComfyUI folder and models folder"
    expected = f"mix_turbo (12.3 GB, bf16), used as Z-Image Turbo, with the other parts from {places}"
    assert str(chosen.reason) == expected
    as_asked = fine_tunes.choose(tune, "full", "generate", "base", environ)
    said = "used as Z-Image as asked, though it says that it was made of Z-Image Turbo"
    assert said in str(as_asked.reason)
    assert "controlnet" in fine_tunes.choose(tune, "full", "controlnet", "turbo", environ).files
    with pytest.raises(
        RequestError, match="weights: 'mini' is not possible; allowed: auto or full with the checkpoint"
    ):
        fine_tunes.choose(tune, "mini", "generate", "turbo", environ)


@pytest.mark.parametrize("named", ["a.ckpt", "b.PTH", "c.pt", "d.bin"])
def test_pickles_are_refused_by_the_request_itself(named: str) -> None:
    from core.request import TextToImage

    values: dict[str, Any] = {"prompt": "a fox", "checkpoint": named}
    with pytest.raises(RequestError, match=r"checkpoint: .* is not possible; allowed: the path of a \.safetensors or"):
        TextToImage.parse(**values)


def test_shapes_of_an_encoder_are_no_checkpoint(tmp_path: Path) -> None:
    write_sparse(tmp_path / "z_image.safetensors", official_shapes("text_encoder"))
    with pytest.raises(RequestError, match="holds no whole transformer"):
        fine_tunes.find(str(tmp_path / "z_image.safetensors"))
