"""PNG text chunks: written as galleries read them, read as they are found."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from core import embedded, metadata
from core.errors import RequestError
from core.foreign import parse_a1111
from core.metadata import Provenance, a1111_text, encode_png, read_picture
from core.parameters import Parameters
from core.request import ResolvedTextToImage, TextToImage
from web import restore
from web.language import english

PROVENANCE = Provenance("mini", {"turbo": "ab" * 32})
IMAGE = Image.new("RGB", (128, 128), "#b33")


def resolved(**values: object) -> ResolvedTextToImage:
    return TextToImage.parse(**{"prompt": "a red apple", "seed": 7, **values}).resolved("mini")


def write(folder: Path, data: bytes) -> Path:
    path = folder / "picture.png"
    path.write_bytes(data)
    return path


def test_png_holds_both_chunks_as_text(tmp_path: Path) -> None:
    path = write(tmp_path, encode_png(IMAGE, resolved(), PROVENANCE))
    data = path.read_bytes()
    assert b"tEXtparameters\x00" in data
    assert b"tEXtz-image-studio\x00" in data
    with Image.open(path) as image:
        assert image.info["parameters"] == (
            "a red apple\n"
            "Steps: 8, Sampler: Euler, CFG scale: 1, Seed: 7, Size: 128x128, "
            "Model: Z-Image Turbo miniature, Version: Z-Image Studio 0.1.0"
        )
        chunk = json.loads(image.info["z-image-studio"])
    assert chunk["schema"] == metadata.SCHEMA
    assert chunk["weights"] == {"kind": "mini", "fingerprints": {"turbo": "ab" * 32}}
    assert chunk["request"] == resolved().model_dump()


def test_same_request_gives_the_same_bytes() -> None:
    assert encode_png(IMAGE, resolved(), PROVENANCE) == encode_png(IMAGE.copy(), resolved(), PROVENANCE)


def test_own_image_gives_its_request_back(tmp_path: Path) -> None:
    request = resolved(model="base", negative_prompt="blue, or green", prompt='two\nlines, "quotes": and 中文')
    found = read_picture(write(tmp_path, encode_png(IMAGE, request, PROVENANCE)))
    assert found.source == "z-image-studio"
    assert found.fingerprints == PROVENANCE.fingerprints
    assert found.request().model_dump() == request.model_dump()
    assert request.weights == "mini"  # what drew it: `auto` may mean other weights by now


@given(
    prompt=st.text(st.characters(exclude_categories=["C"], include_characters="\n"), min_size=1, max_size=80).map(
        str.strip
    ),
    negative=st.text(st.characters(exclude_categories=["C"]), max_size=40).map(str.strip),
    seed=st.integers(1, 2**32 - 1),
)
def test_a1111_text_can_be_read_back(prompt: str, negative: str, seed: int) -> None:
    if not prompt or re.search(r"^Negative prompt:", prompt, re.M):
        return  # the format cannot tell such a line from its own
    request = resolved(prompt=prompt, negative_prompt=negative, seed=seed, model="base")
    found = parse_a1111(a1111_text(request, PROVENANCE, IMAGE.size))
    assert found.values == {**request.model_dump(exclude_defaults=True), "weights": "mini", "model": "base"}
    assert not found.not_restored


def test_damaged_chunk_of_ours_falls_back_on_a1111_text(tmp_path: Path) -> None:
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("parameters", a1111_text(resolved(), PROVENANCE, IMAGE.size))
    chunks.add_text("z-image-studio", '{"schema": 1, "request": [')
    IMAGE.save(tmp_path / "damaged.png", pnginfo=chunks)
    found = read_picture(tmp_path / "damaged.png")
    assert (found.source, found.values["prompt"]) == ("a1111", "a red apple")


def test_unknown_fields_of_a_later_version_are_named(tmp_path: Path) -> None:
    described = metadata.describe(resolved(), PROVENANCE)
    described["request"]["tiling"] = True
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("z-image-studio", json.dumps(described))
    IMAGE.save(tmp_path / "later.png", pnginfo=chunks)
    found = read_picture(tmp_path / "later.png")
    assert found.not_restored == {"tiling": "True"}
    request = found.request()
    assert isinstance(request, TextToImage)
    assert request.prompt == "a red apple"


def test_files_that_hold_nothing_are_refused_with_a_sentence(tmp_path: Path) -> None:
    IMAGE.save(tmp_path / "plain.png")
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "cut.png").write_bytes((tmp_path / "plain.png").read_bytes()[:20])
    for name in ("plain.png", "text.png", "empty.png", "cut.png", "absent.png", "."):
        with pytest.raises(RequestError, match="allowed: a PNG"):
            read_picture(tmp_path / name)


# --- hostile files ---


def holding(path: Path, **chunks: str) -> Path:
    info = PngImagePlugin.PngInfo()
    for name, text in chunks.items():
        info.add_text(name.replace("_", "-"), text)
    IMAGE.save(path, pnginfo=info)
    return path


def completed(found: Parameters) -> TextToImage:
    request = found.request()
    assert isinstance(request, TextToImage)
    return request.resolved("mini")


@pytest.mark.parametrize("digits", [21, 400, 5_000, 50_000])
def test_a_size_of_many_digits_is_refused_by_its_field(digits: int, tmp_path: Path) -> None:
    text = f"x\nSteps: 8, Sampler: Euler, Seed: 3, Size: {'9' * digits}x128"
    found = read_picture(holding(tmp_path / "long.png", parameters=text))
    with pytest.raises(RequestError, match=r"^width: .{20,90} is not possible; allowed: "):
        completed(found)


def of_ours(name: str, value: str) -> str:
    """Our chunk with a field's value as it is written here."""
    described = {"mode": "generate", "weights": {"fingerprints": {}}, "request": {"prompt": "x", name: "VALUE"}}
    return json.dumps(described).replace('"VALUE"', value)


