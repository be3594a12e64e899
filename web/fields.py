"""A form's fields, made from what the request declares: its choices, ranges, defaults and help lines.

Some are more than one component: the image to start from, the seed with its two buttons, the prompt with its length.
"""

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import annotated_types
import gradio as gr
from gradio.blocks import Block
from pydantic.fields import FieldInfo

from core import metadata
from core.request import PreprocessorFacts, Request, UpscalerFacts, random_seed
from diffusion.tokens import MAX_TEXT_TOKENS, count
from engine.mode_generate import unknown_words
from hub import fine_tunes
from web.endpoints import uploaded
from web.language import Say, english, fixed, say_to
from web.words import field_name

COUNT, COUNTS = "count", ("1", "2", "3", "4")  # how many pictures: a field of forms, not of requests

# These run once in the browser. What the server has worded is worded again when the page's language changes.
REWORD_JS = 'addEventListener("studio-language", () => trigger("input"));'

Field = gr.Dropdown | gr.Number | gr.Radio | gr.Slider | gr.Textbox  # what a form has for a field of its request

Inputs = dict[Block, Any]  # what a listener gets: the value of each component
Update = dict[Block, Any]  # what a listener changes: by component, its value or an update of it

# For listeners of the page itself: Gradio's own progress would lie over ours, and programs call the endpoints.
# `Any`, since by its type it might hold every argument of a listener, and not all of them are texts.
QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}


class Fields(dict[str, Field]):
    """A form's fields by their names in the request, in the order in which they are laid out."""

    def __init__(self, mode: type[Request]) -> None:
        super().__init__()
        self.mode = mode

    def add(self, name: str, **look: Any) -> Field:
        """Make the component of a field where a form stands now, as the request declares it.

        Args:
            name: the field's name in the request.
            **look: arguments of the component that differ from what is usual.
        """
        declared = self.mode.model_fields[name]
        usual = None if declared.is_required() else declared.default
        look = {"value": usual, "label": fixed(field_name(name, english)), "info": help_line(self.mode, name)} | look
        if get_origin(declared.annotation) is Literal:
            choices = [(choice.title(), choice) for choice in get_args(declared.annotation)]
            made: Field = gr.Radio(**{"choices": choices, **look})
        elif limits := _limits(declared):
            whole = int in (declared.annotation, *get_args(declared.annotation))
            made = gr.Slider(**{"step": 1 if whole else 0.05, "buttons": [], **limits, **look})
        else:
            made = gr.Textbox(**look)
        self[name] = made
        return made

    def add_prompt(self, elem_id: str, **look: Any) -> Field:
        """Make the prompt where a form's bar stands now: as tall when it is empty as when it is full."""
        return self.add("prompt", lines=2, max_lines=8, elem_id=elem_id, elem_classes=["prompt"], **look)

    def add_count(self) -> None:
        """Make the choice of how many pictures are drawn from the seed on."""
        self[COUNT] = gr.Radio(
            [(number, int(number)) for number in COUNTS],
            value=1,
            label=fixed("Pictures"),
            info=fixed("How many to draw, with one seed after the other."),
            elem_classes=["count"],
        )

    def add_checkpoint(self) -> Field:
        """Make the choice among the checkpoints that are found; it is not shown where there is none."""
        made = gr.Dropdown(**checkpoints(), info=help_line(self.mode, "checkpoint"), elem_classes=["checkpoint"])
        self["checkpoint"] = made
        return made

    def add_seed(self) -> None:
        """Make the seed, with a button that rolls the dice and one that takes the last picture's seed."""
        # Without a range of its own: the request checks it, and its sentence is better than Gradio's.
        field = gr.Number(
            self.mode.model_fields["seed"].default, label=fixed("Seed"), info=help_line(self.mode, "seed")
        )
        with gr.Row(elem_classes=["beside"]):
            dice = gr.Button(fixed("Roll the dice"), size="sm", min_width=120)
            self.last = gr.Button(fixed("Reuse last"), size="sm", min_width=120)
        dice.click(random_seed, None, field, **QUIET)
        self["seed"] = field

    def reuse_seed(self, shown: gr.Image) -> None:
        """Take the last seed from the picture that an output shows."""
        self.last.click(_seed_of, shown, self["seed"], preprocess=False, **QUIET)


