"""What `download` asks of a hub: the contract that `hub_huggingface` and `hub_modelscope` fulfil.

Knows nothing of either, of transfers, or of fronts.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

from errors import DownloadError
from weights import Part

NAMES = ("huggingface", "modelscope")

Report = Callable[[int], None]  # bytes that arrived; fewer than none where some had to be thrown away


@dataclass(frozen=True)
class RemoteFile:
    """A file on a hub: its repository and name there, its size in bytes, and the hub's digest of it.

    `digest` is a SHA-256 (64 hex digits), a Git hash (40), or another text, by which a file cannot be checked.
    """

    repo: str
    name: str
    size: int
    digest: str


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
        """Put an error of the hub's library into a sentence; None where it is none of its own."""


def wanted(part: Part, name: str) -> bool:
    """Whether a file of the part's repository is fetched for it: the pattern's whole folder, or the one file.

    With the folder come configuration and index files: small, and other programs miss them.
    """
    folder = os.path.dirname(part.pattern)
    return str(PurePosixPath(name).parent) == folder if folder else name == part.pattern
