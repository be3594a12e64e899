"""The strip of this visit's last pictures: it is gone when the page is loaded anew. Knows nothing of runs."""

from pathlib import Path

import gradio as gr

import metadata
from errors import RequestError
from language import fixed, say_to
from request import Request
from ui_parts import QUIET, Output, Update, Words, said

KEPT = 12  # pictures


def lay_out(mode: type[Request], output: Output) -> gr.Gallery:
    """Lay out the strip under an output, and wire it: each new picture joins it, and a press shows one again."""
    past = gr.State([])
    strip = gr.Gallery(
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

    def add(picture: dict | None, sidecar: dict | str | None, words: Words | None, kept: list) -> Update:
        """Put a picture that is new to the strip at its front."""
        if picture is None or any(picture["path"] == one["picture"] for one in kept):
            return {past: kept}
        # Of several pictures only the last one's facts were said; the others have their names.
        words = words or (lambda say: said(Path(picture["path"]).stem))
        kept = [{"picture": picture["path"], "sidecar": _path(sidecar), "words": words}, *kept][:KEPT]
        return {past: kept, strip: gr.Gallery([one["picture"] for one in kept], visible=len(kept) > 1)}

    def show(event: gr.SelectData, kept: list, visitor: gr.Request) -> Update:
        """Show an earlier picture, as it was shown when it was new."""
        one = kept[event.index]
        path = Path(one["picture"])
        try:
            prompt = metadata.read_png(path).values["prompt"]
        except RequestError:  # swept away after a day
            return {output.status: gr.skip()}
        return output.finished(one["picture"], one["sidecar"], prompt) | output.tell(one["words"], say_to(visitor))

    output.picture.change(
        add,
        [output.picture, output.json_file, output.words, past],
        [past, strip],
        trigger_mode="multiple",
        preprocess=False,
        concurrency_limit=1,  # two at once would each leave the other's picture out
        **QUIET,
    )
    strip.select(show, past, output.shown, **QUIET)
    return strip


def _path(file: dict | str | None) -> str:
    return file["path"] if isinstance(file, dict) else str(file)
