"""Model files from outside: safetensors headers, whether a file is whole, what it holds, and a stable identity.

Reads a model file up to the end of its header, which holds every tensor's name, shape and place, so that a file of
10 GB is checked in a millisecond. Results are kept per path and what marks a change.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from core import bounded
from core.messages import Message

MAX_HEADER = 25_000_000  # bytes; the hub's own limit (huggingface_hub.constants.SAFETENSORS_MAX_HEADER_LENGTH)
HASHED_WHOLE = 256_000_000  # bytes; above it a fingerprint samples: reading 10 GB takes longer than a picture
SAMPLES, SAMPLE = 64, 65_536
MARKED, PAGE = 16, 4096  # pages, and bytes of each, by which a changed file is known
# What no real file comes near; within these bounds nothing that is done with names and shapes takes long.
MAX_TENSORS = 20_000
MAX_NAME = 500  # characters of a tensor's name
MAX_DIMENSIONS = 8
MAX_SIDE = 1 << 40  # numbers along one dimension


class UnusableError(ValueError):
    """A file or folder is not what it should be.

    Args:
        text: the template of a sentence; what the sentence is about is its value `file`, or `folder`.
        **values: what belongs into the template.

    Attributes:
        message: the sentence.
    """

    def __init__(self, text: str, /, **values: Any) -> None:
        shown = {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}
        self.message = Message("unusable", text, **shown)
        super().__init__(str(self.message))

    def of(self, file: Message) -> Message:
        """Return the sentence with other words for the file than its path."""
        return Message(self.message.code, self.message.text, **{**self.message.values, "file": file})


def unreadable(file: Path | str | Message, error: OSError) -> Message:
    """Return the sentence on a file that the system does not let us read."""
    shown = file if isinstance(file, Message) else str(file)
    return Message("unreadable", "{file} cannot be read ({reason})", file=shown, reason=error.strerror)


@dataclass(frozen=True)
class Tensor:
    """One tensor as a header declares it: safetensors' name of its dtype, its shape, and its bytes in the data."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """What a safetensors file says about itself: its tensors, its metadata, and where the tensors' data starts."""

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    data_start: int

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor name -> shape."""
        return {name: tensor.shape for name, tensor in self.tensors.items()}


# Bits per number of safetensors' dtypes (safetensors 0.8, tensor.rs).
_BITS = {"BOOL": 8, "U8": 8, "I8": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32}
_BITS |= {"I64": 64, "U64": 64, "F64": 64, "C64": 64, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8}
_BITS |= {"F8_E5M2FNUZ": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}


def read_header(path: Path) -> Header:
    """Read a safetensors file's header, and check that the file is as long as the header says; kept for next time.

    Raises:
        UnusableError: it is not a safetensors file, or it is cut short.
        OSError: it cannot be read.
    """
    status = path.stat()
    return _kept_header(str(path), status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=256)
def _kept_header(path: str, _size: int, _changed: int) -> Header:
    return parse_header(Path(path))


def parse_header(path: Path, limit: int = MAX_HEADER) -> Header:
    """Read a safetensors file's header of at most `limit` bytes, and check it against itself and the file's length.

    Raises:
        UnusableError: it is not a safetensors file, it is cut short, or its header contradicts itself.
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if start == b"version ":
            raise UnusableError("{file} is a Git LFS pointer, not the file that it stands for", file=path)
        if size < 8 or not 2 <= length <= limit:
            raise UnusableError("{file} is not a safetensors file", file=path)
        text = file.read(length)
    if len(text) < length:
        raise UnusableError("{file} is cut short: {size:,} bytes are less than its header", file=path, size=size)
    try:
        declared = json.loads(text, object_pairs_hook=_unique, parse_int=bounded.number)
        metadata = {name: _scalar(value) for name, value in (declared.pop("__metadata__", None) or {}).items()}
        if len(declared) > MAX_TENSORS:
            raise ValueError("too many")
        tensors = {name: _tensor(name, facts) for name, facts in declared.items()}
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError):
        raise UnusableError("{file} is not a safetensors file: its header cannot be read", file=path) from None
    _check_extent(path, tensors, 8 + length, size)
    return Header(tensors, metadata, 8 + length)


def _check_extent(path: Path, tensors: Mapping[str, Tensor], data_start: int, size: int) -> None:
    """Refuse a file that is not as long as its header says, or whose tensors overlap or leave gaps."""
    end = data_start + max((tensor.end for tensor in tensors.values()), default=0)
    if size < end:
        raise UnusableError("{file} is cut short: {size:,} of {whole:,} bytes", file=path, size=size, whole=end)
    if size > end:
        raise UnusableError("{file} is too long: {size:,} of {whole:,} bytes", file=path, size=size, whole=end)
    reached = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        bits = math.prod(tensor.shape) * _BITS.get(tensor.dtype, 0)
        if tensor.dtype not in _BITS or tensor.begin != reached or -(-bits // 8) != tensor.end - tensor.begin:
            text = "{file} is not a safetensors file: its header contradicts itself at {tensor}"
            raise UnusableError(text, file=path, tensor=repr(name[:200]))
        reached = tensor.end


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is there twice")
    return found


def _scalar(value: Any) -> str:
    if isinstance(value, dict | list):  # to write one that is nested deeply takes a time that is not bounded
        raise ValueError("not a text")
    return str(value)


def _tensor(name: str, declared: Mapping[str, Any]) -> Tensor:
    shape, (begin, end) = tuple(declared["shape"]), declared["data_offsets"]
    if len(name) > MAX_NAME or len(shape) > MAX_DIMENSIONS:
        raise ValueError("too long")
    if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
        raise ValueError("not a natural number")
    if any(side >= MAX_SIDE for side in shape):
        raise ValueError("too large")
    return Tensor(_scalar(declared["dtype"]), shape, begin, end)


def model_hash(files: Sequence[Path]) -> str:
    """Return DiffSynth's name for a model: the MD5 of its tensor names and shapes, over all its files.

    The same as diffsynth.core.loader.file.hash_model_file, from headers alone and without importing it.

    Raises:
        UnusableError: a file is not a whole safetensors file.
    """
    return hash_of(shapes_of(files))


def shapes_of(files: Sequence[Path]) -> dict[str, tuple[int, ...]]:
    """Return tensor name -> shape over all files of a model.

    Raises:
        UnusableError: a file is not a whole safetensors file.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        shapes.update(read_header(file).shapes)
    return shapes


