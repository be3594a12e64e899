"""OpenAI's image routes, as its own client drives them."""

from __future__ import annotations

import asyncio
import base64
import io
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from PIL import Image

from core import metadata
from core.errors import OutOfMemory
from core.events import Failure, Result
from core.messages import Message
from core.request import ControlNet
from engine import Engine, Settings, zerogpu
from tests.helpers.api_server import api_server, waiting
from tests.helpers.serving import server
from web import bodies
from web.api_errors import ApiError
from web.following import unheld
from web.image_formats import encoded
from web.kept_files import KeptFiles

PROMPT = "a fox on a black background"
LONG: dict[str, Any] = {"prompt": PROMPT, "model": "base", "extra_body": {"num_inference_steps": 100}}


@pytest.fixture(scope="module")
def client() -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server().url}v1", api_key="none", max_retries=0) as connected:
        yield connected


@pytest.fixture(scope="module")
def small(engine: Engine) -> Engine:
    """An engine where one request may wait, with the worker that every test shares."""
    return Engine(Settings(weights="mini", device="cpu", queue_limit=1), engine.worker)


def bytes_of(answer: Any) -> list[bytes]:
    return [base64.b64decode(picture.b64_json) for picture in answer.data]


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def test_several_pictures_with_consecutive_seeds(client: openai.OpenAI, draw: Callable[..., Result]) -> None:
    answer = client.images.generate(prompt=PROMPT, n=2, size="128x128", extra_body={"seed": 7})
    assert bytes_of(answer) == [draw(prompt=PROMPT, seed=seed).png for seed in (7, 8)]
    assert (answer.size, answer.output_format, answer.background) == ("128x128", "png", "opaque")
    assert abs(answer.created - time.time()) < 600


def test_the_extras_reach_the_request(client: openai.OpenAI, tmp_path: Path) -> None:
    extras = {"negative_prompt": "blue", "num_inference_steps": 2, "guidance_scale": 3, "variety": 0.5, "seed": 9}
    answer = client.images.generate(prompt=PROMPT, model="Tongyi-MAI/Z-Image", user="ann", extra_body=extras)
    (tmp_path / "a.png").write_bytes(bytes_of(answer)[0])
    found = metadata.read_picture(tmp_path / "a.png").values
    wanted = {"model": "base", "negative_prompt": "blue", "steps": 2, "cfg": 3, "variety": 0.5, "seed": 9}
    assert {name: found[name] for name in wanted} == wanted


def test_an_edit_keeps_the_structure(client: openai.OpenAI, engine: Engine, tmp_path: Path) -> None:
    path = tmp_path / "outlines.png"
    Image.new("RGB", (128, 128), "white").save(path)
    extras = {"preprocessor": "none", "scale": 0.7, "seed": 7}
    answer = client.images.edit(image=path, prompt=PROMPT, extra_body=extras)
    fields = {"prompt": PROMPT, "image": str(path), **extras}
    assert bytes_of(answer) == [engine.draw(ControlNet.parse(**fields)).png]
    assert bytes_of(client.images.edit(image=[path], prompt=PROMPT, extra_body=extras)) == bytes_of(answer)


def test_an_address_gives_the_picture_and_tells_nothing(client: openai.OpenAI, draw: Callable[..., Result]) -> None:
    extras = {"seed": 7}
    (picture,) = client.images.generate(prompt=PROMPT, response_format="url", extra_body=extras).data or []
    assert picture.url
    assert picture.url.startswith(f"{server().url}v1/files/")
    assert len(picture.url.rpartition("/")[2]) > 32
    found = httpx.get(picture.url)
    assert (found.content, found.headers["content-type"]) == (draw(prompt=PROMPT, seed=7).png, "image/png")
    for name in ("nothing.png", "..%2f..%2fapp.py", "a%00"):
        assert httpx.get(f"{server().url}v1/files/{name}").status_code == 404


