"""Measures the wall seconds of each stage of a run. Knows nothing of what the stages do."""

from __future__ import annotations

import time
from collections.abc import Generator
from typing import TypeVar

from core.events import Event, Stage

T = TypeVar("T")


class Stopwatch:
    """Measures the wall seconds of each stage that passes by."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._entered: list[tuple[str, float]] = []

    def watch(self, events: Generator[Event, None, T]) -> Generator[Event, None, T]:
        """Pass events on, noting when each stage begins; returns what `events` returns."""
        while True:
            try:
                event = next(events)
            except StopIteration as done:
                return done.value
            if isinstance(event, Stage):
                self._entered.append((event.name, time.perf_counter()))
            yield event

    def read(self) -> dict[str, float]:
        """Return the seconds of each stage so far, by its name, and of everything as `total`."""
        now = time.perf_counter()
        seconds: dict[str, float] = {}
        ends = [when for _, when in self._entered[1:]] + [now]
        for (stage, began), ended in zip(self._entered, ends, strict=True):
            seconds[stage] = seconds.get(stage, 0.0) + ended - began
        seconds["total"] = now - self._started
        return {stage: round(taken, 3) for stage, taken in seconds.items()}
