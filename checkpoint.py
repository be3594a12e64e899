"""Model files from outside: safetensors headers, whether a file is whole, what it holds, and a stable identity.

Reads a model file up to the end of its header, which holds every tensor's name, shape and place, so that a file of
10 GB is checked in a millisecond. Results are kept per path, size and time of change.

Knows nothing of torch, of which models there are, or of where they should lie. Imports nothing of ours.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

MAX_HEADER = 25_000_000  # bytes; the hub's own limit (huggingface_hub.constants.SAFETENSORS_MAX_HEADER_LENGTH)
HASHED_WHOLE = 256_000_000  # bytes; above it a fingerprint samples: reading 10 GB takes longer than a picture
SAMPLES, SAMPLE = 64, 65_536


@dataclass(frozen=True)
class Header:
    """What a safetensors file says about itself: tensor name -> shape, and where the tensors' data starts."""

    shapes: Mapping[str, tuple[int, ...]]
    data_start: int


def read_header(path: Path) -> Header:
    """Read a safetensors file's header, and check that the file is as long as the header says.

    Raises:
        ValueError: it is not a safetensors file, or it is cut short; the message names the path.
        OSError: it cannot be read.
    """
    status = path.stat()
    return _read_header(str(path), status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=256)
def _read_header(path: str, size: int, _changed: int) -> Header:
    with open(path, "rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if start == b"version ":
            raise ValueError(f"{path} is a Git LFS pointer, not the file that it stands for")
        if size < 8 or not 2 <= length <= MAX_HEADER:
            raise ValueError(f"{path} is not a safetensors file")
        text = file.read(length)
    if len(text) < length:
        raise ValueError(f"{path} is cut short: {size:,} bytes are less than its header")
    try:
        tensors = json.loads(text)
        tensors.pop("__metadata__", None)
        shapes = {name: tuple(int(side) for side in one["shape"]) for name, one in tensors.items()}
        end = 8 + length + max((int(one["data_offsets"][1]) for one in tensors.values()), default=0)
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError):
        raise ValueError(f"{path} is not a safetensors file: its header cannot be read") from None
    if size != end:
        raise ValueError(f"{path} is {'cut short' if size < end else 'too long'}: {size:,} of {end:,} bytes")
    return Header(shapes, 8 + length)


def model_hash(files: Sequence[Path]) -> str:
    """Return DiffSynth's name for a model: the MD5 of its tensor names and shapes, over all its files.

    The same as diffsynth.core.loader.file.hash_model_file, from headers alone and without importing it.

    Raises:
        ValueError: a file is not a whole safetensors file.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        shapes.update(read_header(file).shapes)
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
    status = resolved.stat()
    return _content_fingerprint(str(resolved), status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=256)
def _content_fingerprint(path: str, size: int, _changed: int) -> str:
    with open(path, "rb") as file:
        if size < HASHED_WHOLE:
            return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
        try:
            start = read_header(Path(path)).data_start
        except ValueError:  # some other kind of file: sampled from its start
            start = 0
        digest = hashlib.sha256(f"{size}\n".encode() + file.read(start))
        for index in range(SAMPLES):
            file.seek(start + (size - start - SAMPLE) * index // (SAMPLES - 1))
            digest.update(file.read(SAMPLE))
    return f"sampled:{digest.hexdigest()}"


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
        inside = [one for one in entries(path) if one.suffix in (".json", ".txt", ".jinja") and one.is_file()]
        loose += inside if path.is_dir() else [path]
    return loose
