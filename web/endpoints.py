"""The named endpoints, as programs get them: a run's progress, then its files, or a sentence that refuses."""

import inspect
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.components.api_component import Api
from gradio.events import api
from gradio.utils import get_upload_folder
from PIL import Image

from core import metadata
from core.errors import NotWritten, RequestError, StudioError
from core.events import Failure, Result, Retry
from core.messages import plain
from core.parameters import all_finite
from core.request import DrawRequest, Request
from core.whole_file import replacing
from engine import Engine
from engine.inspection import inspected
from web.clients import caller
from web.names_only import names_only
from web.run import carry_out, unhurried

# What an endpoint yields: its file, once there is one, and how far it is or what belongs to the file.
Answers = Iterator[tuple[dict[str, Any] | None, dict[str, Any]]]


def stream(engine: Engine, mode: type[DrawRequest], visitor: gr.Request, fields: dict[str, Any]) -> Answers:
    """Carry out what a program asks for: how far it is, then the PNG file and its parameters.

    Raises:
        gr.Error: the sentence of a failed run, its code as the title.
    """
    with closing(carry_out(engine, mode, caller(visitor), fields)) as events:
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
                    yield None, {"progress": "retry", "text": str(names_only(note))}
                case _:
                    told = {name: plain(names_only(value)) for name, value in vars(event).items() if name != "preview"}
                    yield None, {"progress": type(event).__name__.lower(), **told}


def refusal(failure: Failure | StudioError) -> gr.Error:
    """Return a failed run as what a program gets: the sentence, with the code as its title."""
    return gr.Error(str(names_only(failure.message)), title=failure.code, print_exception=False)


def uploaded(file: gr.FileData | dict[str, Any], field: str = "image") -> str:
    """Return the path of a file that came with a program's request; no other file of this machine is opened.

    Raises:
        gr.Error: it is no uploaded file.
    """
    path = file.get("path") if isinstance(file, dict) else None
    folder = Path(get_upload_folder()).resolve()
    if not isinstance(path, str) or "\0" in path or not Path(path).resolve().is_relative_to(folder):
        raise refusal(RequestError(field, path, "a file that is uploaded with the request"))
    return path


@contextmanager
def as_file(image: Image.Image, name: str) -> Iterator[dict[str, Any]]:
    """Hand over an image as a PNG file to download; Gradio takes a copy while it is there.

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


def publish(mode: type[Request], description: str, answer: Callable[[gr.Request, dict[str, Any]], Answers]) -> None:
    """Add the endpoint of a mode, which has its name and takes its fields.

    Args:
        mode: the mode's request. What it requires comes first, else its own order holds.
        description: what programs see.
        answer: carries out the fields, unchecked, for a visitor.
    """
    fields = dict(sorted(mode.model_fields.items(), key=lambda field: not field[1].is_required()))

    def endpoint(visitor: gr.Request, *given: Any) -> Answers:
        values = dict(zip(fields, given, strict=True))
        if values.get("lora", "") is None:
            del values["lora"]
        files = [name for name in (*mode.files, "lora") if name in values]
        yield from answer(visitor, values | {name: uploaded(values[name], name) for name in files})

    parameters = [_parameter(name, *_taken(mode, name)) for name in fields]
    told = [_told(mode, name) for name in fields]
    # gr.api makes an output of each member of a returned tuple, and does not look inside Iterator.
    returned = tuple[gr.FileData, dict[str, Any]]
    _add(mode.mode, description, endpoint, parameters, returned, told, ["file", "parameters"])


def publish_inspect() -> None:
    """Add the endpoint `/inspect`, which says what a file holds."""

    def endpoint(visitor: gr.Request, file: Any) -> Iterator[dict[str, Any]]:
        path = Path(uploaded(file, "file"))
        try:
            yield all_finite(plain(inspected(path, path.name)))
        except StudioError as error:
            raise refusal(error) from error

    parameters = [_parameter("file", gr.FileData)]
    told = ["A picture, or a LoRA's .safetensors file. It is uploaded: gradio_client.handle_file(...)."]
    _add("inspect", INSPECT, endpoint, parameters, dict[str, Any], told, ["facts"])


INSPECT = """Say what a picture was made with, also by another program, or what a LoRA file would change.

Returns what `cli.py inspect --json` prints. Nothing is decoded or loaded.
"""


def _add(
    name: str,
    description: str,
    endpoint: Callable[..., Iterator[Any]],
    parameters: list[inspect.Parameter],
    returned: Any,
    told: list[str],
    outputs: list[str],
) -> None:
    """Add an endpoint that takes a visitor and then `parameters`, each of which is `told` about."""
    parameters = [_parameter("visitor", gr.Request), *parameters]
    signature = inspect.Signature(parameters, return_annotation=returned)
    endpoint.__signature__ = signature  # type: ignore[attr-defined]  # functions take it, other callables may not
    endpoint.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    endpoint.__annotations__["return"] = returned
    endpoint.__doc__ = description
    made = api(unhurried(endpoint), api_name=name)
    page = gr.context.Context.root_block
    assert page is not None
    function = page.fns[made["id"]]
    # gr.api has no place for these, and calls its components 1st, 2nd and so on.
    for component, parameter, text in zip(function.inputs, parameters[1:], told, strict=True):
        assert isinstance(component, Api)
        component.label = parameter.name
        component._api_info |= {"additional_description": text}
    for component, label in zip(function.outputs, outputs, strict=True):
        assert isinstance(component, Api)
        component.label = label


def _told(mode: type[Request], name: str) -> str:
    """Return what a field is for, and what it takes."""
    text = mode.model_fields[name].description or ""
    if name in mode.files or name == "lora":
        return f"{text} It is uploaded: gradio_client.handle_file(...)."
    return f"{text} Takes {mode.allowed(name)}."


def _parameter(name: str, annotation: Any, default: Any = inspect.Parameter.empty) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=annotation, default=default)


def _taken(mode: type[Request], name: str) -> tuple[Any, Any]:
    """Return an endpoint's type and default for a field; a file is uploaded."""
    field = mode.model_fields[name]
    if name in mode.files:
        return gr.FileData, inspect.Parameter.empty
    if name == "lora":
        return gr.FileData | None, None
    return field.annotation, inspect.Parameter.empty if field.is_required() else field.default


@contextmanager
def files(result: Result) -> Iterator[tuple[str, str]]:
    """Hand over a result's picture and its parameters by path; Gradio takes copies while they are there.

    As files, because Gradio would encode a decoded image again and lose the text in it.

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
