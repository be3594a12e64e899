"""The ControlNet tab and the endpoints `/controlnet` and `/preprocess`: a picture decides the structure."""

from collections.abc import Iterator
from contextlib import closing
from html import escape
from typing import Any

import gradio as gr

from core.errors import StudioError
from core.request import (
    CONTROLNET_STEPS,
    LORA_STRENGTH,
    PREPROCESSORS,
    ControlNet,
    Preprocess,
    Preprocessor,
    WeightsChoice,
)
from engine import Engine
from web import words
from web.endpoints import Answers, as_file, publish, refusal, stream, uploaded
from web.fields import (
    COUNT,
    QUIET,
    REWORD_JS,
    Field,
    Seed,
    Update,
    bounds,
    count_tokens,
    help_line,
    picture_field,
    pictures_field,
)
from web.form import Form
from web.language import fixed, say_to
from web.lora_slot import LoraSlot
from web.output import Output, Stopping
from web.run import broken, carry_out
from web.situation import Situation
from web.strip import Past


def lay_out(engine: Engine, tab: gr.Tab, weights_line: gr.HTML) -> tuple[gr.Image, Output, Form]:
    """Lay out the tab and wire it; return the field for the picture, which other tabs may fill, its output and form.

    `weights_line` stands above all tabs and says which weights draw.
    """
    fields = ControlNet.model_fields
    with gr.Row(elem_classes=["columns"]):
        with gr.Column(elem_id="controlnet-controls", min_width=280):
            image_field = picture_field(ControlNet)
            preprocessor_field = gr.Radio(
                choices=[(fixed(facts.title), name) for name, facts in PREPROCESSORS.items()],
                value=fields["preprocessor"].default,
                label=fixed("Preprocessor"),
                info=help_line(ControlNet, "preprocessor"),
                elem_id="preprocessor",
            )
            with gr.Column(visible=False, elem_id="preview-column") as preview_column:
                preview = gr.Image(
                    type="filepath",
                    format="png",
                    image_mode=None,
                    label=fixed("What the picture will follow"),
                    interactive=False,
                    height=240,
                    buttons=["fullscreen"],
                    elem_id="preview",
                )
            about_preview = gr.HTML(js_on_load=REWORD_JS, elem_id="preview-status", elem_classes=["status"])
            prompt_field = gr.Textbox(
                label=fixed("Prompt"),
                info=help_line(ControlNet, "prompt"),
                lines=2,
                max_lines=10,
                elem_id="controlnet-prompt",
            )
            count_tokens(engine, ControlNet, prompt_field)
            scale_field = gr.Slider(
                *bounds(ControlNet, "scale"),
                value=fields["scale"].default,
                step=0.05,
                label=fixed("Control scale"),
                info=help_line(ControlNet, "scale"),
                buttons=[],
            )
            steps_field = gr.Slider(
                *bounds(ControlNet, "steps"),
                value=CONTROLNET_STEPS,
                step=1,
                label=fixed("Steps"),
                info=help_line(ControlNet, "steps"),
                buttons=[],
            )
            slot = LoraSlot.lay_out(engine, ControlNet, prompt_field, ControlNet.model)
            with gr.Accordion(fixed("Advanced"), open=False):
                with gr.Row() as thresholds:
                    low_field, high_field = (
                        gr.Slider(
                            *bounds(ControlNet, name),
                            value=fields[name].default,
                            step=1,
                            label=fixed(label),
                            info=help_line(ControlNet, name),
                            buttons=[],
                            min_width=200,
                        )
                        for name, label in (("canny_low", "Low threshold"), ("canny_high", "High threshold"))
                    )
                seed = Seed.lay_out(ControlNet)
                count_field = pictures_field()
            generate = gr.Button(
                fixed("Generate"),
                variant="primary",
                interactive=False,
                elem_id="controlnet-generate",
                elem_classes=["go"],
            )
        with gr.Column(elem_id="controlnet-output", min_width=280):
            output = Output.lay_out(ControlNet, words.idle("Choose an image, describe a picture", "Generate"))

    stopping = Stopping(output)

    # Listeners that take the picture do so without Gradio's own reading of it, whose complaints are not sentences.
    raw = QUIET | {"preprocess": False}

    def show(
        image: dict[str, Any] | None, preprocessor: Preprocessor, low: int, high: int, visitor: gr.Request
    ) -> Update:
        """Show the control image that a drawing would follow, or why there is none."""
        say = say_to(visitor)
        shown: Update = {
            thresholds: gr.Row(visible=preprocessor == "canny"),
            generate: gr.Button(interactive=image is not None),
            preview_column: gr.Column(visible=False),
            preview: None,
            about_preview: "",
        }
        if image is None:
            return shown
        try:
            control = engine.control_image(Preprocess.parse(**_fields(image, preprocessor, low, high)))
        except StudioError as error:
            return shown | {about_preview: words.failed(error, say)}
        facts = PREPROCESSORS[preprocessor]
        return shown | {
            preview_column: gr.Column(visible=True),
            preview: gr.Image(control.image, alt_text=f"{say(facts.title)}: {say(facts.help)}"),
            about_preview: "".join(f'<p class="note">{escape(say(note))}</p>' for note in control.notes),
        }

    def draw(
        image: dict[str, Any] | None,
        preprocessor: Preprocessor,
        low: int,
        high: int,
        prompt: str,
        scale: float,
        steps: int,
        seed: float | None,
        count: int,
        use_lora: bool,
        lora: dict[str, Any] | None,
        lora_strength: float,
        past: list[Past],
        visitor: gr.Request,
    ) -> Iterator[Update]:
        """Carry out the form, showing each event."""
        values = {**_fields(image, preprocessor, low, high), "prompt": prompt, "scale": scale, "steps": steps}
        values |= {"seed": seed, **slot.fields(use_lora, lora, lora_strength)}
        with closing(carry_out(engine, ControlNet, visitor, values, count)) as events:
            yield from output.follow(events, stopping.begin(visitor), past, say_to(visitor), count)

    seen: list[gr.Image | Field] = [image_field, preprocessor_field, low_field, high_field]
    run = generate.click(
        draw,
        [*seen, prompt_field, scale_field, steps_field, seed.field, count_field, *slot.inputs, output.strip.past],
        output.shown,
        **raw,
    )
    seed.wire(output.picture)
    run.failure(broken, None, output.status, **QUIET)
    # While one preview is made, of what is asked for in the meantime only the last is.
    changes = [one.change for one in seen] + [about_preview.input]
    shown = [thresholds, generate, preview_column, preview, about_preview]
    gr.on(changes, show, seen, shown, trigger_mode="always_last", **raw)

    def by_weights(visitor: gr.Request) -> str:
        return words.weights_sentence(Situation.of(engine, ControlNet, ControlNet.model), say_to(visitor))

    tab.select(by_weights, None, weights_line, **QUIET)
    form = Form.of(
        ControlNet,
        {
            "preprocessor": preprocessor_field,
            "canny_low": low_field,
            "canny_high": high_field,
            "prompt": prompt_field,
            "scale": scale_field,
            "steps": steps_field,
            "seed": seed.field,
            COUNT: count_field,
        },
        slot,
        output,
    )
    return image_field, output, form


