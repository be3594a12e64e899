"""The MCP tools, as the protocol's own client drives them: over HTTP on the real server, and over a pipe."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Coroutine
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from mcp import Client, MCPError, StdioServerParameters
from mcp_types import CallToolResult, ImageContent, TextContent
from PIL import Image

from core.events import Result
from core.request import MODES, Preprocess, Request, TextToImage
from engine import Engine, Settings
from tests.helpers import loras
from tests.helpers.api_server import api_server, waiting
from tests.helpers.serving import server
from web import mcp

ROOT = Path(__file__).parent.parent.parent
PROMPT = "a fox on a black background"
PATIENCE = 200  # seconds, far more than anything here takes: what waits in vain then says where
LONG = {"prompt": PROMPT, "model": "base", "steps": 100}
MODES_OF_CLIENTS = ["auto", "legacy"]  # each request for itself (2026-07-28), and sessions as they were before


def at_server() -> str:
    return f"{server().url}mcp"


def run(steps: Callable[[Client], Coroutine[Any, Any, Any]], url: str | None = None, mode: str = "auto") -> Any:
    async def connected() -> Any:
        async with asyncio.timeout(PATIENCE), Client(url or at_server(), mode=mode) as client:
            return await steps(client)

    return asyncio.run(connected())


def call(name: str, url: str | None = None, **arguments: Any) -> CallToolResult:
    result: CallToolResult = run(lambda client: client.call_tool(name, arguments), url)
    return result


def png_of(result: CallToolResult) -> bytes:
    (content,) = (part for part in result.content if isinstance(part, ImageContent))
    assert content.mime_type == "image/png"
    return base64.b64decode(content.data)


def text_of(result: CallToolResult) -> str:
    return "\n".join(part.text for part in result.content if isinstance(part, TextContent))


def as_url(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


@pytest.fixture(scope="module")
def outlines() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (128, 128), "white").save(buffer, "PNG")
    return buffer.getvalue()


def test_each_tool_takes_the_fields_of_its_request() -> None:
    tools = {tool.name: tool for tool in run(lambda client: client.list_tools()).tools}
    assert sorted(tools) == sorted([*MODES, "preprocess", "inspect"])
    requests: list[type[Request]] = [*MODES.values(), Preprocess]
    for request in requests:
        schema = tools[request.mode].input_schema
        assert list(schema["properties"]) == list(request.model_fields)
        assert set(schema["required"]) == {name for name, field in request.model_fields.items() if field.is_required()}
        assert all(field["description"] for field in schema["properties"].values())
    fields = tools["generate"].input_schema["properties"]
    assert (fields["seed"]["minimum"], fields["seed"]["maximum"]) == (0, 2**32 - 1)
    assert "384 to 2048" in fields["width"]["description"]
    assert "/v1/files" in tools["upscale"].input_schema["properties"]["image"]["description"]


@pytest.mark.parametrize("mode", MODES_OF_CLIENTS)
def test_a_picture_its_parameters_and_what_a_text_model_needs(mode: str, draw: Callable[..., Result]) -> None:
    told: list[tuple[float, float | None, str | None]] = []

    async def note(progress: float, total: float | None, message: str | None) -> None:
        told.append((progress, total, message))

    arguments = {"prompt": PROMPT, "seed": 7, "steps": 3}
    result = run(lambda client: client.call_tool("generate", arguments, progress_callback=note), mode=mode)
    assert png_of(result) == draw(prompt=PROMPT, seed=7, steps=3).png
    facts = result.structured_content
    assert (facts["seed"], facts["width"], facts["request"]["steps"]) == (7, 128, 3)
    assert httpx.get(facts["file"]).content == png_of(result)
    for needed in (PROMPT, "128 x 128", "seed 7", facts["file"]):
        assert needed in text_of(result)
    assert [message for _, _, message in told if message and message.startswith("step")] == [
        f"step {index} of 3" for index in (1, 2, 3)
    ]
    values = [progress for progress, _, _ in told]
    assert values == sorted(set(values))
    assert all(total is None or progress < total for progress, total, _ in told)


def test_one_tools_picture_is_given_to_the_next_by_its_address(outlines: bytes) -> None:
    drawn = call("generate", prompt=PROMPT, seed=7, steps=1)
    small = drawn.structured_content["file"]
    large = call("upscale", image=small, upscaler="fast")
    assert (large.structured_content["width"], large.structured_content["request"]["image"]) == (256, "image.png")
    assert call("inspect", file=small).structured_content["request"]["seed"] == 7
    control = call("preprocess", image=small, preprocessor="gray")
    assert control.structured_content["digest"].startswith("sha256:")
    assert Image.open(io.BytesIO(png_of(control))).size == (128, 128)
    structured = call("controlnet", prompt=PROMPT, image=control.structured_content["file"], preprocessor="none")
    assert structured.structured_content["seed"] > 0


def test_files_come_in_base64_or_are_sent_before(outlines: bytes, tmp_path: Path) -> None:
    wanted = png_of(call("preprocess", image=as_url(outlines), preprocessor="gray"))
    assert png_of(call("preprocess", image=base64.b64encode(outlines).decode(), preprocessor="gray")) == wanted
    with openai.OpenAI(base_url=f"{server().url}v1", api_key="none") as client:
        sent = client.files.create(file=("a.png", outlines), purpose="user_data")
        assert (sent.bytes, sent.filename, sent.status) == (len(outlines), "a.png", "processed")
        url = f"{server().url}v1/files/{sent.id}"
        assert png_of(call("preprocess", image=url, preprocessor="gray")) == wanted
        lora = loras.write(tmp_path / "style.safetensors", loras.peft(loras.random_pairs()))
        url = f"{server().url}v1/files/{client.files.create(file=lora, purpose='user_data').id}"
    assert call("inspect", file=url).structured_content["sha256"]
    drawn = call("generate", prompt=PROMPT, steps=1, lora=url)
    assert drawn.structured_content["request"]["lora"] == "lora.safetensors"


@pytest.mark.parametrize(
    ("tool", "arguments", "named"),
    [
        ("generate", {"prompt": " "}, "prompt"),
        ("generate", {"prompt": PROMPT, "steps": 0}, "steps"),
        ("generate", {"prompt": PROMPT, "size": 3}, "size"),
        ("generate", {"prompt": PROMPT, "lora": str(ROOT / "weights" / "mini")}, "lora"),
        ("generate", {"prompt": PROMPT, "checkpoint": "/etc/passwd.safetensors"}, "checkpoint"),
        ("upscale", {"image": str(ROOT / "docs" / "apple.png")}, "image"),
        ("upscale", {"image": "http://127.0.0.1:1/x.png"}, "image"),
        ("upscale", {"image": "file:///etc/passwd"}, "image"),
        ("upscale", {"image": "/v1/files/nothing.png"}, "image"),
        ("upscale", {"image": "/v1/files/../../app.py"}, "image"),
        ("upscale", {"image": 7}, "image"),
        ("upscale", {"image": "data:;base64,bm8gcGljdHVyZQ=="}, "image"),
        ("upscale", {}, "image"),
        ("preprocess", {"image": "data:image/png;base64,!"}, "image"),
        ("inspect", {"file": "/etc/passwd"}, "file"),
        ("inspect", {"file": ["a"]}, "file"),
        ("inspect", {}, "file"),
        ("inspect", {"file": "x", "path": "y"}, "path"),
    ],
)
def test_bad_input_is_a_tools_error_with_our_sentence(tool: str, arguments: dict[str, Any], named: str) -> None:
    result = call(tool, **arguments)
    assert result.is_error
    assert text_of(result).startswith(f"{named}: ")
    assert "allowed: " in text_of(result)
    assert result.structured_content["error"]["field"] == named
    assert tempfile.gettempdir() not in text_of(result)  # where it lies on the server


def test_an_unknown_tool_is_named() -> None:
    async def steps(client: Client) -> None:
        with pytest.raises(MCPError, match="there is no tool 'paint' here; there are generate"):
            await client.call_tool("paint", {})

    run(steps)


@pytest.fixture(scope="module")
def small() -> Engine:
    """An engine to look into. Its worker is its own: a run of another engine that is still ending would disturb it."""
    return Engine(Settings(weights="mini", device="cpu"))


@pytest.mark.parametrize("mode", MODES_OF_CLIENTS)
def test_cancelling_a_call_frees_its_place_and_stops_the_drawing(mode: str, small: Engine) -> None:
    with api_server(small) as url:
        url = url.replace("/v1", "/mcp")

        async def steps(client: Client) -> None:
            drawing, waits = asyncio.Event(), asyncio.Event()

            async def note(progress: float, total: float | None, message: str | None) -> None:
                if message and message.startswith("step"):
                    drawing.set()
                if message == "waiting behind 1":
                    waits.set()

            async def cancelled_once(reached: asyncio.Event, others: int) -> None:
                call = asyncio.create_task(client.call_tool("generate", LONG, progress_callback=note))
                await reached.wait()
                assert waiting(small) == others + 1
                call.cancel()
                await asyncio.gather(call, return_exceptions=True)
                while waiting(small) > others:
                    await asyncio.sleep(0.01)

            with closing(small.run(TextToImage.parse(**LONG))) as holding:
                next(holding)  # it has its turn, and keeps it
                await cancelled_once(waits, others=1)
            await cancelled_once(drawing, others=0)
            assert not (await client.call_tool("generate", {"prompt": PROMPT, "steps": 1})).is_error

        run(steps, url, mode)


def test_the_door_is_that_of_the_other_routes() -> None:
    guarded = server("--api-key", "a-good-key")
    body = {"jsonrpc": "2.0", "id": 1, "method": "tools/list"}
    assert httpx.post(f"{guarded.url}mcp", json=body).status_code == 401
    assert httpx.post(f"{guarded.url}v1/files", files={"file": b"x"}).status_code == 401
    assert httpx.post(at_server(), json=body, headers={"Origin": "https://example.com"}).status_code == 403
    assert httpx.post(at_server(), json=body, headers={"Host": "example.com"}).status_code == 421
    accepts = {"Accept": "application/json, text/event-stream"}
    large = httpx.post(at_server(), content=b" " * 4_100_000, headers={**accepts, "Content-Type": "application/json"})
    assert large.status_code == 413
    allowed = {**accepts, "Authorization": "Bearer a-good-key"}
    assert httpx.post(f"{guarded.url}mcp", json={**body, "method": "ping"}, headers=allowed).status_code != 401


def test_a_large_picture_is_shown_by_a_smaller_copy() -> None:
    buffer = io.BytesIO()
    Image.effect_noise((1200, 1200), 100).convert("RGB").save(buffer, "PNG")
    data, kind = mcp.shown_as(buffer.getvalue())
    assert kind == "image/jpeg"
    assert len(data) <= mcp.MOST_SHOWN
    assert mcp.shown_as(b"small") == (b"small", "image/png")


# --- over a pipe

NOISY = """
import os, sys
sys.path.insert(0, {root!r})
import cli
from engine.worker import LocalWorker
draw = LocalWorker.draw
def noisy(self, *arguments):
    print("a library prints", flush=True)
    os.write(1, b"and one below Python\\n")
    return draw(self, *arguments)
