"""Finding, checking, choosing and naming weights: on sparse files of full size with the official names and shapes."""

import hashlib
import json
import math
import os
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from core.errors import RequestError, WeightsMissing
from core.messages import Message, plain
from core.request import MODES
from hub import checkpoint, inventory, parts, places
from tests.helpers import comfyui, sparse
from tests.helpers.sparse import COMMIT, write_hub_snapshot, write_part, write_sparse

TURBO, BASE = "Tongyi-MAI/Z-Image-Turbo", "Tongyi-MAI/Z-Image"
TURBO_PARTS = ("turbo", "text_encoder", "vae", "tokenizer")
OLDER = "a" * 40
TINY = {"a.weight": (4, 3), "b": (), "c.bias": (7,)}


@pytest.fixture(scope="session")
def full_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face cache that holds everything; copied, never changed."""
    cache = tmp_path_factory.mktemp("full") / "hub"
    write_hub_snapshot(cache, TURBO, TURBO_PARTS)
    write_hub_snapshot(cache, BASE, ["base"])
    for part in ("controlnet", "depth", "upscaler"):
        write_hub_snapshot(cache, parts.PARTS[part].repo, [part])
    return cache


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    """An environment in which every place to look in lies in this test's folder, and is empty."""
    return {
        "HOME": str(tmp_path / "home"),
        "USERPROFILE": str(tmp_path / "home"),
        "DIFFSYNTH_MODEL_BASE_PATH": str(tmp_path / "models"),
    }


@pytest.fixture
def mini_root(tmp_path: Path) -> Path:
    """A miniature of one tensor a part."""
    root = tmp_path / "mini"
    for repo, part in (("Z-Image-Turbo", "transformer"), ("Z-Image-Turbo", "vae"), ("Z-Image", "transformer")):
        write_sparse(root / repo / part / "diffusion_pytorch_model.safetensors", TINY)
    write_sparse(root / "Z-Image-Turbo" / "text_encoder" / "model.safetensors", TINY)
    write_part(root / "Z-Image-Turbo", "tokenizer")
    return root


def hub(environ: Mapping[str, str]) -> Path:
    return Path(environ["HOME"]) / ".cache" / "huggingface" / "hub"


def cached(environ: Mapping[str, str], full_cache: Path) -> dict[str, str]:
    return {**environ, "HF_HUB_CACHE": str(full_cache)}


def copy_cache(full_cache: Path, to: Path, *repos: str) -> None:
    """Copy repositories of the full cache: links stay links, and sparse files are made again, not filled with zeros."""

    def copy(source: str, target: str) -> None:
        size = os.path.getsize(source)
        if size < 1_000_000:
            shutil.copy2(source, target)
            return
        with open(source, "rb") as old, open(target, "wb") as new:
            new.write(old.read(1_000_000))
            new.truncate(size)

    for repo in repos:
        name = f"models--{repo.replace('/', '--')}"
        shutil.copytree(full_cache / name, to / name, symlinks=True, copy_function=copy)


def found(environ: Mapping[str, str], part: str, root: Path | None = None) -> inventory.Found:
    return next(found for found in inventory.find_all(environ, root) if found.part.name == part)


# --- the registry against the real models


@pytest.mark.parametrize("part", ["turbo", "base", "text_encoder", "vae", "controlnet"])
def test_sizes_and_hashes_are_those_of_diffsynths_models(part: str, full_cache: Path, environ: dict[str, str]) -> None:
    shapes = sparse.official_shapes(part)
    dtype = sparse.LAYOUT[part][1]
    assert sum(map(math.prod, shapes.values())) * sparse.BYTES[dtype] == parts.PARTS[part].size
    files = found(cached(environ, full_cache), part).files
    assert checkpoint.model_hash(files) == parts.PARTS[part].hash
    assert parts.PARTS[part].hash in parts.KNOWN_HASHES


def test_size_of_the_depth_model_is_that_of_its_shapes(full_cache: Path, environ: dict[str, str]) -> None:
    assert sum(map(math.prod, sparse.official_shapes("depth").values())) * 4 == parts.PARTS["depth"].size
    assert inventory.find("depth", cached(environ, full_cache)).source == "Hugging Face cache"


def test_a_part_that_is_missing_is_named_with_its_use(environ: dict[str, str]) -> None:
    with pytest.raises(
        WeightsMissing, match=r"^the preprocessor Depth needs a model .* \(99 MB\); to fetch them"
    ) as why:
        inventory.find("depth", environ)
    assert why.value.values["bytes"] == parts.PARTS["depth"].size


def test_diffsynth_registers_and_computes_the_same_hashes(
    full_cache: Path, environ: dict[str, str], tmp_path: Path
) -> None:
    from diffsynth.configs import MODEL_CONFIGS
    from diffsynth.core.loader.file import hash_model_file

    theirs = set(parts.KNOWN_HASHES) - {parts.CONTROLNET_LITE}  # which `diffusion.loader` adds
    assert theirs <= {config["model_hash"] for config in MODEL_CONFIGS}
    # And by the names that the pipeline asks for.
    known = {(config["model_hash"], config["model_name"]) for config in MODEL_CONFIGS}
    fetched = {"turbo": "z_image_dit", "base": "z_image_dit", "text_encoder": "z_image_text_encoder"}
    fetched |= {"controlnet": "z_image_controlnet", "vae": "flux_vae_decoder"}
    assert {(parts.PARTS[part].hash, name) for part, name in fetched.items()} <= known
    assert (parts.PARTS["vae"].hash, "flux_vae_encoder") in known
    for part in ("turbo", "vae"):
        files = found(cached(environ, full_cache), part).files
        assert checkpoint.model_hash(files) == hash_model_file([str(file) for file in files])
    write_sparse(tmp_path / "tiny.safetensors", TINY)
    assert checkpoint.model_hash([tmp_path / "tiny.safetensors"]) == hash_model_file(str(tmp_path / "tiny.safetensors"))