def test_a_file_without_content_or_name_is_refused() -> None:
    answer = httpx.post(f"{server().url}v1/files", json={"file": ""})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "file")


def test_kept_files_go_with_their_time_and_when_they_are_too_much(tmp_path: Path) -> None:
    now = 1000.0
    kept = KeptFiles(str(tmp_path), seconds=60, most_bytes=10, clock=lambda: now)
    first, second = kept.keep(b"12345", ".png", "image/png"), kept.keep(b"12345", ".png", "image/png")
    assert kept.find(first)
    third = kept.keep(b"123456789012", ".png", "image/png")  # alone too much, but new
    assert [kept.find(name) is not None for name in (first, second, third)] == [False, False, True]
    now += 60
    assert kept.find(third) is None
    assert not list(tmp_path.rglob("*.png"))


def test_formats_keep_what_they_can(client: openai.OpenAI, draw: Callable[..., Result], tmp_path: Path) -> None:
    png = draw(prompt=PROMPT, seed=7).png
    lossless = encoded(png, "webp")
    with Image.open(io.BytesIO(lossless)) as picture, Image.open(io.BytesIO(png)) as original:
        assert picture.convert("RGB").tobytes() == original.tobytes()
    answer = client.images.generate(prompt=PROMPT, output_format="jpeg", output_compression=40, extra_body={"seed": 7})
    assert bytes_of(answer) == [encoded(png, "jpeg", 40)]
    assert len(encoded(png, "jpeg", 40)) < len(encoded(png, "jpeg", 95))
    for name, data in (("a.webp", lossless), ("a.jpeg", encoded(png, "jpeg", 40))):
        (tmp_path / name).write_bytes(data)
        assert metadata.read_picture(tmp_path / name).values["seed"] == 7


@pytest.mark.parametrize("partial", [0, 3])
def test_a_stream_sends_how_it_looks_then_the_picture(
    client: openai.OpenAI, draw: Callable[..., Result], partial: int
) -> None:
    stream = client.images.generate(
        prompt=PROMPT, stream=True, partial_images=partial, output_format="png", extra_body={"seed": 7}
    )
    *parts, last = stream
    assert [part.type for part in parts] == ["image_generation.partial_image"] * partial
    for number, part in enumerate(parts):
        assert part.type == "image_generation.partial_image"
        assert (part.partial_image_index, part.size) == (number, "128x128")
        with Image.open(io.BytesIO(base64.b64decode(part.b64_json))) as picture:
            assert (picture.format, picture.size) == ("PNG", (128, 128))
    assert last.type == "image_generation.completed"
    assert base64.b64decode(last.b64_json) == draw(prompt=PROMPT, seed=7).png
    assert last.usage.total_tokens == 0


def test_an_edit_streams_too(client: openai.OpenAI, tmp_path: Path) -> None:
    Image.new("RGB", (128, 128), "white").save(tmp_path / "white.png")
    stream = client.images.edit(image=tmp_path / "white.png", prompt=PROMPT, n=2, stream=True, partial_images=1)
    kinds = ["image_edit.partial_image", "image_edit.completed"]
    assert [event.type for event in stream] == kinds * 2