@pytest.mark.parametrize("depth", [30, 900, 10_000, 200_000])
def test_a_chunk_nested_deeply_is_refused(depth: int, tmp_path: Path) -> None:
    for number, text in enumerate(("[" * depth, of_ours("prompt", "[" * depth + "]" * depth))):
        with pytest.raises(RequestError, match="allowed: a PNG, JPEG or WebP with its parameters"):
            read_picture(holding(tmp_path / f"{number}.png", z_image_studio=text))


@pytest.mark.parametrize("value", ["1" + "0" * 400, "9" * 5_000, "1e999", "NaN", "Infinity", '"²"', "[]", "{}"])
@pytest.mark.parametrize("name", ["seed", "steps", "width", "cfg", "lora_strength"])
def test_an_impossible_number_of_ours_is_refused_by_its_field(name: str, value: str, tmp_path: Path) -> None:
    found = read_picture(holding(tmp_path / "odd.png", z_image_studio=of_ours(name, value)))
    with pytest.raises(RequestError, match=f"^{name}: "):
        found.request()


def test_half_a_character_is_no_text(tmp_path: Path) -> None:
    text = json.dumps(metadata.describe(resolved(), PROVENANCE)).replace("a red apple", "\\ud83d")
    with pytest.raises(RequestError, match="allowed: a PNG, JPEG or WebP with its parameters"):
        read_picture(holding(tmp_path / "half.png", z_image_studio=text))


def test_text_without_end_is_not_read(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="allowed: a PNG, JPEG or WebP with its parameters"):
        read_picture(holding(tmp_path / "long.png", parameters="a\n" * (embedded.MAX_TEXT // 2 + 1)))


def test_what_was_not_restored_is_told_in_part_where_it_is_much() -> None:
    told = restore._told("Done.", {f"field {number}": "x" for number in range(10_000)}, english)
    assert len(told) < 2_000
    assert "…" in told
    assert "…" not in restore._told("Done.", {"field": "x"}, english)