def test_the_sparse_files_are_the_published_ones_but_for_their_data(full_cache: Path, environ: dict[str, str]) -> None:
    turbo = found(cached(environ, full_cache), "turbo").files
    # The length of the first shard on the hub, to the byte.
    assert turbo[0].stat().st_size == 9_973_693_184
    assert [file.name for file in turbo] == [f"diffusion_pytorch_model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    assert len(found(cached(environ, full_cache), "text_encoder").files) == 3
    assert len(found(cached(environ, full_cache), "base").files) == 2
    if os.name != "nt":
        assert sum(file.stat().st_blocks for file in turbo) * 512 < 1_000_000


# --- choosing


def test_auto_takes_the_real_weights_from_the_hugging_face_cache(full_cache: Path, environ: dict[str, str]) -> None:
    environ["HF_HOME"] = str(full_cache.parent)
    for mode, model in [(mode, model) for mode, request in MODES.items() for model in request.needs]:
        chosen = inventory.choose("auto", mode, model, environ=environ)
        assert (chosen.kind, chosen.source) == ("full", "Hugging Face cache")
        assert tuple(chosen.files) == parts.needs(mode, model)
        assert all(path.exists() for files in chosen.files.values() for path in files)
    chosen = inventory.choose("auto", "generate", "turbo", environ=environ)
    assert str(chosen.reason) == "the real weights: 32.8 GB from the Hugging Face cache"
    snapshot = full_cache / "models--Tongyi-MAI--Z-Image-Turbo" / "snapshots" / COMMIT
    assert chosen.files["tokenizer"] == (snapshot / "tokenizer",)
    assert chosen.files["vae"] == (snapshot / "vae" / "diffusion_pytorch_model.safetensors",)


def test_with_nothing_on_disk_auto_takes_the_miniature(environ: dict[str, str], mini_root: Path) -> None:
    for model in ("turbo", "base"):
        chosen = inventory.choose("auto", "generate", model, environ=environ, mini_root=mini_root)
        assert (chosen.kind, chosen.source) == ("mini", "embedded miniature")
        assert all(mini_root in path.parents for files in chosen.files.values() for path in files)
        assert str(chosen.reason).endswith(f"{parts.FETCH} {model} text_encoder vae tokenizer")
    repo = "Z-Image" if model == "base" else "Z-Image-Turbo"
    assert chosen.files["base"] == (mini_root / repo / "transformer" / "diffusion_pytorch_model.safetensors",)
    assert chosen.files["text_encoder"] == (mini_root / "Z-Image-Turbo" / "text_encoder" / "model.safetensors",)
    assert "to fetch the real weights (20.5 GB): " in str(chosen.reason)


def test_with_turbo_alone_base_says_what_is_missing(full_cache: Path, environ: dict[str, str], mini_root: Path) -> None:
    copy_cache(full_cache, hub(environ), TURBO)
    assert inventory.choose("auto", "generate", "turbo", environ=environ, mini_root=mini_root).kind == "full"
    for weights_asked in ("auto", "full"):
        with pytest.raises(WeightsMissing) as raised:
            inventory.choose(weights_asked, "generate", "base", environ=environ, mini_root=mini_root)
        assert "Tongyi-MAI/Z-Image/transformer/*.safetensors (12.3 GB)" in str(raised.value)
        assert str(raised.value).endswith(f"{parts.FETCH} base")
        assert raised.value.values["bytes"] == parts.PARTS["base"].size
    with pytest.raises(WeightsMissing, match=r"2602-8steps\.safetensors \(6\.7 GB\)"):
        inventory.choose("auto", "controlnet", "turbo", environ=environ, mini_root=mini_root)
    assert inventory.choose("mini", "generate", "base", environ=environ, mini_root=mini_root).kind == "mini"


def test_full_and_miniature_parts_are_never_mixed(full_cache: Path, environ: dict[str, str], mini_root: Path) -> None:
    copy_cache(full_cache, hub(environ), TURBO)
    shutil.rmtree(hub(environ) / "models--Tongyi-MAI--Z-Image-Turbo" / "snapshots" / COMMIT / "vae")
    chosen = inventory.choose("auto", "generate", "turbo", environ=environ, mini_root=mini_root)
    assert all(mini_root in path.parents for files in chosen.files.values() for path in files)
    assert "to fetch the real weights (168 MB): " in str(chosen.reason)


def test_full_without_the_weights_is_refused(environ: dict[str, str], mini_root: Path) -> None:
    with pytest.raises(WeightsMissing) as raised:
        inventory.choose("full", "generate", "turbo", environ=environ, mini_root=mini_root)
    for part in TURBO_PARTS:
        assert parts.PARTS[part].title in str(raised.value)
    assert "to fetch them (32.8 GB): " in str(raised.value)


def test_mini_is_taken_beside_real_weights_and_says_so(
    full_cache: Path, environ: dict[str, str], mini_root: Path
) -> None:
    environ |= cached(environ, full_cache)
    chosen = inventory.choose("mini", "generate", "turbo", environ=environ, mini_root=mini_root)
    assert chosen.kind == "mini"
    assert "the real weights are on this machine too" in str(chosen.reason)


def test_a_missing_miniature_is_named(full_cache: Path, environ: dict[str, str], mini_root: Path) -> None:
    with pytest.raises(WeightsMissing, match="miniature has no controlnet, and the real weights"):
        inventory.choose("auto", "controlnet", "turbo", environ=environ, mini_root=mini_root)
    (mini_root / "Z-Image-Turbo" / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"\x10")
    with pytest.raises(WeightsMissing, match=r"has no vae \(.*not a safetensors file\)"):
        inventory.choose("mini", "generate", "base", environ=environ, mini_root=mini_root)
    environ |= cached(environ, full_cache)
    with pytest.raises(WeightsMissing, match="use --weights full"):
        inventory.choose("mini", "generate", "turbo", environ=environ, mini_root=mini_root)


def test_unknown_choices_are_refused(environ: dict[str, str]) -> None:
    for arguments, bad in (
        (("half", "generate", "turbo"), "weights"),
        (("auto", "inpaint", "turbo"), "mode"),
        (("auto", "generate", "edit"), "model"),
        (("auto", "controlnet", "base"), "model"),
    ):
        with pytest.raises(RequestError) as raised:
            inventory.choose(*arguments, environ=environ)
        assert raised.value.values["field"] == bad
    environ["Z_IMAGE_MODELS"] = str(Path(environ["HOME"]) / "typo")
    with pytest.raises(RequestError, match="Z_IMAGE_MODELS"):
        inventory.choose("auto", "generate", "turbo", environ=environ)


# --- where


def test_places_are_looked_in_in_order(environ: dict[str, str], tmp_path: Path) -> None:
    """Each place is filled after the ones below it in the table, and takes over."""
    home = Path(environ["HOME"])
    environ["Z_IMAGE_MODELS"] = str(tmp_path / "explicit")
    (tmp_path / "explicit").mkdir()
    for folder, place in (
        (home / ".cache" / "modelscope" / "hub" / "models" / TURBO, "ModelScope cache"),
        (hub(environ), "Hugging Face cache"),
        (tmp_path / "models" / TURBO, "models folder"),
        (tmp_path / "explicit" / TURBO, "explicit folder"),
    ):
        if place == "Hugging Face cache":
            write_hub_snapshot(folder, TURBO, ["tokenizer"])
        else:
            write_part(folder, "tokenizer")
        result = found(environ, "tokenizer")
        assert result.source == place
        assert folder in result.files[0].parents
    write_part(tmp_path / "argument" / TURBO, "tokenizer")
    assert tmp_path / "argument" in found(environ, "tokenizer", tmp_path / "argument").files[0].parents
    assert [place.name for place in places.PLACES] == [
        "explicit folder",
        "models folder",
        "Hugging Face cache",
        "ModelScope cache",
    ]


@pytest.mark.parametrize(
    ("settings", "folder"),
    [
        ({}, "home/.cache/huggingface/hub"),
        ({"XDG_CACHE_HOME": "{}/xdg"}, "xdg/huggingface/hub"),
        ({"XDG_CACHE_HOME": "{}/xdg", "HF_HOME": "{}/hf"}, "hf/hub"),
        ({"HF_HOME": "{}/hf", "HUGGINGFACE_HUB_CACHE": "{}/older"}, "older"),
        ({"HUGGINGFACE_HUB_CACHE": "{}/older", "HF_HUB_CACHE": "{}/cache"}, "cache"),
        ({"HF_HOME": "~/hf"}, "home/hf/hub"),
        ({"HF_HOME": "$PLACE/hf", "PLACE": "{}/place"}, "place/hf/hub"),
        ({"HF_HOME": ""}, "home/.cache/huggingface/hub"),
    ],
)
def test_the_hugging_face_cache_is_where_its_library_has_it(
    settings: dict[str, str], folder: str, environ: dict[str, str], tmp_path: Path
) -> None:
    environ |= {name: value.format(tmp_path) for name, value in settings.items()}
    assert places.hub_cache(environ) == tmp_path / folder
    if "HF_HOME" in settings and not settings["HF_HOME"]:
        return  # the library takes an empty HF_HOME for the current folder
    code = "from huggingface_hub import constants; print(constants.HF_HUB_CACHE)"
    environ["PATH"] = os.environ["PATH"]
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()) == tmp_path / folder