def test_models_are_those_that_draw(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["turbo", "base"]
    assert client.models.retrieve("base").owned_by == "z-image-studio"
    with pytest.raises(openai.NotFoundError, match="there are turbo, base"):
        client.models.retrieve("dall-e-3")


@pytest.mark.parametrize(
    ("fields", "param", "sentence"),
    [
        ({"prompt": " "}, "prompt", "prompt: ' ' is not possible; allowed: some text"),
        ({"n": 11}, "n", "from 1 to 10"),
        ({"size": "big"}, "size", "size: 'big' is not possible; allowed: auto, or WIDTHxHEIGHT"),
        ({"size": "200x200"}, "size", "the nearest is 128"),
        ({"output_format": "gif"}, "output_format", "allowed: png, jpeg, webp"),
        ({"background": "transparent"}, "background", "allowed: auto, opaque"),
        ({"extra_body": {"guidance_scale": 4}}, "guidance_scale", "the model base can be guided"),
        ({"extra_body": {"stream": "perhaps"}}, "stream", "allowed: true or false"),
        ({"extra_body": {"strength": 1}}, "strength", "only the fields prompt, model"),
    ],
)
def test_what_is_not_possible_is_refused_with_a_sentence(
    client: openai.OpenAI, fields: dict[str, Any], param: str, sentence: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=sentence.replace("(", "[(]")) as refused:
        client.images.generate(**{"prompt": PROMPT, **fields})
    assert (refused.value.param, refused.value.type) == (param, "invalid_request_error")


def test_a_model_that_is_not_here_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="there is no model 'dall-e-3' here") as refused:
        client.images.generate(prompt=PROMPT, model="dall-e-3")
    assert refused.value.code == "model_not_found"


def test_an_edit_takes_no_mask_no_size_and_only_turbo(client: openai.OpenAI, tmp_path: Path) -> None:
    path = tmp_path / "white.png"
    Image.new("RGB", (32, 32), "white").save(path)
    with pytest.raises(openai.BadRequestError, match="a mask is not possible"):
        client.images.edit(image=path, mask=path, prompt=PROMPT)
    for fields, sentence in (
        ({"size": "1024x1024"}, "size: '1024x1024' is not possible; allowed: auto"),
        ({"model": "base"}, "model: 'base' is not possible; allowed: turbo"),
        ({"image": [path, path]}, "image: 'more than one'"),
        ({"image": b"no picture"}, "allowed: a picture file"),
    ):
        given: dict[str, Any] = {"image": path, "prompt": PROMPT, **fields}
        with pytest.raises(openai.BadRequestError, match=sentence):
            client.images.edit(**given)


@pytest.mark.parametrize("image", ["/etc/hostname", "https://example.com/a.png", "data:image/png;base64,%%", 5])
def test_no_file_is_opened_that_does_not_come_with_the_request(image: object) -> None:
    answer = httpx.post(f"{server().url}v1/images/edits", json={"prompt": PROMPT, "image": image})
    assert answer.status_code == 400
    assert "a file that comes with the request" in answer.json()["error"]["message"]


