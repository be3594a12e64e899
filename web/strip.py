"""The strip of this visit's last pictures: it is gone when the page is loaded again."""

from dataclasses import dataclass
from typing import Any

import gradio as gr
from gradio.blocks import Block

from core.request import Request
from web.language import Words, fixed

KEPT = 12  # pictures


@dataclass(frozen=True)
class Past:
    """A picture of this visit.

    Attributes:
        picture: the PNG file in Gradio's cache.
        sidecar: the file of its parameters there.
        words: what is shown about it.
        source: the image file that it was made from; empty where there was none.
        name: what a screen reader calls it: its prompt and its seed.
        seed: its seed.
        run: the press that it came of, which it may share with others.
    """

    picture: str
    sidecar: str
    words: Words
    source: str = ""
    name: str = ""
    seed: int = 0
    run: str = ""


@dataclass(frozen=True)
class Strip:
    """Small pictures in a row, the newest first."""

    gallery: gr.Gallery
    past: gr.State  # list[Past], as they lie in the strip

    @classmethod
    def lay_out(cls, mode: type[Request]) -> "Strip":
        """Make the components."""
        gallery = gr.Gallery(
            format="png",
            label=fixed("Pictures of this visit"),
            columns=6,
            height="auto",
            object_fit="cover",
            allow_preview=False,
            interactive=False,
            buttons=[],
            visible=False,
            elem_id=f"{mode.mode}-strip",
            elem_classes=["strip"],
        )
        return cls(gallery, gr.State([]))

    def show(self, past: list[Past]) -> dict[Block, Any]:
        """Return what shows the pictures; a single one is on the page anyway."""
        named = [(shown.picture, shown.name) for shown in past]
        return {self.past: past, self.gallery: gr.Gallery(named, visible=len(past) > 1)}


def siblings(past: list[Past], picture: str) -> list[Past]:
    """Return the pictures that came of the same press as a picture, that one among them, as they were drawn."""
    run = next((earlier.run for earlier in past if earlier.picture == picture), None)
    return [earlier for earlier in reversed(past) if earlier.run == run]


def joined(past: list[Past], new: Past) -> list[Past]:
    """Return the pictures that are kept with a new one at the front; the same picture drawn again moves there."""
    return [new, *(earlier for earlier in past if earlier.picture != new.picture)][:KEPT]
