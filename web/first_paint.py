"""The brand on the page before Gradio's own scripts have run: what a visitor sees first.

Gradio adds an app's styles in the browser, with all the rest. Ours for the first moment go into the page that the
server sends, ahead of everything else.
"""

from __future__ import annotations

from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from web import theme

# The brand where the page's heading will be, which takes its place.
STYLE = f"""<style>
html {{ background: {theme.GROUND}; }}
body:not(:has(h1))::before {{
  content: "{theme.TITLE}"; position: absolute; top: 20px; color: {theme.INK};
  left: max(clamp(16px, 3vw, 40px), 50vw - 260px - min(30vh, 450px) - clamp(8px, 1.5vw, 20px));
  font: 650 26px/1.3 Inter, system-ui, sans-serif; letter-spacing: -0.02em;
}}
</style>"""


class FirstPaint:
    """ASGI middleware that puts STYLE into the head of every HTML page; whatever else is sent passes as it is."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        held: dict[str, Any] = {}  # an HTML page's headers, until its length is known

        async def styled(message: Message) -> None:
            if message["type"] == "http.response.start" and _is_page(MutableHeaders(scope=message)):
                held.update(message)
                return
            if held and message["type"] == "http.response.body":
                if not message.get("more_body"):
                    message["body"] = message["body"].replace(b"<head>", b"<head>" + STYLE.encode(), 1)
                    MutableHeaders(scope=held)["content-length"] = str(len(message["body"]))
                await send(dict(held))
                held.clear()
            await send(message)

        await self._app(scope, receive, styled)


def _is_page(headers: MutableHeaders) -> bool:
    return headers.get("content-type", "").startswith("text/html") and "content-encoding" not in headers
