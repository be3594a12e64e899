"""The page as programs meet it: a real server, the real gradio_client, the real miniature."""

import asyncio
import json
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import httpx
import pytest
from gradio_client import Client, handle_file
from gradio_client.client import Job
from gradio_client.exceptions import AppError
from PIL import Image
from starlette.testclient import TestClient
from starlette.types import Receive, Scope, Send

import web.server
from core import metadata
from core.errors import BrokenPicture, OutOfMemory, RequestError, StudioError
from core.events import Event, Failure, Result, Retry, Step
from core.messages import Message
from core.request import MODELS, ControlNet, Preprocess, TextToImage
from core.sizes import IMAGE_SIZES
from engine import Engine
from tests.helpers import loras
from tests.helpers.serving import ROOT, server
from web import fields, first_paint, form, output, page, restore, run, situation, theme
from web.endpoints import as_file, stream
from web.language import english, say_in
from web.output import Output
from web.page import HEAD
from web.strip import Past

PROMPT = "a fox on a black background"


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    one = Client(server().url, verbose=False)
    yield one
    one.close()


@pytest.fixture(scope="module")
def config(client: Client) -> dict[str, Any]:
    """What the page is made of, as the browser gets it."""
    found: dict[str, Any] = client.config
    return found


def plain(text: object) -> object:
    """Return the English of a text that the browser translates."""
    if isinstance(text, str) and text.startswith("__i18n__"):
        return json.loads(text.removeprefix("__i18n__"))["key"]
    return text


def component(config: dict[str, Any], label: str) -> dict[str, Any]:
    found: dict[str, Any] = next(
        one["props"] for one in config["components"] if plain(one["props"].get("label")) == label
    )
    return found


# --- the endpoint ---


def test_public_endpoints_take_every_field(client: Client) -> None:
    endpoints = client.view_api(return_format="dict", print_info=False)
    assert sorted(endpoints["named_endpoints"]) == ["/controlnet", "/generate", "/preprocess", "/upscale"]
    assert not endpoints["unnamed_endpoints"]
    for request in (TextToImage, ControlNet, Preprocess):
        parameters = endpoints["named_endpoints"][f"/{request.mode}"]["parameters"]
        taken = {one["parameter_name"]: one["parameter_default"] for one in parameters if one["parameter_has_default"]}
        fields = request.model_fields
        assert {one["parameter_name"] for one in parameters} == set(fields)
        usual = {name: field.default for name, field in fields.items() if not field.is_required()}
        assert taken == usual | ({"lora": None} if "lora" in fields else {})  # a file, which a program uploads


def test_endpoint_gives_the_very_file_that_the_engine_made(client: Client, draw: Callable[..., Result]) -> None:
    file, sidecar = client.predict(prompt=PROMPT, seed=7, api_name="/generate")
    assert Path(file).read_bytes() == draw(prompt=PROMPT, seed=7).png
    request = metadata.read_png(Path(file)).request()
    assert isinstance(request, TextToImage)
    assert request.seed == 7
    assert sidecar["request"]["seed"] == 7
    assert Path(file).name == "z-image-7.png"


def test_endpoint_picks_a_seed_and_says_which(client: Client) -> None:
    _, sidecar = client.predict(prompt=PROMPT, steps=1, api_name="/generate")
    assert sidecar["request"]["seed"] > 0


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"prompt": "  "}, "prompt"),
        ({"steps": 0}, "steps"),
        ({"steps": "many"}, "steps"),
        ({"width": 1000}, "width"),
        ({"cfg": 4}, "cfg"),
        ({"negative_prompt": "blue"}, "negative_prompt"),
        ({"seed": 2**32}, "seed"),
        ({"model": "omni"}, "model"),
    ],
)
def test_endpoint_refuses_with_a_sentence(client: Client, values: dict[str, Any], named: str) -> None:
    with pytest.raises(AppError, match=rf"^{named}: .* is not possible; allowed: "):
        client.predict(**{"prompt": PROMPT, **values}, api_name="/generate")


def test_endpoint_says_how_far_it_is(client: Client) -> None:
    job = client.submit(prompt=PROMPT, steps=3, seed=7, api_name="/generate")
    job.result()
    *progress, last = job.outputs()
    assert [said["index"] for _, said in progress if said["progress"] == "step"] == [1, 2, 3]
    assert all(file is None for file, _ in progress)
    assert last[0] is not None


def steps_of(job: Job) -> list[dict[str, Any]]:
    return [said for _, said in job.outputs() if said.get("progress") == "step"]


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def test_cancelled_work_makes_room_for_the_next(client: Client) -> None:
    job = client.submit(prompt=PROMPT, model="base", steps=100, api_name="/generate")
    wait_for(lambda: steps_of(job))
    job.cancel()
    file, _ = client.predict(prompt=PROMPT, steps=1, seed=7, api_name="/generate")
    assert Path(file).is_file()
    assert len(steps_of(job)) < 100