@pytest.mark.parametrize(
    ("setting", "folder"),
    [
        ("", "home/.cache/modelscope/models/{owner}--{name}/snapshots/master"),
        ("", "home/.cache/modelscope/hub/models/{owner}/{older}"),
        ("", "home/.cache/modelscope/hub/{owner}/{older}"),
        ("{}/ms", "ms/models/{owner}--{name}/snapshots/master"),
        ("{}/ms", "ms/models/{owner}/{older}"),
    ],
)
def test_every_layout_of_the_modelscope_cache(
    setting: str, folder: str, environ: dict[str, str], tmp_path: Path
) -> None:
    """ControlNet goes by another owner's name there, and its name has a dot, which older versions wrote as ___."""
    if setting:
        environ["MODELSCOPE_CACHE"] = setting.format(tmp_path)
    name = "Z-Image-Turbo-Fun-Controlnet-Union-2.1"
    write_part(tmp_path / folder.format(owner="PAI", name=name, older=name.replace(".", "___")), "controlnet")
    assert found(environ, "controlnet").source == "ModelScope cache"


def test_an_explicit_folder_may_leave_out_the_owner(environ: dict[str, str], tmp_path: Path) -> None:
    write_part(tmp_path / "drive" / "Z-Image", "base", dtype="BF16")
    result = found(environ, "base", tmp_path / "drive")
    assert result.present
    # Base and Turbo cannot be told apart by content, so a folder counts only under its own name.
    assert not found(environ, "turbo", tmp_path / "drive").present


