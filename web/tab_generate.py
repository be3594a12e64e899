"""The Text to Image tab and the endpoint `/generate`: a form, the request it becomes, and what choosing changes."""

from functools import partial
from typing import Any

import gradio as gr

from core.request import MODELS, Model, TextToImage
from core.sizes import ImageSizes, shape_of, shapes
from engine import Engine
from hub import fine_tunes
from web import endpoints, enlarged, examples, words
from web.drawer import Drawer
from web.fields import Fields, Update, checkpoints, count_tokens, named_for
from web.form import RAW, Form
from web.language import fixed, say_to
from web.lora_slot import LoraSlot
from web.output import Output
from web.situation import Situation

DESCRIPTION = """Draw a picture from a prompt. Returns the PNG file and its parameters.

While it works it gives no file, and how far it is in place of the parameters. What is left out takes the usual
value for the model and the weights in use; seed 0 picks one at random. A LoRA is an uploaded file.
"""


def lay_out(engine: Engine, tab: gr.Tab, weights_line: gr.HTML) -> Form:
    """Lay out the tab and wire it; return its form.

    `weights_line` stands above all tabs: which weights draw.
    """
    first = TextToImage.usual_model()
    now, usual = Situation.of(engine, TextToImage, first), MODELS[first]
    situation, fields = gr.State(now), Fields(TextToImage)

    with gr.Row(elem_classes=["columns"]):
        with gr.Column(**named_for(TextToImage, "controls"), min_width=0):
            fields.add_prompt("prompt", autofocus=True, placeholder=fixed("Describe a picture"))
            fields.add("model", elem_id="model", elem_classes=["model"])
            with gr.Row(elem_classes=["line"]):
                with Drawer.lay_out(fields) as drawer:
                    fields.add("steps", value=usual.steps)
                    with gr.Column(visible=usual.guided, elem_id="guidance") as guidance:
                        fields.add("negative_prompt", lines=2)
                        fields.add("cfg", value=usual.cfg, step=0.1)
                    fixed_size = gr.HTML(_fixed_size(now.sizes), visible=_is_fixed(now.sizes))
                    shape = gr.Radio(**_shape(now.sizes), label=fixed("Shape"), elem_id="shape")
                    with gr.Row(visible=not _is_fixed(now.sizes)) as free_size:
                        sides = [fields.add(side, **_size(now.sizes), min_width=120) for side in ("width", "height")]
                    fields.add_seed()
                    fields.add("variety")
                    fields.add_checkpoint()
                    fields.add_count()
                    slot = LoraSlot.lay_out(engine, TextToImage, fields["prompt"], situation, fields["model"])
                count_tokens(fields["prompt"], situation)
            generate = gr.Button(fixed("Generate"), variant="primary", elem_id="generate", elem_classes=["go"])
        with gr.Column(**named_for(TextToImage, "output"), min_width=0):
            output = Output.lay_out(TextToImage, words.idle("Describe a picture", "Generate"))
        with output.stage:
            large = enlarged.lay_out(TextToImage)
            shelf = examples.lay_out(now.kind)

    def by_weights(chosen: Model, width: int, height: int, checkpoint: str, visitor: gr.Request) -> Update:
        """What depends on which weights draw; they may have arrived since the server started."""
        own = checkpoints(checkpoint)
        now, say = Situation.of(engine, TextToImage, chosen, own["value"]), say_to(visitor)
        return {
            situation: now,
            fields["checkpoint"]: gr.Dropdown(**own),
            weights_line: words.weights_sentence(now, say),
            shape: gr.Radio(**_shape(now.sizes, width, height)),
            shelf: examples.shown(now.kind, say),
            fixed_size: gr.HTML(_fixed_size(now.sizes), visible=_is_fixed(now.sizes)),
            free_size: gr.Row(visible=not _is_fixed(now.sizes)),
            fields["width"]: gr.Slider(**_size(now.sizes, width)),
            fields["height"]: gr.Slider(**_size(now.sizes, height)),
        }

    def by_model(chosen: Model, width: int, height: int, checkpoint: str, visitor: gr.Request) -> Update:
        """What choosing a model changes."""
        usual = MODELS[chosen]
        moved = {fields["steps"]: usual.steps, fields["cfg"]: usual.cfg, guidance: gr.Column(visible=usual.guided)}
        return moved | by_weights(chosen, width, height, checkpoint, visitor)

    def by_checkpoint(chosen: Model, width: int, height: int, checkpoint: str, visitor: gr.Request) -> Update:
        """What choosing a checkpoint changes: also the model, where it says which it was made of."""
        tune = fine_tunes.found().get(checkpoint)
        made_of = tune.model if tune else None
        if made_of in (None, chosen):
            return by_weights(chosen, width, height, checkpoint, visitor)
        return {fields["model"]: made_of} | by_model(made_of, width, height, checkpoint, visitor)

    def follow(taken: dict[str, Any]) -> tuple[Update, dict[str, str]]:
        """What values that come from outside change besides, and which of them these weights cannot draw."""
        sizes = Situation.of(engine, TextToImage, taken.get("model", first), taken.get("checkpoint", "")).sizes
        wrong = [side for side in ("width", "height") if side in taken and taken[side] != sizes.nearest(taken[side])]
        refused: dict[str, str] = {side: str(taken.pop(side)) for side in wrong}
        if "model" not in taken:
            return {}, refused
        usual = MODELS[taken["model"]]
        taken.setdefault("steps", usual.steps)
        taken.setdefault("cfg", usual.cfg)
        return {guidance: gr.Column(visible=usual.guided)}, refused

    seen = [fields["model"], *sides, fields["checkpoint"]]
    of_weights = [situation, weights_line, shelf, shape, fixed_size, free_size, *sides, fields["checkpoint"]]
    refresh = by_weights, seen, of_weights
    parts = {"slot": slot, "drawer": drawer, "used": _used, "also": [guidance], "refresh": refresh, "follow": follow}
    form = Form.of(TextToImage, fields, output, **parts)

    filled = examples.wire(shelf, fields["prompt"], situation), form.more_like_this()
    runs = form.draws_on(generate, engine, *filled)
    enlarged.wire(engine, large, output, runs)
    form.sum_up(tab)
    shape.input(lambda chosen, now: shapes(now.sizes)[chosen], [shape, situation], sides, **RAW)
    for side in sides:
        side.change(
            lambda width, height, now: shape_of(width or 0, height or 0, now.sizes), [*sides, situation], shape, **RAW
        )
    of_model = [fields["steps"], fields["cfg"], guidance, *of_weights]
    fields["model"].input(by_model, seen, of_model, **RAW)
    fields["checkpoint"].input(by_checkpoint, seen, [fields["model"], *of_model], **RAW)
    tab.select(by_weights, seen, of_weights, **RAW)
    return form


