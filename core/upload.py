"""An image that came with a request: opened and hashed once, and whole when it travels to another process."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from core.errors import RequestError
from core.messages import Message

MAX_IMAGE_BYTES = 256 << 20
IMAGE_FILE = Message("image_file", "a picture file such as PNG, JPEG or WebP")


@dataclass(frozen=True)
class Upload:
    """A file as it was given: its bare name, and its bytes."""

    name: str
    data: bytes = field(repr=False)

    @classmethod
    def open(cls, path: Path, field: str = "image") -> Upload:
        """Read an image file; nothing is decoded.

        Args:
            path: the file.
            field: the request's field that errors name.

        Raises:
            RequestError: there is no such file, it is larger than MAX_IMAGE_BYTES, or it cannot be read.
        """
        if not path.is_file():
            raise RequestError(field, str(path), Message("no_file", "{wanted} that exists", wanted=IMAGE_FILE))
        try:
            if (size := path.stat().st_size) > MAX_IMAGE_BYTES:
                allowed = Message("too_large", "a file of up to {size} MiB", size=MAX_IMAGE_BYTES >> 20)
                raise RequestError(field, f"{path.name} ({size >> 20} MiB)", allowed)
            return cls(path.name, path.read_bytes())
        except OSError as error:
            text = "{wanted} that can be read ({problem})"
            allowed = Message("unreadable", text, wanted=IMAGE_FILE, problem=error.strerror)
            raise RequestError(field, str(path), allowed) from error

    @cached_property
    def digest(self) -> str:
        """The bytes' "sha256:…"."""
        return f"sha256:{hashlib.sha256(self.data).hexdigest()}"