LocalWorker.draw = noisy
sys.exit(cli.main(["mcp", "--weights", "mini", "--device", "cpu", "--out-dir", sys.argv[1]]))
"""


def test_an_assistant_starts_it_and_gives_it_paths(
    tmp_path: Path, draw: Callable[..., Result], outlines: bytes
) -> None:
    (tmp_path / "in.png").write_bytes(outlines)
    parameters = StdioServerParameters(
        command=sys.executable,
        args=["-c", NOISY.format(root=str(ROOT)), str(tmp_path / "out")],
        env=dict(os.environ),  # as many threads as here: pictures depend on it
        cwd=tmp_path,
    )

    async def steps() -> None:
        async with Client(parameters) as client:
            drawn = await client.call_tool("generate", {"prompt": PROMPT, "seed": 7})
            again = await client.call_tool("generate", {"prompt": PROMPT, "seed": 7})
            refused = await client.call_tool("upscale", {"image": str(tmp_path / "nothing.png")})
            control = await client.call_tool("preprocess", {"image": str(tmp_path / "in.png"), "preprocessor": "gray"})
            inspected = await client.call_tool("inspect", {"file": drawn.structured_content["file"]})
        out = tmp_path / "out"
        assert drawn.structured_content["file"] == str(out / "z-image-7.png")
        assert (out / "z-image-7.png").read_bytes() == png_of(drawn) == draw(prompt=PROMPT, seed=7).png
        assert json.loads((out / "z-image-7.json").read_text())["request"]["seed"] == 7
        assert again.structured_content["file"] == str(out / "z-image-7-2.png")
        assert refused.is_error
        assert text_of(refused).startswith("image: ")
        assert Path(control.structured_content["file"]).read_bytes() == png_of(control)
        assert inspected.structured_content["request"]["prompt"] == PROMPT

    asyncio.run(steps())


def test_it_prints_nothing_but_the_protocol_and_ends_with_its_input(tmp_path: Path) -> None:
    request = {"jsonrpc": "2.0", "id": 1, "method": "initialize"}
    hello = {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "test", "version": "1"}}
    lines = [
        {**request, "params": hello},
        {"jsonrpc": "2.0", "method": "notifications/initialized"},
        {**request, "id": 2, "method": "tools/call", "params": {"name": "generate", "arguments": LONG}},
    ]
    process = subprocess.Popen(
        [sys.executable, "-c", NOISY.format(root=str(ROOT)), str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdin
    assert process.stderr
    process.stdin.write("".join(json.dumps(line) + "\n" for line in lines))
    process.stdin.flush()
    while "one below Python" not in process.stderr.readline():  # it draws
        assert process.poll() is None
    printed, _ = process.communicate()  # closes its input
    assert process.returncode == 0
    answers = {answer["id"]: answer for answer in map(json.loads, printed.splitlines())}
    assert "result" in answers.pop(1)
    assert all("error" in answer for answer in answers.values())
    assert not list(tmp_path.iterdir())


def test_the_tools_for_a_pipe_need_no_web_server() -> None:
    code = "import sys, web.mcp; print([name for name in ('gradio', 'torch') if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).strip() == "[]"
