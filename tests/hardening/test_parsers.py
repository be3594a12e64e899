"""Every parser of what comes from outside, on anything: it gives a result, or refuses in a sentence of ours."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

import lora.file
from core import bounded, foreign, metadata
from core.errors import NotWritten, RequestError
from core.request import ControlNet, TextToImage, Upscale
from core.upload import Upload
from hub import checkpoint, gguf_header
from images.reading import decode
from mini import prompt
from tests.helpers.effort import effort
from web import bodies

New = Callable[[bytes, str], Path]

tried = settings(
    max_examples=effort(60, 20_000),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)

GRAPH = {
    "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "z_image_turbo.safetensors"}},
    "2": {"class_type": "CLIPTextEncode", "inputs": {"text": "a fox", "clip": ["1", 1]}},
    "3": {
        "class_type": "KSampler",
        "inputs": {"seed": 5, "steps": 8, "cfg": 1, "positive": ["2", 0], "model": ["1", 0]},
    },
}
LINES = "a fox\nNegative prompt: none\nSteps: 8, Sampler: Euler, CFG scale: 1, Seed: 5, Size: 512x512, Model: z"


def _picture(kind: str) -> bytes:
    image, buffer = Image.new("RGB", (8, 8), "red"), io.BytesIO()
    if kind == "PNG":
        info = PngImagePlugin.PngInfo()
        info.add_text("parameters", LINES)
        info.add_itxt("prompt", json.dumps(GRAPH), zip=True)
        image.save(buffer, kind, pnginfo=info)
    else:
        exif = Image.Exif()
        exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + LINES.encode("utf-16-be")
        image.save(buffer, kind, exif=exif)
    return buffer.getvalue()


def _lora() -> bytes:
    layer = "diffusion_model.layers.0.attention.to_q"
    weights = {f"{layer}.lora_A.weight": np.zeros((2, 64), "f4"), f"{layer}.lora_B.weight": np.zeros((64, 2), "f4")}
    said = {"ss_network_alpha": "2", "lora_adapter_metadata": '{"r": 2, "rank_pattern": {"a.*": 4}}'}
    return safetensors.numpy.save({**weights, f"{layer}.alpha": np.ones((), "f4")}, said)


def _gguf() -> bytes:
    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    entry = text("general.architecture") + struct.pack("<I", 8) + text("lumina2")
    listed = text("some") + struct.pack("<IIQ", 9, 4, 2) + bytes(8)
    shaped = text("comfy.gguf.orig_shape.a") + struct.pack("<I", 8) + text("2,4")
    tensor = text("a") + struct.pack("<IQIQ", 1, 8, 0, 0)
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, 3) + entry + listed + shaped + tensor
    return head + bytes(-len(head) % 32) + bytes(32)


PICTURES = [_picture(kind) for kind in ("PNG", "JPEG", "WEBP")]
LORA, GGUF = _lora(), _gguf()


@st.composite
def changed(draw: st.DrawFn, *wholes: bytes) -> bytes:
    """Return a whole file with some bytes replaced, put in or cut out: what gets past the first check."""
    data = bytearray(draw(st.sampled_from(wholes)))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(data)))
        new = draw(
            st.binary(max_size=12) | st.sampled_from([b"\xff" * 8, b"9" * 400, b"[" * 99, b"\0" * 4, b"-1", b"1e999"])
        )
        data[at : at + draw(st.sampled_from([0, len(new), 40]))] = new
    return bytes(data)


NUMBERS = st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from([10**400, -(2**63), 1e308, 10**19])
TEXTS = st.text(max_size=40) | st.sampled_from(
    ["²", "9" * 5000, "1e999", "NaN", "\0", "\ud800", "a fox", "<lora:a:9>", "1,"]
)
NAMES = TEXTS | st.sampled_from(
    ["class_type", "inputs", "nodes", "links", "KSampler", "text", "seed", "steps", "1", "2", "3"]
)
VALUES = st.recursive(
    NUMBERS | NAMES,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(NAMES, inner, max_size=5),
    max_leaves=25,
)
GRAPHS = st.dictionaries(
    st.sampled_from(["1", "2", "3", "4"]),
    st.fixed_dictionaries(
        {
            "class_type": st.sampled_from(
                ["KSampler", "CLIPTextEncode", "LoraLoader", "EmptyLatentImage", "UNETLoader"]
            ),
            "inputs": st.dictionaries(
                st.sampled_from(
                    ["text", "seed", "steps", "positive", "negative", "model", "latent_image", "lora_name"]
                ),
                VALUES | st.tuples(st.sampled_from(["1", "2", "3"]), NUMBERS),  # also in circles
            ),
        }
    ),
)


@pytest.fixture(scope="module")
def new(tmp_path_factory: pytest.TempPathFactory) -> New:
    """Write a file of a name that was not used before: what is known of one is kept by its name."""
    folder, numbers = tmp_path_factory.mktemp("hostile"), count()

    def write(data: bytes, suffix: str) -> Path:
        path = folder / f"{next(numbers)}{suffix}"
        path.write_bytes(data)
        return path

    return write


def refused_or(call: Callable[[], Any], *kinds: type[Exception]) -> Any:
    """Return what a call gives, None where it is refused by one of these errors, in a sentence of bounded length."""
    try:
        return call()
    except kinds as error:
        assert 0 < len(str(error)) < 1500
        return None


@tried
@given(changed(*PICTURES) | st.binary(max_size=200))
def test_pictures(new: New, data: bytes) -> None:
    path = new(data, ".png")
    refused_or(lambda: metadata.read_picture(path).request(), RequestError)
    refused_or(lambda: decode(Upload.open(path)), RequestError)
    path.unlink()


@tried
@given(st.text(max_size=300) | st.builds("{}, {}".format, st.just(LINES), st.text(max_size=80)), VALUES, GRAPHS)
def test_texts_of_other_programs(text: str, value: Any, graph: dict[str, Any]) -> None:
    told = [text, json.dumps(value), json.dumps(graph)]
    names = ("parameters", "prompt", "workflow", "invokeai_metadata", "Comment", "sui_image_params", "UserComment")
    for name in names:
        for one in told:
            found = foreign.parse({name: one, "Software": "NovelAI"})
            if found is not None:
                refused_or(found.request, RequestError)


@tried
@given(changed(LORA) | st.binary(max_size=200) | VALUES.map(lambda value: _with_header(json.dumps(value).encode())))
def test_loras(new: New, data: bytes) -> None:
    path = new(data, ".safetensors")
    found = refused_or(lambda: lora.file.read(path), RequestError)
    if found is not None:
        found.report.facts()
    refused_or(lambda: checkpoint.parse_header(path), checkpoint.UnusableError)
    path.unlink()


def _with_header(header: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header


@tried
@given(changed(GGUF) | st.binary(max_size=200).map(lambda data: b"GGUF\3\0\0\0" + data))
def test_gguf(new: New, data: bytes) -> None:
    path = new(data, ".gguf")
    refused_or(lambda: gguf_header.read_header(path), checkpoint.UnusableError)
    path.unlink()


@tried
@given(VALUES.map(json.dumps) | st.text(max_size=200) | st.integers(0, 3000).map(lambda depth: "[" * depth))
def test_json(text: str) -> None:
    refused_or(lambda: bounded.loads(text), ValueError)


@tried
@given(TEXTS | st.lists(st.sampled_from(["a", "fox", "small", "two", "red", "on", "left", "狐狸", ","])).map(" ".join))
def test_prompts(text: str) -> None:
    assert prompt.complete(text, 7) == prompt.complete(text, 7)


@tried
@given(st.sampled_from([TextToImage, ControlNet, Upscale]), st.data())
def test_requests(mode: type[TextToImage | ControlNet | Upscale], data: st.DataObject) -> None:
    fields = data.draw(st.dictionaries(st.sampled_from([*mode.model_fields, "nothing"]), VALUES))
    refused_or(lambda: mode.parse(**fields), RequestError)


@tried
@given(
    VALUES | st.text(max_size=80).map("data:image/png;base64,{}".format) | st.text(max_size=60).map("data:{}".format)
)
def test_data_urls(tmp_path_factory: pytest.TempPathFactory, url: Any) -> None:
    refused_or(lambda: bodies.from_data_url(url, "image", tmp_path_factory.getbasetemp()), RequestError, NotWritten)
