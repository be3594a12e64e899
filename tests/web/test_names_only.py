"""Where files lie is told to this machine's own users only."""

from __future__ import annotations

import json
from pathlib import Path

import gradio as gr
import httpx
import pytest
from starlette.requests import Request

from core.errors import InternalError, NotWritten, RequestError, StudioError
from core.events import Failure
from core.messages import Message
from tests.helpers.serving import server
from web.api_errors import ApiError
from web.endpoints import refusal
from web.language import Say, say_to
from web.names_only import names_only
from web.words import failed

FOLDER = "/srv/of some body/models"
FILE = f"{FOLDER}/fox.safetensors"


def every_kind() -> list[type[StudioError]]:
    kinds: list[type[StudioError]] = [StudioError]
    for kind in kinds:
        kinds += kind.__subclasses__()
    return kinds


def with_paths(kind: type[StudioError]) -> StudioError:
    """Return an error of a kind with paths wherever its message may have them."""
    reasons = [Message("why", "no room in {place}", place=FOLDER), f"[Errno 13] Permission denied: '{FILE}'"]
    text = "{path} cannot be used ({reasons}); allowed: {allowed}"
    facts = {"field": "checkpoint", "value": repr(FILE), "nearest": None}
    return kind.known(kind.code, Message(kind.code, text, path=FILE, reasons=reasons, allowed=FOLDER, **facts))


def visitor(address: str, **headers: str) -> gr.Request:
    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return gr.Request(Request({"type": "http", "client": (address, 1), "headers": raw, "query_string": b""}))


def texts(error: StudioError, say: Say) -> list[str]:
    """Return what all fronts tell of an error, the page as `say` has it."""
    return [say(error.message), failed(error, say), str(refusal(error).message), json.dumps(ApiError.of(error).facts)]


@pytest.mark.parametrize("kind", every_kind(), ids=lambda kind: kind.code)
def test_no_error_tells_a_path_to_others(kind: type[StudioError]) -> None:
    error = with_paths(kind)
    for text in texts(error, say_to(visitor("203.0.113.9"))):
        assert "/srv" not in text
        assert "some body" not in text
    assert "fox.safetensors" in str(names_only(Failure.of(error)).message)  # its name stays
    assert FILE in say_to(visitor("127.0.0.1"))(error.message)
    assert FILE in str(error)  # as in the log


def test_the_errors_that_are_made_of_paths_tell_names() -> None:
    remote = say_to(visitor("203.0.113.9", accept_language="zh-CN"))
    long = f"/tmp/gradio/{'0' * 64}/the visitor's own.safetensors"
    for error, name in (
        (NotWritten(FILE, "No space left on device"), "fox.safetensors"),
        (InternalError("FileNotFoundError", f"[Errno 2] No such file or directory: '{FILE}'"), "fox.safetensors"),
        (RequestError("lora", long, "a file that exists"), "the visitor's own.safetensors"),
    ):
        assert all("/srv" not in text and "/tmp" not in text for text in texts(error, remote))
        assert name in str(refusal(error).message)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("see https://huggingface.co/a/b, or 3/4", "see https://huggingface.co/a/b, or 3/4"),
        ("POST /v1", "POST /v1"),
        ("in /srv/x/y.z (full)", "in y.z (full)"),
        ("no /srv/my models/of some body/a fox.bin, but /srv/a b/c", "no a fox.bin, but c"),
        ("no /srv/x/a.png and/or b/c", "no a.png and/or b/c"),
        ("a /imagine a 3/4 view", "a /imagine a 3/4 view"),
        (r"in C:\Program Files\My App\x.txt", "in x.txt"),
        (r"C:\Users\me\x.txt", "x.txt"),
        ("file:///a/b c", "b c"),
        ("~/a/b", "b"),
        ("/models", "models"),
        ("/home/my name/a.png", "a.png"),
        ("/home/u/a.png is no picture; use png/jpeg", "a.png is no picture; use png/jpeg"),
        ("/imagine a cat and/or a dog", "/imagine a cat and/or a dog"),
        ("""no "/it's here/a b" nor '/x y/z'""", """no "a b" nor 'z'"""),
    ],
)
def test_only_absolute_paths_are_cut(text: str, told: str) -> None:
    assert names_only(text) == told


def test_a_program_elsewhere_gets_names() -> None:
    (sent,) = httpx.post(f"{server().url}gradio_api/upload", files={"files": ("a.safetensors", b"")}).json()
    gone = {"path": str(Path(sent).with_name("gone.safetensors")), "meta": {"_type": "gradio.FileData"}}
    fields = ["a fox", "base", "", 1, None, None, None, 7, gone, 0.8, "auto", 0, ""]
    called = f"{server().url}gradio_api/call/generate"
    event = httpx.post(called, json={"data": fields}, headers={"X-Forwarded-For": "203.0.113.9"}).json()["event_id"]
    answer = httpx.get(f"{called}/{event}", timeout=120).text
    assert "gone.safetensors" in answer
    assert Path(sent).parent.name not in answer