def test_parts_from_several_places_are_named(full_cache: Path, environ: dict[str, str], tmp_path: Path) -> None:
    environ |= cached(environ, full_cache)
    write_part(tmp_path / "models" / TURBO, "turbo", dtype="BF16")
    chosen = inventory.choose("full", "generate", "turbo", environ=environ)
    assert chosen.source == "models folder and Hugging Face cache"
    assert "20.5 GB" in str(chosen.reason)  # a copy in bf16 is as good, and half the size


# --- snapshots


def write_two_snapshots(environ: Mapping[str, str], *, main: str) -> tuple[Path, Path]:
    older = write_hub_snapshot(hub(environ), TURBO, ["tokenizer", "vae"], OLDER, main=main == OLDER)
    newer = write_hub_snapshot(hub(environ), TURBO, ["tokenizer", "vae"], COMMIT, main=main == COMMIT)
    os.utime(older, (time.time() - 1000,) * 2)
    return older, newer


def test_the_main_snapshot_is_preferred_then_the_newest(environ: dict[str, str]) -> None:
    older, newer = write_two_snapshots(environ, main=OLDER)
    assert older in found(environ, "vae").files[0].parents
    (hub(environ) / "models--Tongyi-MAI--Z-Image-Turbo" / "refs" / "main").unlink()
    assert newer in found(environ, "vae").files[0].parents


def test_an_older_complete_snapshot_is_used_while_the_newest_is_not(environ: dict[str, str]) -> None:
    older, newer = write_two_snapshots(environ, main=COMMIT)
    assert newer in found(environ, "vae").files[0].parents
    cut((newer / "vae" / "diffusion_pytorch_model.safetensors").resolve())
    result = found(environ, "vae")
    assert older in result.files[0].parents
    assert "is cut short" in str(result.problems[0])


def test_a_link_to_nothing_is_not_a_file(environ: dict[str, str]) -> None:
    older, newer = write_two_snapshots(environ, main=COMMIT)
    for snapshot in (older, newer):
        (snapshot / "vae" / "diffusion_pytorch_model.safetensors").resolve().unlink()
    result = found(environ, "vae")
    assert not result.present
    assert len(result.problems) == 2
    assert all("is a link to nothing" in str(problem) for problem in result.problems)


def test_an_unreadable_place_is_a_problem_not_a_crash(environ: dict[str, str], tmp_path: Path) -> None:
    loop = hub(environ) / "models--Tongyi-MAI--Z-Image-Turbo" / "snapshots"
    loop.parent.mkdir(parents=True)
    loop.symlink_to(loop)
    folder = tmp_path / "models" / TURBO / "vae"
    folder.parent.mkdir(parents=True)
    folder.symlink_to(folder)
    result = found(environ, "vae")
    assert not result.present
    assert len(result.problems) == 2
    assert all("cannot be read" in str(problem) for problem in result.problems)


# --- whole, and what it should be


def cut(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1)


@pytest.fixture
def folder(environ: dict[str, str], tmp_path: Path) -> Iterator[Path]:
    """A models folder whose Base transformer is complete: two shards and their index."""
    folder = tmp_path / "models" / BASE / "transformer"
    write_part(folder.parent, "base")
    assert found(environ, "base").present
    yield folder
    assert not found(environ, "base").present


def problem(environ: Mapping[str, str], part: str = "base") -> str:
    (only,) = found(environ, part).problems
    return str(only)


SECOND = "diffusion_pytorch_model-00002-of-00002.safetensors"
INDEX = "diffusion_pytorch_model.safetensors.index.json"


def test_a_shard_cut_short(folder: Path, environ: dict[str, str], mini_root: Path) -> None:
    cut(folder / SECOND)
    assert "2,336,146,727 of 2,336,146,728 bytes" in problem(environ)
    # The user is told why the download that they made does not count.
    chosen = inventory.choose("auto", "generate", "base", environ=environ, mini_root=mini_root)
    assert "is cut short" in str(chosen.reason)


def test_a_shard_that_the_index_names_is_missing(folder: Path, environ: dict[str, str]) -> None:
    (folder / SECOND).unlink()
    assert f"lacks 1 of 2 files: {SECOND}" in problem(environ)


def test_a_shard_is_missing_and_no_index_says_so(folder: Path, environ: dict[str, str]) -> None:
    (folder / INDEX).unlink()
    assert found(environ, "base").present
    (folder / SECOND).unlink()
    assert f"lacks 1 of 2 files: {SECOND}" in problem(environ)


@pytest.mark.parametrize("suffix", [".incomplete", ".aria2"])
def test_a_download_in_progress(suffix: str, folder: Path, environ: dict[str, str]) -> None:
    (folder / f"{SECOND}{suffix}").touch()
    assert "still being downloaded" in problem(environ)


def test_a_link_to_an_unfinished_blob(folder: Path, environ: dict[str, str]) -> None:
    (folder / SECOND).rename(folder / "blob.incomplete")
    (folder / SECOND).symlink_to("blob.incomplete")
    assert "still being downloaded" in problem(environ)


@pytest.mark.parametrize("content", ["", "{}", '{"weight_map": {}}', "[" * 10_000, '{"weight_map": {"a": 1}}'])
def test_an_index_that_is_none(content: str, folder: Path, environ: dict[str, str]) -> None:
    (folder / INDEX).write_text(content)
    assert "is not an index" in problem(environ)


