"""Files that are there whole or not at all: written beside their place, then moved into it.

A full disk or a killed process leaves the file that was there before, or none; at worst a hidden file ending in
`.part` stays behind. A symlink stays one, and what it leads to is replaced; an existing file's permissions are kept.
Devices and pipes are written to as they are. Uses the standard library alone.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from core.errors import NotWritten


def write_whole(path: Path, data: bytes) -> None:
    """Write a file whole or not at all.

    Raises:
        NotWritten: the disk is full, the folder is missing or closed to us, and the like.
    """
    write_together({path: data})


def write_together(files: Mapping[Path, bytes]) -> None:
    """Write several files that belong together: none takes its place before all are written, and the first the last.

    Raises:
        NotWritten: as `write_whole`. Unless it was the moving that failed, no file has changed.
    """
    with contextlib.ExitStack() as stack:
        written = [stack.enter_context(contextlib.closing(_Written(path))) for path in files]
        for target, data in zip(written, files.values(), strict=True):
            with target.reporting():
                target.file.write(data)
                target.finish()
        for target in reversed(written):
            with target.reporting():
                target.place()


def check_writable(*paths: Path) -> None:
    """Find out, before any work is done, whether files could be written; nothing changes.

    Raises:
        NotWritten: as `write_whole`, as far as it shows before there are bytes.
    """
    for path in paths:
        if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
            if not os.access(path, os.W_OK):  # opened, a pipe would come to its end
                raise NotWritten(str(path), os.strerror(errno.EACCES))
        else:
            _Written(path).close()


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Yield a file to write to, which takes the place of `path` unless an exception leaves the block.

    Raises:
        NotWritten: as `write_whole`; an OSError that leaves the block is taken for one of writing.
    """
    with contextlib.closing(_Written(path)) as one, one.reporting():
        yield one.file
        one.finish()
        one.place()


class _Written:
    """A file that is being written beside the one whose place it takes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._beside: Path | None = None
        self._mode: int | None = None
        with self.reporting():
            self._target = Path(os.path.realpath(path))
            if self._is_replaceable():
                # Not named after the target, whose name may be as long as names can be.
                self._beside = self._target.with_name(f".{secrets.token_hex(8)}.part")
            # Closed by `finish`, or else by `close`.
            self.file: BinaryIO = open(self._beside or self._target, "xb" if self._beside else "wb")  # noqa: SIM115

    def _is_replaceable(self) -> bool:
        """Whether there is a regular file to replace, or none; a folder fails when it is opened."""
        try:
            found = self._target.stat()
        except FileNotFoundError:
            return True
        if not stat.S_ISREG(found.st_mode):
            return False
        if not os.access(self._target, os.W_OK):  # a rename would not ask
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        self._mode = stat.S_IMODE(found.st_mode)
        return True

    @contextlib.contextmanager
    def reporting(self) -> Iterator[None]:
        """Put what the system refuses into our sentence, with the name that the caller gave."""
        try:
            yield
        except OSError as error:
            raise NotWritten(str(self._path), error.strerror or str(error)) from error

    def finish(self) -> None:
        """Bring everything to the disk, where a full one shows at the latest."""
        self.file.flush()
        if self._beside:
            os.fsync(self.file.fileno())
        self.file.close()

    def place(self) -> None:
        """Let the written file take its place, in one step."""
        if self._beside:
            if self._mode is not None:
                with contextlib.suppress(OSError):  # a file system without permissions
                    os.chmod(self._beside, self._mode)
            os.replace(self._beside, self._target)
            self._beside = None

    def close(self) -> None:
        """Leave nothing behind of what has not taken its place."""
        with contextlib.suppress(OSError):  # what is still to be written is given up
            self.file.close()
        if self._beside:
            with contextlib.suppress(OSError):
                self._beside.unlink()
