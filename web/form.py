"""A tab's form as values by field name: filled from outside, kept in the visitor's browser, mended after a failure.

Values from outside (a link, a picture, the browser's store) are untrusted: each is checked as the request checks it,
and what is not possible here is left out and named.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr
from gradio.blocks import Block

from core.errors import RequestError
from core.request import Request
from web.fields import COUNT, COUNTS, QUIET, Field, Update
from web.language import say_to
from web.lora_slot import LoraSlot
from web.output import Output
from web.words import paragraph

# The browser keeps a form only once it has been filled in: else the form that it is made with would overwrite it.
KEEP_JS = "(kept, ...values) => window.studioReady ? Object.fromEntries({names}.map((n, i) => [n, values[i]])) : kept"
READY_JS = "() => { window.studioReady = true; }"

# Not to be had from a file or a link: the visitor's own files; and a choice that the page does not offer.
FILES = ("image", "lora")
ELSEWHERE = (*FILES, "weights")


@dataclass(frozen=True)
class Form:
    """A tab's fields by their names in the request.

    Attributes:
        mode: the mode's request.
        fields: the components.
        slot: the part for a LoRA, where the mode takes one.
        kept: the form as the visitor's browser keeps it.
        also: what changes besides, when values are filled in.
        refresh: a listener (function, inputs, outputs) to call when the form has been filled in on arrival.
        follow: returns those changes for checked values; it takes out what is not possible, and returns that by name.
    """

    mode: type[Request]
    fields: Mapping[str, Field]
    slot: LoraSlot | None
    kept: gr.BrowserState
    also: Sequence[Block] = ()
    refresh: tuple[Callable[..., Update], list[Block], list[Block]] | None = None
    follow: Callable[[dict[str, Any]], tuple[Update, dict[str, str]]] = lambda taken: ({}, {})

    @classmethod
    def of(
        cls,
        mode: type[Request],
        fields: Mapping[str, Field],
        slot: LoraSlot | None,
        output: Output,
        **following: Any,
    ) -> "Form":
        """Gather a tab's fields, and wire what keeps and mends them."""
        # Gradio encrypts the store; with a secret of its own it could not be read after the server's next start.
        # In a tab it would not be read before the visitor goes there: `web.restore` renders it beside them.
        kept = gr.BrowserState(None, storage_key=f"studio-{mode.mode}", secret="z-image-studio", render=False)
        form = cls(mode, fields, slot, kept, **following)
        gr.on(
            [field.change for field in fields.values()],
            None,
            [kept, *fields.values()],
            kept,
            js=KEEP_JS.replace("{names}", json.dumps(list(fields))),
            **QUIET,
        )
        size = ["size"] if {"width", "height"} <= fields.keys() else []
        output.mendable.update(fields, ["lora"] if slot else [], size)
        shown = [output.mend, output.status, output.words, *([slot.use] if slot else []), *fields.values()]

        def mend(change: tuple[str, Any], visitor: gr.Request) -> Update:
            """Make the change that was offered."""
            name, value = change
            changed: Update
            if name == "lora":
                assert slot is not None  # else it would not be offered
                changed = {slot.use: False}
            elif name == "size":  # "1024 x 768"
                changed = dict(zip((fields["width"], fields["height"]), map(int, value.split(" x ")), strict=True))
            else:
                changed = {fields[name]: value}
            done = output.tell(lambda say: paragraph(say("Done. Press the button again.")), say_to(visitor))
            return changed | done | {output.mend: gr.Button(visible=False)}

        output.mend.click(mend, output.mending, shown, **QUIET)
        return form

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
                taken[name] = self._checked(name, value, values)
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

    def _checked(self, name: str, value: Any, values: Mapping[str, Any]) -> Any:
        """Return a value as the request would have it.

        Raises:
            RequestError: it is not possible, or the form has no such field.
        """
        if name == COUNT and str(value) in COUNTS:
            return int(value)
        if name not in self.fields and name != "lora_strength":
            raise RequestError(name, value, "only the fields of the form")
        return getattr(self.mode.parse(**self._beside(name, values), **{name: value}), name)

    def _beside(self, name: str, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the other fields that a field's check needs: those without a default, and a threshold's partner."""
        needed = {one: "-" for one, field in self.mode.model_fields.items() if field.is_required() and one != name}
        partner = {"canny_low": "canny_high", "canny_high": "canny_low"}.get(name)
        return needed | ({partner: values[partner]} if partner is not None and partner in values else {})
