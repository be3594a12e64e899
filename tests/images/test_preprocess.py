"""Control images: every preprocessor on real images, with the real models where this repository carries them."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from core.errors import RequestError, WeightsMissing
from core.request import PREPROCESSORS, Preprocess, Preprocessor
from core.sizes import IMAGE_SIZES, WeightsKind
from core.upload import Upload
from hub import inventory, parts
from images import pose, preprocess, reading

ROOT = Path(__file__).parent.parent.parent
PORTRAIT = ROOT / "tests" / "data" / "astronaut.jpg"
LIGHT = tuple(name for name in PREPROCESSORS if name not in ("depth", "none"))


def control(image: Path = PORTRAIT, kind: WeightsKind = "full", **values: object) -> preprocess.Control:
    return preprocess.control(Preprocess.parse(image=str(image), **values), Upload.open(image), IMAGE_SIZES[kind])


def codes(made: preprocess.Control) -> list[str]:
    return [note.code for note in made.notes]


@pytest.fixture
def drawing(tmp_path: Path) -> Path:
    """A red disc on green: of the same gray, so that only its colour tells it from the ground."""
    image = Image.new("RGB", (256, 256), (0, 130, 0))
    ImageDraw.Draw(image).ellipse((64, 64, 192, 192), fill=(255, 0, 0))
    assert image.convert("L").getextrema() == (76, 76)
    image.save(tmp_path / "disc.png")
    return tmp_path / "disc.png"


def ring(size: int, thick: int) -> np.ndarray:
    """Where an outline of the disc may be."""
    y, x = np.mgrid[:size, :size] + 0.5
    near: np.ndarray = abs(np.hypot(x - size / 2, y - size / 2) - size / 4) < thick
    return near


@pytest.mark.parametrize("name", LIGHT)
def test_every_preprocessor_gives_an_image_of_the_same_size(name: str) -> None:
    made = control(preprocessor=name)
    assert (made.image.mode, made.image.size) == ("RGB", (1024, 1024))
    pixels = np.asarray(made.image)
    assert pixels.max() > 200
    assert (pixels[..., 0] == pixels[..., 1]).all() == (name != "pose")
    if name != "gray":
        assert (pixels.max(axis=2) < 40).mean() > 0.5  # lines on black
    assert codes(made) == []


@pytest.mark.parametrize(("name", "thick"), [("canny", 12), ("softedge", 16), ("scribble", 40)])
def test_outlines_lie_where_colours_meet(drawing: Path, name: str, thick: int) -> None:
    white = np.asarray(control(drawing, preprocessor=name).image)[..., 0] > 96
    assert white.any()
    assert white[ring(1024, thick)].sum() == white.sum()
    around = np.arctan2(*(np.argwhere(white) - 512).T)
    assert np.histogram(around, 36)[0].all()  # the whole way round


def test_line_art_is_the_dark_lines_of_a_drawing(tmp_path: Path) -> None:
    sheet = Image.new("RGB", (1024, 1024), (250, 245, 230))
    ImageDraw.Draw(sheet).line((100, 500, 900, 500), fill=(40, 40, 60), width=4)
    sheet.save(tmp_path / "sheet.png")
    rows = np.asarray(control(tmp_path / "sheet.png", preprocessor="lineart").image)[..., 0] > 96
    assert rows[498:502, 200:800].any(axis=0).all()
    assert not rows[:480].any()
    assert not rows[520:].any()


def test_thresholds_decide_what_an_edge_is() -> None:
    counts = [
        (np.asarray(control(canny_low=low, canny_high=high).image)[..., 0] > 0).sum()
        for low, high in ((20, 60), (100, 200), (300, 600))
    ]
    assert counts[0] > 1.5 * counts[1] > 3 * counts[2] > 0


def test_thresholds_in_the_wrong_order_are_refused() -> None:
    with pytest.raises(RequestError, match=r"^canny_low: 201 .*; allowed: at most canny_high, which is 200$"):
        Preprocess.parse(image="x.png", canny_low=201)


def test_pre_processed_is_the_image_itself(drawing: Path) -> None:
    made = control(drawing, kind="mini", preprocessor="none")
    image = Image.open(drawing).resize((128, 128), Image.Resampling.LANCZOS)
    assert made.image.tobytes() == image.tobytes()


def test_gray_has_no_colours() -> None:
    pixels = np.asarray(control(preprocessor="gray").image).astype(int)
    luminance = np.asarray(reading.fit(Image.open(PORTRAIT), IMAGE_SIZES["full"]).image.convert("L"))
    assert (pixels[..., 0] == luminance).all()


@pytest.mark.parametrize("source", ["canny", "scribble", "softedge"])
def test_outlines_are_recognised_and_noted(tmp_path: Path, source: str) -> None:
    path = tmp_path / "edges.png"
    control(preprocessor=source).image.save(path)
    for name in ("canny", "scribble"):
        (note,) = [note for note in control(path, preprocessor=name).notes if note.code == "already_edges"]
        assert "Pre-processed" in str(note)
    assert "already_edges" not in codes(control(path, preprocessor="none"))


def test_what_is_no_outline_is_not_taken_for_one(tmp_path: Path) -> None:
    icons = Image.open(ROOT / "tests" / "data" / "mini_icons.png").convert("RGB")
    night = Image.new("RGB", (256, 256))
    ImageDraw.Draw(night).ellipse((90, 90, 166, 166), fill=(255, 255, 255))  # a moon
    red = Image.new("RGB", (256, 256))
    ImageDraw.Draw(red).ellipse((60, 60, 196, 196), outline=(255, 0, 0))
    pictures = {
        "photo": Image.open(PORTRAIT),
        "gray": Image.open(PORTRAIT).convert("L").convert("RGB"),
        "icons": icons,
        "moon": night,
        "red": red,
        "black": Image.new("RGB", (64, 64)),
        "white": Image.new("RGB", (64, 64), (255, 255, 255)),
        "dot": Image.new("RGB", (1, 1)),
    }
    assert [name for name, picture in pictures.items() if preprocess.is_edges(picture)] == []


@pytest.mark.parametrize("name", ["canny", "softedge", "lineart", "scribble"])
def test_nothing_to_be_found_is_noted(tmp_path: Path, name: Preprocessor) -> None:
    Image.new("RGB", (300, 300), (90, 120, 150)).save(tmp_path / "plain.png")
    made = control(tmp_path / "plain.png", preprocessor=name)
    assert codes(made) == ["empty_control"]
    assert PREPROCESSORS[name].title in str(made.notes[0])


@pytest.mark.parametrize("size", [(1, 1), (8000, 100), (100, 8000), (17, 3000)])
@pytest.mark.parametrize("name", [*LIGHT, "none"])
def test_odd_shapes_are_taken(tmp_path: Path, size: tuple[int, int], name: str) -> None:
    Image.effect_noise(size, 60).convert("RGB").save(tmp_path / "odd.png")
    try:
        made = control(tmp_path / "odd.png", kind="mini", preprocessor=name)
    except RequestError as error:
        assert name == "pose"
        assert "a person in it" in str(error)
    else:
        assert made.image.size == (128, 128)
        assert ("image_cut" in codes(made)) == (size != (1, 1))


def test_an_image_that_cannot_be_read_names_the_field(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"^image: '…?/.*absent.png' is not possible; allowed: a picture .* exists"):
        control(tmp_path / "absent.png")


# --- pose, on the real model


def test_the_joints_of_a_person_are_found() -> None:
    """Positions read off the portrait by eye, to a twelfth of its side."""
    (person,) = pose.joints(np.asarray(Image.open(PORTRAIT).convert("RGB")))
    expected = {0: (222, 122), 1: (216, 235), 2: (115, 235), 5: (315, 235), 14: (200, 108), 15: (243, 106)}
    for joint, at in expected.items():
        assert np.hypot(*(person[joint] - at)) < 42, f"joint {joint} at {person[joint]}"
    assert np.isnan(person[[10, 13]]).all()  # feet, outside the image


def test_a_person_is_found_wherever_and_however_turned() -> None:
    portrait = Image.open(PORTRAIT).convert("RGB")
    wide = Image.new("RGB", (1500, 512), (120, 120, 120))
    wide.paste(portrait, (980, 0))
    (person,) = pose.joints(np.asarray(wide))
    assert np.hypot(*(person[0] - (980 + 222, 122))) < 60
    mirrored = portrait.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    (person,) = pose.joints(np.asarray(mirrored))
    assert person[2, 0] < person[5, 0]  # the right shoulder stays the person's right
    (person,) = pose.joints(np.asarray(portrait.rotate(30, fillcolor=(120, 120, 120))))
    assert person[5, 1] < person[2, 1]


def test_two_people_are_two_skeletons() -> None:
    portrait = Image.open(PORTRAIT).convert("RGB")
    both = Image.new("RGB", (1100, 512))
    both.paste(portrait, (0, 0))
    both.paste(portrait.transpose(Image.Transpose.FLIP_LEFT_RIGHT), (560, 0))
    people = pose.joints(np.asarray(both))
    assert sorted(int(person[0, 0] // 550) for person in people) == [0, 1]


def test_skeletons_have_openposes_colours() -> None:
    person = np.full((18, 2), np.nan)
    person[1], person[2], person[5] = (50, 50), (20, 50), (80, 50)
    drawn = pose.draw([person], (100, 100))
    assert drawn.getpixel((35, 50)) == (153, 0, 0)  # neck to right shoulder, at 0.6 of red
    assert drawn.getpixel((65, 50)) == (153, 51, 0)
    assert drawn.getpixel((20, 50)) == (255, 170, 0)
    assert drawn.getpixel((80, 50)) == (85, 255, 0)
    assert drawn.getpixel((50, 80)) == (0, 0, 0)
    assert pose.draw([], (3, 2)).getextrema() == ((0, 0),) * 3


def test_an_image_without_people_stops_the_request(drawing: Path) -> None:
    with pytest.raises(RequestError, match=r"^image: 'disc.png' is not possible; allowed: a picture with a person"):
        control(drawing, preprocessor="pose")


# --- depth: the real architecture; its weights (99 MB) are on the hub alone, so here they are random


@pytest.fixture(scope="module")
def depth_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds Depth Anything V2 Small in its published form, with random weights."""
    import torch
    from safetensors.torch import save_file
    from transformers import DepthAnythingForDepthEstimation

    from images import depth

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models")
    path = folder / "depth-anything" / "Depth-Anything-V2-Small-hf" / "model.safetensors"
    path.parent.mkdir(parents=True)
    save_file(DepthAnythingForDepthEstimation(depth.config()).state_dict(), path, {"format": "pt"})
    return folder


