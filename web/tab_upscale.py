"""The Upscale tab and the endpoint `/upscale`: a small picture becomes a large one."""

from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from core.errors import RequestError, StudioError
from core.request import UPSCALE_DENOISE, UPSCALE_MAX, UPSCALE_STEPS, UPSCALERS, Upscale
from engine import Engine, mode_upscale
from web import endpoints, words
from web.drawer import Drawer
from web.fields import REWORD_JS, Fields, Inputs, Update, image_field, named_for, titles
from web.form import RAW, Form, seen_on_opening
from web.language import Say, fixed, say_to
from web.output import Output
from web.strip import Past
from web.words import paragraph

DESCRIPTION = """Enlarge a picture to exactly twice its width and height. Returns the PNG file and its parameters.

The uploaded image has up to 2048 pixels a side. While it works it gives no file, and how far it is in place of
the parameters.
"""

# Where the prompt stays in its place and means nothing.
PLAIN = f"<p>{fixed('Denoise is 0: nothing is drawn again, and no prompt is needed.')}</p>"


def lay_out(engine: Engine, tab: gr.Tab, weights_line: gr.HTML) -> Form:
    """Lay out the tab and wire it; return its form.

    `weights_line` stands above all tabs: which weights draw.
    """
    usual = UPSCALE_DENOISE[seen_on_opening(engine, Upscale, tab, weights_line).value.kind]
    fields = Fields(Upscale)
    with gr.Row(elem_classes=["columns"]):
        with gr.Column(**named_for(Upscale, "side"), min_width=0):
            image = image_field(Upscale)
            about = gr.HTML(js_on_load=REWORD_JS, elem_id="upscale-estimate", elem_classes=["status"])
            fields.add("upscaler", choices=titles(UPSCALERS), elem_id="upscaler")
            fields.add("denoise", value=usual, step=0.01, elem_id="denoise")
        with gr.Column(**named_for(Upscale, "controls"), min_width=0):
            # Prompt, steps and seed mean nothing to a picture that is not refined.
            fields.add_prompt("upscale-prompt", interactive=usual > 0)
            with gr.Row(elem_classes=["line"]):
                with Drawer.lay_out(fields, visible=usual > 0) as drawer:
                    fields.add("steps", value=UPSCALE_STEPS)
                    fields.add_seed()
                plain = gr.HTML(PLAIN, visible=usual == 0, elem_classes=["tokens"])
            start = gr.Button(
                fixed("Upscale"), variant="primary", interactive=False, elem_id="upscale-start", elem_classes=["go"]
            )
        with gr.Column(**named_for(Upscale, "output"), min_width=0):
            output = Output.lay_out(Upscale, words.idle("Choose a picture", "Upscale"))
        with output.stage:
            compared = gr.ImageSlider(
                type="filepath",
                format="png",
                label=fixed("Before and after"),  # type: ignore[arg-type]  # Gradio translates it here too
                interactive=False,
                buttons=[],
                max_height=UPSCALE_MAX,
                visible=False,
                elem_id="compared",
            )
        # It is shown beside what it was made from, not alone. Where it is not, its changes would not be seen.
        output.picture.visible = "hidden"
        with output.others:
            gr.Button(fixed("View"), size="sm", elem_classes=["view"])  # web/assets/page.js does it

    form = Form.of(Upscale, fields, output, image=image, drawer=drawer)

    def foresee(inputs: Inputs, visitor: gr.Request) -> Update:
        """Show what a picture will become, and about how long that will take."""
        say, chosen = say_to(visitor), inputs[image] is not None
        shown: Update = {start: gr.Button(interactive=chosen), about: ""}
        if not chosen:
            return shown
        try:
            request = Upscale.parse(**form.values(inputs))
            return shown | {about: paragraph(_foreseen(engine.foresee(request), say))}
        except StudioError as error:
            return shown | {about: words.failed(error, say), start: gr.Button(interactive=False)}

    def compare(picture: dict[str, Any] | None, past: list[Past]) -> Any:
        """Show the picture, a new one or one of the strip, beside a plain enlargement of what it was made from."""
        after = "" if picture is None else endpoints.uploaded(picture)
        source = next((earlier.source for earlier in past if earlier.picture == after), "")
        if not source:
            return gr.skip()
        try:
            before = mode_upscale.plain_file(Path(source))
        except RequestError:  # swept away after an hour
            return gr.skip()
        return gr.ImageSlider((before, after), visible=True)

    form.draws_on(start, engine)
    form.sum_up(tab)
    output.picture.change(compare, [output.picture, output.strip.past], compared, **RAW)
    foreseen = [image, *(fields[name] for name in ("upscaler", "denoise", "steps"))]
    changes = [*(field.change for field in foreseen), about.input]
    gr.on(changes, foresee, set(foreseen), [start, about], trigger_mode="always_last", **RAW)
    refined = [fields["prompt"], drawer.place, plain]
    fields["denoise"].change(_refinement, fields["denoise"], refined, **RAW)
    return form


def _refinement(denoise: float | None) -> tuple[gr.Textbox, gr.Accordion, gr.HTML]:
    """Return the prompt and the drawer as a refinement, or none, takes them, and what is said where there is none."""
    refined = denoise is None or denoise > 0  # a field that was emptied means the usual
    return gr.Textbox(interactive=refined), gr.Accordion(visible=refined), gr.HTML(visible=not refined)


def _foreseen(estimate: mode_upscale.Foreseen, say: Say) -> str:
    """Return an estimate in words."""
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
    endpoints.publish(Upscale, DESCRIPTION, partial(endpoints.stream, engine, Upscale))