def test_an_index_cannot_lead_out_of_its_folder(folder: Path, environ: dict[str, str], tmp_path: Path) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": f"../../{SECOND}"}}))
    assert "is not an index" in problem(environ)


def test_several_models_in_one_folder(folder: Path, environ: dict[str, str]) -> None:
    (folder / INDEX).unlink()
    (folder / SECOND).rename(folder / "a.safetensors")
    (folder / "diffusion_pytorch_model-00001-of-00002.safetensors").rename(folder / "b.safetensors")
    assert "no index says which belong together" in problem(environ)


def test_wrong_content_in_the_right_place(folder: Path, environ: dict[str, str]) -> None:
    shutil.rmtree(folder)
    write_sparse(folder / "model.safetensors", sparse.official_shapes("text_encoder"))
    assert "holds the text encoder, not a Z-Image transformer" in problem(environ)
    write_sparse(folder / "model.safetensors", TINY)
    assert "holds an unknown model (" in problem(environ)


def test_a_git_lfs_pointer_is_not_the_file(folder: Path, environ: dict[str, str]) -> None:
    (folder / SECOND).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 2336146728\n")
    assert "is a Git LFS pointer" in problem(environ)


def test_small_files_alone_are_no_part(environ: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "models" / BASE / "transformer"
    folder.mkdir(parents=True)
    (folder / INDEX).write_text("{}")
    result = found(environ, "base")
    assert (result.present, result.problems) == (False, ())


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("tokenizer_config.json", None, "lacks tokenizer_config.json"),
        ("tokenizer.json", b'{"version": "1.0", "mod', "is cut short"),
        ("tokenizer.json", None, ""),  # vocab.json and merges.txt are enough
    ],
)
def test_a_tokenizer_is_whole(
    name: str, content: bytes | None, expected: str, environ: dict[str, str], tmp_path: Path
) -> None:
    folder = tmp_path / "models" / TURBO
    write_part(folder, "tokenizer")
    assert found(environ, "tokenizer").files == (folder / "tokenizer",)
    (folder / "tokenizer" / name).unlink()
    if content is not None:
        (folder / "tokenizer" / name).write_bytes(content)
    if expected:
        assert expected in problem(environ, "tokenizer")
    else:
        assert found(environ, "tokenizer").present