def hash_of(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Return DiffSynth's name for a model of such tensors, as `model_hash`."""
    keys = [f"{name}:{'_'.join(map(str, shape))}" for name, shape in shapes.items()] + list(shapes)
    return hashlib.md5(",".join(sorted(keys)).encode(), usedforsecurity=False).hexdigest()


def fingerprint(files: Sequence[Path]) -> str:
    """Return a stable identity of a part's files (or of a tokenizer's folder), whatever folder they lie in.

    `sha256:…` is exact: of the content, or the name of a Hugging Face blob, which is the same. `sampled:…` is the
    SHA-256 over size, header and 64 evenly spaced blocks of 64 KiB: what a file above 256 MB gets that is no blob.
    Several files give the SHA-256 over their names and fingerprints, marked `x` and their number.

    Raises:
        OSError: a file cannot be read.
    """
    loose = flat(files)
    marks = [_file_fingerprint(file) for file in loose]
    if len(marks) == 1:
        return marks[0]
    how = "sampled" if any(mark.startswith("sampled") for mark in marks) else "sha256"
    text = "\n".join(f"{file.name} {mark}" for file, mark in zip(loose, marks, strict=True))
    return f"{how}x{len(marks)}:{hashlib.sha256(text.encode()).hexdigest()}"


def _file_fingerprint(path: Path) -> str:
    resolved = path.resolve()
    # Blobs of large files are named by their SHA-256; those of small ones by a 40-digit Git hash.
    if resolved.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", resolved.name):
        return f"sha256:{resolved.name}"
    return _content_fingerprint(str(resolved), mark(resolved))


@dataclass(frozen=True)
class Mark:
    """By what a file that changes is known without reading it whole: bytes, nanoseconds since 1970, some content."""

    size: int
    changed: int
    content: bytes


def mark(path: Path) -> Mark:
    """Return the mark of a file as it is now: of its content, MARKED evenly spaced pages, read in milliseconds.

    Raises:
        OSError: it cannot be read.
    """
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb", buffering=0) as file:
        status = os.fstat(file.fileno())
        for index in range(MARKED):
            file.seek(max(status.st_size - PAGE, 0) * index // (MARKED - 1))
            digest.update(file.read(PAGE))
    return Mark(status.st_size, status.st_mtime_ns, digest.digest())


@lru_cache(maxsize=256)
def _content_fingerprint(path: str, seen: Mark) -> str:
    size = seen.size
    with open(path, "rb") as file:
        if size < HASHED_WHOLE:
            return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
        try:
            start = read_header(Path(path)).data_start
        except UnusableError:  # some other kind of file: sampled from its start
            start = 0
        digest = hashlib.sha256(f"{size}\n".encode() + file.read(start))
        for index in range(SAMPLES):
            file.seek(start + (size - start - SAMPLE) * index // (SAMPLES - 1))
            digest.update(file.read(SAMPLE))
    return f"sampled:{digest.hexdigest()}"


def digest_of(path: Path, like: str) -> str | None:
    """Return the digest of a whole file, of the kind that `like` is; None where that is no digest.

    Hubs name large files by their SHA-256 (64 hex digits), and small ones as Git does (40).

    Raises:
        OSError: it cannot be read.
    """
    if re.fullmatch("[0-9a-f]{64}", like):
        digest = hashlib.sha256()
    elif re.fullmatch("[0-9a-f]{40}", like):
        digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    else:
        return None
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def entries(folder: Path) -> list[Path]:
    """Return a folder's entries by name; a folder that does not exist has none."""
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def flat(files: Sequence[Path]) -> list[Path]:
    """Replace a folder by the files in it that a tokenizer is read from."""
    loose: list[Path] = []
    for path in files:
        inside = [file for file in entries(path) if file.suffix in (".json", ".txt", ".jinja") and file.is_file()]
        loose += inside if path.is_dir() else [path]
    return loose
