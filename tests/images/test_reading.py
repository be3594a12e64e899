"""Images from outside, as real files of every odd kind, and the two policies for sizes."""

import hashlib
import io
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pillow_heif
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms

from core.errors import RequestError
from core.sizes import IMAGE_SIZES, WeightsKind
from core.upload import MAX_IMAGE_BYTES
from images import reading
from images.reading import fit, open_image, pad

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 128, 0), (0, 0, 255), (255, 255, 255)


Save = Callable[..., Path]


@pytest.fixture
def saved(tmp_path: Path) -> Save:
    """Save an image and return its path: `saved(image, "x.png", **options)`."""

    def save(image: Image.Image, name: str = "picture.png", **options: Any) -> Path:
        image.save(tmp_path / name, **options)
        return tmp_path / name

    return save


def corners(size: tuple[int, int] = (20, 10)) -> Image.Image:
    """A red image with blue at its top left, so that every turn of it looks different."""
    image = Image.new("RGB", size, RED)
    image.paste(BLUE, (0, 0, size[0] // 2, size[1] // 2))
    return image


def near(pixel: float | tuple[int, ...] | None, colour: tuple[int, ...], tolerance: int = 6) -> bool:
    assert isinstance(pixel, tuple)
    return max(abs(a - b) for a, b in zip(pixel, colour, strict=True)) <= tolerance


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.bmp", "a.tif", "a.ppm", "a.gif", "a.tga", "a.jp2"])
def test_common_formats_are_read(saved: Save, name: str) -> None:
    options = {"quality": 100} if name == "a.jpg" else {"lossless": True} if name == "a.webp" else {}
    opened = open_image(saved(corners((64, 32)), name, **options))
    assert (opened.image.mode, opened.image.size) == ("RGB", (64, 32))
    assert near(opened.image.getpixel((4, 4)), BLUE)
    assert near(opened.image.getpixel((60, 28)), RED)


def test_a_file_is_judged_by_what_it_holds(saved: Save, tmp_path: Path) -> None:
    path = saved(corners(), "a.png").rename(tmp_path / "a.jpg")
    assert open_image(path).image.getpixel((0, 0)) == BLUE


def test_digest_is_the_files(saved: Save) -> None:
    path = saved(corners())
    assert open_image(path).digest == f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif"])
def test_photos_stand_upright(saved: Save, orientation: int, name: str) -> None:
    turned = corners((64, 32))
    # What a camera stores that was held so: the inverse of the turn that sets it upright.
    for turn in {6: (Image.Transpose.ROTATE_90,), 8: (Image.Transpose.ROTATE_270,)}.get(
        orientation, (reading._UPRIGHT[orientation],) if orientation > 1 else ()
    ):
        turned = turned.transpose(turn)
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = open_image(saved(turned, name, exif=exif)).image
    assert upright.size == (64, 32)
    assert near(upright.getpixel((5, 5)), BLUE)
    assert all(near(upright.getpixel(at), RED) for at in ((60, 5), (60, 28), (5, 28)))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P", "RGB"])
def test_transparent_places_show_white(saved: Save, mode: str) -> None:
    if mode in ("RGBA", "LA", "PA"):
        image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
        image.paste((0, 0, 0, 255), (0, 0, 4, 8))
        path = saved(image.convert(mode) if mode != "PA" else image.quantize(4), "a.png")
    elif mode == "P":
        image = Image.new("P", (8, 8), 1)
        image.putpalette([0, 0, 0, 10, 20, 30])
        image.paste(0, (0, 0, 4, 8))
        path = saved(image, "a.gif", transparency=1)
    else:
        image = Image.new("RGB", (8, 8), (10, 20, 30))
        image.paste((0, 0, 0), (0, 0, 4, 8))
        path = saved(image, "a.png", transparency=(10, 20, 30))
    opened = open_image(path).image
    assert (opened.getpixel((1, 1)), opened.getpixel((6, 6))) == ((0, 0, 0), WHITE)


def test_half_transparent_colour_is_mixed_with_white(saved: Save) -> None:
    assert open_image(saved(Image.new("RGBA", (2, 2), (255, 0, 0, 128)))).image.getpixel((0, 0)) == (255, 127, 127)


@pytest.mark.parametrize(
    ("values", "name", "expected"),
    [
        (np.array([[0, 65535, 32768]], np.uint16), "a.png", [0, 255, 128]),
        (np.array([[0, 257, 514]], np.uint16), "a.png", [0, 1, 2]),  # dark stays dark
        (np.array([[0, 65535, 32768]], np.uint16), "a.tif", [0, 255, 128]),
        (np.array([[-5, 5, 0]], np.int32), "a.tif", [0, 255, 128]),
        (np.array([[0, 200_000, 100_000]], np.int32), "a.tif", [0, 255, 128]),
        (np.array([[0.0, 1.0, 0.5]], np.float32), "a.tif", [0, 255, 128]),
        (np.array([[-1.0, 3.0, 1.0]], np.float32), "a.tif", [0, 255, 128]),
        (np.array([[7.0, 7.0, 7.0]], np.float32), "a.tif", [0, 0, 0]),
        (np.array([[np.nan, 1.0, 0.5]], np.float32), "a.tif", [0, 255, 128]),
    ],
)
def test_more_than_eight_bits_are_scaled(saved: Save, values: np.ndarray, name: str, expected: list[int]) -> None:
    opened = np.asarray(open_image(saved(Image.fromarray(values), name)).image)
    assert opened.tolist() == [[[value] * 3 for value in expected]]


def gray_png(depth: int, values: list[int], transparent: int, colours: int = 1) -> bytes:
    """A PNG of one row, of gray or of RGB, whose samples have `depth` bits, with a transparent value."""
    bits = "".join(f"{value:0{depth}b}" for value in values)
    row = int(bits.ljust(-(-len(bits) // 8) * 8, "0"), 2).to_bytes(-(-len(bits) // 8), "big")
    header = struct.pack(">IIBBBBB", len(values) // colours, 1, depth, 2 if colours == 3 else 0, 0, 0, 0)
    chunks = {b"IHDR": header, b"tRNS": struct.pack(">H", transparent) * colours, b"IDAT": zlib.compress(b"\0" + row)}
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(kind, data) for kind, data in {**chunks, b"IEND": b""}.items())


@pytest.mark.parametrize(
    ("depth", "values", "transparent", "expected"),
    [
        (16, [0, 65535, 32768, 2570, 2571], 2570, [0, 255, 128, 255, 10]),  # no neighbour of it
        (16, [0, 65535, 32768], 0, [255, 255, 128]),
        (8, [0, 255, 128, 9], 9, [0, 255, 128, 255]),
        (4, [0, 15, 8, 3], 3, [0, 255, 136, 255]),
        (2, [0, 3, 2, 1], 1, [0, 255, 170, 255]),
        (1, [0, 1, 0], 0, [255, 255, 255]),
    ],
)
def test_a_transparent_value_of_any_depth_shows_the_ground_and_all_others_their_tones(
    depth: int, values: list[int], transparent: int, expected: list[int], tmp_path: Path
) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(gray_png(depth, values, transparent))
    opened = np.asarray(open_image(path).image)
    assert opened.tolist() == [[[value] * 3 for value in expected]]


def test_a_transparent_colour_of_16_bits_shows_the_ground(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(gray_png(16, [10_000, 20_000, 30_000, 40_000, 40_000, 40_000], 40_000, colours=3))
    assert np.asarray(open_image(path).image).tolist() == [[[39, 78, 117], [255, 255, 255]]]


def test_heic_is_read_where_pillow_heif_is_installed(tmp_path: Path) -> None:
    pillow_heif.from_pillow(corners((64, 32))).save(tmp_path / "a.heic", quality=95)
    opened = open_image(tmp_path / "a.heic")
    assert (opened.image.mode, opened.image.size) == ("RGB", (64, 32))
    assert near(opened.image.getpixel((5, 5)), BLUE, 12)
    assert near(opened.image.getpixel((60, 28)), RED, 12)
    assert opened.notes == ()


@pytest.mark.parametrize("brands", [b"heic\0\0\0\0mif1heic", b"mif1\0\0\0\0heixmif1", b"msf1\0\0\0\0hevcmsf1"])
def test_heic_is_named_where_nothing_reads_it(brands: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # as where it is not installed
    path = tmp_path / "photo.heic"
    path.write_bytes(struct.pack(">I", 8 + len(brands)) + b"ftyp" + brands + bytes(100))
    with pytest.raises(RequestError, match=r"^image: 'photo.heic' is not possible; .*HEIC .*pillow-heif is installed"):
        open_image(path)


@pytest.mark.parametrize(("mode", "name"), [("1", "a.png"), ("L", "a.png"), ("P", "a.png"), ("YCbCr", "a.jpg")])
def test_other_modes_become_rgb(saved: Save, mode: str, name: str) -> None:
    path = saved(Image.new("RGB", (8, 8), WHITE).convert(mode), name)
    assert near(open_image(path).image.getpixel((3, 3)), WHITE)


def test_cmyk_has_its_colours(saved: Save) -> None:
    for name in ("a.jpg", "a.tif"):
        path = saved(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), name)
        assert near(open_image(path).image.getpixel((3, 3)), RED)


def test_lab_has_its_colours(saved: Save) -> None:
    lab = ImageCms.profileToProfile(
        Image.new("RGB", (8, 8), RED), ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    )
    assert near(open_image(saved(lab, "a.tif")).image.getpixel((3, 3)), RED)


def test_an_embedded_profile_is_applied_and_a_broken_one_is_not(saved: Save) -> None:
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()  # a profile that fits no RGB image
    for profile in (b"nonsense", lab):
        assert open_image(saved(Image.new("RGB", (4, 4), GREEN), icc_profile=profile)).image.getpixel((0, 0)) == GREEN
    srgb = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, green = (srgb.index(tag, 128) for tag in (b"rXYZ", b"gXYZ"))
    srgb[red : red + 4], srgb[green : green + 4] = b"gXYZ", b"rXYZ"  # red and green change places
    assert near(open_image(saved(Image.new("RGB", (4, 4), RED), icc_profile=bytes(srgb))).image.getpixel((0, 0)),
                (0, 255, 0))  # fmt: skip


@pytest.mark.parametrize("name", ["a.gif", "a.png", "a.webp", "a.tif"])
def test_the_first_of_several_frames_is_taken_and_noted(saved: Save, name: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, BLUE, GREEN)]
    opened = open_image(saved(frames[0], name, save_all=True, append_images=frames[1:]))
    assert near(opened.image.getpixel((0, 0)), RED)
    (note,) = opened.notes
    assert note.code == "first_frame"
    assert "3 frames" in str(note)


def test_a_photo_with_its_extras_is_one_image(saved: Save) -> None:
    path = saved(corners((32, 32)), "a.mpo", save_all=True, append_images=[corners((32, 32))])
    assert open_image(path).notes == ()


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_claiming(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header claims any size."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = {b"IHDR": header, b"IDAT": zlib.compress(b""), b"IEND": b""}
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(kind, data) for kind, data in chunks.items())


@pytest.mark.parametrize("side", [8_945, 9_400, 14_000, 100_000])
def test_decompression_bombs_are_refused_unopened(tmp_path: Path, side: int) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(png_claiming(side, side))
    with pytest.raises(RequestError, match="a picture of up to 80 million pixels") as refused:
        open_image(path)
    assert refused.value.values["field"] == "image"


def test_a_file_of_too_many_bytes_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "huge.png"
    with path.open("wb") as file:
        file.truncate(MAX_IMAGE_BYTES + 1)
    with pytest.raises(RequestError, match=r"^image: 'huge.png \(256 MiB\)'.*up to 256 MiB"):
        open_image(path)


def broken_files() -> dict[str, bytes]:
    kept = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(kept, "PNG")
    photo = io.BytesIO()
    Image.effect_noise((64, 64), 50).convert("RGB").save(photo, "JPEG")
    return {
        "empty.png": b"",
        "text.png": b"no picture at all",
        "cut.png": kept.getvalue()[:1000],
        "cut.jpg": photo.getvalue()[:500],
        "flipped.png": kept.getvalue()[:200] + b"\0" * 50 + kept.getvalue()[250:],
        "nothing.ppm": b"P6 0 0 255\n",
        "drawing.svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "program.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n",
    }


@pytest.mark.parametrize("name", broken_files())
def test_what_is_no_whole_image_is_refused_with_a_reason(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(broken_files()[name])
    with pytest.raises(RequestError, match=rf"^image: '{name}' is not possible; allowed: a picture file such as PNG"):
        open_image(path)


def test_a_path_that_is_no_file_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent.png"):
        with pytest.raises(RequestError, match=r"^file: .*that exists") as refused:
            open_image(path, field="file")
        assert refused.value.values["field"] == "file"


# --- fit ---

SIDES = [(1, 1), (1, 4000), (8000, 100), (100, 8000), (1920, 1080), (1000, 1000), (1024, 1024), (3000, 4000), (17, 16)]


@pytest.mark.parametrize("kind", ["full", "mini"])
@pytest.mark.parametrize("size", SIDES)
def test_fit_gives_a_possible_size(kind: WeightsKind, size: tuple[int, int]) -> None:
    sizes = IMAGE_SIZES[kind]
    fitted = fit(Image.new("RGB", size, GREEN), sizes)
    assert all(side == sizes.nearest(side) for side in fitted.image.size)
    assert set(fitted.image.get_flattened_data()) == {GREEN}
    assert bool(fitted.notes) == any(fitted.cut)


@given(st.integers(100, 5000), st.integers(100, 5000))
def test_fit_keeps_the_shape_and_the_area_where_it_can(width: int, height: int) -> None:
    sizes = IMAGE_SIZES["full"]
    (across, down), scale = reading.fitted_size((width, height), sizes)
    assert across % 16 == down % 16 == 0
    assert sizes.minimum <= min(across, down) <= max(across, down) <= sizes.maximum
    cut = width * scale - across, height * scale - down
    assert min(cut) > -1e-3  # nothing is stretched to fill
    if 384 / 2048 <= width / height <= 2048 / 384:
        assert max(cut) < 16
        if 1 / 4 <= width / height <= 4:
            assert abs((across + cut[0]) * (down + cut[1]) - 1024**2) < 2


def test_fit_reaches_the_stated_area() -> None:
    assert fit(Image.new("RGB", (200, 100)), IMAGE_SIZES["full"], area=512 * 1024).image.size == (1024, 512)


def test_fit_cuts_the_ends_evenly_and_notes_it() -> None:
    image = Image.new("RGB", (300, 100), RED)
    image.paste(GREEN, (100, 0, 200, 100))
    fitted = fit(image, IMAGE_SIZES["mini"])
    assert fitted.image.size == (128, 128)
    assert fitted.cut == (256, 0)
    assert near(fitted.image.getpixel((64, 64)), GREEN)
    assert near(fitted.image.getpixel((3, 3)), GREEN)
    (note,) = fitted.notes
    assert "66.7% of its width" in str(note)
    assert note.values["target"] == "128 × 128"


def test_fit_notes_how_many_pixels_were_cut() -> None:
    (note,) = fit(Image.new("RGB", (1920, 1080)), IMAGE_SIZES["full"]).notes
    assert "brought to 1360 × 768: 5 pixels of its width were cut off" in str(note)


def test_fit_leaves_an_image_of_the_right_size_alone() -> None:
    image = corners((1024, 1024))
    assert fit(image, IMAGE_SIZES["full"]).image is image


# --- pad and restore ---


@given(st.integers(1, 70), st.integers(1, 70), st.sampled_from([1, 2, 4]))
def test_pad_and_restore_lose_nothing(width: int, height: int, factor: int) -> None:
    image = Image.effect_noise((width, height), 90).convert("RGB")
    padded = pad(image)
    assert all(side % 16 == 0 for side in padded.image.size)
    assert all(0 <= side - was < 16 for side, was in zip(padded.image.size, image.size, strict=True))
    grown = padded.image.resize([side * factor for side in padded.image.size], Image.Resampling.NEAREST)
    restored = padded.restore(grown)
    assert restored.size == (width * factor, height * factor)
    assert restored.resize(image.size, Image.Resampling.NEAREST).tobytes() == image.tobytes()


@pytest.mark.parametrize("size", [(1, 1), (8000, 100), (100, 8000)])
def test_pad_takes_odd_shapes(size: tuple[int, int]) -> None:
    padded = pad(Image.new("RGB", size, GREEN))
    assert set(padded.image.get_flattened_data()) == {GREEN}
    assert padded.restore(padded.image).size == size


def test_pad_mirrors_and_leaves_whole_steps_alone() -> None:
    padded = pad(corners((20, 16)))
    assert padded.image.size == (32, 16)
    assert padded.image.getpixel((20, 0)) == padded.image.getpixel((19, 0)) == RED
    whole = corners((32, 16))
    assert pad(whole).image is whole


def test_restore_refuses_what_was_not_made_from_it() -> None:
    padded = pad(Image.new("RGB", (20, 20)))
    for size in ((16, 32), (33, 32), (64, 32)):
        with pytest.raises(ValueError, match="was not made from"):
            padded.restore(Image.new("RGB", size))
