"""What tests look at behind an engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine import Engine
from engine.worker import LocalWorker

if TYPE_CHECKING:
    from diffusion.pipeline import Pipeline


def worker_of(engine: Engine) -> LocalWorker:
    """Return the worker of an engine that draws in this process."""
    assert isinstance(engine.worker, LocalWorker)
    return engine.worker


def pipeline_of(engine: Engine) -> Pipeline:
    """Return the pipeline that an engine has built."""
    pipeline = worker_of(engine).pipeline
    assert pipeline is not None
    return pipeline
