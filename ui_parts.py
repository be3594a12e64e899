"""What the page's tabs are made of: an output that shows a run, the endpoint that carries one out, and the sentences.

Knows nothing of any one mode's form, of pipelines, or of how the server is started.
"""

import functools
import inspect
import tempfile
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import annotated_types
import gradio as gr
from gradio.blocks import Block
from gradio.utils import get_upload_folder
from PIL import Image

import metadata
from engine import Engine
from errors import RequestError, StudioError
from request import SIZES, Event, Failure, Model, Queued, Request, Result, Sizes, Stage, Step, TileDone, WeightsKind

STAGES = {
    "loading": "Loading",
    "preprocessing": "Preparing the control image:",
    "upscaling": "Enlarging",
    "encoding": "Reading the prompt",
    "denoising": "Drawing",
    "decoding": "Developing the picture",
    "saving": "Saving the picture",
}

# Which weights draw, and the words to press for more.
WEIGHTS: dict[WeightsKind, tuple[str, str]] = {
    "mini": ("Drawing with the embedded miniature, which knows small flat icons.", "How to get the real weights"),
    "full": ("Drawing with the real weights.", "Which ones"),
}
WEIGHTS_MISSING = ("This model cannot draw yet: its weights are not complete.", "How to get them")

KEPT = "Your form is as you left it."

# Runs once in the browser: the element stays while its text changes, as a screen reader's live region must, and the
# tab's look follows whether something is under way.
STATUS_JS = """
element.setAttribute("role", "status");
const columns = element.closest(".columns");
watch("value", () => columns.classList.toggle("busy", !!element.querySelector(".working")));
"""

Update = dict[Block, Any]  # what a listener changes: by component, its value or an update of it

# For listeners of the page itself: Gradio's own progress would lie over ours, and programs call the endpoints.
QUIET = {"show_progress": "hidden", "api_visibility": "private"}


@dataclass(frozen=True)
class Situation:
    """What the page says and offers for one model, given the weights on this machine."""

    kind: WeightsKind
    complete: bool
    sentence: str

    @property
    def sizes(self) -> Sizes:
        """Possible widths and heights."""
        return SIZES[self.kind]

    @classmethod
    def of(cls, engine: Engine, mode: type[Request], model: Model) -> "Situation":
        """Look at which weights a request would use now; missing ones are a sentence, not an error."""
        try:
            chosen = engine.weights_in_use(mode.mode, model)
        except StudioError as error:
            return cls("full", False, str(error))
        return cls(chosen.kind, True, chosen.reason)


@dataclass(frozen=True)
class Output:
    """Where a picture appears, with what is said about it and what can be done with it."""

    picture: gr.Image
    status: gr.HTML
    cancel: gr.Button
    downloads: gr.Row
    png_file: gr.DownloadButton
    json_file: gr.DownloadButton
    details: gr.Accordion
    parameters: gr.HTML

    @classmethod
    def lay_out(cls, mode: type[Request], idle: str) -> "Output":
        """Make the components, from top to bottom. `idle` is the HTML shown while nothing has been asked for."""
        named = functools.partial(_named, mode)
        picture = gr.Image(
            type="filepath",
            format="png",
            label="Picture",
            show_label=False,
            interactive=False,
            buttons=["fullscreen"],
            **named("picture"),
        )
        with gr.Row(**named("now")):
            status = gr.HTML(idle, js_on_load=STATUS_JS, **named("status"))
            cancel = gr.Button("Cancel", size="sm", scale=0, **named("cancel"))
        with gr.Row(visible=False) as downloads:
            png_file = gr.DownloadButton("Download picture", size="sm")
            json_file = gr.DownloadButton("Download parameters", size="sm")
        with gr.Accordion("Parameters", open=False, visible=False) as details:
            parameters = gr.HTML(**named("parameters"))
        return cls(picture, status, cancel, downloads, png_file, json_file, details, parameters)

    @property
    def shown(self) -> list[Block]:
        """What `follow` changes."""
        return [
            self.picture,
            self.status,
            self.cancel,
            self.downloads,
            self.png_file,
            self.json_file,
            self.details,
            self.parameters,
        ]

    def follow(self, events: Generator[Event, None, None], stopped: Callable[[], bool]) -> Iterator[Update]:
        """Show each event, until the last one or until `stopped`.

        Only this writes what is shown: Gradio's own way to cancel lets two listeners write at once, and the loser of
        that race would leave a page that seems to work on something, or calls the cancelled run a failure.
        """
        shown = _working("Starting")
        yield {self.status: shown, self.cancel: gr.Button("Cancel", interactive=True)}
        for event in events:
            if stopped():
                events.close()
                yield {self.status: said(f"Cancelled. {KEPT}")}
                return
            match event:
                case Result():
                    with files(event) as (png, sidecar):
                        yield {
                            self.picture: gr.Image(png, alt_text=event.request.prompt),
                            self.status: _done(event),
                            self.downloads: gr.Row(visible=True),
                            self.png_file: png,
                            self.json_file: sidecar,
                            self.details: gr.Accordion(visible=True),
                            self.parameters: _parameters(Path(sidecar).read_text(encoding="utf-8")),
                        }
                case Failure():
                    yield {self.status: failed(event)}
                case _:
                    now = _underway(event)
                    # Also when there is nothing new to show: a visitor who has gone is noticed here.
                    yield {self.status: now if now != shown else gr.skip()}
                    shown = now


