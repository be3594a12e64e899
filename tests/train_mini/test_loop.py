"""The training loop: a training that was stopped and resumed ends with the same weights, to the bit."""

import random
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from train_mini import loop
from train_mini.loop import Training, trained
from train_mini.muon import muon_and_adamw

STEPS = 12


class Killed(Exception):
    """Stands for the end of a process that could not save its state."""


def kill() -> None:
    raise Killed


def run(target: Path, stop_at: int | None = None, stop: Callable[[], None] = kill) -> tuple[torch.nn.Module, list[str]]:
    """Train a few layers with every kind of random numbers; return the model and what its losses and reports were."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Dropout(0.2), torch.nn.Linear(8, 3))
    sources = random.Random(1), np.random.default_rng(2), torch.Generator().manual_seed(3)
    seen: list[str] = []

    def loss(step: int) -> torch.Tensor:
        if step == stop_at:
            stop()
        inputs = torch.randn(4, 6, generator=sources[2]) * sources[1].normal() + sources[0].gauss()
        value: torch.Tensor = model(inputs).square().mean() / 2
        seen.append(f"{step}: {float(value.detach()).hex()}")
        return value

    optimizers = muon_and_adamw(
        model, lambda name: name.endswith("weight"), 0.03, 1e-3, lambda step: 1 / (step + 1), torch.float32
    )
    training = Training(
        target,
        model,
        optimizers,
        STEPS,
        loss,
        sources,
        parts=2,
        average=lambda step: 0.1 if step > 3 else 1.0,
        report=lambda done: seen.append(f"report {done}"),
        report_every=5,
    )
    with trained(training):
        assert training.state.exists()
    return model, seen


@pytest.mark.parametrize("stop_at", [0, 2, 6, STEPS - 1])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_training_stopped_by_a_signal_resumes_to_the_bit(
    tmp_path: Path, number: signal.Signals, stop_at: int
) -> None:
    whole, expected = run(tmp_path / "whole.pt")
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(SystemExit) as stop:
        run(tmp_path / "resumed.pt", stop_at, lambda: signal.raise_signal(number))
    assert stop.value.code == 128 + number
    assert handlers == [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    stopped, seen = run(tmp_path / "resumed.pt")
    # The signal came within a step, which was finished first.
    first = next((place for place, line in enumerate(expected) if line.startswith(f"{stop_at + 1}: ")), len(expected))
    assert seen == [line for line in expected[first:] if line != f"report {stop_at + 1}"]
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, stopped.state_dict()[name])
    assert list(tmp_path.iterdir()) == []


def test_a_killed_training_resumes_from_its_last_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = run(tmp_path / "whole.pt")
    monkeypatch.setattr(loop, "SAVE_SECONDS", -1)
    with pytest.raises(Killed):
        run(tmp_path / "resumed.pt", 7)
    resumed, seen = run(tmp_path / "resumed.pt")
    assert seen[0].startswith("7: ")
    assert all(torch.equal(tensor, resumed.state_dict()[name]) for name, tensor in whole.state_dict().items())


def test_the_state_is_kept_until_the_weights_are(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    training = Training(
        tmp_path / "resumed.pt", model, [(optimizer, lambda step: 0.1)], 2, lambda step: model.weight.sum()
    )
    with pytest.raises(Killed), trained(training):
        kill()
    weights = model.weight.clone()
    assert training.state.exists()
    with trained(training):
        assert torch.equal(weights, model.weight)
    assert not training.state.exists()
