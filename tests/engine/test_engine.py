"""The engine: one way through for every front, on the real miniature."""

import io
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from core import metadata
from core.errors import QueueFull, RequestError, WeightsMissing
from core.events import Failure, Queued, Result, Stage, Step
from core.request import TextToImage
from engine import Engine, Settings
from engine.fair_queue import FairQueue
from engine.mode_generate import examples
from hub import parts
from tests.helpers.workers import pipeline_of, worker_of


def ask(**values: object) -> TextToImage:
    return TextToImage.parse(**{"prompt": "a fox on a black background", "seed": 7, "steps": 2, **values})


def test_run_ends_with_one_result(engine: Engine) -> None:
    *events, result = engine.run(ask(seed=0))
    assert isinstance(result, Result)
    assert all(isinstance(event, Stage | Step) for event in events)
    assert [event for event in events if isinstance(event, Step)] == [Step(1, 2), Step(2, 2)]
    assert isinstance(result.request, TextToImage)
    assert result.request.seed > 0
    assert result.weights == "mini"
    assert result.png.startswith(b"\x89PNG")
    assert set(result.seconds) >= {"encoding", "denoising", "decoding", "total"}


def test_same_request_gives_the_same_file_and_another_seed_does_not(draw: Callable[..., Result]) -> None:
    first = draw().png
    assert draw().png == first
    assert draw(seed=8).png != first


def test_a_fresh_engine_gives_the_same_file(draw: Callable[..., Result]) -> None:
    fresh = Engine(Settings(weights="mini", device="cpu"))
    assert fresh.draw(ask(steps=8)).png == draw(steps=8).png


def test_switching_models_back_and_forth_changes_nothing(draw: Callable[..., Result]) -> None:
    turbo = draw().png
    base = draw(model="base").png
    assert pixels(turbo) != pixels(base)
    assert draw().png == turbo
    assert draw(model="base").png == base


def test_guidance_and_negative_prompt_change_base(draw: Callable[..., Result]) -> None:
    images = [
        pixels(draw(model="base", **values).png)
        for values in ({}, {"cfg": 1}, {"cfg": 2}, {"negative_prompt": "black background"})
    ]
    assert len(set(images)) == len(images)


def pixels(png: bytes) -> bytes:
    import io

    return Image.open(io.BytesIO(png)).tobytes()


def test_image_names_its_weights_and_replays_itself(draw: Callable[..., Result], tmp_path: Path) -> None:
    result = draw(model="base", negative_prompt="blue background")
    path = tmp_path / "picture.png"
    sidecar = metadata.save(result, path)
    assert sidecar.is_file()
    found = metadata.read_picture(path)
    assert set(found.fingerprints) == set(parts.needs("generate", "base"))
    assert draw(**found.values).png == result.png


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"width": 1024}, "width"),
        ({"cfg": 4}, "cfg"),
        ({"negative_prompt": "blue"}, "negative_prompt"),
    ],
)
def test_failure_is_an_event_and_the_next_request_works(engine: Engine, values: dict[str, Any], field: str) -> None:
    (failure,) = engine.run(ask(**values))
    assert isinstance(failure, Failure)
    assert failure.values["field"] == field
    assert isinstance(list(engine.run(ask()))[-1], Result)
    with pytest.raises(RequestError):
        engine.draw(ask(**values))


def test_fault_inside_is_an_event_and_the_next_request_works(
    draw: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(Settings(weights="mini", device="cpu"))
    before = engine.draw(ask()).png
    # A real fault: a model whose weights are gone.
    pipeline_of(engine).pipe.vae_decoder.to("meta")
    *_, failure = engine.run(ask())
    assert isinstance(failure, Failure)
    assert (failure.code, failure.exit_code) == ("internal", 1)
    assert engine.draw(ask()).png == before


def test_weights_that_changed_on_disk_are_loaded_again() -> None:
    engine = Engine(Settings(weights="mini", device="cpu"))
    before, loaded = engine.draw(ask(steps=1)).png, pipeline_of(engine)
    file = engine.weights_in_use("generate", "turbo").files["turbo"][0]
    status = file.stat()
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1_000_000_000))
    try:
        assert engine.draw(ask(steps=1)).png == before
        again = pipeline_of(engine)
        assert again is not loaded
        assert engine.draw(ask(steps=1)).png == before
        assert pipeline_of(engine) is again
    finally:
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_unknown_device_is_refused() -> None:
    (*_, failure) = Engine(Settings(weights="mini", device="tpu")).run(ask())
    assert isinstance(failure, Failure)
    assert failure.exit_code == 2
    assert failure.values["field"] == "device"


def test_missing_weights_are_a_failure_that_names_them() -> None:
    (failure,) = Engine(Settings(weights="full", device="cpu")).run(ask())
    assert isinstance(failure, Failure)
    assert (failure.code, failure.exit_code) == ("weights_missing", WeightsMissing.exit_code)
    assert "Z-Image-Turbo" in failure.text


def test_unknown_words_are_named(draw: Callable[..., Result]) -> None:
    notes = draw(prompt="a fox riding a quixotic zeppelin, black background").notes
    (note,) = [note for note in notes if note.code == "unknown_words"]
    assert "quixotic" in note.values["words"]
    assert "quixotic" in str(note)
    assert "fox" not in note.values["words"]
    assert not draw(prompt="a small mirrored fox in the middle, black background").notes


