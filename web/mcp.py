"""MCP tools: what the page does, for assistants and whatever else speaks the Model Context Protocol.

Tools are made from the requests, their answers from a run's events. How files come in and go out differs: over HTTP
(`web.mcp_http`) no file of this machine is opened; over a pipe (`serve_pipe`) the program is the user's own.
"""

from __future__ import annotations

import asyncio
import base64
import io
import logging
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from pathlib import Path
from typing import Any, Protocol

import mcp_types as types
from mcp.server.context import ServerRequestContext
from mcp.server.lowlevel import Server
from mcp.server.session import ServerSession
from mcp.server.stdio import stdio_server
from mcp.shared.exceptions import MCPError
from PIL import Image

from core import metadata
from core.errors import InternalError, NotWritten, RequestError, StudioError
from core.events import Event, Failure, Result, Step, progress_text
from core.messages import plain
from core.parameters import all_finite
from core.request import MODELS, MODES, DrawRequest, Preprocess, Request
from core.whole_file import write_whole
from engine import Engine, inspection

log = logging.getLogger(__name__)

# Bytes of a picture that are sent as they are: in base64 800 kB. Assistants, and the official client by default, take
# messages of up to 1 MB; a larger picture is shown by a smaller copy, and the file is where the answer says.
MOST_SHOWN = 600_000
_SIDES = (1024, 768, 512, 256)  # of such copies, in pixels: the first that is small enough as a JPEG

INSPECT = "inspect"
INSTRUCTIONS = (
    "Draws pictures with the Z-Image models on the user's own machine. A drawing takes from a second to minutes, and "
    "says how far it is. The same seed gives the same picture. The file that an answer names can be given to "
    "controlnet, upscale, preprocess and inspect as it is."
)
DESCRIPTIONS = {
    "generate": "Draw a picture of a text. Say what is to be seen, where, and in which style, in plain sentences.",
    "controlnet": "Draw a picture of a text that keeps the structure of another picture (ControlNet).",
    "upscale": "Enlarge a picture to exactly twice its width and height.",
    "preprocess": "Make the control image alone: what `controlnet` would keep of a picture.",
    INSPECT: "Say what a picture was made with (prompt, seed, model), also by other programs, or what a LoRA file is.",
}

Context = ServerRequestContext[Any, Any]


class Door(Protocol):
    """How requests, files and pictures pass between a client and the tools.

    Attributes:
        file_help: what an argument that is a file takes, for its description.
        kept_for: how long a file stays where it is kept, as a part of a sentence.
    """

    file_help: str
    kept_for: str

    def begin(self, context: Context, mode: type[DrawRequest], fields: dict[str, Any]) -> AsyncGenerator[Event, None]:
        """Return the events of a request whose fields are unchecked."""
        ...

    def told(self, failure: Failure) -> Failure:
        """Return a failure as this door's clients may read it."""
        ...

    def opened(self, given: Mapping[str, Any], files: set[str]) -> AbstractAsyncContextManager[dict[str, Any]]:
        """Return the arguments, with the paths of those that are files while the block lasts.

        Raises:
            RequestError: one is none that may be opened.
        """
        ...

    def keep(self, context: Context, stem: str, png: bytes, result: Result | None) -> str:
        """Keep a picture, and with a result its parameters; return where it is. Called in a thread.

        Raises:
            NotWritten: there is no room for it.
        """
        ...


def build(engine: Engine, door: Door) -> Server[Any]:
    """Return the tools of an engine, as a server without a transport."""
    tools = _tools(door)

    async def list_tools(context: Context, params: types.PaginatedRequestParams | None) -> types.ListToolsResult:
        return types.ListToolsResult(tools=tools)

    async def call_tool(context: Context, params: types.CallToolRequestParams) -> types.CallToolResult:
        given = dict(params.arguments or {})
        try:
            if params.name in MODES:
                return await _draw(door, context, MODES[params.name], given)
            if params.name == Preprocess.mode:
                return await _preprocess(engine, door, context, given)
            if params.name == INSPECT:
                return await _inspect(door, given)
        except StudioError as error:
            return _refused(door, Failure.of(error))
        except Exception as error:
            log.exception("internal error")
            return _refused(door, Failure.of(InternalError(type(error).__name__, str(error))))
        names = ", ".join(tool.name for tool in tools)
        raise MCPError(types.INVALID_PARAMS, f"there is no tool {params.name[:100]!r} here; there are {names}")

    return Server(
        "z-image-studio",
        title="Z-Image Studio",
        version=metadata.APP_VERSION,
        instructions=INSTRUCTIONS,
        on_list_tools=list_tools,
        on_call_tool=call_tool,
    )


# --- what there is


