"""The endpoints as programs meet them: a real server, the real gradio_client, the real miniature."""

import json
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import httpx
import pytest
from gradio_client import Client, handle_file
from gradio_client.client import Job
from gradio_client.exceptions import AppError
from PIL import Image

from core import metadata
from core.events import Result
from core.request import MODELS, ControlNet, Preprocess, TextToImage, Upscale
from engine import Engine
from tests.helpers import loras
from tests.helpers.command_line import Command
from tests.helpers.serving import server
from web.endpoints import as_file, stream

PROMPT = "a fox on a black background"


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    connected = Client(server().url, verbose=False)
    yield connected
    connected.close()


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
        part["props"] for part in config["components"] if plain(part["props"].get("label")) == label
    )
    return found


def test_public_endpoints_take_every_field(client: Client) -> None:
    endpoints = client.view_api(return_format="dict", print_info=False)
    assert sorted(endpoints["named_endpoints"]) == ["/controlnet", "/generate", "/inspect", "/preprocess", "/upscale"]
    assert not endpoints["unnamed_endpoints"]
    for request in (TextToImage, ControlNet, Preprocess, Upscale):
        parameters = endpoints["named_endpoints"][f"/{request.mode}"]["parameters"]
        defaults = {
            parameter["parameter_name"]: parameter["parameter_default"]
            for parameter in parameters
            if parameter["parameter_has_default"]
        }
        fields = request.model_fields
        required_first = sorted(fields, key=lambda name: not fields[name].is_required())
        assert [parameter["parameter_name"] for parameter in parameters] == required_first
        usual = {name: field.default for name, field in fields.items() if not field.is_required()}
        assert defaults == usual | ({"lora": None} if "lora" in fields else {})  # a file, which a program uploads


def test_an_endpoint_says_what_each_field_is_for(client: Client) -> None:
    endpoints = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    for name, endpoint in endpoints.items():
        assert endpoint["description"], name
        assert all(parameter["python_type"]["description"] for parameter in endpoint["parameters"]), name
    read = client.view_api(return_format="str", print_info=False)
    assert "seed: int (not required, defaults to:   0)  (The same seed gives the same picture; 0 picks" in read
    assert "-> (file, parameters)" in read


def test_inspect_says_what_the_command_line_says(client: Client, command_here: Command, tmp_path: Path) -> None:
    file, _ = client.predict(prompt=PROMPT, seed=7, steps=1, api_name="/generate")
    lora = loras.write(tmp_path / "style.safetensors", loras.kohya(loras.random_pairs()))
    for path in (Path(file), lora):
        told = client.predict(file=handle_file(path), api_name="/inspect")
        printed = json.loads(command_here("inspect", path, "--json", cwd=tmp_path).stdout)
        assert told == printed | {"file": path.name}
    (tmp_path / "x.png").write_bytes(b"no picture")
    with pytest.raises(AppError, match=r"^file: "):
        client.predict(file=handle_file(tmp_path / "x.png"), api_name="/inspect")


def test_endpoint_gives_the_very_file_that_the_engine_made(client: Client, draw: Callable[..., Result]) -> None:
    file, sidecar = client.predict(prompt=PROMPT, seed=7, api_name="/generate")
    assert Path(file).read_bytes() == draw(prompt=PROMPT, seed=7).png
    request = metadata.read_picture(Path(file)).request()
    assert isinstance(request, TextToImage)
    assert request.seed == 7
    assert sidecar["request"]["seed"] == 7
    assert Path(file).name == "z-image-7.png"


def test_endpoint_takes_a_cfg_of_zero_for_none(client: Client) -> None:
    _, sidecar = client.predict(prompt=PROMPT, steps=1, cfg=0, api_name="/generate")
    assert sidecar["request"]["cfg"] == 1


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
    assert [answer["index"] for _, answer in progress if answer["progress"] == "step"] == [1, 2, 3]
    assert all(file is None for file, _ in progress)
    assert last[0] is not None


def steps_of(job: Job) -> list[dict[str, Any]]:
    return [answer for _, answer in job.outputs() if answer.get("progress") == "step"]


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
    fields = [PROMPT, "turbo", "", 1, None, None, None, 7, given, 0.8, "auto", 0, ""]
    answer = httpx.post(f"{server().url}gradio_api/call/generate", json={"data": fields})
    text = httpx.get(f"{server().url}gradio_api/call/generate/{answer.json()['event_id']}", timeout=120).text
    assert "event: error" in text
    assert "event: complete" not in text


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
    public = [listener["api_name"] for listener in config["dependencies"] if listener["api_visibility"] != "private"]
    assert sorted(public) == ["controlnet", "generate", "inspect", "preprocess", "upscale"]


def test_requests_at_once_all_get_their_own_picture(client: Client) -> None:
    seeds: list[int] = []

    def ask(seed: int) -> None:
        own = Client(server().url, verbose=False)
        seeds.append(own.predict(prompt=PROMPT, steps=1, seed=seed, api_name="/generate")[1]["request"]["seed"])
        own.close()

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(seeds) == [1, 2, 3]


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


def test_the_server_logged_nothing_alarming(client: Client) -> None:
    client.predict(prompt=PROMPT, steps=1, api_name="/generate")
    log = server().log.read_text()
    assert "Traceback" not in log
