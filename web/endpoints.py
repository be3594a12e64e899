"""The named endpoints, as programs get them: a run's progress, then its files, or a sentence that refuses."""

import inspect
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.events import api
from gradio.utils import get_upload_folder
from PIL import Image

from core import metadata
from core.errors import NotWritten, RequestError, StudioError
from core.events import Failure, Result, Retry
from core.messages import plain
from core.request import DrawRequest, Request
from core.whole_file import replacing
from engine import Engine
from web.run import carry_out

# What an endpoint gives, again and again: its file, once there is one, and how far it is or what belongs to the file.
Answers = Iterator[tuple[dict[str, Any] | None, dict[str, Any]]]


def stream(engine: Engine, mode: type[DrawRequest], visitor: gr.Request, fields: dict[str, Any]) -> Answers:
    """Carry out what a program asks for: how far it is, then the PNG file and its parameters.

    Raises:
        gr.Error: the sentence of a failed run, its code as the title.
    """
    with closing(carry_out(engine, mode, visitor, fields)) as events:
        for event in events:
            match event:
                case Result():
                    try:
                        with files(event) as (png, _):
                            yield gr.FileData(path=png).model_dump(), dict(event.sidecar)
                    except NotWritten as error:
                        raise refusal(error) from error
                case Failure():
                    raise refusal(event)
                case Retry(note):
                    yield None, {"progress": "retry", "text": str(note)}
                case _:
                    told = {name: plain(value) for name, value in vars(event).items() if name != "preview"}
                    yield None, {"progress": type(event).__name__.lower(), **told}


def refusal(failure: Failure | StudioError) -> gr.Error:
    """Return a failed run as what a program gets: the sentence, with the code as its title."""
    return gr.Error(str(getattr(failure, "text", failure)), title=failure.code, print_exception=False)


def uploaded(file: gr.FileData | dict[str, Any], field: str = "image") -> str:
    """Return the path of a file that came with a program's request; no other file of this machine is opened.

    Raises:
        gr.Error: it is no uploaded file.
    """
    path = file.get("path") if isinstance(file, dict) else None
    folder = Path(get_upload_folder()).resolve()
    if not isinstance(path, str) or not Path(path).resolve().is_relative_to(folder):
        raise refusal(RequestError(field, path, "a file that is uploaded with the request"))
    return path


@contextmanager
def as_file(image: Image.Image, name: str) -> Iterator[dict[str, Any]]:
    """Hand over a picture as a PNG file to download; Gradio takes a copy while it is there.

    Raises:
        gr.Error: it could not be written.
    """
    try:
        with _folder() as folder:
            with replacing(folder / name) as file:
                image.save(file, "PNG")
            yield gr.FileData(path=str(folder / name)).model_dump()
    except NotWritten as error:
        raise refusal(error) from error


def publish(endpoint: Callable[..., Answers], mode: type[Request]) -> None:
    """Make an endpoint of `endpoint`, named like the mode; its arguments and docstring are what programs see."""
    # gr.api makes an output of each member of a returned tuple, and does not look inside Iterator.
    signature = inspect.signature(endpoint).replace(return_annotation=tuple[gr.FileData, dict[str, Any]])
    endpoint.__signature__ = signature  # type: ignore[attr-defined]  # functions take it, other callables may not
    api(endpoint, api_name=mode.mode)


@contextmanager
def files(result: Result) -> Iterator[tuple[str, str]]:
    """Hand over a result's picture and its parameters by path; Gradio takes copies while they are there.

    As files, because Gradio would encode a decoded picture anew and lose the text in it.

    Raises:
        NotWritten: there is no room for them.
    """
    with _folder() as folder:
        png = folder / f"{metadata.file_stem(result.request)}.png"
        sidecar = metadata.save(result, png)
        yield str(png), str(sidecar)


@contextmanager
def _folder() -> Iterator[Path]:
    """Make a folder for files that are handed over; it goes with the block."""
    try:
        made = tempfile.TemporaryDirectory()
    except OSError as error:
        raise NotWritten(tempfile.tempdir or "a temporary file", error.strerror or str(error)) from error
    with made as folder:
        yield Path(folder)
