"""What a file holds: a picture the parameters that it was made with, a LoRA what it would change."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lora.file
from core import metadata


def inspected(path: Path, called: str = "") -> dict[str, Any]:
    """Return what a picture, a LoRA file or a folder with a LoRA holds, as plain values; nothing is decoded or loaded.

    Args:
        path: the file.
        called: what it is called in the answer, in place of its path.

    Raises:
        RequestError: there is no such file, it is neither, or it holds nothing that can be read.
    """
    if path.suffix.lower() == lora.file.SUFFIX or os.path.isdir(path):
        return _lora(path, called or str(path))
    found = metadata.read_picture(path)
    return {
        "file": called or str(path),
        "source": found.source,
        "mode": found.mode,
        "request": dict(found.values),
        "fingerprints": dict(found.fingerprints),
        "not_restored": dict(found.not_restored),
    }


def _lora(path: Path, called: str) -> dict[str, Any]:
    file = lora.file.read(path)
    identity = lora.file.identify(file)
    return {"file": called, **file.report.facts(), "hash": identity.hash, "sha256": identity.digest}
