"""The texts of picture files: found wherever programs put them, and never at a price that a file could set."""

import struct
import zlib
from pathlib import Path

import pytest
from PIL import Image

from core import embedded
from core.errors import RequestError
from core.metadata import read_picture
from tests.helpers import pictures

TEXT = "a lighthouse, at dusk\nNegative prompt: blurry\nSteps: 9, Sampler: Euler, CFG scale: 4, Seed: 123, Size: 64x64"
CHINESE = TEXT.replace("a lighthouse", "灯塔 é")
FORMATS = ["png", "jpg", "webp"]


def international(text: str, packed: bool = False) -> bytes:
    data = zlib.compress(text.encode()) if packed else text.encode()
    return pictures.chunk(b"iTXt", b"parameters\0" + bytes([packed, 0]) + b"en\0key\0" + data)


@pytest.mark.parametrize("behind", [False, True], ids=["before the pixels", "behind the pixels"])
@pytest.mark.parametrize(
    ("chunk", "text"),
    [
        (pictures.chunk(b"tEXt", b"parameters\0" + TEXT.encode()), TEXT),
        (pictures.chunk(b"tEXt", b"parameters\0" + CHINESE.encode()), CHINESE),  # as stable-diffusion.cpp does
        (pictures.chunk(b"tEXt", b"parameters\0" + "café".encode("latin-1")), "café"),
        (pictures.chunk(b"zTXt", b"parameters\0\0" + zlib.compress(TEXT.encode())), TEXT),
        (international(CHINESE), CHINESE),
        (international(CHINESE, packed=True), CHINESE),
    ],
    ids=["tEXt", "tEXt in UTF-8", "tEXt in Latin-1", "zTXt", "iTXt", "iTXt packed"],
)
def test_every_text_chunk_is_found(chunk: bytes, text: str, behind: bool, tmp_path: Path) -> None:
    assert embedded.texts(pictures.png_with(tmp_path / "x.png", chunk, behind=behind)) == {"parameters": text}


@pytest.mark.parametrize("ending", FORMATS)
@pytest.mark.parametrize("text", [TEXT, CHINESE], ids=["ascii", "chinese"])
@pytest.mark.parametrize(
    ("mark", "encoding"),
    [
        (b"UNICODE\0", "utf-16-be"),  # piexif, and so A1111, Forge and SD.Next
        (b"UNICODE\0", "utf-16-le"),  # ImageSharp, and so SwarmUI
        (b"UNICODE\0", "utf-16"),  # with a mark of the order
        (b"UNICODE\0", "utf-8"),
        (b"ASCII\0\0\0", "utf-8"),
        (b"\0" * 8, "utf-8"),
        (b"", "utf-8"),
    ],
)
def test_a_comment_is_read_in_every_encoding(
    mark: bytes, encoding: str, text: str, ending: str, tmp_path: Path
) -> None:
    for order in "<>":
        data = pictures.exif(mark + text.encode(encoding), order)
        path = pictures.with_exif(tmp_path / f"x.{ending}", data)
        assert embedded.texts(path) == {"UserComment": text}
    found = read_picture(path)
    assert found.values["prompt"] == text.split("\n")[0]
    assert (found.values["negative_prompt"], found.values["seed"]) == ("blurry", 123)


@pytest.mark.parametrize("ending", FORMATS)
@pytest.mark.parametrize("comment", [TEXT, TEXT.encode()], ids=["text", "bytes"])
def test_a_comment_in_the_first_folder_is_read(comment: str | bytes, ending: str, tmp_path: Path) -> None:
    # Fooocus, modules/meta_parser.py (get_exif): Pillow's own writing of a tag beside the others.
    exif = Image.Exif()
    exif[pictures.USER_COMMENT] = comment
    exif[0x0131] = "Fooocus v2.5.5"
    pictures.IMAGE.save(tmp_path / f"x.{ending}", exif=exif)
    assert embedded.texts(tmp_path / f"x.{ending}")["UserComment"] == TEXT


def test_comfyuis_texts_in_a_webp_are_read(tmp_path: Path) -> None:
    # ComfyUI, comfy_extras/nodes_images.py (SaveAnimatedWEBP)
    exif = Image.Exif()
    exif[0x0110] = 'prompt:{"3": {}}'
    exif[0x010F] = 'workflow:{"nodes": []}'
    pictures.IMAGE.save(tmp_path / "x.webp", exif=exif)
    assert embedded.texts(tmp_path / "x.webp") == {"prompt": '{"3": {}}', "workflow": '{"nodes": []}'}


def test_a_description_is_read(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x010E] = TEXT
    pictures.IMAGE.save(tmp_path / "x.jpg", exif=exif)
    assert read_picture(tmp_path / "x.jpg").values["seed"] == 123


