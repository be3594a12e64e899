"""Making ready before the first request: once, beside the page, and never in a request's way."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

import pytest

from core.errors import RequestError
from core.events import Failure, Result, Stage, Step
from core.messages import Message
from core.request import Model, TextToImage, WeightsChoice
from diffusion import lazy_imports
from engine import Engine, Settings
from engine.worker import LocalWorker
from engine.worker_zerogpu import ZeroGpuWorker
from hub import inventory
from tests.helpers.workers import pipeline_of, worker_of


def ask(**values: object) -> TextToImage:
    return TextToImage.parse(**{"prompt": "a fox on a black background", "seed": 7, "steps": 2, **values})


@pytest.fixture
def fresh() -> Engine:
    return Engine(Settings(weights="mini", device="cpu"))


def test_the_first_picture_loads_nothing_again(fresh: Engine, draw: Callable[..., Result]) -> None:
    fresh.warm_up()
    *events, result = fresh.run(ask())
    assert isinstance(result, Result)
    assert {event.name for event in events if isinstance(event, Stage)} <= {
        "starting",  # until the warm-up has ended
        "encoding",
        "denoising",
        "decoding",
    }
    assert "loading" not in result.seconds
    assert result.png == draw(steps=2).png


def test_many_visitors_start_it_once(fresh: Engine, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for _ in range(5):
        fresh.warm_up()
    worker_of(fresh)._warming.join()
    built = pipeline_of(fresh)
    fresh.warm_up()
    assert not worker_of(fresh)._warming.is_alive()
    assert pipeline_of(fresh) is built
    assert caplog.text.count("warmed up") == 1


def test_a_request_that_comes_meanwhile_waits_and_can_be_cancelled(fresh: Engine) -> None:
    with lazy_imports._one_at_a_time:  # as while somebody imports
        fresh.warm_up()
        run, cancelled = fresh.run(ask()), fresh.run(ask())
        assert [next(cancelled), next(cancelled)] == [Stage("starting"), Stage("starting")]
        cancelled.close()
        assert next(run) == Stage("starting")
    *events, result = run
    assert isinstance(result, Result)
    assert "starting" in result.seconds
    assert any(isinstance(event, Step) for event in events)


def test_after_a_request_there_is_nothing_to_warm_up(fresh: Engine) -> None:
    run = fresh.run(ask())
    next(run)
    fresh.warm_up()
    assert not worker_of(fresh)._warming.is_alive()
    assert isinstance(list(run)[-1], Result)


def test_a_failure_is_logged_and_told_by_the_first_request(caplog: pytest.LogCaptureFixture) -> None:
    engine = Engine(Settings(weights="mini", device="abacus"))
    engine.warm_up()
    worker_of(engine)._warming.join()
    assert "not warmed up: device" in caplog.text
    assert worker_of(engine).pipeline is None
    failure = list(engine.run(ask()))[-1]
    assert isinstance(failure, Failure)
    assert (failure.code, failure.values["field"]) == (RequestError.code, "device")


class WithRealWeights(LocalWorker):
    """As where the real weights are complete; there are no files, so that reading any would fail."""

    def weights(self, mode: str, model: Model, asked: WeightsChoice, checkpoint: str = "") -> inventory.Chosen:
        return inventory.Chosen("full", {}, "", Message("test", "a test"))


def test_the_real_weights_are_never_loaded_ahead(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    worker = WithRealWeights(Settings(device="cpu"))
    worker.warm_up()
    worker._warming.join()
    assert "not warmed up" not in caplog.text
    assert lazy_imports.is_loaded("diffusion.pipeline")
    assert (worker.pipeline, worker.plan) == (None, None)


def test_weights_that_are_missing_are_the_requests_concern(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(tmp_path))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    engine = Engine(Settings(weights="full", device="cpu"))
    engine.warm_up()
    worker_of(engine)._warming.join()
    assert "not warmed up" in caplog.text
    (failure,) = engine.run(ask())
    assert isinstance(failure, Failure)
    assert failure.code == "weights_missing"


def test_zerogpu_warms_nothing_up() -> None:
    worker, before = object.__new__(ZeroGpuWorker), threading.enumerate()  # a whole one would load everything at once
    worker.warm_up()
    assert threading.enumerate() == before