def test_the_seed_chooses_what_the_prompt_leaves_open(draw: Callable[..., Result]) -> None:
    results = [draw(seed=seed) for seed in range(1, 9)]
    chosen = [note.values for result in results for note in result.notes if note.code == "seed_chose"]
    assert len(chosen) == len(results)
    assert len({values["prompt"] for values in chosen}) > 2
    for result in results:
        assert isinstance(result.request, TextToImage)
        assert result.request.prompt == "a fox on a black background"
    again = draw(prompt=chosen[0]["prompt"], seed=1)  # what was drawn is what the note names
    with Image.open(io.BytesIO(again.png)) as redrawn, Image.open(io.BytesIO(results[0].png)) as other:
        assert redrawn.tobytes() == other.tobytes()


def test_examples_mean_something_to_the_weights_they_are_for(engine: Engine) -> None:
    import mini.config

    assert examples("full")
    for prompt in examples("mini"):
        assert mini.config.unknown_words(prompt) == []


def test_second_request_waits_and_is_told_its_place(engine: Engine) -> None:
    first = engine.run(ask(), client="a")
    next(first)
    second, third = engine.run(ask(), client="b"), engine.run(ask(), client="c")
    assert next(second) == Queued(1)
    assert next(third) == Queued(2)
    first.close()
    assert isinstance(next(second), Stage)
    assert next(third) == Queued(1)
    second.close()
    assert isinstance(list(third)[-1], Result)


def test_waiting_request_can_be_cancelled(engine: Engine) -> None:
    first = engine.run(ask(), client="a")
    next(first)
    waiting, last = engine.run(ask(), client="b"), engine.run(ask(), client="c")
    next(waiting)
    assert next(last) == Queued(2)
    waiting.close()
    assert next(last) == Queued(1)
    first.close()
    last.close()


def test_full_queue_is_refused() -> None:
    engine = Engine(Settings(weights="mini", device="cpu", queue_limit=1))
    first = engine.run(ask())
    next(first)
    second = engine.run(ask())
    next(second)
    (failure,) = engine.run(ask())
    assert isinstance(failure, Failure)
    assert (failure.code, failure.http_status) == ("queue_full", QueueFull.http_status)
    first.close()
    assert isinstance(list(second)[-1], Result)


def test_two_threads_at_once_both_get_their_own_image(engine: Engine, draw: Callable[..., Result]) -> None:
    expected = {seed: draw(seed=seed, steps=2).png for seed in (1, 2)}
    results: dict[int, bytes] = {}
    threads = [
        threading.Thread(target=lambda seed=seed: results.update({seed: engine.draw(ask(seed=seed), str(seed)).png}))
        for seed in expected
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == expected


def test_run_that_is_abandoned_leaves_the_queue(engine: Engine) -> None:
    run = engine.run(ask())
    next(run)
    del run
    assert isinstance(list(engine.run(ask()))[-1], Result)


def test_one_clients_many_requests_do_not_delay_anothers() -> None:
    turns = FairQueue(limit=10)
    order = []
    with turns.ticket("working") as working:
        assert turns.wait(working, 0) == 0
        held = [turns.ticket(client) for client in ("many", "many", "many", "one")]
        tickets = [context.__enter__() for context in held]
        assert [turns.wait(ticket, 0) for ticket in tickets] == [1, 3, 4, 2]
    waiting = dict(zip(tickets, held, strict=True))
    while waiting:
        (ticket,) = [ticket for ticket in waiting if turns.wait(ticket, 0) == 0]
        order.append(ticket.client)
        waiting.pop(ticket).__exit__(None, None, None)
    assert order == ["many", "one", "many", "many"]


def order_of(turns: FairQueue, callers: list[tuple[str, str]]) -> list[int]:
    """Return the order in which callers (client and session) get their turn, of whom all wait behind somebody."""
    order: list[int] = []
    with turns.ticket("working") as working:
        assert turns.wait(working, 0) == 0
        held = [turns.ticket(*caller) for caller in callers]
        tickets = [context.__enter__() for context in held]
    while len(order) < len(callers):
        (next_one,) = [
            index for index, ticket in enumerate(tickets) if index not in order and not turns.wait(ticket, 0)
        ]
        order.append(next_one)
        held[next_one].__exit__(None, None, None)
    return order


def test_new_sessions_do_not_evade_fairness_and_share_a_client_fairly() -> None:
    many = [("a", f"session {number}") for number in range(4)]
    assert order_of(FairQueue(limit=10), [*many, ("b", "one")]) == [0, 4, 1, 2, 3]
    school = [("a", "x"), ("a", "x"), ("a", "x"), ("a", "y")]
    assert order_of(FairQueue(limit=10), school) == [0, 3, 1, 2]


def test_one_client_takes_no_more_places_than_it_may() -> None:
    turns = FairQueue(limit=5, client_limit=2)
    with turns.ticket("a", "x"), turns.ticket("a", "y"):
        assert turns.is_full("a")
        assert not turns.is_full("b")
        with pytest.raises(QueueFull, match="2 requests are waiting"), turns.ticket("a", "z"):
            raise AssertionError
        with turns.ticket(""), turns.ticket(""), turns.ticket(""):  # this machine's own are told apart by nothing
            assert turns.is_full("b")
    assert vars(turns)["_rounds"] == {}
    assert len(vars(turns)["_newest"]) <= 1


def test_importing_the_engine_builds_nothing() -> None:
    assert worker_of(Engine()).pipeline is None
