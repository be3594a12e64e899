"""Reads the real weights on this machine in full, and says which files are not what the hub gave.

`hub.inventory` has looked at headers, lengths, names and shapes already. This adds each file's digest where it is
known: a cache's blobs are named by it, and what huggingface_hub fetched into a plain folder has it beside it. Reads
only.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from core.messages import Message
from hub.checkpoint import digest_of, flat, unreadable
from hub.inventory import Found, find_all
from hub.parts import PARTS, Part

State = Literal["whole", "broken", "missing"]


@dataclass(frozen=True)
class Reading:
    """A file is about to be read in full: its path and bytes."""

    path: Path
    size: int


@dataclass(frozen=True)
class Verdict:
    """The result for one part.

    `unproven` are files whose digest is not known here: their header, length, names and shapes are right. `broken` are
    those with another content than the hub gave.
    """

    found: Found
    state: State
    problems: tuple[Message, ...]
    broken: tuple[Path, ...] = ()
    unproven: tuple[Path, ...] = ()


def verify(
    environ: Mapping[str, str] = os.environ,
    root: Path | None = None,
    parts: Sequence[Part] = tuple(PARTS.values()),
) -> Iterator[Reading | Verdict]:
    """Check parts in their order: a `Reading` before each file that takes a while, a `Verdict` for each part.

    Raises:
        RequestError: an explicit folder that does not exist.
    """
    for found in find_all(environ, root, parts=parts):
        if not found.present:
            yield Verdict(found, "broken" if found.problems else "missing", found.problems)
            continue
        problems, broken, unproven = list(found.problems), [], []
        for path in flat(found.files):
            yield Reading(path, path.stat().st_size)
            expected = known_digest(path)
            if not expected:
                unproven.append(path)
            elif problem := _difference(path, expected):
                problems.append(problem)
                broken.append(path)
        yield Verdict(found, "broken" if broken else "whole", tuple(problems), tuple(broken), tuple(unproven))


def _difference(path: Path, expected: str) -> Message | None:
    """Return what is wrong with a file's content; None where it has the digest."""
    try:
        actual = digest_of(path, expected)
    except OSError as error:
        return unreadable(path, error)
    if actual is None or actual == expected:
        return None
    text = "{file} holds something else than the hub gave: {actual}…, not {expected}…"
    return Message("other_content", text, file=str(path), actual=actual[:12], expected=expected[:12])


def known_digest(path: Path) -> str:
    """Return the digest that the hub gave a file: 64 hex digits (SHA-256) or 40 (Git's); empty where it is not known.

    huggingface_hub names blobs by it, and writes it into the second line of
    `.cache/huggingface/download/<file>.metadata` in a folder that it downloads to.
    """
    resolved = path.resolve()
    if resolved.parent.name == "blobs" and _is_digest(resolved.name):
        return resolved.name
    for folder in path.parents[:2]:
        note = folder / ".cache" / "huggingface" / "download" / f"{path.relative_to(folder)}.metadata"
        try:
            digest = note.read_text(encoding="utf-8").splitlines()[1]
        except (OSError, IndexError, UnicodeDecodeError):
            continue
        if _is_digest(digest):
            return digest
    return ""


def _is_digest(text: str) -> bool:
    return re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", text) is not None
