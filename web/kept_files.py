"""Files that programs fetch by addresses that nobody can guess: kept for a time, and up to a size in all."""

from __future__ import annotations

import secrets
import shutil
import tempfile
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gradio.route_utils import get_root_url
from starlette.requests import Request

from core.errors import NotWritten
from core.whole_file import write_whole

KEPT_SECONDS = 3600  # as long as OpenAI keeps what it gives an address for
KEPT_BYTES = 512 << 20  # some hundred pictures of the largest size


@dataclass(frozen=True)
class Kept:
    """A file: where it lies, what it holds, how large it is, and when it goes (seconds since 1970)."""

    path: Path
    media_type: str
    size: int
    expires: float


def address(request: Request, path: str) -> str:
    """Return the address of one of our routes as the program reaches this server, also behind a proxy."""
    root = get_root_url(request, request.url.path, request.state.proxy_path)
    return f"{root}/v1/{path}"


class KeptFiles:
    """The files that are kept, in a folder of their own, which goes with them.

    Args:
        folder: where that folder is made.
        seconds: how long a file is kept.
        most_bytes: how large all of them may be; above that the oldest go. The newest is always kept.
        clock: returns seconds since 1970.
    """

    def __init__(
        self,
        folder: str,
        seconds: float = KEPT_SECONDS,
        most_bytes: int = KEPT_BYTES,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._parent = folder
        self._folder: Path | None = None
        self._changing = threading.Lock()
        self._seconds, self._most_bytes, self._clock = seconds, most_bytes, clock
        self._files: dict[str, Kept] = {}  # the oldest first

    def keep(self, data: bytes, suffix: str, media_type: str) -> str:
        """Keep a file; return the name that it is found by. May be called from any thread.

        Raises:
            NotWritten: there is no room for it.
        """
        name = secrets.token_urlsafe(24) + suffix
        with self._changing:
            path = self._made() / name
        write_whole(path, data)
        with self._changing:
            self._files[name] = Kept(path, media_type, len(data), self._clock() + self._seconds)
            self._sweep()
        return name

    def find(self, name: str) -> Kept | None:
        """Return the file of a name, unless it is gone or never was."""
        with self._changing:
            self._sweep()
            found = self._files.get(name)
            return found if found and found.path.is_file() else None

    def names(self) -> set[str]:
        """Return the names of all that is kept."""
        with self._changing:
            self._sweep()
            return set(self._files)

    def drop(self, name: str) -> None:
        """Remove the file of a name, where it is still there."""
        with self._changing:
            if kept := self._files.pop(name, None):
                kept.path.unlink(missing_ok=True)

    def _made(self) -> Path:
        if self._folder is None or not self._folder.is_dir():  # a cleaner of temporary files may have taken it
            try:
                Path(self._parent).mkdir(mode=0o700, parents=True, exist_ok=True)
                self._folder = Path(tempfile.mkdtemp(prefix="studio-", dir=self._parent))
            except OSError as error:
                raise NotWritten(self._parent, error.strerror or str(error)) from error
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        return self._folder

    def _sweep(self) -> None:
        """Let go what is too old, or too much: the oldest first, the newest never."""
        now, total = self._clock(), sum(kept.size for kept in self._files.values())
        for name, kept in list(self._files.items()):
            if kept.expires <= now or (total > self._most_bytes and len(self._files) > 1):
                total -= kept.size
                del self._files[name]
                kept.path.unlink(missing_ok=True)
