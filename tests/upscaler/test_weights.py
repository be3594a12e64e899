"""Real-ESRGAN's weights: found, decoded from ncnn's form, kept, checked."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import upscaler.weights
from core.errors import RequestError, WeightsMissing
from hub import parts, places
from tests.helpers.sparse import write_hub_snapshot
from upscaler import ncnn

FAST = upscaler.weights.PACKAGED["fast"]


def write_network(folder: Path, tag: int, numbers: type[np.generic], text: str = "") -> tuple[Path, np.ndarray]:
    """Write a network of one convolution (3 inputs, 2 outputs, 1 x 1; 6 weights) and one PReLU in ncnn's form."""
    weight = np.arange(6).astype(numbers)
    data = np.uint32(tag).tobytes() + weight.tobytes()
    data += np.array([10, 11], np.float32).tobytes() + np.array([0.5, 0.25], np.float32).tobytes()
    lines = [
        ncnn.MAGIC,
        "3 3",
        "Input in 0 1 data",
        "Convolution c 1 1 data a 0=2 1=1 5=1 6=6",
        text or "PReLU p 1 1 a output 0=2",
    ]
    (folder / "net.param").write_text("\n".join(lines), encoding="ascii")
    (folder / "net.bin").write_bytes(data)
    return folder / "net.param", weight


@pytest.mark.parametrize(("tag", "numbers"), [(ncnn.HALF, np.float16), (ncnn.FULL, np.float32)])
def test_weights_are_read_in_either_precision(tmp_path: Path, tag: int, numbers: type[np.generic]) -> None:
    param, weight = write_network(tmp_path, tag, numbers)
    convolution, slopes = ncnn.read(param)
    np.testing.assert_array_equal(convolution.weight, weight.reshape(2, 3, 1, 1))
    np.testing.assert_array_equal(convolution.bias, [10, 11])
    np.testing.assert_array_equal(slopes.weight, [0.5, 0.25])


def test_what_is_not_understood_is_refused(tmp_path: Path) -> None:
    param, _ = write_network(tmp_path, 0x0002C056, np.float16)  # ncnn's int8
    with pytest.raises(ValueError, match="0x2c056"):
        ncnn.read(param)
    param, _ = write_network(tmp_path, 0, np.float32, "InnerProduct p 1 1 a output 0=2")
    with pytest.raises(ValueError, match="InnerProduct"):
        ncnn.read(param)
    param, _ = write_network(tmp_path, 0, np.float32)
    data = param.with_suffix(".bin").read_bytes()
    param.with_suffix(".bin").write_bytes(data[:-1])
    with pytest.raises(ValueError, match="end too early"):
        ncnn.read(param)
    param.with_suffix(".bin").write_bytes(data + b"more")
    with pytest.raises(ValueError, match="describes"):
        ncnn.read(param)
    param.write_text("no network\n0 0\n", encoding="ascii")
    with pytest.raises(ValueError, match=r"no \.param"):
        ncnn.read(param)


def test_names_follow_the_order_of_the_layers() -> None:
    with pytest.raises(ValueError, match="RRDBNet"):
        ncnn.rrdbnet([ncnn.Layer("PReLU", np.zeros(1))] * 21)
    state = upscaler.weights.decoded(upscaler.weights.PACKAGED["best"])
    assert len(state) == 2 * 351
    assert state["conv_first.weight"].shape == (64, 3, 3, 3)
    assert state["body.22.rdb3.conv5.weight"].shape == (64, 192, 3, 3)
    assert state["conv_last.bias"].shape == (3,)


def test_decoded_once_then_kept_and_decoded_again_when_it_is_not_whole(tmp_path: Path) -> None:
    state = upscaler.weights.decoded(FAST, tmp_path)
    assert upscaler.weights.digest(state) == FAST.state_digest
    (kept,) = tmp_path.iterdir()
    written = kept.stat().st_mtime_ns
    upscaler.weights.decoded(FAST, tmp_path)
    assert kept.stat().st_mtime_ns == written

    whole = kept.read_bytes()
    for damaged in (whole[:-4] + b"\0\0\0\1", whole[: len(whole) // 2], b""):
        kept.write_bytes(damaged)
        assert upscaler.weights.digest(upscaler.weights.decoded(FAST, tmp_path)) == FAST.state_digest
        assert upscaler.weights.digest(load_file(kept)) == FAST.state_digest
    assert list(tmp_path.iterdir()) == [kept]


def test_a_place_that_cannot_be_written_to_is_no_hindrance(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    state = upscaler.weights.decoded(FAST, tmp_path / "file")
    assert upscaler.weights.digest(state) == FAST.state_digest


@pytest.mark.parametrize("wrong", ["file_digest", "state_digest"])
def test_another_file_than_expected_is_not_used(tmp_path: Path, wrong: str) -> None:
    changes: dict[str, Any] = {wrong: "0" * 64}  # `replace` has fields of several types
    with pytest.raises(WeightsMissing, match="another file than expected"):
        upscaler.weights.decoded(dataclasses.replace(FAST, **changes), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_package_that_is_not_whole_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(upscaler.weights, "PACKAGE", "no_such_package")
    with pytest.raises(WeightsMissing, match="no-such-package is not installed"):
        upscaler.weights.find("fast", {"HOME": str(tmp_path)})


def test_where_it_is_looked_for(tmp_path: Path) -> None:
    environ = {"HOME": str(tmp_path), "USERPROFILE": str(tmp_path)}
    packaged = upscaler.weights.find("best", environ)
    assert packaged.file is None
    assert packaged.packaged is upscaler.weights.PACKAGED["best"]

    cache = places.hub_cache(environ)
    write_hub_snapshot(cache, parts.PARTS["upscaler"].repo, ["upscaler"])
    cached = upscaler.weights.find("best", environ)
    assert cached.file is not None
    assert cached.file.is_relative_to(cache)
    assert upscaler.weights.find("fast", environ).file is None

    own = tmp_path / "4x-own.safetensors"
    own.write_bytes(b"content")
    named = upscaler.weights.find("best", environ | {upscaler.weights.SETTING: str(own)})
    assert (named.file, named.title) == (own, "4x-own")


@pytest.mark.parametrize("name", ["missing.pth", "folder.pth", "notes.txt"])
def test_a_setting_that_names_no_model_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder.pth").mkdir()
    (tmp_path / "notes.txt").write_text("notes")
    with pytest.raises(RequestError, match=upscaler.weights.SETTING):
        upscaler.weights.find("best", {upscaler.weights.SETTING: str(tmp_path / name)})
