"""The door of the MCP tools over HTTP: at /mcp, behind the same guard as the routes below /v1."""

from __future__ import annotations

import asyncio
import importlib
import re
import shutil
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from core.errors import NotWritten, RequestError, StudioError
from core.events import Event, Failure, Result
from core.messages import Message
from core.request import DrawRequest
from engine import Engine
from web import bodies, own_files
from web.api_errors import ApiError
from web.following import begin
from web.kept_files import KeptFiles, address
from web.names_only import names_only

if TYPE_CHECKING:
    from mcp.server.streamable_http_manager import StreamableHTTPSessionManager

    from web.mcp import Context

PATH = "/mcp"
MOST_SESSIONS = 1_000  # of clients of protocols before 2026-07-28; unused ones end by themselves

NOT_HERE = "the MCP tools are not here: they need the package mcp of version 2 (a Space brings 1)"
FILE = "an address of this server below /v1/files, a data URL in base64, or base64"

_ADDRESS = re.compile(r"(?:https?://[^?#]*)?/v1/files/(?P<name>[\w.-]+)", re.ASCII)
_BASE64 = re.compile(r"[A-Za-z0-9+/\s]{64,}={0,2}\s*", re.ASCII)


class RemoteDoor:
    """The door of programs that may be anywhere: no file of this machine is opened but what was sent to it."""

    file_help = f"Takes {FILE}."
    kept_for = " (for an hour, or less where much comes)"

    def __init__(self, engine: Engine, kept: KeptFiles) -> None:
        self._engine, self._kept = engine, kept

    def begin(self, context: Context, mode: type[DrawRequest], fields: dict[str, Any]) -> AsyncGenerator[Event, None]:
        """Return the events of a request whose fields are unchecked; each key, or address, is one client."""
        try:
            return begin(self._engine, _request(context), mode, fields)
        except ApiError as error:
            raise StudioError(Message(error.code, error.message)) from error

    def told(self, failure: Failure) -> Failure:
        """Return a failure as a client may read it: with names of files, and not where they lie."""
        return names_only(failure)

    @asynccontextmanager
    async def opened(self, given: Mapping[str, Any], files: set[str]) -> AsyncIterator[dict[str, Any]]:
        """Yield the arguments, with the files that they hold, or name by an address, as paths."""
        with own_files.for_a_request() as folder:
            sent = {name: given[name] for name in files if given.get(name)}
            for name, value in sent.items():
                sent[name] = await asyncio.to_thread(self._placed, value, name, Path(folder))
            yield {**given, **sent}

    def _placed(self, given: object, field: str, folder: Path) -> str:
        if not isinstance(given, str):
            raise RequestError(field, given, FILE)
        if found := _ADDRESS.fullmatch(given.strip()):
            kept = self._kept.find(found["name"])
            if kept is None:
                raise RequestError(field, given, "an address of this server that still holds")
            path = folder / f"{field}{kept.path.suffix}"  # its own name is the secret in the address
            try:
                shutil.copyfile(kept.path, path)
            except OSError as error:
                raise NotWritten(field, error.strerror or str(error)) from error
            return str(path)
        url = given if given.startswith("data:") else ""
        if not url and _BASE64.fullmatch(given):
            url = f"data:;base64,{''.join(given.split())}"
        path = Path(bodies.from_data_url(url or given, field, folder, FILE))
        with path.open("rb") as file:
            is_safetensors = file.read(9)[8:] == b"{"  # a header in JSON after its length; no picture begins so
        wanted = path.with_suffix(".safetensors") if is_safetensors else path
        return str(path.rename(wanted) if wanted != path else path)

    def keep(self, context: Context, stem: str, png: bytes, result: Result | None) -> str:
        """Keep a picture where its address leads; its parameters are in it."""
        return address(_request(context), f"files/{self._kept.keep(png, '.png', 'image/png')}")


def _request(context: Context) -> Request:
    """Return the HTTP request that a call came with."""
    request = context.request
    assert isinstance(request, Request)  # this transport gives every call its own
    return request


class Tools:
    """The ASGI app of the tools. The protocol's package is imported, and sessions begin, with the first request."""

    def __init__(self, engine: Engine, kept: KeptFiles) -> None:
        self._engine, self._kept = engine, kept
        self._starting = asyncio.Lock()
        self._serving: asyncio.Task[None] | None = None
        self._manager: StreamableHTTPSessionManager | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        try:
            manager = await self._started()
        except ImportError:
            await ApiError(503, NOT_HERE, "no_mcp").response()(scope, receive, send)
            return
        await manager.handle_request(scope, receive, send)

    async def _started(self) -> StreamableHTTPSessionManager:
        async with self._starting:
            if self._manager is None or self._serving is None or self._serving.done():
                self._manager = await asyncio.to_thread(self._made)
                ready = asyncio.Event()
                self._serving = asyncio.create_task(self._serve(self._manager, ready))
                await ready.wait()
            return self._manager

    def _made(self) -> StreamableHTTPSessionManager:
        tools = importlib.import_module("web.mcp")
        transport = importlib.import_module("mcp.server.streamable_http_manager")
        manager: StreamableHTTPSessionManager = transport.StreamableHTTPSessionManager(
            tools.build(self._engine, RemoteDoor(self._engine, self._kept)),
            max_request_body_size=bodies.MAX_JSON,
            max_sessions=MOST_SESSIONS,
        )
        return manager

    @staticmethod
    async def _serve(manager: StreamableHTTPSessionManager, ready: asyncio.Event) -> None:
        """Hold the sessions as long as the event loop runs: they live in the task that began them."""
        async with manager.run():
            ready.set()
            await asyncio.Event().wait()