def test_bodies_that_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    address = f"{server().url}v1/images/generations"
    for content, status in (
        (b"{", 400),
        (b"[1]", 400),
        (b"[" * 100_000, 400),
        (b"9" * 5000, 400),
        (b"{}", 400),
        (b'{"\\ud800": 1}', 400),
    ):
        answer = httpx.post(address, content=content, headers={"Content-Type": "application/json"})
        assert (answer.status_code, answer.json()["error"]["type"]) == (status, "invalid_request_error")
    assert httpx.post(address, data={"prompt": PROMPT}).status_code == 415
    assert httpx.get(address).status_code == 405
    assert httpx.get(f"{server().url}v1/nothing").json()["error"]["code"] == "not_found"

    def parts() -> Iterator[bytes]:
        for _ in range(5):
            yield b" " * 1_000_000

    for body in (b" " * (bodies.MAX_JSON + 1), parts()):  # one says how much it is, the other does not
        answer = httpx.post(address, content=body, headers={"Content-Type": "application/json"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "too_large")


def test_a_client_that_goes_frees_its_place_and_stops_its_run(small: Engine) -> None:
    with api_server(small) as address:
        for stream in (False, True):
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(
                    f"{address}/images/generations",
                    json={"prompt": PROMPT, "model": "base", "num_inference_steps": 100, "stream": stream},
                    timeout=httpx.Timeout(30, read=1),
                )
            wait_for(lambda: not waiting(small))
        with openai.OpenAI(base_url=address, api_key="none", max_retries=0) as client:
            running = client.images.generate(**LONG, stream=True)
            wait_for(lambda: waiting(small) == 1)
            with pytest.raises(openai.APITimeoutError):
                client.with_options(timeout=0.6).images.generate(**LONG)  # it waits
            wait_for(lambda: waiting(small) == 1)
            running.close()
            wait_for(lambda: not waiting(small))


def test_a_full_queue_says_when_to_ask_again(small: Engine) -> None:
    with api_server(small) as address, openai.OpenAI(base_url=address, api_key="none", max_retries=0) as client:
        streams: list[Any] = []
        while len(streams) < 2:
            streams.append(client.images.generate(**LONG, stream=True))
            wait_for(lambda: waiting(small) == len(streams))
        for stream in (False, True):
            with pytest.raises(openai.RateLimitError, match="1 requests are waiting already") as refused:
                client.images.generate(**LONG, stream=stream)
            assert int(refused.value.response.headers["retry-after"]) > 0
        for begun in streams:
            begun.close()
        wait_for(lambda: not waiting(small))


@pytest.mark.parametrize("fault", [OutOfMemory("too little memory"), ZeroDivisionError("nobody foresaw this")])
def test_a_run_that_breaks_is_told_within_a_stream_and_without(
    small: Engine, monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    # A fault after the first step, which the miniature never has: where a step's preview is made.
    def breaks(*_: Any) -> None:
        raise fault

    sentence = str(fault)
    with api_server(small) as address, openai.OpenAI(base_url=address, api_key="none", max_retries=0) as client:
        with monkeypatch.context() as broken:
            broken.setattr("diffusion.preview.project", breaks)
            with pytest.raises(openai.InternalServerError, match=sentence) as refused:
                client.images.generate(prompt=PROMPT)
            assert refused.value.response.headers["x-should-retry"] == "false"
            with pytest.raises(openai.APIError, match=sentence) as told:
                list(client.images.generate(prompt=PROMPT, stream=True))
            assert told.value.code == refused.value.code
        assert bytes_of(client.images.generate(prompt=PROMPT))


def test_a_fault_of_the_answer_ends_a_stream_in_an_error_too(small: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(*_: Any) -> None:
        raise ZeroDivisionError("nobody foresaw this")  # as Pillow might

    with api_server(small) as address, openai.OpenAI(base_url=address, api_key="none", max_retries=0) as client:
        with monkeypatch.context() as broken:
            broken.setattr("web.openai.encoded", breaks)
            with pytest.raises(openai.APIError, match="nobody foresaw this"):
                list(client.images.generate(prompt=PROMPT, stream=True))
        assert [event.type for event in client.images.generate(prompt=PROMPT, stream=True)] == [
            "image_generation.completed"
        ]


def test_who_reads_slowly_holds_nobodys_turn() -> None:
    async def read_one() -> tuple[int, list[int]]:
        through = asyncio.Event()

        async def run() -> AsyncIterator[int]:
            yield 2
            yield 3
            through.set()

        events = unheld(1, aiter(run()))  # type: ignore[arg-type]  # as any generator
        first = await anext(events)
        await through.wait()
        return first, [event async for event in events]

    assert asyncio.run(read_one()) == (1, [2, 3])


def test_on_zerogpu_programs_are_sent_to_the_named_endpoints(small: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zerogpu, "ACTIVE", True)
    with api_server(small) as address:
        answer = httpx.post(f"{address}/images/generations", json={"prompt": PROMPT})
    assert answer.status_code == 503
    assert "call the named endpoints instead" in answer.json()["error"]["message"]


def test_an_error_that_would_come_again_is_not_asked_for_again() -> None:
    error = ApiError.of(Failure("queue_full", Message("queue_full", "full"), 1, 429))
    assert error.response().headers["retry-after"]
    assert "retry-after" not in ApiError.of(Failure("weights_missing", Message("x", "none"), 3, 503)).response().headers
