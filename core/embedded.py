"""The texts that a picture file carries beside its pixels: PNG's text chunks, EXIF of PNG, JPEG and WebP.

Read without an image library, which would decode pixels or make room for them: a file's length alone bounds the work.
Formats: PNG (W3C, third edition), JPEG (ITU-T T.81), WebP (RFC 9649), EXIF (CIPA DC-008).
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from core.errors import RequestError
from core.messages import Message

# Bounds on what an untrusted file may make us read.
MAX_FILE_BYTES = 256 << 20
MAX_TEXT = 1 << 20  # bytes of one text
MAX_TEXTS = 8 << 20  # bytes of all texts of a file
MAX_PACKED = 32  # compressed texts of a file
MAX_BLOCKS = 100_000  # chunks and segments; libpng's usual 8 KiB make 32,768 of the longest file

WANTED = Message("picture_file", "a PNG, JPEG or WebP file")

# PNG keywords that some program writes parameters under; others are not decompressed.
_KEYWORDS = {
    *("parameters", "z-image-studio", "prompt", "workflow"),
    *("invokeai_metadata", "sd-metadata", "Comment", "Description", "Software", "Source"),
}

# EXIF tags -> the names that they are found by here. ComfyUI's WebP has its two texts in those of a camera.
_EXIF_TAGS = {0x010E: "ImageDescription", 0x010F: "Make", 0x0110: "Model", 0x9286: "UserComment"}
_EXIF_FOLDER = 0x8769  # where the tags of a photograph are, the comment among them
_TYPE_BYTES = {1: 1, 2: 1, 7: 1, 129: 1}  # bytes, ASCII, undefined, UTF-8
_MAX_TAGS = 1_000

_SOI, _EOI, _SOS, _APP1, _COM = 0xD8, 0xD9, 0xDA, 0xE1, 0xFE  # JPEG's markers
_ALONE = {0x01, *range(0xD0, 0xD8)}  # markers without a length


def texts(path: Path) -> dict[str, str]:
    """Return the texts of a picture by PNG's keyword, EXIF's tag, or `comment` (JPEG's own).

    Raises:
        RequestError: there is no such file, it is too large, or it is none of the three formats.
    """
    if not path.is_file():
        raise RequestError("file", str(path), Message("no_file", "{wanted} that exists", wanted=WANTED))
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > MAX_FILE_BYTES:
                allowed = Message("too_large", "{wanted} of up to {size} MiB", wanted=WANTED, size=MAX_FILE_BYTES >> 20)
                raise RequestError("file", path.name, allowed)
            start = file.read(12)
            if start.startswith(b"\x89PNG\r\n\x1a\n"):
                found = _png(file)
            elif start.startswith(b"\xff\xd8\xff"):
                found = _jpeg(file)
            elif start[:4] == b"RIFF" and start[8:] == b"WEBP":
                found = _webp(file)
            else:
                raise RequestError("file", path.name, WANTED)
            return _bounded(found)
    except OSError as error:
        raise RequestError("file", path.name, WANTED) from error


def _bounded(found: Iterator[tuple[str, str]]) -> dict[str, str]:
    """Return texts by name, the last one of a name, as far as they are together no longer than they may be."""
    kept: dict[str, str] = {}
    left = MAX_TEXTS
    for name, text in found:
        left -= len(text)
        if left < 0:
            break
        kept[name] = text
    return kept


def _png(file: BinaryIO) -> Iterator[tuple[str, str]]:
    """Yield the texts of a PNG, those behind its pixels too."""
    file.seek(8)
    packed = 0
    for _ in range(MAX_BLOCKS):
        head = file.read(8)
        if len(head) < 8 or head[4:] == b"IEND":
            return
        length, kind = struct.unpack(">I4s", head)
        if kind in (b"tEXt", b"zTXt", b"iTXt", b"eXIf") and length <= MAX_TEXT:
            data = file.read(length)
            file.seek(4, os.SEEK_CUR)  # the checksum: a text that reads well is worth more than its sum
            if kind == b"eXIf":
                yield from _exif(data)
                continue
            packed += kind != b"tEXt"
            if packed <= MAX_PACKED and (text := _png_text(kind, data)) is not None:
                yield text
        else:
            file.seek(length + 4, os.SEEK_CUR)


def _png_text(kind: bytes, data: bytes) -> tuple[str, str] | None:
    """Return keyword and text of a chunk, None for one that is not wanted, broken or too long."""
    keyword, _, data = data.partition(b"\0")
    name = keyword.decode("latin-1")
    if name not in _KEYWORDS:
        return None
    packed = kind == b"zTXt"
    if kind == b"zTXt":
        data = data[1:]
    elif kind == b"iTXt":
        packed, data = data[:1] == b"\1", data[2:]
        for _ in range(2):  # the language, and the keyword in it
            data = data.partition(b"\0")[2]
    if packed:
        inflated = _inflated(data)
        if inflated is None:
            return None
        data = inflated
    return name, _decoded(data)


def _inflated(data: bytes) -> bytes | None:
    """Return what zlib has packed; None where it is broken, or longer than a text may be."""
    try:
        found = zlib.decompressobj().decompress(data, MAX_TEXT + 1)
    except zlib.error:
        return None
    return found if len(found) <= MAX_TEXT else None


def _decoded(data: bytes) -> str:
    """Return a text of unknown encoding: PNG has Latin-1 in `tEXt`, and programs write UTF-8 there."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data.decode("latin-1")


def _jpeg(file: BinaryIO) -> Iterator[tuple[str, str]]:
    """Yield the texts of a JPEG, all of which come before its pixels."""
    file.seek(2)
    for _ in range(MAX_BLOCKS):
        mark = file.read(2)
        if len(mark) < 2 or mark[0] != 0xFF:
            return
        marker = mark[1]
        if marker == 0xFF:  # padding
            file.seek(-1, os.SEEK_CUR)
            continue
        if marker in (_SOS, _EOI):
            return
        if marker in _ALONE:
            continue
        size = file.read(2)
        if len(size) < 2 or (length := int.from_bytes(size) - 2) < 0:
            return
        if marker in (_APP1, _COM):
            data = file.read(length)
            if marker == _COM:
                yield "comment", _decoded(data)
            elif data.startswith(b"Exif\0\0"):
                yield from _exif(data[6:])
        else:
            file.seek(length, os.SEEK_CUR)


def _webp(file: BinaryIO) -> Iterator[tuple[str, str]]:
    """Yield the texts of a WebP."""
    for _ in range(MAX_BLOCKS):
        head = file.read(8)
        if len(head) < 8:
            return
        kind, length = struct.unpack("<4sI", head)
        if kind == b"EXIF" and length <= MAX_TEXT:
            yield from _exif(file.read(length).removeprefix(b"Exif\0\0"))
            file.seek(length % 2, os.SEEK_CUR)
        else:
            file.seek(length + length % 2, os.SEEK_CUR)


def _exif(data: bytes) -> Iterator[tuple[str, str]]:
    """Yield the texts of EXIF data, of its first folder and of that of a photograph."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(data[:4])
    if order is None or len(data) < 8:
        return
    (first,) = struct.unpack_from(f"{order}I", data, 4)
    folders = [first]
    for folder in folders:
        for tag, value in _tags(data, order, folder):
            if isinstance(value, int):
                if len(folders) == 1:
                    folders.append(value)
            elif tag == 0x9286:
                yield _EXIF_TAGS[tag], _comment(value)
            else:
                text = _decoded(value.rstrip(b"\0"))
                name, colon, inside = text.partition(":")
                yield (name, inside) if colon and name in ("prompt", "workflow") else (_EXIF_TAGS[tag], text)


def _tags(data: bytes, order: str, folder: int) -> Iterator[tuple[int, bytes | int]]:
    """Yield the wanted tags of a folder with their bytes, and where the folder of a photograph begins."""
    if folder + 2 > len(data):
        return
    (count,) = struct.unpack_from(f"{order}H", data, folder)
    for number in range(min(count, _MAX_TAGS)):
        place = folder + 2 + 12 * number
        if place + 12 > len(data):
            return
        tag, kind, length, where = struct.unpack_from(f"{order}HHII", data, place)
        if tag == _EXIF_FOLDER:
            yield tag, where
        elif tag in _EXIF_TAGS and kind in _TYPE_BYTES:
            start = place + 8 if length <= 4 else where
            yield tag, data[start : start + length]


def _comment(data: bytes) -> str:
    """Return the text of EXIF's UserComment: eight bytes that name its encoding, where they do, and the text."""
    if data.startswith(b"UNICODE\0"):
        data = data[8:]
        # Most of a text of parameters is ASCII, whose upper byte is zero; programs write both orders, and UTF-8.
        even, odd = data[::2].count(0), data[1::2].count(0)
        if data.startswith((b"\xff\xfe", b"\xfe\xff")):
            return data.decode("utf-16", "replace").rstrip("\0")
        if even or odd:
            return data.decode("utf-16-be" if even > odd else "utf-16-le", "replace").rstrip("\0")
    elif data.startswith((b"ASCII\0\0\0", b"\0" * 8)):
        data = data[8:]
    return _decoded(data.rstrip(b"\0"))
