"""The Upscale tab and the endpoint `/upscale`: a small picture becomes a large one."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import gradio as gr

from core import metadata
from core.errors import RequestError, StudioError
from core.request import UPSCALE_DENOISE, UPSCALE_STEPS, UPSCALERS, Upscale, Upscaler, WeightsChoice
from engine import Engine, mode_upscale
from web import endpoints, words
from web.fields import QUIET, REWORD_JS, Field, Seed, Update, bounds, help_line, picture_field
from web.form import Form
from web.language import Say, fixed, say_to
from web.output import Output, Stopping
from web.run import broken, carry_out
from web.situation import Situation
from web.strip import Past
from web.words import paragraph


def lay_out(engine: Engine, tab: gr.Tab, weights_line: gr.HTML) -> tuple[gr.Image, Output, Form]:
    """Lay out the tab and wire it; return the field for the picture, which other tabs may fill, its output and form.

    `weights_line` stands above all tabs and says which weights draw.
    """
    declared = Upscale.model_fields
    usual = UPSCALE_DENOISE[Situation.of(engine, Upscale, Upscale.model).kind]
    with gr.Row(elem_classes=["columns"]):
        with gr.Column(elem_id="upscale-controls", min_width=280):
            image_field = picture_field(Upscale)
            about = gr.HTML(js_on_load=REWORD_JS, elem_id="upscale-estimate", elem_classes=["status"])
            upscaler_field = gr.Radio(
                choices=[(fixed(facts.title), name) for name, facts in UPSCALERS.items()],
                value=declared["upscaler"].default,
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
                    declared["prompt"].default,
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
                    seed = Seed.lay_out(Upscale)
            start = gr.Button(
                fixed("Upscale"), variant="primary", interactive=False, elem_id="upscale-start", elem_classes=["go"]
            )
        with gr.Column(elem_id="upscale-output", min_width=280):
            compared = gr.ImageSlider(
                type="filepath",
                format="png",
                label=fixed("Before and after"),  # type: ignore[arg-type]  # Gradio translates it here too
                interactive=False,
                buttons=["fullscreen"],
                visible=False,
                elem_id="compared",
            )
            output = Output.lay_out(Upscale, words.idle("Choose a picture", "Upscale"))
            # It is shown beside what it was made from, not alone. Where it is not, its changes would not be seen.
            output.picture.visible = "hidden"

    stopping = Stopping(output)
    sources = gr.State({})  # by digest: the uploaded files that this visit's pictures were made from

    # Listeners that take the picture do so without Gradio's own reading of it, whose complaints are not sentences.
    raw = QUIET | {"preprocess": False}

    def foresee(
        image: dict[str, Any] | None, upscaler: Upscaler, denoise: float, steps: int, visitor: gr.Request
    ) -> Update:
        """Say what a picture will become, and how long that will take about."""
        say = say_to(visitor)
        shown: Update = {start: gr.Button(interactive=image is not None), about: ""}
        if image is None:
            return shown
        try:
            request = Upscale.parse(image=endpoints.uploaded(image), upscaler=upscaler, denoise=denoise, steps=steps)
            return shown | {about: paragraph(_foreseen(engine.upscale_estimate(request), say))}
        except StudioError as error:
            return shown | {about: words.failed(error, say), start: gr.Button(interactive=False)}

    def draw(
        image: dict[str, Any] | None,
        upscaler: Upscaler,
        denoise: float,
        prompt: str,
        steps: int,
        seed: float | None,
        known: dict[str, str],
        past: list[Past],
        visitor: gr.Request,
    ) -> Iterator[Update]:
        """Carry out the form, showing each event."""
        values: dict[str, Any] = {"upscaler": upscaler, "denoise": denoise, "prompt": prompt, "steps": steps}
        values["seed"] = seed
        if image is not None:
            values["image"] = endpoints.uploaded(image)
        with closing(carry_out(engine, Upscale, visitor, values)) as events:
            for update in output.follow(events, stopping.begin(visitor), past, say_to(visitor)):
                if png := update.get(output.png_file):
                    digest = metadata.read_png(Path(png)).inputs["image"]
                    update |= {sources: {**known, digest: values["image"]}}
                yield update

    def compare(picture: dict[str, Any] | None, known: dict[str, str]) -> Any:
        """Show the picture, a new one or one of the strip, beside a plain enlargement of what it was made from."""
        if picture is None:
            return gr.skip()
        after = endpoints.uploaded(picture)
        try:
            source = known[metadata.read_png(Path(after)).inputs["image"]]
            before = engine.plain_enlargement(Upscale.parse(image=source))
        except RequestError:  # swept away after a day
            return gr.skip()
        return gr.ImageSlider((before, after), visible=True)

    fields: dict[str, Field] = {
        "upscaler": upscaler_field,
        "denoise": denoise_field,
        "prompt": prompt_field,
        "steps": steps_field,
        "seed": seed.field,
    }
    run = start.click(
        draw, [image_field, *fields.values(), sources, output.strip.past], [*output.shown, sources], **raw
    )
    output.picture.change(compare, [output.picture, sources], compared, **raw)
    seed.wire(output.picture)
    run.failure(broken, None, output.status, **QUIET)
    foreseen: list[gr.Image | Field] = [image_field, upscaler_field, denoise_field, steps_field]
    changes = [field.change for field in foreseen] + [about.input]
    gr.on(changes, foresee, foreseen, [start, about], trigger_mode="always_last", **raw)
    denoise_field.change(lambda denoise: gr.Column(visible=denoise > 0), denoise_field, refinement, **QUIET)

    def by_weights(visitor: gr.Request) -> str:
        return words.weights_sentence(Situation.of(engine, Upscale, Upscale.model), say_to(visitor))

    tab.select(by_weights, None, weights_line, **QUIET)
    return image_field, output, Form.of(Upscale, fields, None, output)


def _foreseen(estimate: mode_upscale.Foreseen, say: Say) -> str:
    """Put an estimate into words."""
    before, after = (f"{width} × {height}" for width, height in (estimate.before, estimate.after))

    def pieces(count: int) -> str:
        return say("in {tiles} tiles", tiles=count) if count > 1 else say("at once")

    seconds = max(1, round(estimate.seconds))
    time = say("{seconds} s", seconds=seconds) if seconds < 100 else say("{minutes} min", minutes=round(seconds / 60))
    known = say("as fast as the last one") if estimate.measured else say("a first guess for this machine")
    values = {"before": before, "after": after, "enlarged": pieces(estimate.tiles), "time": time, "known": known}
    if not estimate.refined:
        return say("{before} becomes {after}, enlarged {enlarged}: about {time}, {known}.", **values)
    return say(
        "{before} becomes {after}, enlarged {enlarged}, refined {refined}: about {time}, {known}.",
        refined=pieces(estimate.refined),
        **values,
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
    ) -> endpoints.Answers:
        """Enlarge a picture to exactly twice its width and height. Returns the PNG file and its parameters.

        The uploaded image has up to 2048 pixels a side. While it works it gives no file, and how far it is in place of
        the parameters.
        """
        values = {
            "image": endpoints.uploaded(image),
            "prompt": prompt,
            "steps": steps,
            "denoise": denoise,
            "upscaler": upscaler,
            "seed": seed,
            "weights": weights,
        }
        yield from endpoints.stream(engine, Upscale, visitor, values)

    endpoints.publish(upscale, Upscale)
