"""The Text to Image tab and the endpoint `/generate`: a form, the request it becomes, and what choosing changes."""

from collections.abc import Iterator
from contextlib import closing
from html import escape
from typing import Any

import gradio as gr

import ui_parts
from engine import Engine
from request import LORA_STRENGTH, MODELS, Model, Sizes, TextToImage, WeightsChoice
from ui_lora import LoraSlot
from ui_parts import KEPT, QUIET, Output, Situation, Stopping, Update, bounds, help_line, said


def lay_out(engine: Engine, page: gr.Blocks, tab: gr.Tab, weights_line: gr.HTML) -> Output:
    """Lay out the tab and wire it; return its output. `weights_line` stands above all tabs: which weights draw."""
    first: Model = TextToImage.model_fields["model"].default
    now, usual = Situation.of(engine, TextToImage, first), MODELS[first]

    with gr.Row(elem_classes=["columns"]):
        with gr.Column(elem_id="generate-controls", min_width=280):
            examples = engine.examples(now.kind)
            prompt_field = gr.Textbox(
                label="Prompt",
                info=help_line(TextToImage, "prompt"),
                placeholder=examples[0],
                lines=3,
                max_lines=10,
                autofocus=True,
                elem_id="prompt",
            )
            samples = gr.Dataset(
                components=[prompt_field],
                samples=[[example] for example in examples],
                label="Try one of these",
                elem_id="examples",
            )
            model_field = gr.Radio(
                choices=[(name.title(), name) for name in MODELS],
                value=first,
                label="Model",
                info=help_line(TextToImage, "model"),
                elem_id="model",
            )
            steps_field = gr.Slider(
                *bounds(TextToImage, "steps"),
                value=usual.steps,
                step=1,
                label="Steps",
                info=help_line(TextToImage, "steps"),
                buttons=[],
            )
            with gr.Column(visible=usual.guided, elem_id="guidance") as guidance:
                negative_field = gr.Textbox(
                    label="Negative prompt", info=help_line(TextToImage, "negative_prompt"), lines=2
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
            with gr.Accordion("Advanced", open=False):
                fixed_size = gr.HTML(_fixed_size(now.sizes), visible=_is_fixed(now.sizes))
                with gr.Row(visible=not _is_fixed(now.sizes)) as free_size:
                    width_field, height_field = (
                        gr.Slider(
                            **_size(now.sizes),
                            label=side.title(),
                            info=help_line(TextToImage, side),
                            buttons=[],
                            min_width=200,
                        )
                        for side in ("width", "height")
                    )
                # Without a range of its own: the request checks it, and its sentence is better than Gradio's.
                seed_field = gr.Number(
                    TextToImage.model_fields["seed"].default, label="Seed", info=help_line(TextToImage, "seed")
                )
            generate = gr.Button("Generate", variant="primary", elem_id="generate", elem_classes=["go"])
        with gr.Column(elem_id="generate-output", min_width=280):
            output = Output.lay_out(TextToImage, ui_parts.idle("Describe a picture", "Generate"))

    stopping = Stopping(output)

    def by_weights(chosen: Model, width: int, height: int) -> Update:
        """What depends on which weights draw; they may have arrived since the server started."""
        now = Situation.of(engine, TextToImage, chosen)
        return {
            weights_line: ui_parts.weights_line(now),
            samples: gr.Dataset(samples=[[example] for example in engine.examples(now.kind)]),
            fixed_size: gr.HTML(_fixed_size(now.sizes), visible=_is_fixed(now.sizes)),
            free_size: gr.Row(visible=not _is_fixed(now.sizes)),
            width_field: gr.Slider(**_size(now.sizes, width)),
            height_field: gr.Slider(**_size(now.sizes, height)),
        }

    def by_model(chosen: Model, width: int, height: int) -> Update:
        """What choosing a model changes."""
        usual = MODELS[chosen]
        moved = {steps_field: usual.steps, cfg_field: usual.cfg, guidance: gr.Column(visible=usual.guided)}
        return moved | by_weights(chosen, width, height)

    def draw(
        prompt: str,
        model: Model,
        negative_prompt: str,
        steps: int,
        cfg: float,
        width: int,
        height: int,
        seed: float | None,
        use_lora: bool,
        lora: str | None,
        lora_strength: float,
        visitor: gr.Request,
    ) -> Iterator[Update]:
        """Carry out the form, showing each event."""
        fields: dict[str, Any] = {"prompt": prompt, "model": model, "steps": steps, "width": width, "height": height}
        fields |= {"seed": seed, **slot.fields(use_lora, lora, lora_strength)}
        if MODELS[model].guided:  # the other model's form still holds what was typed before it was chosen
            fields.update(negative_prompt=negative_prompt, cfg=cfg)
        with closing(ui_parts.run(engine, TextToImage, visitor, fields)) as events:
            yield from output.follow(events, stopping.begin(visitor))

    form = [prompt_field, model_field, negative_field, steps_field, cfg_field, width_field, height_field, seed_field]
    form += slot.inputs
    situation = [model_field, width_field, height_field]
    of_weights = [weights_line, samples, fixed_size, free_size, width_field, height_field]
    of_model = [steps_field, cfg_field, guidance, *of_weights]

    run = generate.click(draw, form, output.shown, **QUIET)
    run.failure(lambda: said(f"That did not work; the server's log says why. {KEPT}"), None, output.status, **QUIET)
    samples.click(lambda sample: sample[0], samples, prompt_field, **QUIET)
    model_field.input(by_model, situation, of_model, **QUIET)
    page.load(by_weights, situation, of_weights, **QUIET)
    tab.select(by_weights, situation, of_weights, **QUIET)
    return output


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
    ) -> Iterator[tuple[dict | None, dict]]:
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
            "lora": "" if lora is None else ui_parts.uploaded(lora, "lora"),
            "lora_strength": lora_strength,
            "weights": weights,
        }
        yield from ui_parts.answer(engine, TextToImage, visitor, fields)

    ui_parts.publish(generate, TextToImage)


def _size(sizes: Sizes, wanted: int = 0) -> dict[str, Any]:
    """Return what a slider for a width or a height is made of; what was wanted stays where it is possible."""
    return {
        "minimum": min(sizes.minimum, sizes.maximum - sizes.step),  # a slider has a range even when it is not shown
        "maximum": sizes.maximum,
        "step": sizes.step,
        "value": wanted if wanted == sizes.nearest(wanted) else sizes.native,
    }


def _is_fixed(sizes: Sizes) -> bool:
    return sizes.minimum == sizes.maximum


def _fixed_size(sizes: Sizes) -> str:
    return f'<p class="hint">Width and height: {escape(str(sizes))}.</p>'
