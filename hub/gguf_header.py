"""GGUF files: their headers, read as safetensors' are; the numbers stay where they are.

The format is ggml's (docs/gguf.md of ggml-org/ggml, versions 2 and 3, little-endian). The package `gguf` reads headers
too, but without bounds, and a vocabulary of 150,000 tokens takes it seconds: a file is looked at more often than used.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import IO, NamedTuple

from hub.checkpoint import MAX_DIMENSIONS, MAX_NAME, MAX_SIDE, MAX_TENSORS, Header, Tensor, UnusableError

SUFFIX = ".gguf"
MAX_ENTRIES = 10_000  # of the metadata; real files have some 40
MAX_ITEMS = 2_000_000  # of a list; vocabularies have up to 260,000
MAX_TEXT = 1 << 24  # bytes of one text
KEPT_TEXT = 10_000  # characters of a text that is kept
ALIGNMENT = 32  # bytes; where a file does not say otherwise
PREFIX = "GGUF "  # of a type's name as a dtype


class Kind(NamedTuple):
    """A type of numbers: how many there are in a block, and the bytes of a block."""

    name: str
    numbers: int
    bytes: int


# By ggml's number (gguf-py, constants.py), those that the package can widen; tests/hub/test_gguf_header.py compares.
KINDS: Mapping[int, Kind] = {
    number: Kind(*facts)
    for number, facts in {
        0: ("F32", 1, 4),
        1: ("F16", 1, 2),
        2: ("Q4_0", 32, 18),
        3: ("Q4_1", 32, 20),
        6: ("Q5_0", 32, 22),
        7: ("Q5_1", 32, 24),
        8: ("Q8_0", 32, 34),
        10: ("Q2_K", 256, 84),
        11: ("Q3_K", 256, 110),
        12: ("Q4_K", 256, 144),
        13: ("Q5_K", 256, 176),
        14: ("Q6_K", 256, 210),
        20: ("IQ4_NL", 32, 18),
        23: ("IQ4_XS", 256, 136),
        30: ("BF16", 1, 2),
    }.items()
}
PLAIN = ("F32", "F16", "BF16")

# Types of metadata: what struct calls those of one number.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _LIST = 8, 9


def read_header(path: Path) -> Header:
    """Read a GGUF file's header, and check that the file is as long as it says; kept for next time.

    Shapes are as torch has them, dtypes are `BF16`, `F16`, `F32` or `GGUF Q4_K` and the like.

    Raises:
        UnusableError: it is no GGUF file, it is cut short, or it holds a type that cannot be read.
        OSError: it cannot be read.
    """
    status = path.stat()
    return _kept_header(str(path), status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=64)
def _kept_header(path: str, _size: int, _changed: int) -> Header:
    with open(path, "rb") as file:
        try:
            return _header(Path(path), file)
        except (ValueError, EOFError, OverflowError, MemoryError) as error:
            if isinstance(error, UnusableError):
                raise
            text = "{file} is not a GGUF file: its header cannot be read"
            raise UnusableError(text, file=Path(path)) from None


def _header(path: Path, file: IO[bytes]) -> Header:
    size = os.fstat(file.fileno()).st_size
    if file.read(4) != b"GGUF":
        raise UnusableError("{file} is not a GGUF file", file=path)
    version = _number(file, "I")
    if version not in (2, 3):
        raise UnusableError("{file} is a GGUF file of version {version}; 2 and 3 are read", file=path, version=version)
    tensors, entries = _bounded(file, "Q", MAX_TENSORS), _bounded(file, "Q", MAX_ENTRIES)
    metadata = dict(_entry(file) for _ in range(entries))
    declared = [_declared(file) for _ in range(tensors)]
    if len({name for name, *_ in declared}) != len(declared):
        raise ValueError("a name is there twice")
    alignment = int(metadata.get("general.alignment", ALIGNMENT))
    if not 0 < alignment <= 1 << 20:
        raise ValueError("no alignment")
    start = -(-file.tell() // alignment) * alignment
    found = {}
    for name, shape, number, begin in declared:
        if number not in KINDS:
            text = "{file} holds numbers of the GGUF type {number}, which is not read here; {known} are"
            raise UnusableError(text, file=path, number=number, known=[kind.name for kind in KINDS.values()])
        kind = KINDS[number]
        if shape and shape[-1] % kind.numbers:
            raise ValueError("rows that are no whole number of blocks")
        end = begin + math.prod(shape) // kind.numbers * kind.bytes
        if start + end > size:
            text = "{file} is cut short: {size:,} of {whole:,} bytes"
            raise UnusableError(text, file=path, size=size, whole=start + end)
        dtype = kind.name if kind.name in PLAIN else PREFIX + kind.name
        found[name] = Tensor(dtype, _original(name, shape, metadata), begin, end)
    return Header(found, metadata, start)


def _original(name: str, shape: tuple[int, ...], metadata: Mapping[str, str]) -> tuple[int, ...]:
    """Return the shape that a tensor had before it was brought into whole blocks, as ComfyUI-GGUF notes it."""
    noted = metadata.get(f"comfy.gguf.orig_shape.{name}", "")
    sides = tuple(int(side) for side in noted.split(",")) if noted else shape
    return sides if math.prod(sides) == math.prod(shape) and min(sides, default=1) >= 0 else shape


def _declared(file: IO[bytes]) -> tuple[str, tuple[int, ...], int, int]:
    """Return a tensor's name, shape, type and place."""
    name = _text(file, MAX_NAME).decode()
    sides = [_bounded(file, "Q", MAX_SIDE) for _ in range(_bounded(file, "I", MAX_DIMENSIONS))]
    return name, tuple(reversed(sides)), _number(file, "I"), _number(file, "Q")


def _entry(file: IO[bytes]) -> tuple[str, str]:
    """Return an entry of the metadata as text; long lists and texts are passed over."""
    name, kind = _text(file, MAX_NAME).decode(), _number(file, "I")
    if kind == _TEXT:
        text = _text(file, MAX_TEXT)
        return name, text.decode("utf-8", "replace")[:KEPT_TEXT]
    if kind in _SCALARS:
        return name, str(_number(file, _SCALARS[kind]))
    if kind != _LIST:
        raise ValueError("an unknown type")
    inner, count = _number(file, "I"), _bounded(file, "Q", MAX_ITEMS)
    if inner == _TEXT:
        for _ in range(count):
            file.seek(_bounded(file, "Q", MAX_TEXT), os.SEEK_CUR)
        return name, ""
    if inner not in _SCALARS:
        raise ValueError("a list in a list")
    code = _SCALARS[inner]
    items = struct.unpack(f"<{count}{code}", _exactly(file, count * struct.calcsize(code)))
    return name, ",".join(map(str, items)) if count <= MAX_DIMENSIONS else ""


def _bounded(file: IO[bytes], code: str, limit: int) -> int:
    number = _number(file, code)
    if number > limit:
        raise ValueError("too many")
    return number


def _number(file: IO[bytes], code: str) -> int:
    (number,) = struct.unpack(f"<{code}", _exactly(file, struct.calcsize(code)))
    return number  # type: ignore[no-any-return]  # or a float or a truth of the metadata, which becomes text


def _text(file: IO[bytes], limit: int) -> bytes:
    return _exactly(file, _bounded(file, "Q", limit))


def _exactly(file: IO[bytes], count: int) -> bytes:
    data = file.read(count)
    if len(data) < count:
        raise EOFError
    return data
