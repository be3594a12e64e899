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
  content: "{theme.TITLE}"; position: absolute; top: 0; left: clamp(12px, 2vw, 24px); color: {theme.INK};
  font: 650 18px/48px Inter, system-ui, sans-serif; letter-spacing: -0.02em;
}}
</style>"""

# The language that the visitor chose here before, which Gradio would ask the browser for.
LANGUAGE = """<script>
try {
  const chosen = localStorage.getItem("studio-language");
  if (chosen) Object.defineProperty(navigator, "language", { value: chosen });
} catch {}
</script>"""


class FirstPaint:
    """ASGI middleware that puts STYLE and LANGUAGE into the head of every HTML page; all else passes as it is."""

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
                    message["body"] = message["body"].replace(b"<head>", b"<head>" + (STYLE + LANGUAGE).encode(), 1)
                    MutableHeaders(scope=held)["content-length"] = str(len(message["body"]))
                await send(dict(held))
                held.clear()
            await send(message)

        await self._app(scope, receive, styled)


def _is_page(headers: MutableHeaders) -> bool:
    return headers.get("content-type", "").startswith("text/html") and "content-encoding" not in headers
