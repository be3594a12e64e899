"""What the page shows of a run: its pictures, a second try, and the change that fixes a failure."""

import asyncio
import json
import tempfile
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import gradio as gr
import pytest

from core import metadata
from core.errors import BrokenPicture, OutOfMemory, RequestError, StudioError
from core.events import Event, Failure, Result, Retry, Step
from core.messages import Message
from core.request import TextToImage
from core.sizes import IMAGE_SIZES
from engine import Engine
from web import run, situation
from web.language import english, say_in
from web.output import Output
from web.strip import Past

PROMPT = "a fox on a black background"


def offered(error: StudioError, engine: Engine, **fields: object) -> dict[str, Any]:
    """What a failure offers to change."""
    request = TextToImage.parse(prompt=PROMPT, **fields)
    return dict(run.pointed(Failure.of(error), engine, request).values)


def test_out_of_memory_offers_a_smaller_size_else_no_lora(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    error = OutOfMemory("the memory did not suffice")
    assert offered(error, engine) == {}  # the miniature has one size
    assert offered(error, engine, lora="style.safetensors") == {"field": "lora"}
    monkeypatch.setattr(situation, "IMAGE_SIZES", {"mini": IMAGE_SIZES["full"]})  # as if larger ones were drawn here
    assert offered(error, engine, width=1360, height=768) == {"field": "size", "nearest": "1024 x 576"}
    assert offered(error, engine) == {"field": "size", "nearest": "768 x 768"}


def test_a_broken_picture_offers_to_do_without_the_lora(engine: Engine) -> None:
    error = BrokenPicture("no picture came of it", defect="nan", stage="denoising")
    assert offered(error, engine, lora="style.safetensors")["field"] == "lora"
    assert "field" not in offered(error, engine)


def test_a_failure_that_names_its_field_keeps_it(engine: Engine) -> None:
    error = RequestError("steps", 100, "1 to 7", nearest=7)
    assert offered(error, engine, lora="style.safetensors")["nearest"] == 7


def laid_out() -> Output:
    async def lay_out() -> Output:  # within a loop: else Gradio makes some that nobody closes
        with gr.Blocks():
            return Output.lay_out(TextToImage, "")

    return asyncio.run(lay_out())


def test_the_page_shows_a_second_try_until_it_ends() -> None:
    def events() -> Generator[Event, None, None]:
        yield Step(1, 8)
        yield Retry(Message("gpu_retry", "The Space took its GPU back.", asked=60, seconds=120))
        yield Step(1, 8)
        yield Failure("gpu_aborted", Message("gpu_aborted", "Again."), 1, 503)

    output = laid_out()
    texts = [str(update.get(output.status, "")) for update in output.follow(events(), lambda: False, [])]
    assert ["took its GPU back" in text for text in texts] == [False, False, True, True, False]
    assert "step 1 of 8" in texts[3]


def test_every_picture_of_a_run_joins_the_strip(draw: Callable[..., Result]) -> None:
    """Not by way of the browser, which may pass over a picture that the next one follows at once."""
    output = laid_out()
    strip = output.strip
    past: list[Past] = []
    for seeds in ((1, 2), (3, 1)):
        events = (draw(prompt=PROMPT, steps=1, seed=seed) for seed in seeds)
        updates = [*output.follow(events, lambda: False, past, count=2)]
        lengths = [len(update[strip.past]) for update in updates if strip.past in update]
        past = next(update for update in reversed(updates) if strip.past in update)[strip.past]
        assert lengths == ([1, 2] if seeds == (1, 2) else [3, 3])
    assert [metadata.read_picture(Path(shown.picture)).values["seed"] for shown in past] == [
        1,
        3,
        2,
    ]  # the newest first
    assert all(f"<b>{seed}</b>" in shown.words(english) for shown, seed in zip(past, (1, 3, 2), strict=True))
    assert all(json.loads(Path(shown.sidecar).read_text())["seconds"] for shown in past)


@pytest.mark.parametrize("full", ["temporary folder", "cache"])
def test_a_picture_that_cannot_be_kept_is_told_on_the_page(
    draw: Callable[..., Result], full: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, drawn = laid_out(), []

    def events() -> Generator[Event, None, None]:
        for seed in (1, 2):
            drawn.append(seed)
            yield draw(prompt=PROMPT, steps=1, seed=seed)

    (tmp_path / "file").write_text("no folder")
    if full == "cache":
        monkeypatch.setattr(output.picture, "GRADIO_CACHE", str(tmp_path / "file"))
    else:
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "file"))
    *_, last = output.follow(events(), lambda: False, [], count=2)
    assert "could not be written (" in last[output.status]
    assert "make room on the disk" in last[output.status]
    assert "无法写入" in last[output.words](say_in("zh"))
    assert drawn == [1]  # the next one would fare no better
