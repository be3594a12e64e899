"""The loop of every training: steps, log lines, and a state file from which a stopped training resumes."""

from __future__ import annotations

import logging
import random
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import numpy as np
import torch

from core.whole_file import replacing
from engine.estimate import duration_text

logger = logging.getLogger(__name__)

WORK = Path.home() / ".cache" / "z-image-studio" / "train_mini"  # icons, caches, state files and sheets
LOG_SECONDS, SAVE_SECONDS = 20, 300  # between two log lines, and between two writes of the state file

Rate = Callable[[int], float]  # step -> learning rate
Model = TypeVar("Model", bound=torch.nn.Module)
RandomSource = random.Random | np.random.Generator | torch.Generator


@dataclass
class Training:
    """What differs from one training to the next."""

    target: Path  # where the weights will be; the state file is beside it
    model: torch.nn.Module
    optimizers: Sequence[tuple[torch.optim.Optimizer, Rate]]
    steps: int
    loss: Callable[[int], torch.Tensor]  # step -> the loss of its batch, or of one of its `parts`
    random_sources: Sequence[RandomSource] = ()  # which `loss` draws from, besides torch's own
    parts: int = 1  # each is backpropagated separately, to save memory
    average: Callable[[int], float] = lambda step: 1.0  # how far the averaged weights follow; 1 copies the weights
    report: Callable[[int], None] = lambda done: None  # called after every `report_every` steps and the last
    report_every: int = 1

    @property
    def name(self) -> str:
        """What log lines call it."""
        return self.target.stem

    @property
    def state(self) -> Path:
        """The state file."""
        return self.target.with_name(f"{self.name}_state.pt")


@contextmanager
def trained(t: Training) -> Iterator[None]:
    """Train, resuming from the state file where there is one, then delete it after the block, which keeps the weights.

    The model then has the averaged weights.

    Raises:
        SystemExit: SIGINT or SIGTERM asked to stop; the state is saved.
    """
    average = {name: tensor.clone() for name, tensor in t.model.state_dict().items()}
    first = _resume(t, average)
    started = logged = saved = time.monotonic()
    smooth = None
    with _signals() as received:
        for step in range(first, t.steps):
            loss = _step(t, step)
            for name, tensor in t.model.state_dict().items():
                average[name].lerp_(tensor, t.average(step))
            smooth = loss if smooth is None else smooth + 0.03 * (loss - smooth)
            done, now = step + 1, time.monotonic()
            if step == first or done == t.steps or now - logged > LOG_SECONDS:
                left = (now - started) / (done - first) * (t.steps - done)
                rest = f"{duration_text(left)} left" if left else "done"
                logger.info("%s step %d/%d, loss %.4f, %s", t.name, done, t.steps, smooth, rest)
                logged = now
            if done % t.report_every == 0 or done == t.steps:
                t.report(done)
            if received or done == t.steps or now - saved > SAVE_SECONDS:
                _save(t, average, done)
                saved = now
            if received:
                logger.info("%s stopped at step %d/%d; the same command resumes it", t.name, done, t.steps)
                raise SystemExit(128 + received[0])
    t.model.load_state_dict(average)
    yield
    t.state.unlink(missing_ok=True)


def plateau(step: int, steps: int, falling_share: float) -> float:
    """Return the factor on a learning rate: a short rise, a plateau, over the last share of steps a fall to 5 %."""
    rest = (steps - step) / (falling_share * steps)
    return min(1.0, (step + 1) / 50) * min(1.0, 0.05 + 0.95 * rest)


def load_rounded(model: Model, path: Path, device: torch.device) -> Model:
    """Return a frozen model with trained weights, rounded to bfloat16 as the exported file holds them."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    model.load_state_dict({name: tensor.bfloat16().float() for name, tensor in state.items()})
    return model.to(device).eval().requires_grad_(False)


def _step(t: Training, step: int) -> float:
    """Take one step and return its loss."""
    for optimizer, rate in t.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        optimizer.zero_grad()
    total = 0.0
    for _ in range(t.parts):
        loss = t.loss(step)
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        total += loss.item()
    torch.nn.utils.clip_grad_norm_(t.model.parameters(), 1.0)
    for optimizer, _ in t.optimizers:
        optimizer.step()
    return total


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Yield a list to which SIGINT and SIGTERM are added as they arrive, instead of ending the process."""
    received: list[int] = []

    def receive(number: int, frame: FrameType | None) -> None:
        received.append(number)

    previous = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


# ---- the state file --------------------------------------------------------------------------------------------------


def _save(t: Training, average: dict[str, torch.Tensor], done: int) -> None:
    state = {
        "step": done,
        "model": t.model.state_dict(),
        "average": average,
        "optimizers": [optimizer.state_dict() for optimizer, _ in t.optimizers],
        "random_sources": [_random_state(source) for source in t.random_sources],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all(),
    }
    with replacing(t.state) as file:
        torch.save(state, file)


def _resume(t: Training, average: dict[str, torch.Tensor]) -> int:
    """Return the step to begin with, after bringing everything to where the state file was written."""
    if not t.state.exists():
        return 0
    state = torch.load(t.state, map_location="cpu", weights_only=True)
    t.model.load_state_dict(state["model"])
    for name, tensor in state["average"].items():
        average[name].copy_(tensor)
    for (optimizer, _), saved in zip(t.optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    for source, saved in zip(t.random_sources, state["random_sources"], strict=True):
        _set_random_state(source, saved)
    torch.set_rng_state(state["torch"])
    torch.cuda.set_rng_state_all(state["cuda"])
    step: int = state["step"]
    logger.info("%s resumes after step %d/%d", t.name, step, t.steps)
    return step


def _random_state(source: RandomSource) -> Any:
    if isinstance(source, np.random.Generator):
        return source.bit_generator.state
    return source.get_state() if isinstance(source, torch.Generator) else source.getstate()


def _set_random_state(source: RandomSource, state: Any) -> None:
    if isinstance(source, np.random.Generator):
        source.bit_generator.state = state
    elif isinstance(source, torch.Generator):
        source.set_state(state)
    else:
        source.setstate(state)
