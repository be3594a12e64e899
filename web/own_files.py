"""The files that a server keeps for its visitors: only its user reads them, and none outlives it for long.

Each server has a folder of its own for all that is temporary, below one of its user's, and holds a lock in it while it
runs. The next one to start removes the folders whose locks nobody holds: those of servers that were killed.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import os
import shutil
import signal
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import gradio as gr
from filelock import FileLock
from gradio.route_utils import delete_files_created_by_app
from gradio.utils import get_upload_folder

from core.errors import NotWritten

LOOK, KEEP = 60, 3600  # seconds: how often a server looks for files that are too old, and how old that is
LOCK = "lock"  # in a server's folder, held while it runs; and beside all of them, held while one is made or removed
WAIT = 60  # seconds for another server that starts; removing what was left takes a moment

_held: tuple[Path, FileLock] | None = None


def settle() -> None:
    """Make this process's folder, for its owner alone, let temporary files lie in it, and remove what was left.

    Gradio's uploads and pictures lie in it too, unless GRADIO_TEMP_DIR names another place: that one keeps its
    permissions and all that is in it.

    Raises:
        OSError: it cannot be made, or a folder of somebody else is in its place.
    """
    global _held
    if _held is None:
        servers = _of_this_user()
        with FileLock(servers / LOCK, timeout=WAIT):
            _remove_left(servers)
            folder = Path(tempfile.mkdtemp(dir=servers))
            lock = FileLock(folder / LOCK, thread_local=False)
            lock.acquire()
        _held = folder, lock
        tempfile.tempdir = str(folder)
        atexit.register(leave)


def for_a_request() -> tempfile.TemporaryDirectory[str]:
    """Make a folder for one request's files among the uploads, whose folder a cleaner may have taken meanwhile.

    Raises:
        NotWritten: it cannot be made.
    """
    folder = get_upload_folder()
    try:
        Path(folder).mkdir(mode=0o700, parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(dir=folder)
    except OSError as error:
        raise NotWritten(folder, error.strerror or str(error)) from error


def _of_this_user() -> Path:
    """Return the folder that this user's servers have theirs in; others cannot read it, nor have made it."""
    folder = Path(tempfile.gettempdir()).resolve() / "z-image-studio"
    if not hasattr(os, "getuid"):  # Windows, whose folder for temporary files is a user's own
        folder.mkdir(exist_ok=True)
        return folder
    folder = folder.with_name(f"{folder.name}-{os.getuid()}")
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise PermissionError(errno.EPERM, "somebody else's", str(folder))
    folder.chmod(0o700)
    return folder


def _remove_left(servers: Path) -> None:
    """Remove the folders of servers that run no more.

    One without a lock may be of a server that runs, from which a cleaner of temporary files took it: that server makes
    another within LOOK. For the caller, who holds the lock beside all folders.
    """
    for folder in servers.iterdir():
        with contextlib.suppress(OSError):
            if (folder / LOCK).is_file():
                with FileLock(folder / LOCK, timeout=0):
                    pass  # nobody holds it, and nobody will while the caller has the other one
                shutil.rmtree(folder)
            elif folder.is_dir() and folder.stat().st_mtime < time.time() - 10 * LOOK:
                shutil.rmtree(folder)


def keep() -> None:
    """Keep this process's folder from cleaners of old files; make it and its lock again where one has taken them."""
    if _held is not None:
        folder, lock = _held
        with contextlib.suppress(OSError):
            if not (folder / LOCK).is_file():
                lock.release()
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                with FileLock(folder.parent / LOCK, timeout=0):  # no other server judges it meanwhile
                    lock.acquire(timeout=0)
            os.utime(folder / LOCK)


def leave() -> None:
    """Remove this process's folder with all that is in it, where there is one."""
    global _held
    if _held is not None:
        (folder, lock), _held = _held, None
        tempfile.tempdir = None
        lock.release()
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def gone_at_the_end(page: gr.Blocks) -> Iterator[None]:
    """Serve a page within this block: its files go when the block ends, by SIGTERM too, which then ends the process."""
    terminated = False

    def stop(*_: object) -> None:
        nonlocal terminated
        terminated = True
        raise KeyboardInterrupt

    with contextlib.suppress(ValueError):  # only a main thread is told
        signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        # Gradio does so too, but not while a stream is open.
        delete_files_created_by_app(page, None)
        leave()
        if terminated:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
