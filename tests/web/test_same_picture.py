"""One request, asked in every way that there is: the same picture comes of it.

A way is a row of WAYS: a function of a mode and its fields, of which `image` is the path of a file, that returns the
PNG file it got.
"""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from gradio_client import Client, handle_file
from mcp import Client as McpClient
from mcp_types import ImageContent
from PIL import Image

from cli import main
from core.request import MODES, ControlNet, TextToImage, Upscale
from engine import Engine
from tests.helpers.browsing import Open, finished, generate, picture_bytes, set_seed, set_steps, write
from tests.helpers.serving import server

Fields = Mapping[str, Any]

REQUESTS: dict[str, dict[str, Any]] = {
    TextToImage.mode: {"prompt": "a fox on a black background", "seed": 7, "steps": 3},
    ControlNet.mode: {"prompt": "a green apple", "seed": 8, "steps": 2, "preprocessor": "gray", "scale": 0.9},
    Upscale.mode: {"seed": 9, "upscaler": "fast"},
}


def by_endpoint(mode: str, fields: Fields, folder: Path) -> bytes:
    client = Client(server().url, verbose=False)
    given = {name: handle_file(value) if isinstance(value, Path) else value for name, value in fields.items()}
    file, _ = client.predict(**given, api_name=f"/{mode}")
    client.close()
    return Path(file).read_bytes()


def by_command_line(mode: str, fields: Fields, folder: Path) -> bytes:
    required = MODES[mode].model_fields["prompt"].is_required()
    prompt = [str(fields["prompt"])] if required else []
    flags = [f"--{name}={value}" for name, value in fields.items() if name != "prompt"]
    out = folder / "command-line.png"
    assert main([mode, *prompt, *flags, "--weights=mini", "--device=cpu", f"--out={out}"]) == 0
    return out.read_bytes()


def by_openai(mode: str, fields: Fields, folder: Path, form: str = "png") -> bytes:
    extra = {name: value for name, value in fields.items() if name not in ("prompt", "steps", "image")}
    extra |= {"num_inference_steps": fields["steps"], "output_format": form}
    with openai.OpenAI(base_url=f"{server().url}v1", api_key="none") as client:
        if mode == ControlNet.mode:
            answer = client.images.edit(image=fields["image"], prompt=fields["prompt"], extra_body=extra)
        else:
            answer = client.images.generate(prompt=fields["prompt"], extra_body=extra)
    (picture,) = answer.data or []
    return base64.b64decode(picture.b64_json or "")


def by_mcp(mode: str, fields: Fields, folder: Path) -> bytes:
    given = {name: as_url(value) if isinstance(value, Path) else value for name, value in fields.items()}

    async def drawn() -> bytes:
        async with McpClient(f"{server().url}mcp") as client:
            result = await client.call_tool(mode, given)
        (content,) = (part for part in result.content if isinstance(part, ImageContent))
        return base64.b64decode(content.data)

    return asyncio.run(drawn())


def by_job(mode: str, fields: Fields, folder: Path) -> bytes:
    given = {name: as_url(value) if isinstance(value, Path) else value for name, value in fields.items()}
    with httpx.Client(base_url=f"{server().url}v1", timeout=60) as client:
        facts = client.post("/jobs", json={"mode": mode, **given}).json()
        while facts["state"] in ("queued", "running"):
            facts = client.get(f"/jobs/{facts['id']}").json()
        return client.get(facts["files"][0]["url"]).content


def as_url(file: Path) -> str:
    return f"data:image/png;name={file.name};base64,{base64.b64encode(file.read_bytes()).decode()}"


Way = Callable[[str, Fields, Path], bytes]

WAYS: dict[str, tuple[Way, set[str]]] = {  # and the modes that can be asked for so
    "endpoint": (by_endpoint, set(REQUESTS)),
    "command line": (by_command_line, set(REQUESTS)),
    "openai": (by_openai, {TextToImage.mode, ControlNet.mode}),
    "mcp": (by_mcp, set(REQUESTS)),
    "job": (by_job, set(REQUESTS)),
}


@pytest.mark.parametrize("mode", REQUESTS)
def test_every_way_gives_the_same_file(mode: str, engine: Engine, tmp_path: Path) -> None:
    fields = dict(REQUESTS[mode])
    if MODES[mode].files:
        fields["image"] = tmp_path / "in.png"
        Image.radial_gradient("L").resize((128, 128)).convert("RGB").save(fields["image"])
    named = {name: str(value) if isinstance(value, Path) else value for name, value in fields.items()}
    png = engine.draw(MODES[mode].parse(**named)).png
    got = {name: ask(mode, fields, tmp_path) for name, (ask, modes) in WAYS.items() if mode in modes}
    assert {name for name, file in got.items() if file != png} == set()


@pytest.mark.browser
def test_the_page_gives_the_same_file_too(open_page: Open, engine: Engine) -> None:
    """The other two modes are compared where their tabs are tested."""
    fields, page = REQUESTS[TextToImage.mode], open_page()
    write(page, fields["prompt"])
    set_seed(page, str(fields["seed"]))
    set_steps(page, fields["steps"])
    generate(page)
    finished(page)
    assert picture_bytes(page) == engine.draw(TextToImage.parse(**fields)).png


def test_a_format_without_loss_has_the_same_pixels(engine: Engine, tmp_path: Path) -> None:
    fields = REQUESTS[TextToImage.mode]
    webp = by_openai(TextToImage.mode, fields, tmp_path, "webp")
    png = engine.draw(TextToImage.parse(**fields)).png
    with Image.open(io.BytesIO(webp)) as picture, Image.open(io.BytesIO(png)) as original:
        assert (picture.format, picture.convert("RGB").tobytes()) == ("WEBP", original.convert("RGB").tobytes())
