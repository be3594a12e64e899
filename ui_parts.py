"""What the page's tabs are made of: an output that shows a run, the endpoint that carries one out, and the sentences.

Knows nothing of any one mode's form, of pipelines, or of how the server is started.
"""

import inspect
import tempfile
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import annotated_types
import gradio as gr
from gradio.blocks import Block
from gradio.utils import get_upload_folder
from PIL import Image

from core import metadata
from core.errors import NotWritten, RequestError, StudioError
from core.events import Event, Failure, Result, Retry, Step
from core.request import SEED_MAX, Model, Request, TextToImage, random_seed
from core.sizes import IMAGE_SIZES, ImageSizes, WeightsKind, smaller
from core.whole_file import replacing
from engine import Engine
from engine.timing import Pace
from language import Say, Words, english, fixed, say_to
from ui_gallery import Past, Strip, joined
from ui_words import (
    KEPT,
    again,
    done_with,
    emerging,
    failed,
    idle,
    parameters_of,
    said,
    underway,
    weights_line,
    working_on,
)

__all__ = ["failed", "idle", "said", "weights_line"]  # the tabs take these from here

# These run once in the browser. What the server has worded is worded anew when the page's language changes.
REWORD_JS = 'addEventListener("studio-language", () => trigger("input"));'
# The element stays while its text changes, as a screen reader's live region must, and the tab's look follows whether
# something is under way.
STATUS_JS = f"""{REWORD_JS}
element.setAttribute("role", "status");
const columns = element.closest(".columns");
watch("value", () => columns.classList.toggle("busy", !!element.querySelector(".working")));
"""

FAULT = "That did not work; the server's log says why."

Update = dict[Block, Any]  # what a listener changes: by component, its value or an update of it

# For listeners of the page itself: Gradio's own progress would lie over ours, and programs call the endpoints.
QUIET = {"show_progress": "hidden", "api_visibility": "private"}


@dataclass(frozen=True)
class Situation:
    """What the page says and offers for one model, given the weights on this machine."""

    kind: WeightsKind
    complete: bool
    sentences: tuple[str, ...]

    @property
    def sizes(self) -> ImageSizes:
        """Possible widths and heights."""
        return IMAGE_SIZES[self.kind]

    @classmethod
    def of(cls, engine: Engine, mode: type[Request], model: Model) -> "Situation":
        """Look at which weights a request would use now; missing ones are a sentence, not an error."""
        try:
            chosen = engine.weights_in_use(mode.mode, model)
        except StudioError as error:
            return cls("full", False, (str(error),))
        return cls(chosen.kind, True, tuple(filter(None, (chosen.reason, engine.memory_in_use()))))


