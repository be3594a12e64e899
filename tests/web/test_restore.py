"""A picture that is dropped on the page: what comes into the form, what is named, and what is refused."""

import asyncio
import json
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
from gradio.utils import get_upload_folder
from PIL import ImageFile

from core.request import SEED_MAX
from engine import Engine
from tests.helpers import pictures
from web import page

LINE = "Steps: 9, Sampler: Euler, Schedule type: Simple, CFG scale: 1.0, Seed: 123, Size: 128x128"
NEGATIVE = "a lighthouse\nNegative prompt: blurry\n"
SWARM = {"prompt": "a lighthouse", "steps": 9, "seed": 123, "cfgscale": 1, "model": "z_image_turbo", "loras": ["ink"]}
INVOKE = {"positive_prompt": "a lighthouse", "steps": 9, "seed": 123, "width": 128, "height": 128}
COMFY = {
    "3": {"class_type": "KSampler", "inputs": {"seed": 123, "steps": 9, "cfg": 1.0, "positive": ["6", 0]}},
    "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "a lighthouse"}},
}


@pytest.fixture(scope="module")
def built(engine: Engine) -> gr.Blocks:
    async def build() -> gr.Blocks:  # within a loop: else Gradio makes some that nobody closes
        return page.build(engine)

    return asyncio.run(build())


def test_no_listener_lets_gradio_refuse_a_number(built: gr.Blocks) -> None:
    """Its refusal is no sentence of ours, and in English."""
    numbers = [fn for fn in built.fns.values() if any(isinstance(block, gr.Slider | gr.Number) for block in fn.inputs)]
    assert len(numbers) > 10
    assert [fn.name for fn in numbers if fn.fn is not None and fn.preprocess] == []


@pytest.fixture
def uploads() -> Iterator[Path]:
    """A folder for files that the page takes for uploaded."""
    Path(get_upload_folder()).mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=get_upload_folder()))
    yield folder
    shutil.rmtree(folder)


Drop = Callable[[Path], dict[str, Any]]


@pytest.fixture
def drop(built: gr.Blocks) -> Drop:
    """Drop a file on the page; what changes comes back, by the component's id or else its label."""
    listener = next(fn for fn in built.fns.values() if fn.name == "restore")
    assert listener.fn is not None
    restore = listener.fn

    def drop(path: Path) -> dict[str, Any]:
        update = restore({"path": str(path)}, None)
        return {block.elem_id or english(getattr(block, "label", "")): value for block, value in update.items()}

    return drop


def english(label: Any) -> str:
    text = str(label or "")
    return json.loads(text.removeprefix("__i18n__"))["key"] if text.startswith("__i18n__") else text


@pytest.mark.parametrize(
    ("name", "texts", "model", "named"),
    [
        (
            "x.png",
            {"parameters": f"a lighthouse\n{LINE}, Model: z_image_turbo_bf16"},
            "turbo",
            ["Schedule type: Simple"],
        ),
        ("x.png", {"parameters": f"{NEGATIVE}{LINE}, Model: z_image_turbo_bf16"}, "turbo", ["Negative prompt: blurry"]),
        ("x.png", {"parameters": f"{NEGATIVE}{LINE}, Model: sdxl"}, "base", ["Model: sdxl"]),
        ("x.png", {"parameters": {"sui_image_params": SWARM}}, "turbo", ["LoRA: ink"]),
        ("x.png", {"invokeai_metadata": INVOKE}, "turbo", []),
        ("x.png", {"prompt": COMFY, "workflow": {}}, "turbo", []),
    ],
    ids=["a1111", "forge with a negative prompt", "another model", "swarmui", "invokeai", "comfyui"],
)
def test_another_programs_picture_fills_the_form(
    name: str, texts: dict[str, Any], model: str, named: list[str], drop: Drop, uploads: Path
) -> None:
    written = {key: text if isinstance(text, str) else json.dumps(text) for key, text in texts.items()}
    found = drop(pictures.png(uploads / name, **written))
    assert (found["prompt"], found["model"], found["Steps"], found["Seed"]) == ("a lighthouse", model, 9, 123)
    assert found["Negative prompt"] == ("blurry" if model == "base" else "")
    for text in ("The settings of the picture are in the form.", *named):
        assert text in found["restored"]


@pytest.mark.parametrize("ending", ["jpg", "webp"])
def test_a_jpeg_or_webp_fills_the_form(ending: str, drop: Drop, uploads: Path) -> None:
    comment = b"UNICODE\0" + f"a lighthouse\n{LINE}".encode("utf-16-be")
    assert drop(pictures.with_exif(uploads / f"x.{ending}", pictures.exif(comment)))["prompt"] == "a lighthouse"


def test_a_seed_that_is_too_large_is_named_and_no_other_stays(drop: Drop, uploads: Path) -> None:
    text = f"a lighthouse\nSteps: 9, Seed: {SEED_MAX + 1}, CFG scale: 0"
    found = drop(pictures.png(uploads / "x.png", parameters=text))
    assert found["Seed"] == 0
    assert f"Seed: {SEED_MAX + 1}" in found["restored"]


def test_a_cfg_of_zero_is_none_in_the_form(drop: Drop, uploads: Path) -> None:
    described = {"mode": "generate", "weights": {"fingerprints": {}}, "request": {"prompt": "x", "cfg": 0}}
    found = drop(pictures.png(uploads / "x.png", z_image_studio=json.dumps(described)))
    assert found["CFG"] == 1
    assert "Not restored" not in found["restored"]


@pytest.mark.parametrize(
    ("texts", "sentence"),
    [
        ({"z_image_studio": "[" * 200_000}, "a PNG, JPEG or WebP with its parameters inside"),
        ({"parameters": '{"a": 1}'}, "a PNG, JPEG or WebP with its parameters inside"),
        ({"parameters": f"x\nSteps: 8, Sampler: Euler, Seed: 3, Size: {'9' * 5_000}x128"}, "Width: 999"),
    ],
    ids=["deep", "json", "digits"],
)
def test_what_cannot_be_is_refused_in_a_sentence(
    texts: dict[str, str], sentence: str, drop: Drop, uploads: Path
) -> None:
    told = drop(pictures.png(uploads / "x.png", **texts))["restored"]
    assert sentence in told
    assert len(told) < 1_000


@pytest.mark.parametrize("side", [9_400, 17_210])
@pytest.mark.parametrize("listener", ["restore", "foresee", "show"])
def test_no_listener_decodes_a_picture_that_is_too_large(
    listener: str, side: int, built: gr.Blocks, uploads: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    chunks = (pictures.chunk(b"IHDR", header), pictures.chunk(b"IDAT", b""), pictures.chunk(b"IEND", b""))
    (uploads / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: pytest.fail("it was decoded"))
    found = next(fn for fn in built.fns.values() if fn.name == listener)
    assert found.fn is not None
    picture = {"path": str(uploads / "x.png")}
    if listener == "restore":
        update = found.fn(picture, None)
    else:
        inputs = {
            block: picture if isinstance(block, gr.Image) else getattr(block, "value", None) for block in found.inputs
        }
        update = found.fn(inputs, None)
    told = [value for value in update.values() if isinstance(value, str) and "failed" in value]
    assert len(told) == 1
    assert ("80 million pixels" if listener != "restore" else "with its parameters inside") in told[0]