class Stopping:
    """Which visitors have pressed Cancel in one tab; a run sees it within a step."""

    def __init__(self, output: Output) -> None:
        self._sessions: set[str] = set()
        output.cancel.click(self._stop, None, output.cancel, **QUIET)

    def begin(self, visitor: gr.Request) -> Callable[[], bool]:
        """Forget an earlier press; return what says whether there is a new one."""
        me = visitor.session_hash or ""
        self._sessions.discard(me)
        return lambda: me in self._sessions

    def _stop(self, visitor: gr.Request) -> gr.Button:
        self._sessions.add(visitor.session_hash or "")
        return gr.Button("Cancelling", interactive=False)


# --- carrying out a request


def run(
    engine: Engine, mode: type[Request], visitor: gr.Request, fields: dict[str, Any]
) -> Generator[Event, None, None]:
    """Carry out an unchecked form; a form that is wrong is a failure like any other. Closing it cancels the work."""
    try:
        request = mode.parse(**fields)
    except StudioError as error:
        yield Failure.of(error)
        return
    with closing(engine.run(request, client=visitor.session_hash or "")) as events:
        yield from events


def answer(
    engine: Engine, mode: type[Request], visitor: gr.Request, fields: dict[str, Any]
) -> Iterator[tuple[dict | None, dict]]:
    """Carry out what a program asks for: how far it is, then the PNG file and its parameters.

    Raises:
        gr.Error: the sentence of a failed run, its code as the title.
    """
    with closing(run(engine, mode, visitor, fields)) as events:
        for event in events:
            match event:
                case Result():
                    with files(event) as (png, _):
                        yield gr.FileData(path=png).model_dump(), dict(event.sidecar)
                case Failure():
                    raise refusal(event)
                case _:
                    yield None, {"progress": type(event).__name__.lower(), **vars(event)}


def refusal(failure: Failure | StudioError) -> gr.Error:
    """Return a failed run as what a program gets: the sentence, with the code as its title."""
    return gr.Error(str(getattr(failure, "text", failure)), title=failure.code, print_exception=False)


