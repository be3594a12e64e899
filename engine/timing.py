"""Measures the stages of a run, and estimates how long a picture still takes from how long its steps took."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from typing import Generic, TypeVar

from core.events import Event, Queued, Stage, Step, TileDone

T = TypeVar("T")


class Returning(Generic[T]):
    """Iterates over a generator of events, and keeps what it returns in `value`."""

    value: T

    def __init__(self, events: Generator[Event, None, T]) -> None:
        self._events = events

    def __iter__(self) -> Iterator[Event]:
        return self

    def __next__(self) -> Event:
        try:
            return next(self._events)
        except StopIteration as end:
            self.value = end.value
            raise

    def close(self) -> None:
        """Stop the generator where it is."""
        self._events.close()


class Stopwatch:
    """Measures the wall seconds of each stage, from the events that it is shown."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._entered: list[tuple[str, float]] = []

    def see(self, event: Event) -> None:
        """Note when a stage begins."""
        if isinstance(event, Stage):
            self._entered.append((event.name, time.perf_counter()))

    def read(self) -> dict[str, float]:
        """Return the seconds of each stage so far, by its name, and of everything as `total`."""
        now = time.perf_counter()
        seconds: dict[str, float] = {}
        ends = [when for _, when in self._entered[1:]] + [now]
        for (stage, began), ended in zip(self._entered, ends, strict=True):
            seconds[stage] = seconds.get(stage, 0.0) + ended - began
        seconds["total"] = now - self._started
        return {stage: round(taken, 3) for stage, taken in seconds.items()}


class Pace:
    """Watches the events of one picture; the first step, which also warms up, tells nothing."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._first: tuple[int, float] | None = None

    def left(self, event: Queued | Stage | Step | TileDone) -> float | None:
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
