"""Whose files are whose: what only closed pages have used goes ten minutes after the last of them was closed.

Gradio removes files by their age alone (`KEEP`), and not what we put beside them.
"""

from __future__ import annotations

import asyncio
import re
import shutil
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import anyio
from gradio.route_utils import delete_files_created_by_app
from gradio.routes import App
from gradio.utils import get_upload_folder
from starlette.types import ASGIApp, Receive, Scope, Send

from web import own_files
from web.own_files import KEEP, LOOK

LEFT = 600.0  # seconds after a page was closed, or after the last call of a program
_HEARTBEAT = re.compile(r"/gradio_api/heartbeat/([^/]+)/?$")  # open as long as a page is
_FOLDER = re.compile(r"[0-9a-f]{64}")  # Gradio keeps a file in a folder that is named by the file's SHA-256


class Visits:
    """The sessions that have used files, and in which folders those lie. For one event loop.

    Args:
        clock: returns seconds since 1970.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._open: Counter[str] = Counter()
        self._last: dict[str, float] = {}  # when a session's page was closed, or its last call ended
        self._used: dict[str, set[Path]] = {}
        self._left: set[Path] = set()  # what sessions that are gone have used

    @contextmanager
    def open(self, session: str) -> Iterator[None]:
        """Count a session as one that is here, while its page is open or a call of it is carried out."""
        self._open[session] += 1
        try:
            yield
        finally:
            self._open[session] -= 1
            if not self._open[session]:
                del self._open[session]
            if session in self._used:  # a name alone, which anybody may make up, is not kept
                self._last[session] = self._clock()

    def use(self, session: str, values: Any) -> None:
        """Note the files in what a session has sent, or is sent, which may be anything that JSON can hold."""
        root, level = Path(get_upload_folder()), [values]
        while level:
            value = level.pop()
            if isinstance(value, dict):
                path = value.get("path")
                folder = Path(path).parent if isinstance(path, str) else root
                if folder.parent == root and _FOLDER.fullmatch(folder.name):
                    self._used.setdefault(session, set()).add(folder)
                level += value.values()
            elif isinstance(value, (list, tuple)):
                level += value

    def sweep(self, noted: Iterable[set[str]] = ()) -> None:
        """Remove the folders that only sessions which are gone have used, and those in which everything is too old.

        Args:
            noted: Gradio's sets of files, which are to forget those too.
        """
        now = self._clock()
        gone = {session for session, last in self._last.items() if session not in self._open and now - last > LEFT}
        for session in gone:
            del self._last[session]
            self._left |= self._used.pop(session, set())
        in_use = set[Path]().union(*self._used.values())
        self._left -= in_use
        # A young file may have been sent again, by somebody whose call waits for its turn and has not been noted.
        removed = {folder for folder in self._left if _newest(folder) < now - LEFT}
        removed |= {folder for folder in in_use if _newest(folder) < now - KEEP}
        for folder in removed:
            shutil.rmtree(folder, ignore_errors=True)
        for used in (self._left, *self._used.values()):
            used -= removed
        for files in noted:
            files -= {file for file in tuple(files) if Path(file).parent in removed}


def _newest(folder: Path) -> float:
    """Return when the last file of a folder was made, in seconds since 1970; 0.0 where there is none."""
    try:
        return max((file.lstat().st_ctime for file in folder.iterdir()), default=0.0)
    except OSError:
        return 0.0


VISITS = Visits()  # of this process, which serves one page
SESSION: ContextVar[str] = ContextVar("session", default="")  # whose call is being carried out


class Visiting:
    """ASGI middleware that notes which pages are open."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        found = _HEARTBEAT.search(scope["path"]) if scope["type"] == "http" and scope["method"] == "GET" else None
        if found is None:
            await self._app(scope, receive, send)
            return
        with VISITS.open(found[1]):
            await self._app(scope, receive, send)


@asynccontextmanager
async def sweeping(app: App) -> AsyncIterator[None]:
    """Remove what has to go, and keep what has to stay, now and then while the server runs."""

    async def sweep() -> None:
        while True:
            await asyncio.sleep(LOOK)
            own_files.keep()
            page = app.get_blocks()
            # Gradio would do so by a schedule of its own (`delete_cache`), in a thread, while we change its sets.
            await anyio.to_thread.run_sync(delete_files_created_by_app, page, KEEP)
            VISITS.sweep(page.temp_file_sets)

    task = asyncio.create_task(sweep())
    try:
        yield
    finally:
        task.cancel()