@dataclass(frozen=True)
class Output:
    """Where a picture appears, with what is said about it and what can be done with it."""

    picture: gr.Image
    status: gr.HTML
    cancel: gr.Button
    preview: gr.HTML
    mend: gr.Button
    mending: gr.State
    words: gr.State  # what the status says, once nothing is under way: `Words`
    downloads: gr.Row
    png_file: gr.DownloadButton
    json_file: gr.DownloadButton
    details: gr.Accordion
    parameters: gr.HTML
    strip: Strip
    mendable: set[str] = field(default_factory=set)  # fields that the button `mend` can change; see `ui_form`

    @classmethod
    def lay_out(cls, mode: type[Request], idle: str) -> "Output":
        """Make the components, from top to bottom. `idle` is the HTML shown while nothing has been asked for."""
        named = partial(_named, mode)
        with gr.Column(**named("stage")):
            picture = gr.Image(
                type="filepath",
                format="png",
                label=fixed("Picture"),
                show_label=False,
                interactive=False,
                buttons=["fullscreen"],
                **named("picture"),
            )
            preview = gr.HTML(**named("emerging"))
        with gr.Row(**named("now")):
            status = gr.HTML(idle, js_on_load=STATUS_JS, **named("status"))
            cancel = gr.Button(fixed("Cancel"), size="sm", scale=0, **named("cancel"))
        mend, mending = gr.Button(visible=False, size="sm", **named("mend")), gr.State()
        words = gr.State()
        status.input(_said_again, [words, mending], [status, mend], **QUIET)
        with gr.Row(visible=False, **named("downloads")) as downloads:
            png_file = gr.DownloadButton(fixed("Download picture"), size="sm")
            json_file = gr.DownloadButton(fixed("Download parameters"), size="sm")
            gr.Button(fixed("Copy picture"), size="sm", elem_classes=["copy"])  # assets/page.js does it
        with gr.Accordion(fixed("Parameters"), open=False, visible=False) as details:
            parameters = gr.HTML(**named("parameters"))
        about = downloads, png_file, json_file, details, parameters, Strip.lay_out(mode)
        output = cls(picture, status, cancel, preview, mend, mending, words, *about)
        output.strip.gallery.select(output._look_back, output.strip.past, output.shown, **QUIET)
        return output

    @property
    def shown(self) -> list[Block]:
        """What `follow` changes."""
        return [
            self.picture,
            self.status,
            self.cancel,
            self.preview,
            self.mend,
            self.mending,
            self.words,
            self.downloads,
            self.png_file,
            self.json_file,
            self.details,
            self.parameters,
            self.strip.gallery,
            self.strip.past,
        ]

    def follow(
        self,
        events: Generator[Event, None, None],
        stopped: Callable[[], bool],
        past: list[Past],
        say: Say = english,
        count: int = 1,
    ) -> Iterator[Update]:
        """Show each event of `count` pictures, until the last one or until `stopped`, worded by `say`.

        `past` is what lies in the strip; each new picture joins it.

        Only this writes what is shown: Gradio's own way to cancel lets two listeners write at once, and the loser of
        that race would leave a page that seems to work on something, or calls the cancelled run a failure.
        """
        shown, banner, pace, done = working_on(say, say("Starting")), "", Pace(), 0
        yield {
            self.status: shown,
            self.cancel: gr.Button(say("Cancel"), interactive=True),
            self.preview: "",
            self.mend: gr.Button(visible=False),
            self.words: None,
        }
        for event in events:
            if stopped():
                events.close()
                yield self.tell(_cancelled, say) | {self.preview: ""}
                return
            match event:
                case Result():
                    done, banner = done + 1, ""
                    facts = replace(event, png=b"", sidecar={})  # these are kept as long as the words are
                    try:
                        with files(event) as paths:
                            new = Past(*map(self._cached, paths), partial(done_with, facts))
                    except NotWritten as error:
                        events.close()
                        yield self.tell(partial(failed, Failure.of(error)), say) | {self.preview: ""}
                        return
                    past = joined(past, new)
                    update = self._finished(new, event.request.prompt) | self.strip.show(past)
                    yield update | (self.tell(new.words, say) if done == count else {})
                case Failure():
                    yield self.tell(partial(failed, event), say) | self._offer(event, say) | {self.preview: ""}
                case Retry(note):
                    banner, pace = again(note, say), Pace()
                    yield {self.status: banner + shown, self.preview: ""}
                case _:
                    of_several = say("Picture {number} of {count}:", number=done + 1, count=count) if count > 1 else ""
                    now = banner + underway(event, say, pace.left(event), of_several)
                    # Also when there is nothing new to show: a visitor who has gone is noticed here.
                    update = {self.status: now if now != shown else gr.skip()}
                    if isinstance(event, Step) and event.preview:
                        update[self.preview] = emerging(event.preview)
                    yield update
                    shown = now

    def _cached(self, file: str) -> str:
        """Return the path of a file's copy in Gradio's cache, which every component shares and a page may read."""
        try:
            copy = self.picture.move_resource_to_block_cache(file)
        except OSError as error:
            raise NotWritten(Path(file).name, error.strerror or str(error)) from error
        assert copy is not None  # it is only for no path
        return copy

    def _look_back(self, event: gr.SelectData, past: list[Past], visitor: gr.Request) -> Update:
        """Show an earlier picture, as it was shown when it was new."""
        one = past[event.index]
        try:
            prompt = metadata.read_png(Path(one.picture)).values["prompt"]
        except RequestError:  # swept away after a day
            return {self.status: gr.skip()}
        return self._finished(one, prompt) | self.tell(one.words, say_to(visitor))

    def _finished(self, one: Past, prompt: str) -> Update:
        """Return what shows a finished picture."""
        return {
            self.picture: gr.Image(one.picture, alt_text=prompt),
            self.preview: "",
            self.downloads: gr.Row(visible=True),
            self.png_file: one.picture,
            self.json_file: one.sidecar,
            self.details: gr.Accordion(visible=True),
            self.parameters: parameters_of(Path(one.sidecar).read_text(encoding="utf-8")),
        }

    def _offer(self, failure: Failure, say: Say) -> Update:
        """Offer the one change that mends a failed form, where there is one and the form can make it."""
        name, nearest = failure.values.get("field"), failure.values.get("nearest")
        if name not in self.mendable:
            return {}  # also where nothing is named
        value = {"lora": None, "seed": 0}.get(name, nearest)
        if value is None and name != "lora":
            return {}
        return {self.mend: gr.Button(_offered(name, value, say), visible=True), self.mending: (name, value)}

    def tell(self, words: Words, say: Say) -> Update:
        """Say in the status how a run ended, or what was done, so that it can be said again in another language."""
        return {self.status: words(say), self.words: words}


