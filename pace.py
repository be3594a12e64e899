"""How long a picture still takes, from how long its steps took. Knows nothing of what the steps do."""

from __future__ import annotations

import time
from collections.abc import Callable

from core.events import Queued, Stage, Step


class Pace:
    """Watches the events of one picture; the first step, which also warms up, tells nothing."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._first: tuple[int, float] | None = None

    def left(self, event: Queued | Stage | Step) -> float | None:
        """Return the seconds until the last step, or None while that cannot be told."""
        if not isinstance(event, Step):
            self._first = None
            return None
        now = self._clock()
        if self._first is None:
            self._first = event.index, now
            return None
        index, then = self._first
        return (now - then) / (event.index - index) * (event.total - event.index)