def test_a_jpegs_own_comment_is_read(tmp_path: Path) -> None:
    pictures.IMAGE.save(tmp_path / "x.jpg", comment=TEXT)
    assert read_picture(tmp_path / "x.jpg").values["seed"] == 123


def test_what_a_camera_says_is_no_prompt(tmp_path: Path) -> None:
    path = pictures.with_exif(tmp_path / "x.jpg", pictures.exif(b"ASCII\0\0\0Screenshot"))
    with pytest.raises(RequestError, match="with its parameters inside"):
        read_picture(path)


def test_a_file_is_known_by_its_bytes(tmp_path: Path) -> None:
    path = pictures.with_exif(tmp_path / "x.webp", pictures.exif(b"UNICODE\0" + TEXT.encode("utf-16-be")))
    assert read_picture(path.rename(tmp_path / "x.png")).values["seed"] == 123


# --- hostile files ---


def test_texts_that_unpack_without_end_are_not_read(tmp_path: Path) -> None:
    bomb = zlib.compress(b"a" * (embedded.MAX_TEXT + 1))
    chunks = (
        pictures.chunk(b"zTXt", b"parameters\0\0" + bomb),
        pictures.chunk(b"iTXt", b"parameters\0\1\0\0\0" + bomb),
    )
    assert embedded.texts(pictures.png_with(tmp_path / "x.png", *chunks)) == {}
    # And only so many are unpacked at all.
    good = pictures.chunk(b"zTXt", b"parameters\0\0" + zlib.compress(TEXT.encode()))
    assert embedded.texts(pictures.png_with(tmp_path / "x.png", *[chunks[0]] * embedded.MAX_PACKED, good)) == {}


def test_all_texts_together_are_bounded(tmp_path: Path) -> None:
    full = zlib.compress(b"a" * embedded.MAX_TEXT)
    names = (b"parameters", b"prompt", b"workflow", b"Comment", b"Description", b"Software", b"Source", b"sd-metadata")
    chunks = [pictures.chunk(b"zTXt", name + b"\0\0" + full) for name in (*names, b"invokeai_metadata")]
    found = embedded.texts(pictures.png_with(tmp_path / "x.png", *chunks))
    assert sum(map(len, found.values())) == embedded.MAX_TEXTS


@pytest.mark.parametrize("ending", FORMATS)
def test_a_file_cut_anywhere_is_read_or_refused(ending: str, tmp_path: Path) -> None:
    path = pictures.with_exif(tmp_path / f"x.{ending}", pictures.exif(b"UNICODE\0" + TEXT.encode("utf-16-be")))
    data = path.read_bytes()
    for end in range(len(data)):
        path.write_bytes(data[:end])
        try:
            embedded.texts(path)
        except RequestError as refused:
            assert end < 12
            assert "a PNG, JPEG or WebP file" in str(refused)


@pytest.mark.parametrize("order", "<>")
def test_exif_of_any_bytes_is_read_or_left(order: str, tmp_path: Path) -> None:
    good = pictures.exif(b"UNICODE\0" + TEXT.encode("utf-16-be"), order)
    head = struct.calcsize("2sHI")
    for place in range(head, head + 36):
        for value in (0, 1, 0x7F, 0xFF):
            odd = good[:place] + bytes([value]) + good[place + 1 :]
            embedded.texts(pictures.png_with(tmp_path / "x.png", pictures.chunk(b"eXIf", odd)))


def test_lengths_that_lead_out_of_a_file_end_it(tmp_path: Path) -> None:
    for name, data in {
        "x.png": b"\x89PNG\r\n\x1a\n" + struct.pack(">I4s", 0xFFFFFFFF, b"tEXt"),
        "x.jpg": b"\xff\xd8\xff\xe1\xff\xffExif\0\0" + bytes(6),
        "x.webp": b"RIFF\0\0\0\0WEBP" + struct.pack("<4sI", b"EXIF", 0xFFFFFFFF),
    }.items():
        (tmp_path / name).write_bytes(data)
        assert embedded.texts(tmp_path / name) == {}


def test_pixels_are_never_decoded(tmp_path: Path) -> None:
    """A picture of 296 million pixels, in a file of 22 kB: its text costs what its length costs."""
    header = struct.pack(">IIBBBBB", 17_210, 17_210, 1, 0, 0, 0, 0)
    plain = b"\x89PNG\r\n\x1a\n" + pictures.chunk(b"IHDR", header)
    text = pictures.chunk(b"tEXt", b"parameters\0" + TEXT.encode())
    (tmp_path / "x.png").write_bytes(
        plain + text + pictures.chunk(b"IDAT", b"no pixels") + pictures.chunk(b"IEND", b"")
    )
    assert read_picture(tmp_path / "x.png").values["seed"] == 123
