"""The Text to Image tab and the endpoint `/generate`: a form, the request it becomes, and what choosing changes."""

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import gradio as gr

from core.request import LORA_STRENGTH, MODELS, Model, TextToImage, WeightsChoice
from core.sizes import ImageSizes, shape_of, shapes
from engine import Engine
from web import endpoints, words
from web.fields import COUNT, QUIET, Field, Seed, Update, bounds, count_tokens, help_line, pictures_field
from web.form import Form
from web.language import fixed, say_to
from web.lora_slot import LoraSlot
from web.output import Output, Stopping
from web.run import broken, carry_out
from web.situation import Situation
from web.strip import Past


def lay_out(engine: Engine, tab: gr.Tab, weights_line: gr.HTML) -> tuple[Output, Form]:
    """Lay out the tab and wire it; return its output and its form.

    `weights_line` stands above all tabs: which weights draw.
    """
    first: Model = TextToImage.model_fields["model"].default
    now, usual = Situation.of(engine, TextToImage, first), MODELS[first]

    with gr.Row(elem_classes=["columns"]):
        with gr.Column(elem_id="generate-controls", min_width=280):
            examples = engine.examples(now.kind)
            prompt_field = gr.Textbox(
                label=fixed("Prompt"),
                info=help_line(TextToImage, "prompt"),
                placeholder=fixed(examples[0]),
                lines=3,
                max_lines=10,
                autofocus=True,
                elem_id="prompt",
            )
            count_tokens(engine, TextToImage, prompt_field)
            samples = gr.Dataset(
                components=[prompt_field],
                samples=[[example] for example in examples],
                label=fixed("Try one of these"),
                elem_id="examples",
            )
            model_field = gr.Radio(
                choices=[(name.title(), name) for name in MODELS],
                value=first,
                label=fixed("Model"),
                info=help_line(TextToImage, "model"),
                elem_id="model",
            )
            steps_field = gr.Slider(
                *bounds(TextToImage, "steps"),
                value=usual.steps,
                step=1,
                label=fixed("Steps"),
                info=help_line(TextToImage, "steps"),
                buttons=[],
            )
            with gr.Column(visible=usual.guided, elem_id="guidance") as guidance:
                negative_field = gr.Textbox(
                    label=fixed("Negative prompt"), info=help_line(TextToImage, "negative_prompt"), lines=2
                )
                cfg_field = gr.Slider(
                    *bounds(TextToImage, "cfg"),
                    value=usual.cfg,
                    step=0.1,
                    label="CFG",
                    info=help_line(TextToImage, "cfg"),
                    buttons=[],
                )
            slot = LoraSlot.lay_out(engine, TextToImage, prompt_field, first, model_field)
            with gr.Accordion(fixed("Advanced"), open=False):
                fixed_size = gr.HTML(_fixed_size(now.sizes), visible=_is_fixed(now.sizes))
                shape_field = gr.Radio(**_shape(now.sizes), label=fixed("Shape"), elem_id="shape")
                with gr.Row(visible=not _is_fixed(now.sizes)) as free_size:
                    width_field, height_field = (
                        gr.Slider(
                            **_size(now.sizes),
                            label=fixed(side.title()),
                            info=help_line(TextToImage, side),
                            buttons=[],
                            min_width=200,
                        )
                        for side in ("width", "height")
                    )
                seed = Seed.lay_out(TextToImage)
                count_field = pictures_field()
            generate = gr.Button(fixed("Generate"), variant="primary", elem_id="generate", elem_classes=["go"])
        with gr.Column(elem_id="generate-output", min_width=280):
            output = Output.lay_out(TextToImage, words.idle("Describe a picture", "Generate"))

    stopping = Stopping(output)

    def by_weights(chosen: Model, width: int, height: int, visitor: gr.Request) -> Update:
        """What depends on which weights draw; they may have arrived since the server started."""
        now, say = Situation.of(engine, TextToImage, chosen), say_to(visitor)
        return {
            weights_line: words.weights_sentence(now, say),
            shape_field: gr.Radio(**_shape(now.sizes, width, height)),
            samples: gr.Dataset(samples=[[say(example)] for example in engine.examples(now.kind)]),
            fixed_size: gr.HTML(_fixed_size(now.sizes), visible=_is_fixed(now.sizes)),
            free_size: gr.Row(visible=not _is_fixed(now.sizes)),
            width_field: gr.Slider(**_size(now.sizes, width)),
            height_field: gr.Slider(**_size(now.sizes, height)),
        }

    def by_model(chosen: Model, width: int, height: int, visitor: gr.Request) -> Update:
        """What choosing a model changes."""
        usual = MODELS[chosen]
        moved = {steps_field: usual.steps, cfg_field: usual.cfg, guidance: gr.Column(visible=usual.guided)}
        return moved | by_weights(chosen, width, height, visitor)

    def by_shape(shape: str, chosen: Model) -> tuple[int, int]:
        """What choosing a shape sets."""
        return shapes(Situation.of(engine, TextToImage, chosen).sizes)[shape]

    def follow(taken: dict[str, Any]) -> tuple[Update, dict[str, str]]:
        """What values that come from outside change besides, and which of them these weights cannot draw."""
        sizes = Situation.of(engine, TextToImage, taken.get("model", first)).sizes
        wrong = [side for side in ("width", "height") if side in taken and taken[side] != sizes.nearest(taken[side])]
        refused: dict[str, str] = {side: str(taken.pop(side)) for side in wrong}
        if "model" not in taken:
            return {}, refused
        usual = MODELS[taken["model"]]
        taken.setdefault("steps", usual.steps)
        taken.setdefault("cfg", usual.cfg)
        return {guidance: gr.Column(visible=usual.guided)}, refused

    def draw(
        prompt: str,
        model: Model,
        negative_prompt: str,
        steps: int,
        cfg: float,
        width: int,
        height: int,
        seed: float | None,
        count: int,
        use_lora: bool,
        lora: str | None,
        lora_strength: float,
        past: list[Past],
        visitor: gr.Request,
    ) -> Iterator[Update]:
        """Carry out the form, showing each event."""
        fields: dict[str, Any] = {"prompt": prompt, "model": model, "steps": steps, "width": width, "height": height}
        fields |= {"seed": seed, **slot.fields(use_lora, lora, lora_strength)}
        if MODELS[model].guided:  # the other model's form still holds what was typed before it was chosen
            fields.update(negative_prompt=negative_prompt, cfg=cfg)
        with closing(carry_out(engine, TextToImage, visitor, fields, count)) as events:
            yield from output.follow(events, stopping.begin(visitor), past, say_to(visitor), count)

    fields: dict[str, Field] = {
        "prompt": prompt_field,
        "model": model_field,
        "negative_prompt": negative_field,
        "steps": steps_field,
        "cfg": cfg_field,
        "width": width_field,
        "height": height_field,
        "seed": seed.field,
        COUNT: count_field,
    }
    situation = [model_field, width_field, height_field]
    of_weights = [weights_line, samples, shape_field, fixed_size, free_size, width_field, height_field]
    of_model = [steps_field, cfg_field, guidance, *of_weights]
    refresh = by_weights, situation, of_weights
    form = Form.of(TextToImage, fields, slot, output, also=[guidance], refresh=refresh, follow=follow)

    run = generate.click(draw, [*fields.values(), *slot.inputs, output.strip.past], output.shown, **QUIET)
    run.failure(broken, None, output.status, **QUIET)
    seed.wire(output.picture)
    shape_field.input(by_shape, [shape_field, model_field], [width_field, height_field], **QUIET)
    for side in (width_field, height_field):
        side.change(
            lambda width, height, model: shape_of(width, height, Situation.of(engine, TextToImage, model).sizes),
            [width_field, height_field, model_field],
            shape_field,
            **QUIET,
        )
    samples.click(lambda sample: sample[0], samples, prompt_field, **QUIET)
    model_field.input(by_model, situation, of_model, **QUIET)
    tab.select(by_weights, situation, of_weights, **QUIET)
    return output, form


