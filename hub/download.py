"""Fetches weights: asks a hub what there is, checks the disk, transfers several files at once, and reports progress.

`fetch` is a generator of events, so that closing it stops the transfers; what has arrived is kept, and the next call
goes on from there. What a hub is like is its own module's matter (`hub.huggingface`, `hub.modelscope`). Writes into the
hub's cache and nowhere else.
"""

from __future__ import annotations

import errno
import queue
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, TypeVarTuple

from core.errors import DownloadError, NotWritten
from hub.parts import Part, size_text
from hub.remote import Hub, RemoteFile

WORKERS = 4  # files at once; one stream from a hub's servers seldom fills a fast line
ROOM = 500_000_000  # bytes that are left free on the disk
HEARD = 1.0  # seconds; a line that is silent for longer says so by a `Progress` like the one before
LOOKED_BACK = 20.0  # seconds that a speed is the mean of: bytes come in blocks of 10 MB

Given = TypeVarTuple("Given")
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Planned:
    """What is going to be fetched, and where to: bytes in all, bytes still to come, bytes free there."""

    files: int
    total: int
    left: int
    free: int
    folder: Path


@dataclass(frozen=True)
class Progress:
    """How far all files together are, in bytes and in files."""

    done: int
    total: int
    files_done: int
    files: int


@dataclass(frozen=True)
class Fetched:
    """One file is there, whole and checked."""

    file: RemoteFile
    path: Path


TransferEvent = Planned | Progress | Fetched


