"""Picture files that carry texts as other programs write them, put together from the formats' blocks."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

from PIL import Image, PngImagePlugin

IMAGE = Image.new("RGB", (8, 8), "#b33")
USER_COMMENT, EXIF_FOLDER = 0x9286, 0x8769


def png(path: Path, **texts: str) -> Path:
    """Write a PNG with text chunks before its pixels, as Pillow does for A1111, ComfyUI, InvokeAI and Fooocus."""
    info = PngImagePlugin.PngInfo()
    for name, text in texts.items():
        info.add_text(name.replace("_", "-") if name in ("z_image_studio", "sd_metadata") else name, text)
    IMAGE.save(path, "PNG", pnginfo=info)
    return path


def chunk(kind: bytes, data: bytes) -> bytes:
    """Return a chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_with(path: Path, *chunks: bytes, behind: bool = False) -> Path:
    """Write a PNG with chunks in front of its pixels or behind them."""
    plain = png(path).read_bytes()
    place = plain.index(b"IEND" if behind else b"IDAT") - 4
    path.write_bytes(plain[:place] + b"".join(chunks) + plain[place:])
    return path


def exif(comment: bytes, order: str = ">", in_first: bool = False) -> bytes:
    """Return EXIF data with a UserComment, in the folder of a photograph or, as Fooocus has it, in the first."""

    def folder(tag: int, kind: int, length: int, value: int, behind: int) -> bytes:
        return struct.pack(f"{order}HHHIII", 1, tag, kind, length, value, behind)

    start = (b"MM" if order == ">" else b"II") + struct.pack(f"{order}HI", 42, 8)
    if in_first:
        return start + folder(USER_COMMENT, 7, len(comment), 26, 0) + comment
    return start + folder(EXIF_FOLDER, 4, 1, 26, 0) + folder(USER_COMMENT, 7, len(comment), 44, 0) + comment


def with_exif(path: Path, data: bytes) -> Path:
    """Write a PNG, JPEG or WebP, by the path's ending, with EXIF data."""
    IMAGE.save(path, exif=b"Exif\0\0" + data)
    return path
