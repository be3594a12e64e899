"""A progress bar over a run's events, for notebooks and terminals."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing

from core.events import Event, Step, progress_text


def with_bar(events: Generator[Event, None, None]) -> Generator[Event, None, None]:
    """Yield the events of a run, and show how far it is by a bar of tqdm's, which is a widget where there is one."""
    from tqdm.auto import tqdm  # only here: it looks whether this is a notebook

    with closing(events), tqdm(unit="step", leave=False) as bar:
        for event in events:
            if isinstance(event, Step):
                bar.total = event.total
                bar.update(event.index - bar.n)
            elif text := progress_text(event):
                bar.set_description_str(text)
            yield event
