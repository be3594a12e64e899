"""Fields that more than one form has: the picture to start from, the seed with its two buttons, how many pictures, and
the prompt's length; and what every field takes from the request: help lines and ranges.
"""

from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import annotated_types
import gradio as gr
from gradio.blocks import Block

from core import metadata
from core.request import Request, random_seed
from diffusion.tokens import MAX_TEXT_TOKENS
from engine import Engine
from web.endpoints import uploaded
from web.language import Say, fixed, say_to

COUNT, COUNTS = "count", ("1", "2", "3", "4")  # how many pictures: a field of forms, not of requests


def picture_field(mode: type[Request]) -> gr.Image:
    """Make the field for the picture that a mode starts from, with its help line, where a form stands now."""
    # As it was uploaded: decoded here, it would lose what only our own reading keeps, and keeps in bounds.
    field = gr.Image(
        type="filepath",
        image_mode=None,
        sources=["upload", "clipboard"],
        label=fixed("Image"),
        height=240,
        buttons=[],
        elem_id=f"{mode.mode}-image",
    )
    gr.HTML(f'<p class="hint">{help_line(mode, "image")}</p>')
    return field


def pictures_field() -> gr.Radio:
    """Make the choice of how many pictures are drawn from the seed on."""
    return gr.Radio(
        [(number, int(number)) for number in COUNTS],
        value=1,
        label=fixed("Pictures"),
        info=fixed("How many to draw, with one seed after the other."),
        elem_classes=["count"],
    )


@dataclass(frozen=True)
class Seed:
    """The seed, and what fills it in."""

    field: gr.Number
    dice: gr.Button
    last: gr.Button

    @classmethod
    def lay_out(cls, mode: type[Request]) -> "Seed":
        """Make the components where a form stands now."""
        # Without a range of its own: the request checks it, and its sentence is better than Gradio's.
        field = gr.Number(mode.model_fields["seed"].default, label=fixed("Seed"), info=help_line(mode, "seed"))
        with gr.Row(elem_classes=["beside"]):
            dice = gr.Button(fixed("Roll the dice"), size="sm", min_width=120)
            last = gr.Button(fixed("Reuse last"), size="sm", min_width=120)
        dice.click(random_seed, None, field, **QUIET)
        return cls(field, dice, last)

    def wire(self, shown: gr.Image) -> None:
        """Take the last seed from the picture that an output shows."""
        self.last.click(_seed_of, shown, self.field, preprocess=False, **QUIET)


def _seed_of(picture: dict[str, Any] | None) -> Any:
    """Return the seed of a picture; nothing changes where there is none."""
    if picture is None:
        return gr.skip()
    return metadata.read_png(Path(uploaded(picture))).values.get("seed", 0)


def count_tokens(engine: Engine, mode: type[Request], prompt: gr.Textbox) -> None:
    """Say under a prompt, laid out just before, how much of the text encoder's room it takes."""
    about = gr.HTML(js_on_load=REWORD_JS, elem_classes=["tokens"])

    def count(text: str, visitor: gr.Request) -> str:
        used = engine.count_tokens(mode, text) if text.strip() else None
        return "" if used is None else _tokens(used, say_to(visitor))

    # While one count is made, of what is typed in the meantime only the last is counted.
    gr.on([prompt.change, about.input], count, prompt, about, trigger_mode="always_last", **QUIET)


def _tokens(used: int, say: Say) -> str:
    line = say("{used} of {limit} tokens", used=used, limit=MAX_TEXT_TOKENS)
    if used <= MAX_TEXT_TOKENS:
        return f"<p>{escape(line)}</p>"
    return f'<p class="failed">{escape(line)}. {escape(say("The end of the prompt will be cut."))}</p>'


# These run once in the browser. What the server has worded is worded anew when the page's language changes.
REWORD_JS = 'addEventListener("studio-language", () => trigger("input"));'

Field = gr.Number | gr.Radio | gr.Slider | gr.Textbox  # what a form has for a field of its request

Update = dict[Block, Any]  # what a listener changes: by component, its value or an update of it

# For listeners of the page itself: Gradio's own progress would lie over ours, and programs call the endpoints.
# `Any`, since by its type it might hold every argument of a listener, and not all of them are texts.
QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}


# --- a form's fields, as the request declares them ---------------------------------------------------------------


def help_line(mode: type[Request], name: str) -> str:
    """Return the help line of a field, in the visitor's language once it is on the page."""
    return str(fixed(mode.model_fields[name].description or ""))


def bounds(mode: type[Request], name: str) -> tuple[float, float]:
    """Return the lowest and the highest value of a field."""
    declared = mode.model_fields[name].metadata
    # As `Any`, because to annotated_types a bound is whatever can be compared; ours are numbers.
    lowest: Any = next(bound.ge for bound in declared if isinstance(bound, annotated_types.Ge))
    highest: Any = next(bound.le for bound in declared if isinstance(bound, annotated_types.Le))
    return lowest, highest


def named_for(mode: type[Request], part: str) -> dict[str, Any]:
    """Name a part of a tab: by a class for the look, by an id that no other tab has."""
    return {"elem_id": f"{mode.mode}-{part}", "elem_classes": [part]}
