"""The drawer: what a first picture does not need, folded away; closed, its one line says what is set."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.blocks import Block

from web.fields import COUNT, QUIET, Fields, Update
from web.language import Say, fixed

RANDOM = (None, 0, -1)  # what a form's seed holds when the request picks one


@dataclass(frozen=True)
class Drawer:
    """The components.

    Attributes:
        place: what is folded; its label says what is set.
        chip: a fixed seed, also while the drawer is closed; a press makes it random again.
    """

    place: gr.Accordion
    chip: gr.Button

    @classmethod
    @contextmanager
    def lay_out(cls, fields: Fields, visible: bool = True) -> Iterator["Drawer"]:
        """Make the components where a bar stands now; inside the block, its fields are laid out.

        Args:
            fields: the form's fields; the seed is among those that the block makes.
            visible: whether there is something to set.
        """
        chip = gr.Button(visible=False, size="sm", elem_classes=["chip"])
        with gr.Accordion(fixed("Settings"), open=False, visible=visible, elem_classes=["drawer"]) as place:
            yield cls(place, chip)
        chip.click(None, None, fields["seed"], js="() => 0", **QUIET)

    @property
    def shown(self) -> list[Block]:
        """What `sum_up` changes."""
        return [self.place, self.chip]

    def sum_up(self, values: Mapping[str, Any], say: Say) -> Update:
        """Return what says what is set, given a form's values as they are, unchecked."""
        told: Update = {self.place: gr.Accordion(label=summary(values, say)), self.chip: gr.Button(visible=False)}
        if values.get("seed") not in RANDOM and values.get("denoise") != 0:
            told[self.chip] = gr.Button(f"{say('seed {seed}', seed=values['seed'])} ×", visible=True)
        return told


def summary(values: Mapping[str, Any], say: Say) -> str:
    """Return what is set, in a line: "Turbo, 8 steps, 1024 × 1024, seed random". A fixed seed is the chip's to say."""
    said = []
    if model := values.get("model"):
        said.append(str(model).title())
    if name := values.get("checkpoint"):
        said.append(Path(name).stem)
    if steps := values.get("steps"):
        said.append(say("1 step") if steps == 1 else say("{steps} steps", steps=steps))
    if values.get("width") and values.get("height"):
        said.append(f"{values['width']} × {values['height']}")
    if "scale" in values:
        said.append(say("scale {scale}", scale=values["scale"]))
    if name := values.get("lora"):
        said.append(f"LoRA {Path(name).stem} {values['lora_strength']}")
    if values.get(COUNT, 1) != 1:
        said.append(say("{count} pictures", count=values[COUNT]))
    if values.get("seed") in RANDOM:
        said.append(say("seed random"))
    return ", ".join(said)
