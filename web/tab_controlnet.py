"""The ControlNet tab and the endpoints `/controlnet` and `/preprocess`: an image decides the structure."""

from functools import partial
from html import escape
from typing import Any

import gradio as gr

from core.errors import StudioError
from core.request import CONTROLNET_STEPS, PREPROCESSORS, ControlNet, Preprocess
from engine import Engine
from web import enlarged, words
from web.drawer import Drawer
from web.endpoints import Answers, as_file, publish, refusal, stream
from web.fields import (
    QUIET,
    REWORD_JS,
    Fields,
    Inputs,
    Update,
    checkpoints,
    count_tokens,
    image_field,
    named_for,
    titles,
)
from web.form import RAW, Form, seen_on_opening
from web.language import fixed, say_to
from web.lora_slot import LoraSlot
from web.output import Output

DESCRIPTION = """Draw a picture that keeps the structure of another. Returns the PNG file and its parameters.

The preprocessor says what is taken from the uploaded image; `none` takes it as it is. A scale of 0.65 to 1.0 is
usual. While it works it gives no file, and how far it is in place of the parameters.
"""
PREPROCESS_DESCRIPTION = (
    "Make a control image from an uploaded one, of the size that a picture will have. Returns a PNG file."
)


def lay_out(engine: Engine, tab: gr.Tab, weights_line: gr.HTML) -> Form:
    """Lay out the tab and wire it; return its form.

    `weights_line` stands above all tabs: which weights draw.
    """
    situation, fields = seen_on_opening(engine, ControlNet, tab, weights_line), Fields(ControlNet)
    with gr.Row(elem_classes=["columns"]):
        with gr.Column(**named_for(ControlNet, "side"), min_width=0):
            image = image_field(ControlNet)
            fields.add("preprocessor", choices=titles(PREPROCESSORS), elem_id="preprocessor")
            with gr.Column(visible=False, elem_id="preview-column") as preview_column:
                preview = gr.Image(
                    type="filepath",
                    format="png",
                    image_mode=None,
                    label=fixed("What the picture will follow"),
                    interactive=False,
                    height=240,
                    buttons=[],
                    elem_id="preview",
                )
            about_preview = gr.HTML(js_on_load=REWORD_JS, elem_id="preview-status", elem_classes=["status"])
        with gr.Column(**named_for(ControlNet, "controls"), min_width=0):
            fields.add_prompt("controlnet-prompt", placeholder=fixed("Describe a picture"))
            with gr.Row(elem_classes=["line"]):
                with Drawer.lay_out(fields) as drawer:
                    fields.add("steps", value=CONTROLNET_STEPS)
                    fields.add("scale")
                    with gr.Row() as thresholds:
                        fields.add("canny_low", min_width=120)
                        fields.add("canny_high", min_width=120)
                    fields.add_seed()
                    fields.add_checkpoint()
                    fields.add_count()
                    slot = LoraSlot.lay_out(engine, ControlNet, fields["prompt"], situation)
                count_tokens(fields["prompt"], situation)
            generate = gr.Button(
                fixed("Generate"),
                variant="primary",
                interactive=False,
                elem_id="controlnet-generate",
                elem_classes=["go"],
            )
        with gr.Column(**named_for(ControlNet, "output"), min_width=0):
            output = Output.lay_out(ControlNet, words.idle("Choose an image, describe a picture", "Generate"))

        with output.stage:
            large = enlarged.lay_out(ControlNet)

    form = Form.of(ControlNet, fields, output, image=image, slot=slot, drawer=drawer, used=_used)

    def show(inputs: Inputs, visitor: gr.Request) -> Update:
        """Show the control image that a drawing would follow, or why there is none."""
        say, preprocessor = say_to(visitor), inputs[fields["preprocessor"]]
        shown: Update = {
            thresholds: gr.Row(visible=preprocessor == "canny"),
            generate: gr.Button(interactive=inputs[image] is not None),
            preview_column: gr.Column(visible=False),
            preview: None,
            about_preview: "",
        }
        if inputs[image] is None:
            return shown
        try:
            control = engine.control_image(Preprocess.parse(**form.values(inputs)))
        except StudioError as error:
            return shown | {about_preview: words.failed(error, say), generate: gr.Button(interactive=False)}
        facts = PREPROCESSORS[preprocessor]
        return shown | {
            preview_column: gr.Column(visible=True),
            preview: gr.Image(control.image, alt_text=f"{say(facts.title)}: {say(facts.help)}"),
            about_preview: "".join(f'<p class="note">{escape(say(note))}</p>' for note in control.notes),
        }

    enlarged.wire(engine, large, output, form.draws_on(generate, engine, form.more_like_this()))
    form.sum_up(tab)
    own = fields["checkpoint"]
    tab.select(lambda chosen: gr.Dropdown(**checkpoints(chosen)), own, own, **QUIET)
    seen = [image, *(fields[name] for name in ("preprocessor", "canny_low", "canny_high"))]
    # While one preview is made, of what is asked for in the meantime only the last is.
    changes = [*(field.change for field in seen), about_preview.input]
    shown = [thresholds, generate, preview_column, preview, about_preview]
    gr.on(changes, show, set(seen), shown, trigger_mode="always_last", **RAW)
    return form


def _used(values: dict[str, Any]) -> dict[str, Any]:
    """Return the values that mean something: thresholds, where they are not shown, do not."""
    unused = () if values["preprocessor"] == "canny" else ("canny_low", "canny_high")
    return {name: value for name, value in values.items() if name not in unused}


def endpoints(engine: Engine) -> None:
    """Add the endpoints, which programs call by name."""

    def preprocess(visitor: gr.Request, values: dict[str, Any]) -> Answers:
        try:
            control = engine.control_image(Preprocess.parse(**values))
        except StudioError as error:
            raise refusal(error) from error
        facts = {"digest": control.digest, "notes": [str(note) for note in control.notes]}
        with as_file(control.image, "control.png") as file:
            yield file, facts

    publish(ControlNet, DESCRIPTION, partial(stream, engine, ControlNet))
    publish(Preprocess, PREPROCESS_DESCRIPTION, preprocess)
