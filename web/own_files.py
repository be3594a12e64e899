"""The files that a server keeps for its visitors: only its user reads them, and none outlives it for long."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import gradio as gr
from gradio.route_utils import delete_files_created_by_app
from gradio.utils import get_upload_folder

LOOK, KEEP = 60, 3600  # seconds: how often Gradio looks for files that are too old, and how old that is
LEFT_OVER = 2 * KEEP  # no server that runs has files so old
_OURS = re.compile(r"[0-9a-f]{64}|tmp[a-z0-9_]{8}")  # Gradio's folders by digest, and uploads under way


def settle() -> None:
    """Make the folder, for its owner alone where it is not one that somebody chose, and remove what was left in it.

    Raises:
        OSError: it cannot be made.
    """
    folder = Path(get_upload_folder())
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if os.environ.get("GRADIO_TEMP_DIR"):
        return  # it may hold other things too
    with contextlib.suppress(OSError):  # another user's
        folder.chmod(0o700)
    for path in folder.iterdir():
        with contextlib.suppress(OSError):
            if _OURS.fullmatch(path.name) and time.time() - path.lstat().st_ctime > LEFT_OVER:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


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
        if terminated:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