class Speed:
    """How fast bytes arrive: the mean of the last LOOKED_BACK seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: deque[tuple[float, int]] = deque()

    def see(self, done: int) -> None:
        """Note how many bytes are there now."""
        now = self._clock()
        self._seen.append((now, done))
        while len(self._seen) > 2 and now - self._seen[1][0] >= LOOKED_BACK:
            self._seen.popleft()

    @property
    def per_second(self) -> float:
        """Bytes a second; 0 while that cannot be told."""
        if len(self._seen) < 2:
            return 0.0
        (began, first), (now, last) = self._seen[0], self._seen[-1]
        return max(last - first, 0) / max(now - began, 1e-3)

    def left(self, total: int) -> float | None:
        """Return the seconds until `total` bytes are there; None while that cannot be told."""
        speed = self.per_second
        return (total - self._seen[-1][1]) / speed if speed else None


class _StoppedError(Exception):
    """The generator was closed; raised inside a transfer to end it."""


def connect(name: str) -> Hub:
    """Return a hub, one of NAMES, as the environment sets it up (endpoint, token, cache)."""
    if name == "modelscope":
        from hub.modelscope import ModelScope

        return ModelScope()
    from hub.huggingface import HuggingFace

    return HuggingFace()


def fetch(
    parts: Sequence[Part], hub: Hub, *, workers: int = WORKERS, free: Callable[[Path], int] | None = None
) -> Generator[TransferEvent, None, None]:
    """Fetch parts: first a `Planned`, then `Progress` (one a second at least) and `Fetched` as they come.

    Args:
        parts: what to fetch; what is in the hub's cache already is not transferred again.
        hub: where from.
        workers: how many files at once.
        free: how many bytes are free where a folder will be; the disk is asked where none is given.

    Raises:
        DownloadError: it cannot go on; the sentence says why and what to do.
    """
    files: list[RemoteFile] = []
    for part in parts:
        files += [file for file in _translated(hub, part.repo, hub.files, part) if file not in files]
    have = sum(hub.have(file) for file in files)
    plan = Planned(len(files), sum(file.size for file in files), 0, (free or disk_free)(hub.folder), hub.folder)
    plan = Planned(plan.files, plan.total, plan.total - have, plan.free, plan.folder)
    yield plan
    if plan.left and plan.left + ROOM > plan.free:
        raise DownloadError(
            "{folder} has {free_size} free, and {left_size} are still to come: make room, or let HF_HOME (or "
            "MODELSCOPE_CACHE) name a folder on a larger disk",
            folder=str(hub.folder),
            free_size=size_text(plan.free),
            left_size=size_text(plan.left),
            free=plan.free,
            left=plan.left,
        )
    yield from _transfer(hub, files, have, plan, workers)


def _transfer(hub: Hub, files: list[RemoteFile], have: int, plan: Planned, workers: int) -> Iterator[TransferEvent]:
    done, finished = have, 0
    with _Transfers(hub, files, workers) as transfers:
        while finished < len(files):
            event = transfers.next_event()
            if isinstance(event, Fetched):
                yield event
                finished += 1
            else:
                done += event
            yield Progress(min(done, plan.total), plan.total, finished, len(files))


class _Transfers:
    """Threads that fetch files; leaving the `with` block stops them.

    Args:
        hub: where from.
        files: what to fetch, in this order.
        workers: how many threads.
    """

    def __init__(self, hub: Hub, files: Sequence[RemoteFile], workers: int) -> None:
        self._hub = hub
        self._waiting: queue.SimpleQueue[RemoteFile] = queue.SimpleQueue()
        for file in files:
            self._waiting.put(file)
        self._events: queue.SimpleQueue[int | Fetched | Exception] = queue.SimpleQueue()
        self._stop = threading.Event()
        # Daemons, so that Ctrl+C ends a process whose line is dead: what they leave in the cache is a file's beginning.
        self._threads = [threading.Thread(target=self._work, name="download", daemon=True) for _ in range(workers)]

    def __enter__(self) -> _Transfers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(timeout=2)

    def next_event(self) -> int | Fetched:
        """Wait for bytes that have arrived, none in HEARD seconds, or a file that is whole; raise what ended one."""
        try:
            event = self._events.get(timeout=HEARD)
        except queue.Empty:  # the reader may stop, and Ctrl+C works on Windows
            return 0
        if isinstance(event, Exception):
            raise event
        return event

    def _work(self) -> None:
        try:
            while not self._stop.is_set():
                file = self._waiting.get_nowait()
                path = _translated(self._hub, file.repo, self._hub.fetch, file, self._report)
                self._events.put(Fetched(file, path))
        except queue.Empty:
            pass
        except Exception as error:  # raised again where the events are read
            self._events.put(error)

    def _report(self, count: int) -> None:
        if self._stop.is_set():
            raise _StoppedError
        self._events.put(count)


def _translated(hub: Hub, repo: str, call: Callable[[*Given], Answer], *arguments: *Given) -> Answer:
    """Call, and turn what a library or the system raises into one of our errors."""
    try:
        return call(*arguments)
    except (DownloadError, _StoppedError):
        raise
    except Exception as error:
        if (ours := hub.explain(error, repo)) is not None:
            raise ours from error
        cause: BaseException = error
        if isinstance(error, NotWritten) and error.__cause__:  # a file of ours: the system's own error is behind it
            cause = error.__cause__
        if isinstance(cause, OSError) and cause.errno == errno.ENOSPC:
            text = "the disk with {folder} is full: make room and try again"
            raise DownloadError(text, folder=str(hub.folder)) from cause
        if isinstance(cause, OSError) and cause.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise DownloadError(
                "{file} cannot be written ({reason}): let HF_HOME (or MODELSCOPE_CACHE) name a folder of yours",
                file=str(cause.filename or hub.folder),
                reason=cause.strerror,
            ) from cause
        raise


def disk_free(folder: Path) -> int:
    """Return the bytes that are free where a folder lies or will be made."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def drop(broken: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Remove broken files from a Hugging Face cache, so that they are fetched again.

    Returns:
        What was removed, and what was left because it does not lie in a cache and may be the user's own.
    """
    removed, left = [], []
    for path in broken:
        blob = path.resolve()
        if blob.parent.name == "blobs":
            blob.unlink(missing_ok=True)
            removed.append(path)
        else:
            left.append(path)
    return removed, left
