"""Where a picture appears on a tab, with the text about it and what can be done with it."""

import secrets
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.blocks import Block
from gradio.events import Dependency

from core import metadata
from core.errors import NotWritten, RequestError
from core.events import Event, Failure, Result, Retry, Step
from core.request import Request
from engine.timing import Pace
from web.endpoints import files, uploaded
from web.fields import QUIET, REWORD_JS, Update, named_for
from web.language import Say, Words, english, fixed, say_to
from web.strip import Past, Strip, joined
from web.words import KEPT, done_with, emerging, failed, paragraph, parameters_of, retrying, underway, working_on

# The element stays while its text changes, as a screen reader's live region must, and the tab's look follows whether
# something is under way.
STATUS_JS = f"""{REWORD_JS}
element.setAttribute("role", "status");
const columns = element.closest(".columns");
columns.classList.add("untouched"); // until the first press: what a press moves, it moves at once
columns.addEventListener("click", ({{ target }}) => {{
  if (target.closest(".go, #examples button")) columns.classList.remove("untouched");
}});
watch("value", () => {{
  const busy = columns.classList.toggle("busy", !!element.querySelector(".working"));
  columns.querySelector(".go").ariaDisabled = busy;
}});
"""


@dataclass
class Output:
    """Where a picture appears, with the text about it and what can be done with it."""

    stage: gr.Column
    picture: gr.Image
    status: gr.HTML
    cancel: gr.Button
    preview: gr.HTML
    fix: gr.Button
    change: gr.State  # what `fix` makes: a field's name and value
    words: gr.State  # the status's text, once nothing is under way: `Words`
    actions: gr.Row
    others: gr.Row  # for what other parts of the page offer to do with a picture
    png_file: gr.DownloadButton
    json_file: gr.DownloadButton
    parameters: gr.HTML
    strip: Strip
    looked_back: Dependency = field(init=False)  # an earlier picture was chosen in the strip, and is shown
    fixable: set[str] = field(default_factory=set)  # fields that the button `fix` can change; see `web.form`

    @classmethod
    def lay_out(cls, mode: type[Request], idle: str) -> "Output":
        """Make the components: the stage, and beside or below it what is said and what can be done.

        `idle` is the HTML shown while nothing has been asked for.
        """
        named = partial(named_for, mode)
        with gr.Column(**named("stage")) as stage:
            picture = gr.Image(
                type="filepath",
                format="png",
                label=fixed("Picture"),
                show_label=False,
                interactive=False,
                buttons=[],
                **named("picture"),
            )
            preview = gr.HTML(**named("emerging"))
        with gr.Column(**named("caption"), min_width=0):
            with gr.Row(**named("now")):
                status = gr.HTML(idle, js_on_load=STATUS_JS, **named("status"))
                cancel = gr.Button(fixed("Cancel"), size="sm", scale=0, **named("cancel"))
            fix, change = gr.Button(visible=False, size="sm", **named("fix")), gr.State()
            words = gr.State()
            status.input(_reworded, [words, change], [status, fix], **QUIET)
            strip = Strip.lay_out(mode)
            with gr.Row(visible=False, **named("actions")) as actions:
                png_file = _download("Download", "download")
                gr.Button(fixed("Copy"), size="sm", elem_classes=["copy"])  # web/assets/page.js does it
                others = gr.Row(elem_classes=["others"])
                with gr.Accordion(fixed("More"), open=False, elem_classes=["more"]):
                    parameters = gr.HTML(js_on_load=REWORD_JS, **named("parameters"))
                    json_file = _download("Download parameters")
            parameters.input(_parameters_again, json_file, parameters, preprocess=False, **QUIET)
        about = actions, others, png_file, json_file, parameters, strip
        output = cls(stage, picture, status, cancel, preview, fix, change, words, *about)
        output.looked_back = strip.gallery.select(output._look_back, strip.past, output.shown, **QUIET)
        return output

    @property
    def shown(self) -> list[Block]:
        """What `follow` changes."""
        return [
            self.picture,
            self.status,
            self.cancel,
            self.preview,
            self.fix,
            self.change,
            self.words,
            self.actions,
            self.png_file,
            self.json_file,
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
        source: str = "",
    ) -> Iterator[Update]:
        """Show each event of `count` pictures, until the last one or until `stopped`, worded by `say`.

        `past` is what lies in the strip; each new picture joins it, with the image `source` that it was made from.

        Only this writes what is shown: Gradio's own way to cancel lets two listeners write at once, and the loser of
        that race would leave a page that seems to work on something, or calls the cancelled run a failure.
        """
        shown, banner, pace, done, run = working_on(say, say("Starting")), "", Pace(), 0, secrets.token_hex(4)
        yield {
            self.status: shown,
            self.cancel: gr.Button(say("Cancel"), interactive=True),
            self.preview: "",
            self.fix: gr.Button(visible=False),
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
                        with files(event) as (png, sidecar):
                            used = event.request
                            name = f"{used.prompt}, {say('seed {seed}', seed=used.seed)}"
                            words = partial(done_with, facts)
                            kept = self._cached(png), self._cached(sidecar)
                            new = Past(*kept, words, source, name, used.seed, run)
                    except NotWritten as error:
                        events.close()
                        yield self.tell(partial(failed, Failure.of(error)), say) | {self.preview: ""}
                        return
                    past = joined(past, new)
                    update = self._finished(new, event.request.prompt, say) | self.strip.show(past)
                    yield update | (self.tell(new.words, say) if done == count else {})
                case Failure():
                    yield self.tell(partial(failed, event), say) | self._offer(event, say) | {self.preview: ""}
                case Retry(note):
                    banner, pace = retrying(note, say), Pace()
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
        return self.look_at(past[event.index], say_to(visitor))

    def look_at(self, chosen: Past, say: Say) -> Update:
        """Show an earlier picture, as it was shown when it was new."""
        try:
            prompt = metadata.read_picture(Path(chosen.picture)).values["prompt"]
        except RequestError:  # swept away after an hour
            return {self.status: gr.skip()}
        return self._finished(chosen, prompt, say) | self.tell(chosen.words, say)

    def _finished(self, made: Past, prompt: str, say: Say) -> Update:
        """Return what shows a finished picture."""
        return {
            self.picture: gr.Image(made.picture, alt_text=prompt),
            self.preview: "",
            self.actions: gr.Row(visible=True),
            self.png_file: made.picture,
            self.json_file: made.sidecar,
            self.parameters: _parameters(made.sidecar, say),
        }

    def _offer(self, failure: Failure, say: Say) -> Update:
        """Return what offers the change that fixes a failed form, where there is one and the form can make it."""
        name, nearest = failure.values.get("field"), failure.values.get("nearest")
        if name not in self.fixable:
            return {}  # also where nothing is named
        value = {"lora": None, "seed": 0}.get(name, nearest)
        if value is None and name != "lora":
            return {}
        return {self.fix: gr.Button(_offered(name, value, say), visible=True), self.change: (name, value)}

    def tell(self, words: Words, say: Say) -> Update:
        """Return what shows in the status how a run ended, or what was done, in any language that is chosen later."""
        return {self.status: words(say), self.words: words}


def _parameters(sidecar: str, say: Say) -> str:
    return parameters_of(Path(sidecar).read_text(encoding="utf-8"), say)


def _parameters_again(sidecar: dict[str, Any] | None, visitor: gr.Request) -> Any:
    """Return a picture's parameters in the visitor's language; nothing changes where none are shown any more."""
    try:
        return gr.skip() if sidecar is None else _parameters(uploaded(sidecar), say_to(visitor))
    except OSError:  # swept away after an hour
        return gr.skip()


def _download(label: str, *classes: str) -> gr.DownloadButton:
    name: Any = fixed(label)  # Gradio translates it here too, for all that its type says
    return gr.DownloadButton(name, size="sm", elem_classes=[*classes])


def _reworded(words: Words | None, change: tuple[str, Any] | None, visitor: gr.Request) -> tuple[Any, Any]:
    """Return the status, and the name of the button that fixes the form, in the visitor's language."""
    say = say_to(visitor)
    return gr.skip() if words is None else words(say), gr.Button(_offered(*change, say)) if change else gr.skip()


def _offered(name: str, value: Any, say: Say) -> str:
    if name == "lora":
        return say("Turn LoRA off")
    return say("Use a random seed") if name == "seed" else say("Use {value}", value=value)


def _cancelled(say: Say) -> str:
    return paragraph(f"{say('Cancelled.')} {say(KEPT)}")


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
