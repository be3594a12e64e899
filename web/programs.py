"""The routes for programs: below /v1 one FastAPI app, at /mcp the MCP tools, each behind a guard.

Errors have the shape that OpenAI's have. All is attached to the app that Gradio's launch makes, and shares nothing with
Gradio's own endpoints but the engine.
"""

from __future__ import annotations

import logging
import re
from urllib.parse import urlsplit

from fastapi import FastAPI
from gradio.utils import get_upload_folder
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from core import metadata
from core.errors import InternalError, StudioError
from engine import Engine
from web import jobs, mcp_http, openai
from web.api_errors import ApiError, of_status
from web.api_keys import ApiKeys
from web.clients import sender
from web.following import ClientGone
from web.kept_files import KeptFiles

log = logging.getLogger(__name__)

PREFIX = "/v1"

CLOSED = "the routes for programs are closed on this server: start it with --api-key KEY, or with --insecure"
NO_KEY = "this server asks for an API key: send one of its keys in the header Authorization: Bearer KEY"
OTHER_SITE = "a web page may not ask here: these routes are for programs"


def routes(engine: Engine, keys: ApiKeys, closed: bool, root_path: str = "", private: bool = False) -> list[BaseRoute]:
    """Return the routes for programs, which are matched before Gradio's own.

    Args:
        engine: what draws.
        keys: of which a program has to show one, where there are any.
        closed: whether nobody gets in, for want of keys.
        root_path: where a proxy in front of us serves the page.
        private: whether nobody but those at this machine is meant to come.
    """
    kept = KeptFiles(get_upload_folder())
    tools = Guard(mcp_http.Tools(engine, kept), keys, closed, root_path)
    mount = Mount(PREFIX, app=Guard(build(engine, kept, private), keys, closed, root_path))
    mount.path_regex = re.compile(f"^{PREFIX}/(?P<path>.*)$", re.DOTALL)  # else what has a new line in it is not ours
    return [mount, Route(mcp_http.PATH, tools)]


def build(engine: Engine, kept: KeptFiles | None = None, private: bool = False) -> FastAPI:
    """Return the app behind the doors, as `routes`; `kept` are the files that programs fetch by address."""
    kept = kept or KeptFiles(get_upload_folder())
    app = FastAPI(
        title="Z-Image Studio",
        version=metadata.APP_VERSION,
        summary="Pictures with the Z-Image models, for programs.",
        servers=[{"url": PREFIX}],
        openapi_url="/openapi.json",
        docs_url=None,  # they would fetch scripts from others
        redoc_url=None,
        root_path_in_servers=False,
        redirect_slashes=False,
    )
    app.include_router(openai.router(engine, kept))
    app.include_router(jobs.router(engine, kept, private))

    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(StudioError)
    async def failed(request: Request, error: StudioError) -> Response:
        return ApiError.of(error).response()

    @app.exception_handler(HTTPException)
    async def not_answered(request: Request, error: HTTPException) -> Response:
        return of_status(error.status_code, error.detail, error.headers).response()

    @app.exception_handler(ClientGone)
    @app.exception_handler(ClientDisconnect)  # before all of its body was here
    async def gone(request: Request, error: Exception) -> Response:
        return Response(status_code=499)  # which nobody reads

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> Response:
        return ApiError.of(InternalError(type(error).__name__, str(error))).response()

    return app


class Guard:
    """ASGI middleware that lets programs in that may come in, before anything of their request is read.

    Pages of other sites may not: Gradio, which is around us, would let any of them read the answers where the server is
    not called `localhost`.
    """

    def __init__(self, app: ASGIApp, keys: ApiKeys, closed: bool, root_path: str) -> None:
        self._app, self._keys, self._closed, self._root_path = app, keys, closed, root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":  # there are no websockets here, which the app says
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        client, owner, refused = sender(scope, headers), None, None
        if "origin" in headers and _host(headers["origin"]) != headers.get("host", ""):
            refused = ApiError(403, OTHER_SITE, "other_site")
        elif self._closed:
            refused = ApiError(403, CLOSED, "closed")
        # The address of a file is enough to fetch it: it cannot be guessed.
        elif self._keys and not scope["path"].startswith(scope.get("root_path", "") + "/files/"):
            owner = self._keys.owner(headers.get("authorization", ""))
            client = owner or client
            if owner is None:
                refused = ApiError(401, NO_KEY, "invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        if refused:
            refused.headers["Connection"] = "close"  # or the server would read the body that is still to come
            await refused.response()(scope, receive, send)
            return
        state = {**scope.get("state", {}), "client": client, "owner": owner, "proxy_path": self._root_path}
        await self._app({**scope, "state": state}, receive, send)


def _host(origin: str) -> str:
    """Return the name and the port in an Origin; empty where it is none."""
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return ""