def uploaded(file: gr.FileData, field: str = "image") -> str:
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
def as_file(image: Image.Image, name: str) -> Iterator[dict]:
    """Hand over a picture as a PNG file to download; Gradio takes a copy while it is there."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        image.save(path)
        yield gr.FileData(path=str(path)).model_dump()


def publish(endpoint: Callable[..., Iterator[tuple[dict | None, dict]]], mode: type[Request]) -> None:
    """Make an endpoint of `endpoint`, named like the mode; its arguments and docstring are what programs see."""
    # gr.api makes an output of each member of a returned tuple, and does not look inside Iterator.
    endpoint.__signature__ = inspect.signature(endpoint).replace(return_annotation=tuple[gr.FileData, dict])
    gr.api(endpoint, api_name=mode.mode)


@contextmanager
def files(result: Result) -> Iterator[tuple[str, str]]:
    """Hand over a result's picture and its parameters by path; Gradio takes copies while they are there.

    As files, because Gradio would encode a decoded picture anew and lose the text in it.
    """
    with tempfile.TemporaryDirectory() as folder:
        png = Path(folder) / f"{metadata.file_stem(result.request)}.png"
        sidecar = metadata.save(result, png)
        yield str(png), str(sidecar)


# --- a form's fields, as the request declares them ---------------------------------------------------------------


def help_line(mode: type[Request], name: str) -> str:
    """Return the help line of a field."""
    return mode.model_fields[name].description or ""


def bounds(mode: type[Request], name: str) -> tuple[float, float]:
    """Return the lowest and the highest value of a field."""
    declared = mode.model_fields[name].metadata
    lowest = next(bound.ge for bound in declared if isinstance(bound, annotated_types.Ge))
    highest = next(bound.le for bound in declared if isinstance(bound, annotated_types.Le))
    return lowest, highest


def _named(mode: type[Request], part: str) -> dict[str, Any]:
    """Name a part of a tab: by a class for the look, by an id that no other tab has."""
    return {"elem_id": f"{mode.mode}-{part}", "elem_classes": [part]}


# --- what the page says, as HTML ---------------------------------------------------------------------------------


def weights_line(now: Situation) -> str:
    """Say which weights draw, with more on demand."""
    plain, more = WEIGHTS[now.kind] if now.complete else WEIGHTS_MISSING
    return f"<details><summary>{plain} <u>{more}</u></summary><p>{escape(_upper(now.sentence))}</p></details>"


def idle(sentence: str, button: str) -> str:
    """Say what to do first; `button` is what the keys press."""
    keys = '<span class="keys">Or press <kbd>Ctrl</kbd> <kbd>Enter</kbd>; <kbd>Esc</kbd> cancels.</span>'
    return f'<p class="hint">{escape(sentence)}, then press {button}. {keys}</p>'


def said(sentence: str) -> str:
    """Return a sentence as a paragraph."""
    return f"<p>{escape(sentence)}</p>"


def _working(sentence: str, aside: str = "", fraction: float | None = None) -> str:
    """Say what is being done. `aside` is for the eye only: a screen reader need not read every step aloud."""
    known = "" if fraction is None else f' aria-valuenow="{100 * fraction:.0f}" style="--done: {fraction:.1%}"'
    return (
        f'<div class="working"><div class="bar" role="progressbar" aria-label="Progress"{known}><i></i></div>'
        f'<p>{escape(sentence)}<span aria-hidden="true">{escape(aside)}</span></p></div>'
    )


def _underway(event: Queued | Stage | Step | TileDone) -> str:
    match event:
        case Queued(ahead):
            others = "one request comes" if ahead == 1 else f"{ahead} requests come"
            return _working(f"Waiting: {others} before yours")
        case Stage(name, detail):
            return _working(STAGES.get(name, name), detail, 1.0 if name in ("decoding", "saving") else None)
        case Step(index, total):
            return _working(STAGES["denoising"], f"step {index} of {total}", index / total)
        case TileDone(stage, index, total):
            return _working(STAGES[stage], f"tile {index} of {total}", index / total)


def failed(failure: Failure | StudioError) -> str:
    """Say why there is no picture."""
    failure = Failure.of(failure) if isinstance(failure, StudioError) else failure
    facts = failure.values
    if failure.code != RequestError.code:
        text = _upper(failure.text)
    elif facts["field"] == "image" and facts["value"] == "None":
        text = "Choose an image first."
    elif facts["field"] == "prompt":
        text = f"What should the picture show? The prompt takes {facts['allowed']}."
    elif facts["field"] == "lora":
        text = f"This LoRA cannot be used. Wanted: {facts['allowed']}."
    else:
        name = facts["field"].replace("_", " ").capitalize().replace("Cfg", "CFG").replace("Lora", "LoRA")
        text = f"{name} takes {facts['allowed']}; {facts['value']} is not possible."
        if facts["nearest"] is not None:
            text += f" The nearest is {facts['nearest']}."
    return f'<p class="failed">{escape(text)}</p>'


def _done(result: Result) -> str:
    used, total, loading = result.request, result.seconds["total"], result.seconds.get("loading", 0.0)
    time = f"{total:.1f} s" + (f", {loading:.1f} of them loading" if loading >= 1 else "")
    width, height = result.size
    drawn = f"{used.model.title()}, {used.steps_run} steps, " if used.steps_run else ""
    facts = f"{drawn}{width} × {height}, {time}"
    notes = "".join(f'<p class="note">{escape(note.text)}</p>' for note in result.notes)
    return f"<p><span>Seed <b>{used.seed}</b></span><span>{facts}</span></p>{notes}"


def _parameters(text: str) -> str:
    # Not as gr.JSON: its colours compete with the picture's.
    return f'<pre tabindex="0">{escape(text)}</pre>'


def _upper(text: str) -> str:
    """Begin a text like a sentence; it may end with a command, so its end stays."""
    return text[:1].upper() + text[1:]
