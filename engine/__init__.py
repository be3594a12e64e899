"""One request at a time, from any front, through a worker to a result."""

from engine.engine import Engine
from engine.worker import Settings

__all__ = ["Engine", "Settings"]
