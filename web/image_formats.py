"""A finished picture in the format that a program asks for: the PNG file as it is, or JPEG or WebP made from it."""

from __future__ import annotations

import base64
import io
from typing import Literal

from PIL import ExifTags, Image

from core import metadata
from core.events import Preview

Format = Literal["png", "jpeg", "webp"]

_CELL = 8  # pixels of the picture, across and down, that one pixel of a preview stands for: the VAE's factor


def media_type(name: Format) -> str:
    """Return what HTTP calls a format."""
    return f"image/{name}"


def encoded(png: bytes, name: Format, quality: int = 100) -> bytes:
    """Return a picture of ours in a format.

    Args:
        png: the file.
        name: what it becomes. PNG stays as it is, byte for byte; the others get the line of parameters as EXIF.
        quality: 0 to 100 for JPEG and WebP. WebP keeps every pixel at 100.
    """
    if name == "png":
        return png
    with Image.open(io.BytesIO(png)) as picture:
        exif = Image.Exif()
        text = picture.info.get(metadata.PARAMETERS_CHUNK, "")
        # Where A1111 and its kin put a JPEG's parameters.
        exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = b"UNICODE\0" + text.encode("utf-16-be")
        return _saved(picture.convert("RGB"), name, quality, exif)


def size_of(preview: Preview) -> tuple[int, int]:
    """Return width and height of the picture that a preview is of, in pixels."""
    return preview.width * _CELL, preview.height * _CELL


def emerging(preview: Preview, name: Format) -> bytes:
    """Return a preview at the size of the picture that it will become."""
    small = Image.frombytes("RGB", (preview.width, preview.height), preview.rgb)
    return _saved(small.resize(size_of(preview), Image.Resampling.BICUBIC), name, 100)


def small(preview: Preview) -> str:
    """Return a preview as it is, small, as the data URL of a JPEG."""
    image = Image.frombytes("RGB", (preview.width, preview.height), preview.rgb)
    return f"data:image/jpeg;base64,{base64.b64encode(_saved(image, 'jpeg', 91)).decode()}"


def _saved(picture: Image.Image, name: Format, quality: int, exif: Image.Exif | None = None) -> bytes:
    buffer = io.BytesIO()
    options = {"exif": exif} if exif is not None else {}
    match name:
        case "png":
            picture.save(buffer, "PNG")
        case "jpeg":
            picture.save(buffer, "JPEG", quality=quality, subsampling=0 if quality > 90 else 2, **options)
        case "webp":
            picture.save(buffer, "WEBP", quality=quality, lossless=quality == 100, exact=True, **options)
    return buffer.getvalue()
