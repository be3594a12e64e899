"""The one queue in front of the engine: bounded, and fair among clients."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from core.errors import QueueFull


class FairQueue:
    """A bounded, fair queue: one client's many requests do not delay another client's one.

    A ticket's turn comes when nobody works and no other ticket ranks before it. Tickets are ranked by how many
    requests their client has waiting before them, then by arrival.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._changed = threading.Condition()
        self._waiting: list[_Ticket] = []
        self._working: _Ticket | None = None
        self._served = 0

    @contextmanager
    def ticket(self, client: str) -> Iterator[_Ticket]:
        """Hold a place in the queue, then the turn, until the block is left in whatever way.

        Raises:
            QueueFull: `limit` requests are waiting already.
        """
        with self._changed:
            if len(self._waiting) >= self.limit:
                raise QueueFull(self.limit)
            mine = _Ticket(client, rank=(self._round(client), time.monotonic_ns()))
            self._waiting.append(mine)
        try:
            yield mine
        finally:
            with self._changed:
                if self._working is mine:
                    self._working = None
                else:
                    self._waiting.remove(mine)
                self._changed.notify_all()

    def wait(self, ticket: _Ticket, seconds: float) -> int:
        """Wait up to `seconds` for the ticket's turn; return how many requests come before it, 0 when it has begun."""
        with self._changed:
            if self._ahead(ticket):
                self._changed.wait_for(lambda: not self._ahead(ticket), timeout=seconds)
            ahead = self._ahead(ticket)
            if not ahead and self._working is not ticket:
                self._waiting.remove(ticket)
                self._working = ticket
                self._served = max(self._served, ticket.rank[0])
            return ahead

    def _round(self, client: str) -> int:
        """Return the round that a client's next request belongs to: one after its last, and not before today's."""
        mine = [ticket.rank[0] for ticket in (*self._waiting, self._working) if ticket and ticket.client == client]
        return max([self._served, *(number + 1 for number in mine)])

    def _ahead(self, ticket: _Ticket) -> int:
        if self._working is ticket:
            return 0
        return (self._working is not None) + sum(other.rank < ticket.rank for other in self._waiting)


@dataclass(frozen=True, eq=False)
class _Ticket:
    client: str
    rank: tuple[int, int]