def test_a_second_visitor_is_told_its_place(client: Client) -> None:
    other = Client(server().url, verbose=False)
    first = client.submit(prompt=PROMPT, model="base", steps=100, api_name="/generate")
    wait_for(lambda: steps_of(first))
    second = other.submit(prompt=PROMPT, steps=1, api_name="/generate")
    wait_for(lambda: second.outputs())
    assert second.outputs()[0] == (None, {"progress": "queued", "ahead": 1})
    first.cancel()
    assert second.result()[0] is not None
    other.close()


def test_endpoint_takes_an_uploaded_lora(client: Client, draw: Callable[..., Result], tmp_path: Path) -> None:
    path = loras.write(tmp_path / "style.safetensors", loras.kohya(loras.random_pairs()))
    file, sidecar = client.predict(
        prompt=PROMPT, steps=2, seed=7, lora=handle_file(str(path)), lora_strength=0.9, api_name="/generate"
    )
    assert Path(file).read_bytes() == draw(prompt=PROMPT, steps=2, lora=str(path), lora_strength=0.9).png
    assert sidecar["lora"]["name"] == "style"


@pytest.mark.parametrize("marked", [True, False])
def test_endpoint_opens_no_file_that_was_not_uploaded(client: Client, tmp_path: Path, marked: bool) -> None:
    path = loras.write(tmp_path / "secret.safetensors", loras.kohya(loras.random_pairs()))
    given = {"path": str(path)} | ({"meta": {"_type": "gradio.FileData"}} if marked else {})
    fields = [PROMPT, "turbo", "", 1, None, None, None, 7, given, 0.8, "auto"]
    answer = httpx.post(f"{server().url}gradio_api/call/generate", json={"data": fields})
    said = httpx.get(f"{server().url}gradio_api/call/generate/{answer.json()['event_id']}", timeout=120).text
    assert "event: error" in said
    assert "event: complete" not in said


# --- the form ---


def test_help_lines_and_ranges_are_the_requests_own(config: dict[str, Any]) -> None:
    for name, label in {
        "prompt": "Prompt",
        "model": "Model",
        "steps": "Steps",
        "negative_prompt": "Negative prompt",
        "cfg": "CFG",
        "width": "Width",
        "height": "Height",
        "seed": "Seed",
    }.items():
        assert plain(component(config, label)["info"]) == TextToImage.model_fields[name].description
    steps = component(config, "Steps")
    assert (steps["minimum"], steps["maximum"], steps["value"]) == (1, 100, MODELS["turbo"].steps)


def test_every_other_listener_is_private_and_none_limits_the_others(config: dict[str, Any]) -> None:
    public = [one["api_name"] for one in config["dependencies"] if one["api_visibility"] != "private"]
    assert sorted(public) == ["controlnet", "generate", "preprocess", "upscale"]


# --- the server ---


def test_importing_the_app_and_building_the_page_load_no_torch() -> None:
    code = """
import sys, app
assert app.demo is app.demo
print(sorted({"torch", "diffsynth", "transformers", "diffusers", "cv2"} & set(sys.modules)))
"""
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.0.0.5"])
def test_this_machine_alone_needs_no_password(host: str) -> None:
    assert web.server.launch_options(host, 7860, None, False)["server_name"] == host


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "studio.example"])
def test_other_machines_need_a_password_or_consent(host: str) -> None:
    with pytest.raises(RequestError, match="--auth USER:PASSWORD"):
        web.server.launch_options(host, 7860, None, False)
    assert web.server.launch_options(host, 7860, "ann:secret", False)["auth"] == ("ann", "secret")
    assert "auth" not in web.server.launch_options(host, 7860, None, True)


@pytest.mark.parametrize("auth", ["ann", ":secret", "ann:", ""])
def test_a_malformed_password_is_refused_and_not_repeated(auth: str) -> None:
    with pytest.raises(RequestError, match="allowed: user:password") as refusal:
        web.server.launch_options("127.0.0.1", 7860, auth, False)
    assert "secret" not in str(refusal.value)


def test_a_space_decides_where_to_listen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPACE_ID", "someone/z-image-studio")
    assert not {"server_name", "server_port"} & set(web.server.launch_options("127.0.0.1", 7860, None, False))


def status_of(url: str) -> int:
    try:
        with urllib.request.urlopen(url) as answer:
            status: int = answer.status
            return status
    except urllib.error.HTTPError as refused:
        return refused.code


def test_a_password_guards_everything_but_the_look() -> None:
    url = server("--auth", "ann:secret").url
    assert status_of(url + "config") == 401
    assert status_of(url + "gradio_api/info") == 401
    assert status_of(url + theme.ASSETS_URL + "/inter-latin.woff2") == 200


def test_assets_are_all_that_is_served() -> None:
    base = server().url + theme.ASSETS_URL
    assert status_of(base + "/page.js") == 200
    for path in ("/../app.py", "/%2e%2e/app.py", "/", "/nothing"):
        assert status_of(base + path) in (403, 404)