def test_the_upscaler_has_its_exact_length(environ: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "models" / "lllyasviel" / "Annotators"
    write_part(folder, "upscaler")
    assert found(environ, "upscaler").present
    cut(folder / "RealESRGAN_x4plus.pth")
    assert "67,040,988 bytes instead of 67,040,989" in problem(environ, "upscaler")


def safetensors(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "not a safetensors file"),
        (b"PK\x03\x04", "not a safetensors file"),
        (struct.pack("<Q", checkpoint.MAX_HEADER + 1) + b"{}", "not a safetensors file"),
        (struct.pack("<Q", 1000) + b'{"a"', "less than its header"),
        (safetensors(b"[]"), "header cannot be read"),
        (safetensors(b"{nonsense"), "header cannot be read"),
        (safetensors(b"[" * 100_000), "header cannot be read"),
        (safetensors(b'{"a": {"shape": [1e999], "data_offsets": [0, 0]}}'), "header cannot be read"),
        (safetensors(b'{"a": {"dtype": "F32", "shape": [1]}}'), "header cannot be read"),
        (safetensors(b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}', b"123"), "cut short"),
        (safetensors(b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}', b"12345"), "too long"),
    ],
)
def test_headers_from_outside_are_not_trusted(content: bytes, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=expected) as raised:
        checkpoint.read_header(path)
    assert str(path) in str(raised.value)


def test_a_changed_file_is_looked_at_again(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_sparse(path, TINY)
    before = checkpoint.model_hash([path]), checkpoint.fingerprint([path])
    write_sparse(path, {**TINY, "d": (2,)})
    assert checkpoint.model_hash([path]) != before[0]
    assert checkpoint.fingerprint([path]) != before[1]


# --- inventory


def test_the_inventory_lists_every_part(full_cache: Path, environ: dict[str, str]) -> None:
    assert [entry.part.name for entry in inventory.find_all(environ)] == list(parts.PARTS)
    assert not any(entry.present for entry in inventory.find_all(environ))
    environ |= cached(environ, full_cache)
    for entry in inventory.find_all(environ):
        assert entry.present
        assert entry.problems == ()
        assert entry.source == "Hugging Face cache"
        if entry.part.name != "tokenizer":  # the stand-in is smaller
            assert entry.part.size <= entry.size < entry.part.size + 200_000


# --- fingerprints


def test_blobs_of_the_hub_are_known_by_their_names(full_cache: Path, environ: dict[str, str]) -> None:
    (vae,) = found(cached(environ, full_cache), "vae").files
    assert checkpoint.fingerprint([vae]) == f"sha256:{vae.resolve().name}"
    three = checkpoint.fingerprint(found(cached(environ, full_cache), "turbo").files)
    assert three.startswith("sha256x3:")


def test_small_files_are_hashed_whole(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"abc")
    expected = hashlib.sha256(b"abc").hexdigest()
    assert checkpoint.fingerprint([tmp_path / "a.safetensors"]) == f"sha256:{expected}"


def test_large_files_are_sampled_and_say_so(tmp_path: Path) -> None:
    path = tmp_path / "one" / "big.safetensors"
    write_sparse(path, {"a": (200_000_000,)})
    plain = checkpoint.fingerprint([path])
    assert plain.startswith("sampled:")
    # Wherever it lies, whatever it is called, through a link or not.
    (tmp_path / "other").symlink_to(path)
    assert checkpoint.fingerprint([tmp_path / "other"]) == plain
    twin = tmp_path / "twin.safetensors"
    write_sparse(twin, {"a": (200_000_000,)})
    assert checkpoint.fingerprint([twin]) == plain
    # The header, the first and the last block count.
    for position in (20, checkpoint.read_header(twin).data_start, twin.stat().st_size - 1):
        write_sparse(twin, {"a": (200_000_000,)})
        with twin.open("r+b") as file:
            file.seek(position)
            file.write(b"t" if position == 20 else b"\1")
        assert checkpoint.fingerprint([twin]) != plain


def test_a_tokenizers_folder_has_a_fingerprint_of_its_files(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_part(tmp_path / name, "tokenizer")
    (tmp_path / "two" / "tokenizer" / ".DS_Store").write_bytes(b"x")
    assert checkpoint.fingerprint([tmp_path / "one" / "tokenizer"]) == checkpoint.fingerprint(
        [tmp_path / "two" / "tokenizer"]
    )
    (tmp_path / "two" / "tokenizer" / "merges.txt").write_bytes(b"other")
    assert checkpoint.fingerprint([tmp_path / "one" / "tokenizer"]) != checkpoint.fingerprint(
        [tmp_path / "two" / "tokenizer"]
    )


def test_a_file_that_changes_in_place_keeps_no_mark_and_no_fingerprint(tmp_path: Path) -> None:
    file = tmp_path / "model.bin"
    file.write_bytes(b"x" * (checkpoint.MARKED * checkpoint.PAGE))
    status, mark, fingerprint = file.stat(), checkpoint.mark(file), checkpoint.fingerprint([file])
    with file.open("r+b") as opened:
        opened.seek(7 * checkpoint.PAGE)
        opened.write(b"y")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert file.stat().st_mtime_ns == status.st_mtime_ns
    assert checkpoint.mark(file) != mark
    assert checkpoint.fingerprint([file]) != fingerprint
    file.write_bytes(b"")
    assert checkpoint.mark(file).size == 0


def test_importing_the_module_loads_nothing_heavy() -> None:
    code = (
        "import sys, hub.inventory; print([n for n in ('torch', 'diffsynth', 'huggingface_hub') if n in sys.modules])"
    )
    root = Path(inventory.__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- messages


def test_what_is_missing_has_facts_for_programs_and_parts_to_translate(
    folder_cut: dict[str, str], mini_root: Path
) -> None:
    with pytest.raises(WeightsMissing) as raised:
        inventory.choose("full", "generate", "base", environ=folder_cut, mini_root=mini_root)
    facts = json.loads(json.dumps(plain(raised.value.values)))
    assert facts["missing"][0] == parts.PARTS["base"].title
    assert facts["bytes"] == sum(parts.PARTS[name].size for name in parts.needs("generate", "base"))
    assert facts["command"] == f"{parts.FETCH} base text_encoder vae tokenizer"
    assert "is cut short" in facts["problems"][0]
    texts = templates(raised.value.message)
    assert {
        "the real weights are not complete on this machine",
        "{file} is cut short: {size:,} of {whole:,} bytes",
    } <= texts
    chosen = inventory.choose("auto", "generate", "base", environ=folder_cut, mini_root=mini_root)
    assert "{file} is cut short: {size:,} of {whole:,} bytes" in templates(chosen.reason)


@pytest.fixture
def folder_cut(environ: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """An environment with one shard of Base cut short, in a folder whose name has braces."""
    environ["DIFFSYNTH_MODEL_BASE_PATH"] = str(tmp_path / "{models}")
    write_part(tmp_path / "{models}" / BASE, "base")
    cut(tmp_path / "{models}" / BASE / "transformer" / SECOND)
    return environ


def templates(message: Message) -> set[str]:
    """Return the templates that a message is made of."""
    texts: set[str] = set()

    def note(text: str) -> str:
        texts.add(text)
        return text

    message.render(note)
    return texts


def test_phrases_of_choices() -> None:
    assert str(parts.any_of(["a", "b", "c"])) == "a or b or c"
    assert str(parts.all_of(["a", "b"])) == "a and b"
    assert parts.all_of(["a"]) == "a"


# --- ComfyUI's folders


PARTS_OF_COMFYUI = ("turbo", "base", "text_encoder", "vae", "controlnet")


def sources(environ: Mapping[str, str], root: Path | None = None) -> dict[str, str]:
    return {found.part.name: found.source for found in inventory.find_all(environ, root) if found.present}


def test_the_original_vae_has_the_names_that_diffsynth_knows() -> None:
    assert checkpoint.hash_of(comfyui.AUTOENCODER) == parts.ORIGINAL_VAE


@pytest.mark.parametrize("base", ["ComfyUI", "comfy/ComfyUI", "Documents/ComfyUI"])
def test_comfyuis_files_are_found_where_it_keeps_them(base: str, environ: dict[str, str]) -> None:
    models = Path(environ["HOME"]) / base / "models"
    comfyui.write_folder(models, kind="unet" if base == "ComfyUI" else "diffusion_models")
    assert sources(environ) == dict.fromkeys(PARTS_OF_COMFYUI, "ComfyUI folder")
    write_part(models / "elsewhere", "tokenizer")
    with pytest.raises(WeightsMissing) as missing:  # all but the tokenizer, which ComfyUI has no file for
        inventory.choose("full", "generate", "turbo", environ=environ)
    assert missing.value.values["command"].endswith("models download tokenizer")


@pytest.mark.parametrize("below", ["", "models", "models/diffusion_models", "models/vae"])
def test_a_folder_of_comfyuis_may_be_named_at_any_depth(below: str, environ: dict[str, str], tmp_path: Path) -> None:
    comfyui.write_folder(tmp_path / "AI" / "models", encoders="clip")
    named = tmp_path / "AI" / below
    found = sources({**environ, "Z_IMAGE_MODELS": str(named)})
    assert found.keys() == {*PARTS_OF_COMFYUI}
    assert sources(environ, named) == found


def test_folders_that_comfyui_is_told_of_are_looked_in(environ: dict[str, str], tmp_path: Path) -> None:
    comfyui.write_folder(tmp_path / "drive" / "sd", kind="big")
    paths = f"""other:
    base_path: {tmp_path}/nowhere
    vae: vae
    loras: |
        one
        two
mine:
    base_path: {tmp_path}/drive
    diffusion_models: |
        sd/none
        sd/big
    text_encoders: sd/text_encoders
    vae: sd/vae
    model_patches: sd/model_patches
"""
    home = Path(environ["HOME"]) / "ComfyUI"
    home.mkdir(parents=True)
    (home / "extra_model_paths.yaml").write_text(paths)
    assert sources(environ).keys() == {*PARTS_OF_COMFYUI}
    for damaged in ("a: [", "- 1\n- 2", "a: {base_path: 3, vae: [1]}", "\0"):
        (home / "extra_model_paths.yaml").write_text(damaged)
        assert sources(environ) == {}


@pytest.mark.parametrize(
    ("name", "shapes", "dtype", "said"),
    [
        ("z_image_turbo_bf16.safetensors", TINY, "BF16", "holds an unknown model"),
        ("z_image_turbo.safetensors", comfyui.AUTOENCODER, "BF16", "holds an unknown model"),
        ("z_image_turbo_int8.safetensors", comfyui.TRANSFORMER, "I8", "is packed as int8, which is not read here"),
    ],
)
def test_what_comfyui_reads_and_we_do_not_is_named(
    name: str, shapes: sparse.Shapes, dtype: str, said: str, environ: dict[str, str]
) -> None:
    write_sparse(Path(environ["HOME"]) / "ComfyUI/models/diffusion_models" / name, shapes, dtype)
    turbo = next(found for found in inventory.find_all(environ) if found.part.name == "turbo")
    assert not turbo.present
    (problem,) = map(str, turbo.problems)
    assert name in problem
    assert said in problem


def test_files_in_fp8_are_used_where_there_is_nothing_better(environ: dict[str, str]) -> None:
    models = Path(environ["HOME"]) / "ComfyUI" / "models"
    scales = {
        f"{name}_scale": () for name, shape in comfyui.TRANSFORMER.items() if len(shape) == 2 and "token" not in name
    }
    dtypes = dict.fromkeys(scales, "F32")
    name = "z_image_turbo_fp8_scaled_e4m3fn.safetensors"
    write_sparse(models / "diffusion_models" / name, comfyui.TRANSFORMER | scales, "F8_E4M3", dtypes)
    write_sparse(models / "text_encoders/qwen_3_4b_fp8.safetensors", sparse.official_shapes("text_encoder"), "F8_E5M2")
    assert sources(environ) == {"turbo": "ComfyUI folder", "text_encoder": "ComfyUI folder"}
    assert found(environ, "turbo").files[0].name == name
    write_sparse(models / "diffusion_models" / "z_image_turbo_bf16.safetensors", comfyui.TRANSFORMER)
    assert found(environ, "turbo").files[0].name == "z_image_turbo_bf16.safetensors"


def test_a_fine_tune_is_not_taken_for_the_model_that_it_is_made_of(environ: dict[str, str]) -> None:
    folder = Path(environ["HOME"]) / "ComfyUI/models/diffusion_models"
    for name in ("z_image_turbo_anime", "z-image-de-turbo", "my_z_image", "z_image_turbo_lora"):
        write_sparse(folder / f"{name}.safetensors", comfyui.TRANSFORMER)
    assert sources(environ) == {}


def test_the_official_files_come_before_comfyuis(environ: dict[str, str], full_cache: Path) -> None:
    comfyui.write_folder(Path(environ["HOME"]) / "ComfyUI" / "models")
    found = sources(cached(environ, full_cache))
    assert found["turbo"] == found["vae"] == "Hugging Face cache"


def write_repackaged(cache: Path) -> None:
    """Write Comfy-Org's repository as it is fetched, in full length, and the official tokenizer."""
    snapshot = cache / "models--Comfy-Org--z_image_turbo" / "snapshots" / COMMIT / "split_files"
    write_sparse(snapshot / "diffusion_models/z_image_turbo_bf16.safetensors", comfyui.TRANSFORMER)
    write_sparse(snapshot / "text_encoders/qwen_3_4b.safetensors", sparse.official_shapes("text_encoder"))
    write_sparse(snapshot / "vae/ae.safetensors", comfyui.AUTOENCODER, "F32")
    write_hub_snapshot(cache, TURBO, ["tokenizer"])


def test_the_repackaged_files_do_where_the_official_ones_are_not(environ: dict[str, str], full_cache: Path) -> None:
    write_repackaged(hub(environ))
    chosen = inventory.choose("auto", "generate", "turbo", environ=environ)
    assert (chosen.kind, chosen.source) == ("full", "Hugging Face cache")
    assert chosen.files["turbo"][0].name == "z_image_turbo_bf16.safetensors"
    for name in TURBO_PARTS:
        there = found(environ, name)
        assert there.edition == ("official" if name == "tokenizer" else "repackaged")
        if name != "tokenizer":  # what is announced of a part is what it weighs, but for its header
            assert 0 < there.size - parts.PARTS[name].in_edition("repackaged").size < 200_000
    shutil.rmtree(hub(environ) / "models--Tongyi-MAI--Z-Image-Turbo")
    copy_cache(full_cache, hub(environ), TURBO)
    assert {found(environ, name).edition for name in TURBO_PARTS} == {"official"}


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K", "BF16"])
def test_ggufs_are_found_beside_comfyuis_files(kind: str, environ: dict[str, str]) -> None:
    models = Path(environ["HOME"]) / "ComfyUI" / "models"
    transformer = {name: shape[-1:] if shape[0] == 1 else shape for name, shape in comfyui.TRANSFORMER.items()}
    comfyui.write_gguf(models / "unet" / f"z_image_turbo-{kind}.gguf", transformer, kind)
    comfyui.write_gguf(models / "clip" / f"Qwen3-4B-UD-{kind}_M.gguf", comfyui.LLAMA_CPP_ENCODER, kind)
    assert sources(environ) == {"turbo": "ComfyUI folder", "text_encoder": "ComfyUI folder"}
    os.truncate(models / "unet" / f"z_image_turbo-{kind}.gguf", 1_000_000)
    assert "is cut short" in str(found(environ, "turbo").problems[0])


def test_of_several_files_the_one_with_most_bits_is_taken(environ: dict[str, str]) -> None:
    folder = Path(environ["HOME"]) / "ComfyUI/models/diffusion_models"
    comfyui.write_gguf(folder / "z-image-turbo-Q4_K_M.gguf", comfyui.TRANSFORMER, "Q4_K")
    comfyui.write_gguf(folder / "z-image-turbo-Q8_0.gguf", comfyui.TRANSFORMER, "Q8_0")
    assert found(environ, "turbo").files[0].name == "z-image-turbo-Q8_0.gguf"
    write_sparse(folder / "z_image_turbo_fp8.safetensors", comfyui.TRANSFORMER, "F8_E4M3")
    assert found(environ, "turbo").files[0].name == "z-image-turbo-Q8_0.gguf"
    write_sparse(folder / "z_image_turbo_fp16.safetensors", comfyui.TRANSFORMER, "F16")
    assert found(environ, "turbo").files[0].name == "z_image_turbo_fp16.safetensors"


UNION = "Z-Image-Turbo-Fun-Controlnet-Union-2.1"


def write_union(folder: Path, which: str) -> None:
    shapes = sparse.official_shapes("controlnet_lite" if "lite" in which else "controlnet")
    write_sparse(folder / f"{UNION}{which}.safetensors", shapes)


def test_the_small_controlnet_is_the_published_one() -> None:
    shapes = sparse.official_shapes("controlnet_lite")
    assert checkpoint.hash_of(shapes) == parts.CONTROLNET_LITE
    assert round(sum(math.prod(shape) for shape in shapes.values()) * 2 / 1e9, 2) == 2.02  # as on the hub


def test_the_newest_controlnet_on_the_machine_is_used(environ: dict[str, str]) -> None:
    patches = Path(environ["HOME"]) / "ComfyUI/models/model_patches"
    folder = Path(environ["DIFFSYNTH_MODEL_BASE_PATH"]) / parts.PARTS["controlnet"].repo

    def used() -> tuple[str, str]:
        one = found(environ, "controlnet")
        return one.files[0].stem.removeprefix(UNION), one.source

    write_union(patches, "-lite-2602-8steps")
    assert used() == ("-lite-2602-8steps", "ComfyUI folder")
    write_union(patches, "-8steps")
    assert used() == ("-8steps", "ComfyUI folder")
    write_union(folder, "-8steps")
    assert used() == ("-8steps", "models folder")
    assert found(environ, "controlnet").outdated
    write_union(patches, "-2601-8steps")
    assert used() == ("-2601-8steps", "ComfyUI folder")
    write_union(patches, "-2602-8steps")
    assert used() == ("-2602-8steps", "ComfyUI folder")
    assert not found(environ, "controlnet").outdated
    write_union(folder, "-2602-8steps")
    assert used() == ("-2602-8steps", "models folder")


@pytest.mark.parametrize(
    ("name", "release", "rank"),
    [
        (f"{UNION}.safetensors", 2512, (True, 2512)),
        (f"{UNION}-8steps.safetensors", 2512, (True, 2512)),
        (f"{UNION}-2601-8steps.safetensors", 2601, (True, 2601)),
        (f"{UNION}-2602-8steps_fp8_e4m3fn.safetensors", 2602, (True, 2602)),
        (f"{UNION}-lite-2602-8steps.safetensors", 2602, (False, 2602)),
    ],
)
def test_a_controlnets_release_is_in_its_name(name: str, release: int, rank: tuple[bool, int]) -> None:
    assert parts.controlnet_release(name) == release
    assert parts.controlnet_rank(name) == rank


@pytest.mark.parametrize(("dtype", "said"), [("F8_E4M3", None), ("I8", "is packed as int8"), ("U8", "bytes")])
def test_a_repository_in_other_numbers_is_not_taken_for_the_published_one(
    dtype: str, said: str | None, environ: dict[str, str]
) -> None:
    """Names and shapes are the same, so that DiffSynth would read it as it is."""
    write_part(Path(environ["DIFFSYNTH_MODEL_BASE_PATH"]) / BASE, "base", dtype)
    base = found(environ, "base")
    assert base.present == (said is None)
    assert [str(said) in str(problem) for problem in base.problems] == ([True] if said else [])