def checkpoints(chosen: str = "") -> dict[str, Any]:
    """Return what the choice among the checkpoints found is made of; what was chosen stays where it is there."""
    tunes = fine_tunes.found()
    return {
        "choices": [(fixed("As published"), ""), *((tune.title, name) for name, tune in tunes.items())],
        "value": chosen if chosen in tunes else "",
        "label": fixed(field_name("checkpoint", english)),
        "visible": bool(tunes),
    }


def titles(facts: Mapping[Any, PreprocessorFacts] | Mapping[Any, UpscalerFacts]) -> list[tuple[Any, str]]:
    """Return the choices of a field with their titles."""
    return [(fixed(about.title), name) for name, about in facts.items()]


def image_field(mode: type[Request]) -> gr.Image:
    """Make the field for the image that a mode starts from, with its help line, where a form stands now."""
    # As it was uploaded: decoded here, it would lose what only our own reading keeps, and keeps in bounds.
    field = gr.Image(
        type="filepath",
        image_mode=None,
        sources=["upload", "clipboard"],
        label=fixed("Image"),
        height=240,
        buttons=[],
        **named_for(mode, "image"),
    )
    gr.HTML(f'<p class="sr-only">{help_line(mode, "image")}</p>', elem_classes=["about-image"])
    return field


def _seed_of(picture: dict[str, Any] | None) -> Any:
    """Return the seed of a picture; nothing changes where there is none."""
    if picture is None:
        return gr.skip()
    return metadata.read_picture(Path(uploaded(picture))).values.get("seed", 0)


def count_tokens(prompt: Field, situation: gr.State) -> None:
    """Show under a prompt, laid out just before, which words the weights do not know, and how much room it takes.

    Args:
        prompt: the field.
        situation: the tab's `Situation`, which has the tokenizer.
    """
    about = gr.HTML(js_on_load=REWORD_JS, elem_classes=["tokens"])

    def tokens(text: str, situation: Any, visitor: gr.Request) -> str:
        if not text.strip() or situation.tokenizer is None:
            return ""
        return _tokens(count(situation.tokenizer, text), unknown_words(text, situation.kind), say_to(visitor))

    # While one count is made, of what is typed in the meantime only the last is counted.
    gr.on([prompt.change, about.input], tokens, [prompt, situation], about, trigger_mode="always_last", **QUIET)


def _tokens(used: int, unknown: list[str], say: Say) -> str:
    line = say("{used} of {limit} tokens", used=used, limit=MAX_TEXT_TOKENS)
    if used <= MAX_TEXT_TOKENS:
        told = f"<b>{escape(say('Does not know: {words}', words=unknown))}</b> " if unknown else ""
        return f"<p>{told}<span>{escape(line)}</span></p>"
    return f'<p class="failed">{escape(line)}. {escape(say("The end of the prompt will be cut."))}</p>'


def help_line(mode: type[Request], name: str) -> str:
    """Return the help line of a field, in the visitor's language once it is on the page."""
    return str(fixed(mode.model_fields[name].description or ""))


def _limits(declared: FieldInfo) -> dict[str, Any]:
    """Return the lowest and the highest value of a number, as a slider takes them; empty for what is no number."""
    limits: dict[str, Any] = {}
    for bound in declared.metadata:
        match bound:
            case annotated_types.Ge(ge):
                limits["minimum"] = ge
            case annotated_types.Le(le):
                limits["maximum"] = le
    return limits


def named_for(mode: type[Request], part: str) -> dict[str, Any]:
    """Name a part of a tab: by a class for the look, by an id that no other tab has."""
    return {"elem_id": f"{mode.mode}-{part}", "elem_classes": [part]}