def endpoint(engine: Engine) -> None:
    """Add the endpoint, which programs call by name."""

    def generate(
        visitor: gr.Request,
        prompt: str,
        model: Model = "turbo",
        negative_prompt: str = "",
        steps: int | None = None,
        cfg: float | None = None,
        width: int | None = None,
        height: int | None = None,
        seed: int = 0,
        lora: gr.FileData | None = None,
        lora_strength: float = LORA_STRENGTH,
        weights: WeightsChoice = "auto",
    ) -> endpoints.Answers:
        """Draw a picture from a prompt. Returns the PNG file and its parameters.

        While it works it gives no file, and how far it is in place of the parameters. What is left out takes the usual
        value for the model and the weights in use; seed 0 picks one at random. A LoRA is an uploaded file.
        """
        fields = {
            "prompt": prompt,
            "model": model,
            "negative_prompt": negative_prompt,
            "steps": steps,
            "cfg": cfg,
            "width": width,
            "height": height,
            "seed": seed,
            "lora": "" if lora is None else endpoints.uploaded(lora, "lora"),
            "lora_strength": lora_strength,
            "weights": weights,
        }
        yield from endpoints.stream(engine, TextToImage, visitor, fields)

    endpoints.publish(generate, TextToImage)


def _size(sizes: ImageSizes, wanted: int = 0) -> dict[str, Any]:
    """Return what a slider for a width or a height is made of; what was wanted stays where it is possible."""
    return {
        "minimum": min(sizes.minimum, sizes.maximum - sizes.step),  # a slider has a range even when it is not shown
        "maximum": sizes.maximum,
        "step": sizes.step,
        "value": wanted if wanted == sizes.nearest(wanted) else sizes.native,
    }


def _shape(sizes: ImageSizes, width: int = 0, height: int = 0) -> dict[str, Any]:
    """Return what the choice of a shape is made of; there is nothing to choose where only one is possible."""
    possible = shapes(sizes)
    chosen = shape_of(width or sizes.native, height or sizes.native, sizes)
    return {"choices": list(possible), "value": chosen, "visible": len(possible) > 1}


def _is_fixed(sizes: ImageSizes) -> bool:
    return sizes.minimum == sizes.maximum


def _fixed_size(sizes: ImageSizes) -> str:
    return f'<p class="hint">{fixed(f"Width and height: {sizes}.")}</p>'
