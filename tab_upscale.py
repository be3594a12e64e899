"""The Upscale tab and the endpoint `/upscale`: a small picture becomes a large one."""

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import gradio as gr

import ui_parts
import upscaling
from engine import Engine
from errors import StudioError
from language import Say, fixed, say_to
from request import UPSCALE_DENOISE, UPSCALE_STEPS, UPSCALERS, Upscale, Upscaler, WeightsChoice
from ui_parts import QUIET, Output, Situation, Stopping, Update, bounds, help_line, said


def lay_out(engine: Engine, tab: gr.Tab, weights_line: gr.HTML) -> gr.Image:
    """Lay out the tab and wire it; return the field for the picture, which other tabs may fill.

    `weights_line` stands above all tabs and says which weights draw.
    """
    fields = Upscale.model_fields
    usual = UPSCALE_DENOISE[Situation.of(engine, Upscale, Upscale.model).kind]
    with gr.Row(elem_classes=["columns"]):
        with gr.Column(elem_id="upscale-controls", min_width=280):
            # As it was uploaded, as in tab_controlnet.
            image_field = gr.Image(
                type="filepath",
                image_mode=None,
                sources=["upload", "clipboard"],
                label=fixed("Image"),
                height=240,
                buttons=[],
                elem_id="upscale-image",
            )
            gr.HTML(f'<p class="hint">{help_line(Upscale, "image")}</p>')
            about = gr.HTML(elem_id="upscale-estimate", elem_classes=["status"])
            upscaler_field = gr.Radio(
                choices=[(fixed(facts.title), name) for name, facts in UPSCALERS.items()],
                value=fields["upscaler"].default,
                label=fixed("Upscaler"),
                info=help_line(Upscale, "upscaler"),
                elem_id="upscaler",
            )
            denoise_field = gr.Slider(
                *bounds(Upscale, "denoise"),
                value=usual,
                step=0.01,
                label=fixed("Denoise"),
                info=help_line(Upscale, "denoise"),
                buttons=[],
                elem_id="denoise",
            )
            # They mean nothing to a picture that is not refined.
            with gr.Column(visible=usual > 0) as refinement:
                prompt_field = gr.Textbox(
                    fields["prompt"].default,
                    label=fixed("Prompt"),
                    info=help_line(Upscale, "prompt"),
                    lines=1,
                    max_lines=10,
                    elem_id="upscale-prompt",
                )
                with gr.Accordion(fixed("Advanced"), open=False):
                    steps_field = gr.Slider(
                        *bounds(Upscale, "steps"),
                        value=UPSCALE_STEPS,
                        step=1,
                        label=fixed("Steps"),
                        info=help_line(Upscale, "steps"),
                        buttons=[],
                    )
                    seed_field = gr.Number(fields["seed"].default, label=fixed("Seed"), info=help_line(Upscale, "seed"))
            start = gr.Button(
                fixed("Upscale"), variant="primary", interactive=False, elem_id="upscale-start", elem_classes=["go"]
            )
        with gr.Column(elem_id="upscale-output", min_width=280):
            compared = gr.ImageSlider(
                type="filepath",
                format="png",
                label=fixed("Before and after"),
                interactive=False,
                buttons=["fullscreen"],
                visible=False,
                elem_id="compared",
            )
            output = Output.lay_out(Upscale, ui_parts.idle("Choose a picture", "Upscale"))
            output.picture.visible = False  # it is shown beside what it was made from, not alone

    stopping = Stopping(output)

    # Listeners that take the picture do so without Gradio's own reading of it, whose complaints are not sentences.
    raw = QUIET | {"preprocess": False}

    def foresee(image: dict | None, upscaler: Upscaler, visitor: gr.Request) -> Update:
        """Say what a picture will become, and how long that will take about."""
        say = say_to(visitor)
        shown: Update = {start: gr.Button(interactive=image is not None), about: ""}
        if image is None:
            return shown
        try:
            request = Upscale.parse(image=ui_parts.uploaded(image), upscaler=upscaler)
            return shown | {about: said(_foreseen(engine.upscale_estimate(request), say))}
        except StudioError as error:
            return shown | {about: ui_parts.failed(error, say), start: gr.Button(interactive=False)}

    def draw(
        image: dict | None,
        upscaler: Upscaler,
        denoise: float,
        prompt: str,
        steps: int,
        seed: float | None,
        visitor: gr.Request,
    ) -> Iterator[Update]:
        """Carry out the form, showing each event."""
        values: dict[str, Any] = {"upscaler": upscaler, "denoise": denoise, "prompt": prompt, "steps": steps}
        values["seed"] = seed
        if image is not None:
            values["image"] = ui_parts.uploaded(image)
        with closing(ui_parts.run(engine, Upscale, visitor, values)) as events:
            for update in output.follow(events, stopping.begin(visitor), say_to(visitor)):
                if after := update.get(output.png_file):
                    before = engine.plain_enlargement(Upscale.parse(**values))
                    update |= {compared: gr.ImageSlider((before, after), visible=True)}
                yield update

    inputs = [image_field, upscaler_field, denoise_field, prompt_field, steps_field, seed_field]
    run = start.click(draw, inputs, [*output.shown, compared], **raw)
    run.failure(ui_parts.broken, None, output.status, **QUIET)
    gr.on(
        [image_field.change, upscaler_field.input],
        foresee,
        [image_field, upscaler_field],
        [start, about],
        trigger_mode="always_last",
        **raw,
    )
    denoise_field.change(lambda denoise: gr.Column(visible=denoise > 0), denoise_field, refinement, **QUIET)

    def by_weights(visitor: gr.Request) -> str:
        return ui_parts.weights_line(Situation.of(engine, Upscale, Upscale.model), say_to(visitor))

    tab.select(by_weights, None, weights_line, **QUIET)
    return image_field


def _foreseen(estimate: upscaling.Estimate, say: Say) -> str:
    """Put an estimate into words."""
    before, after = (f"{width} × {height}" for width, height in (estimate.before, estimate.after))
    pieces = say("in {tiles} tiles", tiles=estimate.tiles) if estimate.tiles > 1 else say("at once")
    seconds = max(1, round(estimate.seconds))
    time = say("{seconds} s", seconds=seconds) if seconds < 100 else say("{minutes} min", minutes=round(seconds / 60))
    known = say("as fast as the last one") if estimate.measured else say("a first guess for this machine")
    return say(
        "{before} becomes {after}, enlarged {pieces}: about {time}, {known}; a refinement comes on top.",
        before=before,
        after=after,
        pieces=pieces,
        time=time,
        known=known,
    )


def endpoint(engine: Engine) -> None:
    """Add the endpoint, which programs call by name."""

    def upscale(
        visitor: gr.Request,
        image: gr.FileData,
        prompt: str = Upscale.model_fields["prompt"].default,
        steps: int | None = None,
        denoise: float | None = None,
        upscaler: Upscaler = "best",
        seed: int = 0,
        weights: WeightsChoice = "auto",
    ) -> Iterator[tuple[dict | None, dict]]:
        """Enlarge a picture to exactly twice its width and height. Returns the PNG file and its parameters.

        The uploaded image has up to 2048 pixels a side. While it works it gives no file, and how far it is in place of
        the parameters.
        """
        values = {
            "image": ui_parts.uploaded(image),
            "prompt": prompt,
            "steps": steps,
            "denoise": denoise,
            "upscaler": upscaler,
            "seed": seed,
            "weights": weights,
        }
        yield from ui_parts.answer(engine, Upscale, visitor, values)

    ui_parts.publish(upscale, Upscale)
