"""Links `models/<owner>/<repository>/` to the files of cached snapshots: the layout that DiffSynth and others look in.

The app itself uses cached files where they lie and needs no links. File by file, so that a program that adds a file
to the folder does not add it to the cache. Whatever is not a link into a cache is the user's own and is left alone.
Writes links and nothing else; `hub.inventory` does the looking.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from core.messages import Message
from hub import places
from hub.checkpoint import entries
from hub.inventory import Found, find_all
from hub.parts import PARTS, Part

Action = Literal["linked", "repaired", "kept", "removed", "impossible"]


@dataclass(frozen=True)
class Link:
    """What became of one link: its path, the file that it stands for, and why it is not there."""

    path: Path
    target: Path
    action: Action
    reason: Message | None = None


def link(
    environ: Mapping[str, str] = os.environ,
    parts: Sequence[Part] = tuple(PARTS.values()),
    symlink: Callable[[Path, Path], None] = os.symlink,
) -> list[Link]:
    """Link every part that a cache holds whole, from the newest such snapshot; return what changed or could not be.

    Where the system allows no symbolic links (Windows, unless developer mode is on), hard links stand in on the same
    drive. Links that lead nowhere or to another snapshot are set right, and those of files that the snapshot no
    longer has are removed, since DiffSynth takes every file of a folder for part of the model.

    Args:
        environ: the environment to take the places from.
        parts: which parts.
        symlink: makes a symbolic link: target, path.
    """
    done: list[Link] = []
    for found in find_all(environ, parts=parts, places=places.CACHES):
        if found.present:
            done += _link_part(found, places.models_root(environ), _cache_roots(environ), symlink)
    return done


def _link_part(found: Found, root: Path, caches: Sequence[Path], symlink: Callable[[Path, Path], None]) -> list[Link]:
    part = found.part.in_edition(found.edition)
    repo = root / part.repo
    if repo.is_symlink():
        return [Link(repo, found.files[0], "kept", Message("own_folder", "the whole folder is a link of yours"))]
    folder = os.path.dirname(part.pattern)
    source = found.files[0] if found.files[0].is_dir() else found.files[0].parent
    whole_folder = folder and not part.alone
    files = [path for path in entries(source) if path.is_file()] if whole_folder else list(found.files)
    here = repo / folder
    here.mkdir(parents=True, exist_ok=True)
    done = [change for file in files if (change := _set(here / file.name, file, caches, symlink))]
    if whole_folder:
        names = {file.name for file in files}
        for path in entries(here):
            if path.name not in names and _ours(path, caches):
                done.append(Link(path, Path(os.readlink(path)), "removed"))
                path.unlink()
    return done


def _set(path: Path, target: Path, caches: Sequence[Path], symlink: Callable[[Path, Path], None]) -> Link | None:
    """Make one link right; None where it was."""
    there = os.path.lexists(path)
    if path.is_symlink() and Path(os.readlink(path)) == target:
        return None
    if there and not _ours(path, caches):
        own = Message("own_file", "a file of yours lies there")
        return None if path.samefile(target) else Link(path, target, "kept", own)
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        symlink(target, fresh)
    except (OSError, NotImplementedError):
        try:
            os.link(target.resolve(), fresh)
        except OSError as error:
            text = "this system allows no links here ({reason}); the file is used where it lies"
            return Link(path, target, "impossible", Message("no_links", text, reason=error.strerror))
    os.replace(fresh, path)
    return Link(path, target, "repaired" if there else "linked")


def _ours(path: Path, caches: Sequence[Path]) -> bool:
    """Whether something is a link that leads nowhere, or into a cache."""
    if not path.is_symlink():
        return False
    target = Path(os.readlink(path))
    return not path.exists() or any(cache in target.parents for cache in caches)


def _cache_roots(environ: Mapping[str, str]) -> list[Path]:
    return [places.hub_cache(environ), places.modelscope_cache(environ)]