def _fields(image: dict[str, Any] | None, preprocessor: Preprocessor, low: int, high: int) -> dict[str, Any]:
    """Return the request's fields for a control image. Thresholds that are not used, and not shown, are left out."""
    fields: dict[str, Any] = {"preprocessor": preprocessor}
    if image is not None:
        fields["image"] = uploaded(image)
    return fields | ({"canny_low": low, "canny_high": high} if preprocessor == "canny" else {})


def endpoints(engine: Engine) -> None:
    """Add the endpoints, which programs call by name."""

    def controlnet(
        visitor: gr.Request,
        image: gr.FileData,
        prompt: str,
        preprocessor: Preprocessor = "canny",
        canny_low: int = 100,
        canny_high: int = 200,
        weights: WeightsChoice = "auto",
        scale: float = 0.8,
        steps: int | None = None,
        seed: int = 0,
        lora: gr.FileData | None = None,
        lora_strength: float = LORA_STRENGTH,
    ) -> Answers:
        """Draw a picture that keeps the structure of another. Returns the PNG file and its parameters.

        The preprocessor says what is taken from the uploaded image; `none` takes it as it is. A scale of 0.65 to 1.0 is
        usual. While it works it gives no file, and how far it is in place of the parameters.
        """
        values = {
            "image": uploaded(image),
            "prompt": prompt,
            "preprocessor": preprocessor,
            "canny_low": canny_low,
            "canny_high": canny_high,
            "weights": weights,
            "scale": scale,
            "steps": steps,
            "seed": seed,
            "lora": "" if lora is None else uploaded(lora, "lora"),
            "lora_strength": lora_strength,
        }
        yield from stream(engine, ControlNet, visitor, values)

    def preprocess(
        image: gr.FileData,
        preprocessor: Preprocessor = "canny",
        canny_low: int = 100,
        canny_high: int = 200,
        weights: WeightsChoice = "auto",
    ) -> Answers:
        """Make a control image from an uploaded one, of the size that a picture will have. Returns a PNG file."""
        path = uploaded(image)
        values = {"preprocessor": preprocessor, "canny_low": canny_low, "canny_high": canny_high, "weights": weights}
        try:
            control = engine.control_image(Preprocess.parse(image=path, **values))
        except StudioError as error:
            raise refusal(error) from error
        facts = {"digest": control.digest, "notes": [str(note) for note in control.notes]}
        with as_file(control.image, "control.png") as file:
            yield file, facts

    publish(controlnet, ControlNet)
    publish(preprocess, Preprocess)