def endpoint(engine: Engine) -> None:
    """Add the endpoint, which programs call by name."""
    endpoints.publish(TextToImage, DESCRIPTION, partial(endpoints.stream, engine, TextToImage))


def _used(values: dict[str, Any]) -> dict[str, Any]:
    """Return the values that mean something to the model: the other model's stay in the form where they were typed."""
    unguided = () if MODELS[values["model"]].guided else ("negative_prompt", "cfg")
    return {name: value for name, value in values.items() if name not in unguided}


def _size(sizes: ImageSizes, wanted: int | None = None) -> dict[str, Any]:
    """Return what a slider for a width or a height is made of; what was wanted stays where it is possible."""
    return {
        "minimum": min(sizes.minimum, sizes.maximum - sizes.step),  # a slider has a range even when it is not shown
        "maximum": sizes.maximum,
        "step": sizes.step,
        "value": wanted if wanted and wanted == sizes.nearest(wanted) else sizes.native,
    }


def _shape(sizes: ImageSizes, width: int | None = None, height: int | None = None) -> dict[str, Any]:
    """Return what the choice of a shape is made of; there is nothing to choose where only one is possible."""
    possible = shapes(sizes)
    chosen = shape_of(width or sizes.native, height or sizes.native, sizes)
    return {"choices": list(possible), "value": chosen, "visible": len(possible) > 1}


def _shape_now(width: int | None, height: int | None, now: Situation) -> str | None:
    return shape_of(width or 0, height or 0, now.sizes)


def _is_fixed(sizes: ImageSizes) -> bool:
    return sizes.minimum == sizes.maximum


def _fixed_size(sizes: ImageSizes) -> str:
    return f'<p class="hint">{fixed(f"Width and height: {sizes}.")}</p>'
