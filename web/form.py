"""A tab's form as values by field name: carried out, filled in from outside, kept in the browser, fixed.

Values from outside (a link, a picture, the browser's store) are untrusted: each is checked as the request checks it,
and what is not possible here is left out and named.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.blocks import Block
from gradio.events import Dependency

from core import metadata
from core.errors import RequestError
from core.request import SEED_MAX, DrawRequest, Request
from engine import Engine
from hub import fine_tunes
from web.clients import caller
from web.drawer import Drawer
from web.endpoints import uploaded
from web.fields import COUNT, COUNTS, QUIET, Fields, Inputs, Update
from web.language import fixed, say_to
from web.lora_slot import LoraSlot
from web.output import Output, Stopping
from web.run import broken, carry_out, unhurried
from web.situation import Situation
from web.strip import Past, siblings
from web.words import paragraph, weights_sentence

# The browser keeps a form only once it has been filled in: else the form that it is made with would overwrite it.
KEEP_JS = "(kept, ...values) => window.studioReady ? Object.fromEntries({names}.map((n, i) => [n, values[i]])) : kept"
READY_JS = "() => { window.studioReady = true; }"

# Listeners that take files do so without Gradio's own reading of them, whose complaints are not sentences.
RAW = QUIET | {"preprocess": False}

# Not to be had from a file or a link: the visitor's own files; and a choice that the page does not offer.
FILES = ("image", "lora")
ELSEWHERE = (*FILES, "weights")


@dataclass(frozen=True)
class Form:
    """A tab's fields by their names in the request, and where their picture appears.

    Attributes:
        mode: the mode's request.
        fields: the components.
        output: where its picture appears.
        kept: the form as the visitor's browser keeps it.
        image: the field for the image that the mode starts from, where it does.
        slot: the part for a LoRA, where the mode takes one.
        drawer: where the fields are folded away that a first picture does not need.
        used: returns, of all values that the form holds, those that mean something beside the others.
        also: what changes besides, when values are filled in.
        refresh: a listener (function, inputs, outputs) to call when the form has been filled in on arrival.
        follow: returns those changes for checked values; it takes out what is not possible, and returns that by name.
    """

    mode: type[DrawRequest]
    fields: Fields
    output: Output
    kept: gr.BrowserState
    image: gr.Image | None = None
    slot: LoraSlot | None = None
    drawer: Drawer | None = None
    used: Callable[[dict[str, Any]], dict[str, Any]] = dict
    also: Sequence[Block] = ()
    refresh: tuple[Callable[..., Update], list[Block], list[Block]] | None = None
    follow: Callable[[dict[str, Any]], tuple[Update, dict[str, str]]] = lambda taken: ({}, {})

    @classmethod
    def of(cls, mode: type[DrawRequest], fields: Fields, output: Output, **parts: Any) -> "Form":
        """Gather a tab's fields, and wire what keeps and fixes them."""
        # Gradio encrypts the store; with a secret of its own it could not be read after the server's next start.
        # In a tab it would not be read before the visitor goes there: `web.restore` renders it beside them.
        kept = gr.BrowserState(None, storage_key=f"studio-{mode.mode}", secret="z-image-studio", render=False)
        form = cls(mode, fields, output, kept, **parts)
        gr.on(
            [field.change for field in fields.values()],
            None,
            [kept, *fields.values()],
            kept,
            js=KEEP_JS.replace("{names}", json.dumps(list(fields))),
            **QUIET,
        )
        size = ["size"] if {"width", "height"} <= fields.keys() else []
        output.fixable.update(fields, ["lora"] if form.slot else [], size)
        use = [form.slot.use] if form.slot else []
        shown = [output.fix, output.status, output.words, *use, *fields.values()]
        output.fix.click(form._fixed, output.change, shown, **QUIET)
        return form

    def _fixed(self, change: tuple[str, Any], visitor: gr.Request) -> Update:
        """Make the change that was offered."""
        name, value = change
        changed: Update
        if name == "lora":
            assert self.slot is not None  # else it would not be offered
            changed = {self.slot.use: False}
        elif name == "size":  # "1024 x 768"
            sides = self.fields["width"], self.fields["height"]
            changed = dict(zip(sides, map(int, value.split(" x ")), strict=True))
        else:
            changed = {self.fields[name]: value}
        done = self.output.tell(lambda say: paragraph(say("Done. Press the button again.")), say_to(visitor))
        return changed | done | {self.output.fix: gr.Button(visible=False)}

    def draws_on(self, button: gr.Button, engine: Engine, *filled: Any) -> list[Dependency]:
        """Wire the button that carries the form out, showing each event.

        Args:
            button: the button.
            engine: what draws.
            *filled: listeners that fill the form in, after each of which it is carried out too.

        Returns:
            What carries the form out.
        """
        output, stopping = self.output, Stopping(self.output)

        def draw(inputs: Inputs, visitor: gr.Request) -> Iterator[Update]:
            values = self.values(inputs)
            count, past = values.pop(COUNT, 1), inputs[output.strip.past]
            with closing(carry_out(engine, self.mode, caller(visitor), values, count)) as events:
                stopped, say = stopping.begin(visitor), say_to(visitor)
                yield from output.follow(events, stopped, past, say, count, values.get("image", ""))

        image, slot = [self.image] if self.image else [], self.slot.inputs if self.slot else []
        inputs = {*image, *self.fields.values(), *slot, output.strip.past}
        begins = button.click, *(listener.success for listener in filled)
        runs: list[Dependency] = [begin(unhurried(draw), inputs, output.shown, **RAW) for begin in begins]
        for run in runs:
            run.failure(broken, None, output.status, **QUIET)
        self.fields.reuse_seed(output.picture)
        return runs

    def more_like_this(self) -> Dependency:
        """Offer to draw on with a picture's settings and the seeds after it; return what a press begins."""
        with self.output.others:
            again = gr.Button(fixed("More like this"), size="sm", elem_classes=["again"])

        def next_seeds(picture: dict[str, Any] | None, past: list[Past]) -> Update:
            made = siblings(past, uploaded(picture)) if picture else []
            if not made:
                return {self.fields["seed"]: gr.skip()}
            try:
                values = metadata.read_picture(Path(made[-1].picture)).values
            except RequestError:  # removed meanwhile (web/visits.py)
                return {self.fields["seed"]: gr.skip()}
            onward = {name: value for name, value in values.items() if name not in (*FILES, "lora_strength")}
            return self.fill(onward | {"seed": made[-1].seed % SEED_MAX + 1})[0]

        inputs = [self.output.picture, self.output.strip.past]
        return again.click(next_seeds, inputs, self.changed, **RAW)

    def sum_up(self, tab: gr.Tab) -> None:
        """Have the closed drawer say what is set, from when its tab is opened on."""
        if self.drawer is None:
            return
        slot = self.slot.inputs if self.slot else []
        told = [field for name, field in self.fields.items() if name != "prompt"]
        changes = [block.change for block in (*told, *slot)]  # type: ignore[attr-defined]  # all of them are inputs

        def sum_up(inputs: Inputs, visitor: gr.Request) -> Update:
            assert self.drawer is not None
            return self.drawer.sum_up(self.values(inputs), say_to(visitor))

        events = [*changes, tab.select, self.output.status.input]
        gr.on(events, sum_up, {*told, *slot}, self.drawer.shown, trigger_mode="always_last", **RAW)

    def values(self, inputs: Inputs) -> dict[str, Any]:
        """Return what a listener's inputs hold by field of the request, unchecked; a field may not be among them."""
        values = {name: inputs[field] for name, field in self.fields.items() if field in inputs}
        if self.image is not None and inputs.get(self.image) is not None:
            values["image"] = uploaded(inputs[self.image])
        if self.slot and self.slot.use in inputs:
            values |= self.slot.fields(*(inputs[block] for block in self.slot.inputs))
        return self.used(values)

    @property
    def changed(self) -> list[Block]:
        """What `fill` may change."""
        slot = [self.slot.use, self.slot.strength] if self.slot else []
        return [*self.fields.values(), *slot, *self.also]

    def fill(self, values: Mapping[str, Any]) -> tuple[Update, dict[str, str]]:
        """Return what puts values into the form, and those that it cannot take, by name."""
        taken: dict[str, Any] = {}
        refused: dict[str, str] = {}
        for name, value in values.items():
            if name in ELSEWHERE or value is None or (name == "prompt" and not str(value).strip()):
                continue
            try:
                taken[name] = self._checked(name, value)
            except RequestError:
                refused[name] = str(value)
        refused |= {name: str(values[name]) for name in FILES if values.get(name)}
        update, not_here = self.follow(taken)
        strength = taken.pop("lora_strength", None)
        update |= {self.fields[name]: value for name, value in taken.items()}
        if self.slot and "lora" in values:
            update[self.slot.use] = False  # its file has to be chosen again
        if self.slot and strength is not None:
            update[self.slot.strength] = strength
        return update, refused | not_here

    def _checked(self, name: str, value: Any) -> Any:
        """Return a value as the request would have it.

        Raises:
            RequestError: it is not possible, or the form has no such field.
        """
        if name == COUNT and str(value) in COUNTS:
            return int(value)
        if name not in self.fields and name != "lora_strength":
            raise RequestError(name, value, "only the fields of the form")
        if name == "checkpoint" and value:
            fine_tunes.offered(value)
        return self.mode.check(name, value)


def seen_on_opening(engine: Engine, mode: type[Request], tab: gr.Tab, weights_line: gr.HTML) -> gr.State:
    """Return the situation as it was when a tab was last opened; which weights draw is shown then, too.

    For a mode without a choice of models.
    """
    now = gr.State(Situation.of(engine, mode, mode.usual_model()))

    def look(visitor: gr.Request) -> Update:
        found = Situation.of(engine, mode, mode.usual_model())
        return {now: found, weights_line: weights_sentence(found, say_to(visitor))}

    tab.select(look, None, [now, weights_line], **QUIET)
    return now