@pytest.mark.slow
def test_depth_runs_and_fills_the_range(depth_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("Z_IMAGE_MODELS", str(depth_folder))
    assert inventory.find("depth").source == "explicit folder"
    made = control(kind="mini", preprocessor="depth")
    pixels = np.asarray(made.image)
    assert (made.image.mode, made.image.size) == ("RGB", (128, 128))
    assert (pixels[..., 0] == pixels[..., 1]).all()
    assert int(pixels.max()) - int(pixels.min()) > 100  # the full range, before it was made smaller
    assert control(kind="mini", preprocessor="depth").image.tobytes() == made.image.tobytes()


@pytest.mark.slow
def test_depth_agrees_with_transformers_own_preprocessing(depth_folder: Path) -> None:
    import torch
    from transformers import DPTImageProcessorPil

    from images import depth

    weights_file = next(depth_folder.rglob("*.safetensors"))
    picture = Image.open(PORTRAIT).convert("RGB").resize((640, 480))
    # preprocessor_config.json of the published model.
    processor = DPTImageProcessorPil(
        do_resize=True,
        size={"height": 518, "width": 518},
        ensure_multiple_of=14,
        keep_aspect_ratio=True,
        resample=Image.Resampling.BICUBIC,
        do_rescale=True,
        do_normalize=True,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )
    with torch.no_grad():
        inputs = processor(picture, return_tensors="pt")
        model = depth._model(str(weights_file), weights_file.stat().st_mtime_ns)
        near = model(**inputs).predicted_depth[0].numpy()
    gray = Image.fromarray(((near - near.min()) * (255 / (near.max() - near.min()))).astype(np.uint8))
    theirs = np.asarray(gray.resize(picture.size, Image.Resampling.BICUBIC)).astype(int)
    ours = np.asarray(depth.depth(picture, weights_file)).astype(int)[..., 0]
    assert abs(ours - theirs).mean() < 2


def test_depth_without_its_model_stops_with_what_how_big_and_how(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("Z_IMAGE_MODELS", str(tmp_path))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(WeightsMissing) as refused:
        control(preprocessor="depth")
    text = str(refused.value)
    assert text.startswith("the preprocessor Depth needs a model that is not on this machine")
    assert "(99 MB)" in text
    assert f"{parts.FETCH} depth" in text


def test_a_depth_model_that_is_cut_short_is_not_used(
    depth_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = next(depth_folder.rglob("*.safetensors"))
    path = tmp_path / whole.relative_to(depth_folder)
    path.parent.mkdir(parents=True)
    with whole.open("rb") as file:
        path.write_bytes(file.read(1_000_000))
    monkeypatch.setenv("Z_IMAGE_MODELS", str(tmp_path))
    with pytest.raises(WeightsMissing, match="is cut short"):
        inventory.find("depth")


def test_a_file_that_lacks_tensors_is_no_depth_model(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    from images import depth

    save_file(
        {"backbone.embeddings.cls_token": torch.zeros(1, 1, 384)}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(ValueError, match="is not Depth Anything V2 Small"):
        depth.depth(Image.new("RGB", (64, 64)), tmp_path / "model.safetensors")


def test_an_unused_preprocessor_costs_no_import() -> None:
    code = f"""
import os, sys
from pathlib import Path
from core import environment; environment.prepare_environment(os.environ)
from images import preprocess
from core.request import Preprocess
from core.sizes import IMAGE_SIZES
from core.upload import Upload
print([name for name in ("cv2", "torch", "transformers", "ai_edge_litert") if name in sys.modules])
request = Preprocess.parse(image={str(PORTRAIT)!r})
preprocess.control(request, Upload.open(Path(request.image)), IMAGE_SIZES["mini"])
print([name for name in ("cv2", "torch", "transformers", "ai_edge_litert") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n['cv2']\n"
