"""The one queue in front of the engine: bounded, and fair among clients, and for each among its sessions."""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from core.errors import QueueFull

UNLIMITED = ""  # the client of whom only sessions are known: those on this machine itself


class FairQueue:
    """A bounded, fair queue: one client's many requests do not delay another client's one.

    A ticket's turn comes when nobody works and no other ticket ranks before it. Tickets are ranked by how many requests
    their client has waiting before them, then by arrival; among a client's own the same holds for its sessions.

    Args:
        limit: how many may wait.
        client_limit: how many of one client may wait; UNLIMITED has no such limit, and so has everyone where it is 0.
    """

    def __init__(self, limit: int, client_limit: int = 0) -> None:
        self.limit = limit
        self.client_limit = client_limit
        self._changed = threading.Condition()
        self._arrivals = itertools.count()
        self._waiting: list[_Ticket] = []  # by arrival
        self._working: _Ticket | None = None
        self._line: list[_Ticket] | None = None  # the same in the order of their turns, where it is known
        # The round that the next ticket to begin belongs to: of a client, and of a session of a client.
        self._rounds: dict[tuple[str, ...], int] = {}
        self._newest: dict[tuple[str, ...], int] = {}  # the latest round that has begun: of all, and within a client

    @contextmanager
    def ticket(self, client: str, session: str = "") -> Iterator[_Ticket]:
        """Hold a place in the queue, then the turn, until the block is left in whatever way.

        Raises:
            QueueFull: `limit` requests are waiting already, or `client_limit` of this client.
        """
        with self._changed:
            if (most := self._full(client)) is not None:
                raise QueueFull(most)
            mine = _Ticket(client, session, next(self._arrivals))
            self._rounds.setdefault((client,), self._newest.get((), 0))
            self._rounds.setdefault((client, session), self._newest.get((client,), 0))
            self._waiting.append(mine)
            self._line = None
        try:
            yield mine
        finally:
            with self._changed:
                if self._working is mine:
                    self._working = None
                else:
                    self._waiting.remove(mine)
                    self._line = None
                self._forget(mine)
                self._changed.notify_all()

    def is_full(self, client: str) -> bool:
        """Whether another request of a client would be refused now."""
        with self._changed:
            return self._full(client) is not None

    def wait(self, ticket: _Ticket, seconds: float) -> int:
        """Wait up to `seconds` for the ticket's turn; return how many requests come before it, 0 when it has begun."""
        with self._changed:
            if seconds and self._ahead(ticket):
                self._changed.wait_for(lambda: not self._ahead(ticket), timeout=seconds)
            ahead = self._ahead(ticket)
            if not ahead and self._working is not ticket:
                self._begin(ticket)
            return ahead

    def _full(self, client: str) -> int | None:
        """Return the limit that another request of a client would exceed."""
        if len(self._waiting) >= self.limit:
            return self.limit
        own = sum(ticket.client == client for ticket in self._waiting)
        return self.client_limit if client != UNLIMITED and 0 < self.client_limit <= own else None

    def _begin(self, ticket: _Ticket) -> None:
        self._waiting.remove(ticket)
        self._working, self._line = ticket, None
        client, session = (ticket.client,), (ticket.client, ticket.session)
        for among, key in (((), client), (client, session)):
            self._newest[among] = max(self._newest.get(among, 0), self._rounds[key])
            self._rounds[key] += 1

    def _forget(self, ticket: _Ticket) -> None:
        """Forget the rounds of a client and a session that have nothing in the queue any more."""
        here = [*self._waiting, *([self._working] if self._working else [])]
        if not any((other.client, other.session) == (ticket.client, ticket.session) for other in here):
            del self._rounds[ticket.client, ticket.session]
        if not any(other.client == ticket.client for other in here):
            del self._rounds[ticket.client,]
            self._newest.pop((ticket.client,), None)

    def _ahead(self, ticket: _Ticket) -> int:
        if self._working is ticket:
            return 0
        if self._line is None:
            self._line = self._ranked()
        return (self._working is not None) + self._line.index(ticket)

    def _ranked(self) -> list[_Ticket]:
        """Return the waiting tickets in the order of their turns."""
        line: list[tuple[int, int, _Ticket]] = []
        for client in dict.fromkeys(ticket.client for ticket in self._waiting):
            before: Counter[str] = Counter()
            own: list[tuple[int, int, _Ticket]] = []
            for ticket in self._waiting:
                if ticket.client == client:
                    own.append((self._rounds[client, ticket.session] + before[ticket.session], ticket.arrival, ticket))
                    before[ticket.session] += 1
            first = self._rounds[client,]
            line += [(first + place, ticket.arrival, ticket) for place, (*_, ticket) in enumerate(sorted(own))]
        return [ticket for *_, ticket in sorted(line)]


@dataclass(frozen=True, eq=False)
class _Ticket:
    client: str
    session: str
    arrival: int  # no two have the same