# --- the look ---


def luminance(color: str) -> float:
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [one / 12.92 if one <= 0.03928 else ((one + 0.055) / 1.055) ** 2.4 for one in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("ink", [theme.INK, theme.ACCENT, theme.WARM.c400, theme.WARM.c500])
@pytest.mark.parametrize("ground", [theme.GROUND, theme.WARM.c900])
def test_contrast_meets_aa(ink: str, ground: str) -> None:
    assert (luminance(ink) + 0.05) / (luminance(ground) + 0.05) >= 4.5


def test_both_colour_modes_are_the_same_palette() -> None:
    built = vars(theme.build())
    pairs = {name: name.removesuffix("_dark") for name in built if name.endswith("_dark") and built[name] is not None}
    assert pairs
    assert all(built[dark] == built[light] for dark, light in pairs.items())


def test_the_brand_is_in_the_page_ahead_of_any_script() -> None:
    page = httpx.get(server().url).text
    assert page.count(first_paint.STYLE) == 1
    assert page.index(first_paint.STYLE) < page.index("<script")


def test_the_first_styles_go_into_whole_pages_alone() -> None:
    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        kind, pieces = kinds[scope["path"]]
        headers = [(b"content-type", kind), (b"content-length", b"%d" % sum(map(len, pieces)))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for number, piece in enumerate(pieces, 1):
            await send({"type": "http.response.body", "body": piece, "more_body": number < len(pieces)})

    head = b"<html><head></head></html>"
    kinds = {"/page": (b"text/html; charset=utf-8", [head]), "/cut": (b"text/html", [head[:9], head[9:]]),
             "/events": (b"text/event-stream", [b"data: 1", head]), "/json": (b"application/json", [head])}  # fmt: skip
    client = TestClient(first_paint.FirstPaint(answer))
    assert client.get("/page").text == f"<html><head>{first_paint.STYLE}</head></html>"
    for path in ("/cut", "/events", "/json"):
        assert client.get(path).content == b"".join(kinds[path][1])


def test_our_own_javascript_stays_small() -> None:
    """All of it: the file, and what stands in the modules under a name that ends in _JS."""
    inside = [
        value
        for module in (page, fields, output, form, restore)
        for name, value in vars(module).items()
        if name.endswith("_JS")
    ]
    assert len(inside) >= 4
    assert len((theme.ASSETS / "page.js").read_bytes()) + sum(map(len, inside)) + len(HEAD) <= 20_000


def test_the_look_stays_small_and_fetches_nothing() -> None:
    rules = theme.CSS.read_text(encoding="utf-8")
    assert len(rules) < 10_000
    assert "@import" not in rules
    assert "url(" not in rules


# --- what fixes a failure


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


def test_requests_at_once_all_get_their_own_picture(client: Client) -> None:
    seeds: list[int] = []

    def ask(seed: int) -> None:
        one = Client(server().url, verbose=False)
        seeds.append(one.predict(prompt=PROMPT, steps=1, seed=seed, api_name="/generate")[1]["request"]["seed"])
        one.close()

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(seeds) == [1, 2, 3]


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
    said = [str(update.get(output.status, "")) for update in output.follow(events(), lambda: False, [])]
    assert ["took its GPU back" in text for text in said] == [False, False, True, True, False]
    assert "step 1 of 8" in said[3]


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
    assert [metadata.read_png(Path(one.picture)).values["seed"] for one in past] == [1, 3, 2]  # the newest first
    assert all(f"<b>{seed}</b>" in one.words(english) for one, seed in zip(past, (1, 3, 2), strict=True))
    assert all(json.loads(Path(one.sidecar).read_text())["seconds"] for one in past)


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


def test_a_file_that_cannot_be_written_is_told_to_programs(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "file"))
    fields: dict[str, Any] = {"prompt": PROMPT, "steps": 1}
    visitor = gr.Request(session_hash="x")
    with pytest.raises(gr.Error, match="could not be written") as refused:
        list(stream(engine, TextToImage, visitor, fields))
    assert refused.value.title == "not_written"
    with pytest.raises(gr.Error, match="could not be written"), as_file(Image.new("L", (8, 8)), "control.png"):
        raise AssertionError


def test_a_control_image_is_handed_over_as_a_png() -> None:
    with as_file(Image.new("L", (8, 8), 77), "control.png") as file, Image.open(file["path"]) as picture:
        assert (picture.format, picture.size, picture.getpixel((0, 0))) == ("PNG", (8, 8), 77)


def test_the_server_said_nothing_alarming(client: Client) -> None:
    client.predict(prompt=PROMPT, steps=1, api_name="/generate")
    log = server().log.read_text()
    # Gradio itself logs one for a file that was not uploaded, which a test above asks for.
    assert log.count("Traceback") == log.count("\ngradio.exceptions.InvalidPathError")
