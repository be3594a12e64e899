"""Shared fixtures: the real engine and the real pipeline on the miniature, built once for all tests."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from core import environment
from core.events import Result
from core.request import TextToImage
from engine import Engine, Settings
from tests.helpers.browsing import browser, contexts, open_page, open_tab  # noqa: F401 (fixtures)
from tests.helpers.command_line import command_here  # noqa: F401 (a fixture)

if TYPE_CHECKING:
    from diffusion.pipeline import Pipeline

# Before anything imports torch or gradio, as every front does.
environment.prepare_environment(os.environ)

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def engine() -> Engine:
    """An engine that draws with the miniature on the CPU, whatever else this machine has."""
    return Engine(Settings(weights="mini", device="cpu"))


@pytest.fixture(scope="session")
def pipeline() -> Pipeline:
    """The miniature's pipeline with both transformers loaded."""
    import torch

    from diffusion.pipeline import Pipeline
    from hub import inventory
    from tests.helpers.plans import everything_stays

    built = Pipeline("cpu", torch.float32, everything_stays())
    for model in ("base", "turbo"):
        for _ in built.load(inventory.choose("mini", TextToImage.mode, model), model):
            pass
    return built


@pytest.fixture(scope="session")
def draw(engine: Engine) -> Callable[..., Result]:
    """Draw one image: `draw(prompt=..., seed=...)`; raises the error of a failed run."""

    def draw(**values: object) -> Result:
        return engine.draw(TextToImage.parse(**{"prompt": "a fox on a black background", "seed": 7, **values}))

    return draw
