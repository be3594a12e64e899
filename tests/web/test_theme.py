"""The look: contrast, one palette, what is seen first, and how much of our own is sent."""

import httpx
import pytest
from starlette.testclient import TestClient
from starlette.types import Receive, Scope, Send

from tests.helpers.serving import server
from web import fields, first_paint, form, output, page, restore, theme
from web.page import HEAD


def luminance(color: str) -> float:
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [channel / 12.92 if channel <= 0.03928 else ((channel + 0.055) / 1.055) ** 2.4 for channel in channels]
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


@pytest.mark.parametrize("path", ["", "config", "theme.css"])
def test_the_page_is_sent_compressed_to_those_who_can_read_that(path: str) -> None:
    sent = {}
    for encoding in ("gzip, deflate, br", "identity"):
        with httpx.stream("GET", server().url + path, headers={"accept-encoding": encoding}) as answer:
            sent[answer.headers.get("content-encoding")] = sum(len(chunk) for chunk in answer.iter_raw())
    assert sent.keys() == {"gzip", None}
    assert sent["gzip"] < sent[None] / 5


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
    assert client.get("/page").text == f"<html><head>{first_paint.STYLE}{first_paint.LANGUAGE}</head></html>"
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
    assert len(rules) < 25_000
    assert "@import" not in rules
    assert "url(" not in rules
