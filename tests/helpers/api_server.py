"""The routes for programs on a real server in the tests' own process, before an engine that tests can look into."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from starlette.applications import Starlette

from engine import Engine
from web.api_keys import ApiKeys
from web.programs import routes


@contextmanager
def api_server(engine: Engine, keys: ApiKeys | None = None) -> Iterator[str]:
    """Serve the routes of an engine while the block lasts; yield their address."""
    app = Starlette(routes=routes(engine, keys or ApiKeys(), closed=False))
    server = uvicorn.Server(
        uvicorn.Config(app, port=0, log_level="error", lifespan="off", timeout_graceful_shutdown=10)
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/v1"
    finally:
        server.should_exit = True
        thread.join()


def waiting(engine: Engine) -> int:
    """Return how many requests an engine has in hand, waiting or worked on."""
    turns = engine._turns
    return len(turns._waiting) + (turns._working is not None)


def wait_until_idle(engine: Engine) -> None:
    """Wait until an engine has nothing in hand: its worker is shared, and serves one engine at a time."""
    deadline = time.monotonic() + 60
    while waiting(engine):
        assert time.monotonic() < deadline, "a run goes on"
        time.sleep(0.01)
