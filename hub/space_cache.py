"""A Space's preloaded Hugging Face cache, mirrored to where this process may write.

`preload_from_hub` in README.md fills the cache while the Space is built, as another user: what lies there can be read
and not added to, and a hub client that cannot write its refs and locks fails. The mirror is made of links, so it takes
no room.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from pathlib import Path

from hub import places

log = logging.getLogger(__name__)

MIRROR_FOLDER = Path(".cache") / "z-image-studio" / "huggingface"  # under the home folder
# Why a hard link is not possible and a symlink is: another file system, one without them, too many, or a file that
# the kernel lets its owner alone link (fs.protected_hardlinks, usual in containers).
_NO_HARD_LINK = {errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}


@dataclass
class Mirrored:
    """What a mirror run made new, in numbers of files, and what it could not read."""

    hard_links: int = 0
    symlinks: int = 0
    snapshots: int = 0
    refs: int = 0
    problems: tuple[str, ...] = ()


def settle(environ: MutableMapping[str, str] = os.environ) -> Mirrored | None:
    """Mirror a cache that cannot be written to and let `environ` point to the mirror; None where there is no need.

    Call it before huggingface_hub is imported, which reads the environment then.
    """
    home = Path(environ.get("HOME") or Path.home())
    cache = places.hub_cache(environ)
    if not cache.is_dir() or _writable(cache):
        return None
    target = home / MIRROR_FOLDER
    done = mirror(cache, target / "hub")
    environ["HF_HOME"], environ["HF_HUB_CACHE"] = str(target), str(target / "hub")
    # ZeroGPU deletes blobs that it has packed, to save room. Of these there would be no room saved, and where they are
    # linked by symlinks it would fail: they are another user's. A pattern that matches nothing.
    environ.setdefault("ZEROGPU_MMAP_AUTOPRUNE_PATTERN", str(target / "none"))
    log.info("mirrored %s to %s: %s", cache, target / "hub", done)
    return done


def mirror(cache: Path, target: Path) -> Mirrored:
    """Mirror every repository of the hub cache `cache` in `target`, and return what was new.

    Blobs are hard-linked, or symlinked where that is not possible; snapshots' links are kept as they are; refs are
    copied, since they are written to. What is there already stays, but broken links are made again. Several processes
    may do so at once. What cannot be read is left out, and named in `problems`.

    Raises:
        OSError: `target` cannot be written to.
    """
    done = Mirrored()
    for repo in sorted(cache.glob("*--*")):
        if not repo.is_dir():
            continue
        for folder, make in (("blobs", _link_blob), ("snapshots", _keep_link), ("refs", _copy_ref)):
            for file in _files(repo / folder, done):
                if file.name.endswith((".incomplete", ".lock")):
                    continue
                into = target / repo.name / file.relative_to(repo)
                into.parent.mkdir(parents=True, exist_ok=True)
                make(file, into, done)
    return done


def _files(folder: Path, done: Mirrored) -> list[Path]:
    def note(error: OSError) -> None:
        done.problems += (f"{error.filename} cannot be read ({error.strerror})",)

    if not os.path.lexists(folder):
        return []
    return [
        Path(place) / name
        for place, folders, names in os.walk(folder, onerror=note)
        for name in sorted([*names, *(link for link in folders if (Path(place) / link).is_symlink())])
    ]


def _link_blob(blob: Path, into: Path, done: Mirrored) -> None:
    if into.exists():
        return
    if not os.access(blob, os.R_OK):
        done.problems += (f"{blob} cannot be read",)
        return
    source = blob.resolve()
    try:
        _put(into, lambda name: os.link(source, name))
        done.hard_links += 1
    except OSError as error:
        if error.errno not in _NO_HARD_LINK:
            raise
        _put(into, lambda name: os.symlink(source, name))
        done.symlinks += 1


def _keep_link(entry: Path, into: Path, done: Mirrored) -> None:
    if not entry.is_symlink():  # the hub client puts the files themselves where links are not possible
        _link_blob(entry, into, done)
        return
    aim = os.readlink(entry)
    if os.path.isabs(aim):  # would lead out of the mirror
        aim = os.path.relpath(aim, entry.parent)
    if into.is_symlink() and os.readlink(into) == aim:
        return
    _put(into, lambda name: os.symlink(aim, name))
    done.snapshots += 1


def _copy_ref(ref: Path, into: Path, done: Mirrored) -> None:
    if into.exists():  # it may have been written to since
        return
    try:
        text = ref.read_bytes()
    except OSError as error:
        done.problems += (f"{ref} cannot be read ({error.strerror})",)
        return
    _put(into, lambda name: Path(name).write_bytes(text))
    done.refs += 1


def _put(into: Path, make: Callable[[str], object]) -> None:
    """Make a file or link beside `into` and move it there: nobody ever sees half of it, and of two the last stays."""
    beside = tempfile.mkdtemp(prefix=".mirror-", dir=into.parent)
    try:
        made = os.path.join(beside, into.name)
        make(made)
        # Two names of one file are left as they are by a rename, which is as good: `into` is there then.
        os.replace(made, into)
    finally:
        shutil.rmtree(beside)


def _writable(cache: Path) -> bool:
    """Whether this user may add to the cache and to everything in it that the hub client adds to."""
    folders = [cache, *(repo for repo in cache.glob("*--*") if repo.is_dir())]
    folders += [
        folder for repo in folders[1:] for folder in repo.rglob("*") if folder.is_dir() and not folder.is_symlink()
    ]
    return all(os.access(folder, os.W_OK | os.X_OK) for folder in folders)
