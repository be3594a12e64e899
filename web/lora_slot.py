"""The "Use a LoRA" part of a form: a file, its strength, what the file is, and the words that trigger it.

A tab that takes a LoRA calls `LoraSlot.lay_out` once, adds `slot.inputs` to its form, and gives what they hold to
`slot.fields`.
"""

from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.blocks import Block

from core.errors import RequestError
from core.request import MODELS, Model, Request
from core.sizes import WeightsKind
from engine import Engine
from engine.drawing import lora_report
from web.endpoints import uploaded
from web.fields import QUIET, REWORD_JS, Field, Fields, Update, help_line
from web.language import Say, fixed, say_to
from web.situation import Situation
from web.words import failed

USUAL = {"minimum": 0, "maximum": 1.5}  # what the slider reaches; the number beside it takes all that is possible
# Gradio's slider takes a number back into its range, so it has none of its own here.
TO_SLIDER_JS = f"value => Math.min({USUAL['maximum']}, Math.max({USUAL['minimum']}, value ?? 0))"
SLOT_HEIGHT = 92  # pixels; Gradio's own drop zone is 400 tall


@dataclass(frozen=True)
class LoraSlot:
    """The components; `strength` is the number, which a slider follows where it reaches."""

    use: gr.Checkbox
    file: gr.File
    strength: Field
    about: gr.HTML
    words: gr.Dataset

    @classmethod
    def lay_out(
        cls,
        engine: Engine,
        mode: type[Request],
        prompt: Field,
        situation: gr.State,
        choice: Field | None = None,
    ) -> "LoraSlot":
        """Make the components where a form stands now, and wire them.

        Args:
            engine: says what a file is.
            mode: the mode's request, with the fields `lora` and `lora_strength`.
            prompt: the prompt's field, which a trigger word is added to.
            situation: the tab's `Situation`, by which a file has to fit.
            choice: the field that chooses another one, where there is one.
        """
        use = gr.Checkbox(False, label=fixed("Use a LoRA"), elem_classes=["use-lora"])
        with gr.Column(visible=False, elem_classes=["lora"]) as inside:
            file = gr.File(
                file_types=[".safetensors"],
                type="filepath",
                height=SLOT_HEIGHT,
                **_label(mode.usual_model()),
                elem_classes=["lora-file"],
            )
            hint = f'<p class="hint">{help_line(mode, "lora")}</p>'
            about = gr.HTML(hint, js_on_load=REWORD_JS, elem_classes=["lora-about"])
            words = gr.Dataset(
                components=[prompt],
                samples=[],
                label=fixed("Trigger words"),
                visible=False,
                elem_classes=["trigger-words"],
            )
            with gr.Row(elem_classes=["lora-strength"]):
                slider = Fields(mode).add("lora_strength", **USUAL, min_width=200)
                strength = gr.Number(
                    mode.model_fields["lora_strength"].default,
                    label=fixed("As a number"),
                    info=fixed("Up to 5, or down to -5."),
                    step=0.05,
                    min_width=110,
                )
        slider.input(None, slider, strength, js="value => value", **QUIET)
        strength.change(None, strength, slider, js=TO_SLIDER_JS, **QUIET)
        slot = cls(use, file, strength, about, words)

        def look(path: str | None, situation: Situation, visitor: gr.Request) -> Update:
            return slot._looked_at(engine, mode, path, situation.kind, say_to(visitor))

        use.change(lambda on: gr.Column(visible=on), use, inside, **QUIET)
        gr.on([file.change, about.input], look, [file, situation], [about, words], **QUIET)
        words.click(_with_word, [prompt, words], prompt, **QUIET)
        if choice is not None:
            choice.input(lambda chosen: gr.File(**_label(chosen)), choice, file, **QUIET)
            situation.change(look, [file, situation], [about, words], **QUIET)
        return slot

    @property
    def inputs(self) -> list[Block]:
        """What a form adds to its inputs; `fields` takes their values in this order."""
        return [self.use, self.file, self.strength]

    @staticmethod
    def fields(use: bool, file: dict[str, Any] | None, strength: float) -> dict[str, Any]:
        """Return the request's fields for what the components hold, as a listener without preprocessing gets it."""
        return {"lora": uploaded(file, "lora"), "lora_strength": strength} if use and file is not None else {}

    def _looked_at(self, engine: Engine, mode: type[Request], path: str | None, kind: WeightsKind, say: Say) -> Update:
        """Return what shows what a file is, or why it cannot be used, by its header alone."""
        found: tuple[str, ...]
        if path is None:
            shown, found = f'<p class="hint">{help_line(mode, "lora")}</p>', ()
        else:
            try:
                report = lora_report(Path(path))
                report.check_fits(kind)
                shown, found = _described(report, say), report.trigger_words
            except RequestError as error:
                shown, found = failed(error, say), ()
        return {self.about: shown, self.words: gr.Dataset(samples=[[word] for word in found], visible=bool(found))}


def _label(model: Model) -> dict[str, Any]:
    return {"label": fixed(f"LoRA for {MODELS[model].title}")}


def _described(report: Any, say: Say) -> str:
    line = say(
        "{used} of {layers} layers matched, rank {rank}, trained on {base}",
        used=report.used,
        layers=report.layers,
        rank=report.facts()["rank"],
        base=MODELS[report.base].title if report.base else say("unknown"),
    )
    title = f"<b>{escape(report.title)}</b> " if report.title else ""
    notes = "".join(f'<p class="note">{escape(say(warning))}</p>' for warning in report.warnings())
    return f"<p>{title}<span>{escape(line)}</span></p>{notes}"


def _with_word(prompt: str, chosen: list[str]) -> str:
    """Return a prompt with a trigger word in it, once."""
    word = chosen[0]
    if word.casefold() in prompt.casefold():
        return prompt
    return f"{prompt.rstrip().rstrip(',')}, {word}" if prompt.strip() else word