def _said_again(words: Words | None, change: tuple[str, Any] | None, visitor: gr.Request) -> tuple[Any, Any]:
    """Return the status and the name of the mending button in the visitor's language."""
    say = say_to(visitor)
    return gr.skip() if words is None else words(say), gr.Button(_offered(*change, say)) if change else gr.skip()


def _offered(name: str, value: Any, say: Say) -> str:
    if name == "lora":
        return say("Turn LoRA off")
    return say("Use a random seed") if name == "seed" else say("Use {value}", value=value)


def _cancelled(say: Say) -> str:
    return said(f"{say('Cancelled.')} {say(KEPT)}")


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
        return gr.Button(say_to(visitor)("Cancelling"), interactive=False)


# --- carrying out a request


def run(
    engine: Engine, mode: type[Request], visitor: gr.Request, fields: dict[str, Any], count: int = 1
) -> Generator[Event, None, None]:
    """Carry out an unchecked form; a form that is wrong is a failure like any other. Closing it cancels the work.

    With a `count`, so many pictures are drawn, one after another, with consecutive seeds; a failure ends them.
    """
    try:
        request = mode.parse(**fields)
    except StudioError as error:
        yield Failure.of(error)
        return
    if count > 1 and not request.seed:
        request = request.model_copy(update={"seed": random_seed()})
    for _ in range(count):
        failed = False
        with closing(engine.run(request, client=visitor.session_hash or "")) as events:
            for event in events:
                failed = isinstance(event, Failure)
                yield pointed(event, engine, request) if failed else event
        if failed:
            return
        request = request.model_copy(update={"seed": request.seed % SEED_MAX + 1})


def pointed(failure: Failure, engine: Engine, request: Request) -> Failure:
    """Name the field whose change likely mends a failure that names none itself: a smaller size, or no LoRA."""
    found: dict[str, Any] = {}
    if failure.code in ("out_of_memory", "broken_picture") and getattr(request, "lora", ""):
        found = {"field": "lora"}
    if failure.code in ("out_of_memory", "gpu_aborted") and isinstance(request, TextToImage):
        sizes = Situation.of(engine, type(request), request.model).sizes
        if less := smaller(request.width or sizes.native, request.height or sizes.native, sizes):
            found = {"field": "size", "nearest": f"{less[0]} x {less[1]}"}
    return replace(failure, values={**found, **failure.values})


def broken(visitor: gr.Request) -> str:
    """Say that a listener itself failed, which is a fault of ours."""
    say = say_to(visitor)
    return f'<p class="failed">{escape(say(FAULT))} {escape(say(KEPT))}</p>'


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
                    try:
                        with files(event) as (png, _):
                            yield gr.FileData(path=png).model_dump(), dict(event.sidecar)
                    except NotWritten as error:
                        raise refusal(error) from error
                case Failure():
                    raise refusal(event)
                case Retry(note):
                    yield None, {"progress": "retry", "text": note.text}
                case _:
                    told = {name: value for name, value in vars(event).items() if name != "preview"}
                    yield None, {"progress": type(event).__name__.lower(), **told}


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


def publish(endpoint: Callable[..., Iterator[tuple[dict | None, dict]]], mode: type[Request]) -> None:
    """Make an endpoint of `endpoint`, named like the mode; its arguments and docstring are what programs see."""
    # gr.api makes an output of each member of a returned tuple, and does not look inside Iterator.
    endpoint.__signature__ = inspect.signature(endpoint).replace(return_annotation=tuple[gr.FileData, dict])
    gr.api(endpoint, api_name=mode.mode)


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


# --- a form's fields, as the request declares them ---------------------------------------------------------------


def help_line(mode: type[Request], name: str) -> str:
    """Return the help line of a field, in the visitor's language once it is on the page."""
    return str(fixed(mode.model_fields[name].description or ""))


def bounds(mode: type[Request], name: str) -> tuple[float, float]:
    """Return the lowest and the highest value of a field."""
    declared = mode.model_fields[name].metadata
    lowest = next(bound.ge for bound in declared if isinstance(bound, annotated_types.Ge))
    highest = next(bound.le for bound in declared if isinstance(bound, annotated_types.Le))
    return lowest, highest


def _named(mode: type[Request], part: str) -> dict[str, Any]:
    """Name a part of a tab: by a class for the look, by an id that no other tab has."""
    return {"elem_id": f"{mode.mode}-{part}", "elem_classes": [part]}