def _tools(door: Door) -> list[types.Tool]:
    requests: list[type[Request]] = [*MODES.values(), Preprocess]
    tools = [
        types.Tool(
            name=request.mode,
            description=DESCRIPTIONS.get(request.mode, request.help),
            input_schema=_arguments(request, door.file_help),
            output_schema=_DRAWN if issubclass(request, DrawRequest) else _PREPROCESSED,
            annotations=types.ToolAnnotations(destructive_hint=False, open_world_hint=False),
        )
        for request in requests
    ]
    file = {"type": "string", "description": f"The picture or LoRA file. {door.file_help}"}
    inspect = types.Tool(
        name=INSPECT,
        description=DESCRIPTIONS[INSPECT],
        input_schema=_object({"file": file}, ["file"]) | {"additionalProperties": False},
        annotations=types.ToolAnnotations(read_only_hint=True, open_world_hint=False),
    )
    return [*tools, inspect]


def _object(properties: dict[str, Any], required: list[str]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": required}


_KEPT = {
    "file": {"type": "string", "description": "Where the PNG file is."},
    "width": {"type": "integer", "description": "Pixels."},
    "height": {"type": "integer", "description": "Pixels."},
    "notes": {"type": "array", "items": {"type": "string"}, "description": "What the user should know."},
}
_DRAWN = _object(
    {
        **_KEPT,
        "seed": {"type": "integer", "description": "The seed that draws the same picture again."},
        "request": {"type": "object", "description": "Every value that was used."},
    },
    [*_KEPT, "seed", "request"],
)
_PREPROCESSED = _object({**_KEPT, "digest": {"type": "string"}}, [*_KEPT, "digest"])


def _arguments(request: type[Request], file_help: str) -> dict[str, Any]:
    """Return the schema of a tool's arguments: the fields of its request."""
    schema = request.model_json_schema()
    for name, field in schema["properties"].items():
        told = field.get("description", "")
        if name in ("width", "height") or ("allowed" in field and name not in _files(request)):
            told = f"{told} Allowed: {request.allowed(name)}."
        if name in _files(request):
            told = f"{told} {file_help}"
            field.pop("maxLength", None)
        field["description"] = told.strip()
        for ours in ("allowed", "flag", "metavar", "title"):  # for the command line, and for sentences
            field.pop(ours, None)
    return schema | {"title": request.mode, "description": request.help}


def _files(request: type[Request]) -> set[str]:
    return {*request.files, "lora"} & request.model_fields.keys()


# --- what they do


async def _draw(door: Door, context: Context, mode: type[DrawRequest], given: dict[str, Any]) -> types.CallToolResult:
    progress = _Progress(context.session)
    async with door.opened(given, _files(mode)) as fields, aclosing(door.begin(context, mode, fields)) as events:
        async for event in events:
            if isinstance(event, Result):
                return await asyncio.to_thread(_drawn, door, context, event)
            if isinstance(event, Failure):
                return _refused(door, event)
            await progress.tell(event)
    raise AssertionError("a run ends with a Result or a Failure")


def _drawn(door: Door, context: Context, result: Result) -> types.CallToolResult:
    request, (width, height) = result.request, result.size
    file = door.keep(context, metadata.file_stem(request), result.png, result)
    drawer = MODELS[request.model].title if result.weights == "full" else "the embedded miniature of Z-Image"
    notes = [str(note) for note in result.notes]
    told = (
        f"{type(request).help.capitalize()}: {_cut(request.prompt)}\n"
        f"{width} x {height} pixels, seed {request.seed}, {request.steps_run} steps, drawn by {drawer}."
    )
    facts = {"file": file, "seed": request.seed, "width": width, "height": height, **plain(result.sidecar)}
    return _answer(result.png, told, file, door.kept_for, notes, facts)


async def _preprocess(engine: Engine, door: Door, context: Context, given: dict[str, Any]) -> types.CallToolResult:
    async with door.opened(given, _files(Preprocess)) as fields:
        request = Preprocess.parse(**fields)
        control = await asyncio.to_thread(engine.control_image, request)
    png = control.png()
    file = await asyncio.to_thread(door.keep, context, "control", png, None)
    (width, height), notes = control.image.size, [str(note) for note in control.notes]
    facts = {"file": file, "width": width, "height": height, "digest": control.digest, "notes": notes}
    told = f"The control image by {request.preprocessor}, {width} x {height} pixels."
    return _answer(png, told, file, door.kept_for, notes, facts)


async def _inspect(door: Door, given: dict[str, Any]) -> types.CallToolResult:
    if strange := given.keys() - {"file"}:
        raise RequestError(min(strange), given[min(strange)], "only the field file")
    if not isinstance(given.get("file"), str) or not given["file"]:
        raise RequestError("file", given.get("file"), door.file_help)
    async with door.opened(given, {"file"}) as fields:
        path = Path(fields["file"])
        facts = all_finite(plain(await asyncio.to_thread(inspection.inspected, path, path.name)))
    text = types.TextContent(text="\n".join(f"{name}: {value}" for name, value in facts.items()))
    return types.CallToolResult(content=[text], structured_content=facts)


class _Progress:
    """How far a run is, as notifications: what each step tells, and the place in the queue."""

    def __init__(self, session: ServerSession) -> None:
        self._session = session
        self._last, self._value = "", 0.0
        self._total: float | None = None

    async def tell(self, event: Event) -> None:
        """Tell an event, unless it says what the last one did: a request that waits says so several times a second."""
        text = progress_text(event)
        if text == self._last:
            return
        self._last = text
        self._value += 0.001  # it has to grow with each notification; only steps are counted
        if isinstance(event, Step):
            self._value = max(float(event.index), self._value)
            self._total = event.total + 1.0  # the last one is what comes after the steps
        await self._session.report_progress(self._value, self._total, text)


def _refused(door: Door, failure: Failure) -> types.CallToolResult:
    failure = door.told(failure)
    facts = {"code": failure.code, "message": failure.text}
    if failure.code == RequestError.code:
        facts["field"] = failure.values["field"]
    text = types.TextContent(text=failure.text)
    return types.CallToolResult(content=[text], structured_content={"error": facts}, is_error=True)


def _answer(
    png: bytes, told: str, file: str, kept_for: str, notes: list[str], facts: dict[str, Any]
) -> types.CallToolResult:
    shown, kind = shown_as(png)
    lines = [told, f"The PNG file, its parameters inside: {file}{kept_for}", *notes]
    if shown is not png:
        lines.append("What is shown here is a smaller copy of it.")
    content = types.ImageContent(data=base64.b64encode(shown).decode(), mime_type=kind)
    return types.CallToolResult(
        content=[types.TextContent(text="\n".join(lines)), content], structured_content=all_finite(facts)
    )


def shown_as(png: bytes) -> tuple[bytes, str]:
    """Return what a client gets to see of a picture, and its type: the file, or a smaller copy where it is large."""
    if len(png) <= MOST_SHOWN:
        return png, "image/png"
    with Image.open(io.BytesIO(png)) as picture:
        copy = picture.convert("RGB")
    data = b""
    for side in _SIDES:
        copy.thumbnail((side, side), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        copy.save(buffer, "JPEG", quality=85)
        data = buffer.getvalue()
        if len(data) <= MOST_SHOWN:
            break
    return data, "image/jpeg"


def _cut(prompt: str) -> str:
    text = " ".join(prompt.split())
    return text if len(text) <= 300 else text[:297] + "..."


# --- over a pipe, for the assistants of this machine


class LocalDoor:
    """The door of a program that the user's own assistant starts: files are paths, pictures are kept in a folder."""

    file_help = "The path of a file on this machine."
    kept_for = ""

    def __init__(self, engine: Engine, folder: Path) -> None:
        self._engine, self._folder = engine, folder
        self._writing = threading.Lock()  # else two that find the same name free would both take it

    def begin(self, context: Context, mode: type[DrawRequest], fields: dict[str, Any]) -> AsyncGenerator[Event, None]:
        """Return the events of a request whose fields are unchecked."""
        return self._engine.arun(mode.parse(**fields))

    def told(self, failure: Failure) -> Failure:
        """Return a failure as it is: it is read by this machine's user."""
        return failure

    @asynccontextmanager
    async def opened(self, given: Mapping[str, Any], files: set[str]) -> AsyncIterator[dict[str, Any]]:
        """Yield the arguments; the paths in them may begin with `~`."""
        paths = {name: str(given[name]) for name in files if isinstance(given.get(name), str)}
        yield {**given, **{name: _home(path) for name, path in paths.items()}}

    def keep(self, context: Context, stem: str, png: bytes, result: Result | None) -> str:
        """Write a picture, and with a result its parameters, under a name that overwrites nothing."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise NotWritten(str(self._folder), error.strerror or str(error)) from error
        with self._writing:
            path = metadata.free_path(self._folder / stem)
            if result is None:
                write_whole(path, png)
            else:
                metadata.save(result, path)
        return str(path)


def _home(path: str) -> str:
    try:
        return str(Path(path).expanduser())
    except RuntimeError:  # the home of nobody
        return path


def serve_pipe(engine: Engine, folder: Path) -> None:
    """Serve the tools on stdin and stdout until stdin closes; what else is printed meanwhile goes to stderr."""
    asyncio.run(_serve_pipe(engine, folder))


async def _serve_pipe(engine: Engine, folder: Path) -> None:
    server = build(engine, LocalDoor(engine, folder))
    async with stdio_server() as (arriving, leaving):
        await server.run(arriving, leaving, server.create_initialization_options())
