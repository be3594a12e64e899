"""What `hub.download` asks of a hub: the contract that `hub.huggingface` and `hub.modelscope` fulfil."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Protocol

from core.errors import DownloadError
from core.messages import Message
from hub.parts import Part

NAMES = ("huggingface", "modelscope")

LONGEST = 255  # bytes of a file's name, without its folder; what common file systems take

# What ends every sentence of `Hub.explain`.
GOES_ON = "{what}. What has arrived is kept, and the next try goes on from there"

Report = Callable[[int], None]  # bytes that arrived; fewer than none where some had to be thrown away


@dataclass(frozen=True)
class RemoteFile:
    """A file on a hub: its repository and name there, its size in bytes, and the hub's digest of it.

    `digest` is a SHA-256 (64 lowercase hex digits), a Git hash (40), or empty where the hub gives none. `commit`, where
    a hub has such, is what its cache calls the snapshot that the file belongs to. None of these leads out of a cache:
    `plain_name` and `hex_digits` have seen to it.
    """

    repo: str
    name: str
    size: int
    digest: str
    commit: str = field(default="", compare=False)  # a file of two parts is one, also if the hub moves on between them


class Hub(Protocol):
    """A place that files come from, and the cache that they go to."""

    folder: Path

    def files(self, part: Part) -> list[RemoteFile]:
        """Return the files that belong to a part. Raises what `explain` knows."""

    def have(self, file: RemoteFile) -> int:
        """Return how many bytes of a file are on this machine already; not more than its size."""

    def fetch(self, file: RemoteFile, report: Report) -> Path:
        """Make a file whole, going on from what is there, check it, and return where it lies."""

    def explain(self, error: Exception, repo: str) -> DownloadError | None:
        """Return what an error of the hub's library means and what to do; None where it is none of its own."""


def wanted(part: Part, name: str) -> bool:
    """Whether a file of the part's repository is fetched for it: the pattern's whole folder, or the one file.

    With the folder come configuration and index files: small, and other programs miss them. Not where a repository
    keeps the same model in other numbers beside it.
    """
    folder = "" if part.alone else os.path.dirname(part.pattern)
    return str(PurePosixPath(name).parent) == folder if folder else name == part.pattern


def plain_name(name: str, repo: str, endpoint: str) -> str:
    """Return a file's name as a hub answered it, once it is one that stays inside a folder on every system.

    Raises:
        DownloadError: it might lead elsewhere, or be no name for a file.
    """
    parts = name.split("/")
    # A part that ends with a dot is also "." or ".."; Windows drops dots and spaces there, so ".. " is ".." to it. A
    # colon is a drive's or a stream's. What does not print holds NUL, line breaks and halves of characters.
    stays = name.isprintable() and not re.search(r'[\\:*?"<>|]', name)
    if stays and all(part and not part.endswith((".", " ")) and len(part.encode()) <= LONGEST for part in parts):
        return name
    raise DownloadError(
        "{endpoint} lists a file of {repo} by the name {name}, which might lead out of the cache: nothing is fetched; "
        "check HF_ENDPOINT or MODELSCOPE_ENDPOINT and any proxy",
        endpoint=endpoint,
        repo=repo,
        name=_shown(name),
    )


def hex_digits(text: str, what: Message, endpoint: str) -> str:
    """Return a hub's digest or commit, in lowercase, once it is one: other texts would be paths in the cache.

    Raises:
        DownloadError: it is something else.
    """
    if re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", text.lower()):
        return text.lower()
    raise DownloadError(
        "{endpoint} answers {answer} as the {what}, where a hub answers 40 or 64 hex digits: nothing is fetched; check "
        "HF_ENDPOINT or MODELSCOPE_ENDPOINT and any proxy",
        endpoint=endpoint,
        answer=_shown(text),
        what=what,
    )


def _shown(text: str) -> str:
    """Return what a hub answered, as it may be shown: in ASCII, and not all of it where it is long."""
    return ascii(text) if len(ascii(text)) <= 80 else ascii(text)[:77] + "..."
