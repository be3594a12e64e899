"""A download that belongs to a server: it runs in a thread, can be paused, and goes on after the server's next start.

All pages see the same. What is being fetched is kept in a small file, so that a server that was stopped knows it.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from core import bounded
from core.errors import DownloadError, InternalError, NotWritten, StudioError
from core.messages import Message
from core.whole_file import write_whole
from hub import download, links, places, remote
from hub.inventory import check_fetched, find_all
from hub.parts import OFFICIAL, PARTS, Edition, Part

log = logging.getLogger(__name__)

FILE = "download.json"  # in the folder of models
LARGEST_FILE = 10_000  # bytes; a real one has some 100

State = Literal["idle", "running", "paused", "failed", "done"]


@dataclass(frozen=True)
class Order:
    """What is to be fetched: names of parts, which edition of them, and the hub's name."""

    parts: tuple[str, ...]
    edition: Edition = OFFICIAL
    hub: str = remote.NAMES[0]

    def missing(self) -> list[Part]:
        """Return the parts that are not on this machine, as they will be fetched."""
        found = find_all(parts=[PARTS[name] for name in self.parts])
        return [part.part.in_edition(self.edition) for part in found if not part.present]


@dataclass(frozen=True)
class Look:
    """How far a download is.

    Attributes:
        state: what becomes of it.
        order: what is fetched; None where nothing was asked for.
        progress: in bytes and files; None until the hub has told what there is.
        speed: bytes a second, 0 while it is not known.
        left: seconds, None while that is not known.
        error: why it failed.
        finished: how many downloads have come to their end in this process.
    """

    state: State = "idle"
    order: Order | None = None
    progress: download.Progress | None = None
    speed: float = 0.0
    left: float | None = None
    error: Message | None = None
    finished: int = 0


class DownloadJob:
    """One download at a time; every method may be called from any thread, and returns at once.

    Args:
        file: where it is kept what is fetched; `download.json` in the folder of models where none is given.
        connect: returns a hub by its name.
    """

    def __init__(self, file: Path | None = None, connect: Callable[[str], remote.Hub] = download.connect) -> None:
        self._file = file or places.models_root() / FILE
        self._connect = connect
        self._lock = threading.Lock()
        self._look = Look()
        self._thread: threading.Thread | None = None
        self._turn = 0  # of the thread whose download counts; an earlier one ends when it notices

    def look(self) -> Look:
        """Return how far it is."""
        return self._look

    def begin(self, order: Order) -> None:
        """Begin to fetch; nothing happens while something is being fetched."""
        with self._lock:
            if self._look.state != "running":
                self._start(order)

    def pause(self) -> None:
        """Stop for now; what has arrived is kept."""
        with self._lock:
            order = self._look.order
            if self._look.state == "running" and order:
                self._turn += 1
                self._look = replace(self._look, state="paused", speed=0.0, left=None)
                self._keep(order, paused=True)

    def go_on(self) -> None:
        """Go on with what was paused, or has failed."""
        with self._lock:
            if self._look.state in ("paused", "failed") and self._look.order:
                self._start(self._look.order)

    def cancel(self) -> None:
        """Give it up; what has arrived stays in the hub's cache, and a later download goes on from there."""
        with self._lock:
            self._turn += 1
            self._look = Look(finished=self._look.finished)
            self._forget()

    def restore(self) -> None:
        """Go on with what an earlier process was fetching, or show what was paused; to be called once."""
        try:
            if self._file.stat().st_size > LARGEST_FILE:
                raise ValueError("too long")
            kept = bounded.loads(self._file.read_text(encoding="utf-8"))
            order = Order(tuple(kept["parts"]), kept["edition"], kept["hub"])
            known = order.parts and set(order.parts) <= PARTS.keys()
            if not known or order.edition not in get_args(Edition) or order.hub not in remote.NAMES:
                raise ValueError("unknown")
            paused = bool(kept["paused"])
        except FileNotFoundError:
            return
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            log.warning("%s is not gone on with: %s", self._file, error)
            return
        with self._lock:
            if paused:
                self._look = Look("paused", order)
            else:
                self._start(order)

    def wait(self) -> Look:
        """Wait until nothing is being fetched any more, and return how it ended."""
        while (thread := self._thread) is not None and thread.is_alive():
            thread.join()
        return self._look

    def _start(self, order: Order) -> None:
        self._turn += 1
        progress = self._look.progress if self._look.order == order else None
        self._look = Look("running", order, progress, finished=self._look.finished)
        self._keep(order, paused=False)
        arguments = self._turn, order, self._thread
        self._thread = threading.Thread(target=self._work, args=arguments, name="download-job", daemon=True)
        self._thread.start()

    def _work(self, turn: int, order: Order, before: threading.Thread | None) -> None:
        if before is not None:
            before.join()  # it has noticed, or is about to
        try:
            if self._fetch(turn, order):
                self._set(turn, state="done", speed=0.0, left=None, finished=self._look.finished + 1)
        except StudioError as error:
            self._set(turn, state="failed", speed=0.0, left=None, error=error.message)
        except Exception as error:
            log.exception("internal error")
            failed = InternalError(type(error).__name__, str(error)).message
            self._set(turn, state="failed", speed=0.0, left=None, error=failed)

    def _fetch(self, turn: int, order: Order) -> bool:
        """Fetch what is missing; return whether nothing is any more, and not somebody has stopped it."""
        parts = [PARTS[name] for name in order.parts]
        if missing := order.missing():
            if not all(self._set(turn, **change) for change in self._changes(order, missing)):
                return False
            check_fetched(parts)
        with suppress(OSError):  # they are for other programs
            links.link(parts=parts)
        return True

    def _changes(self, order: Order, missing: list[Part]) -> Iterator[dict[str, Any]]:
        """Fetch, and yield what changes; after a cut, go on as long as something arrives between two of them."""
        best = -1
        while True:
            speed, done = download.Speed(), -1
            try:
                with closing(download.fetch(missing, self._connect(order.hub))) as events:
                    for event in events:
                        if isinstance(event, download.Progress):
                            done = event.done
                            speed.see(done)
                            yield {"progress": event, "speed": speed.per_second, "left": speed.left(event.total)}
                        elif isinstance(event, download.Planned):
                            done = event.total - event.left
                            best = max(best, done)
                            speed.see(done)
                            yield {"progress": download.Progress(done, event.total, 0, event.files)}
                return
            except DownloadError as error:
                if error.message.text != remote.GOES_ON or done <= best:
                    raise
                log.warning("gone on with: %s", error)
                best = done

    def _set(self, turn: int, **changes: Any) -> bool:
        """Change what is seen; return whether the download still counts."""
        with self._lock:
            if turn != self._turn:
                return False
            self._look = replace(self._look, **changes)
            if self._look.state == "done":
                self._forget()
            return True

    def _keep(self, order: Order, *, paused: bool) -> None:
        kept = {"parts": order.parts, "edition": order.edition, "hub": order.hub, "paused": paused}
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self._file, json.dumps(kept).encode())
        except (OSError, NotWritten) as error:
            log.warning("after a restart, the download will not be gone on with: %s", error)

    def _forget(self) -> None:
        with suppress(OSError):
            self._file.unlink(missing_ok=True)
